"""Reciprocal lattice points that have no reflection.

In a centred lattice the reflections h with

    exp(2πi h·t) ≠ 1  for any centring translation t

are absent everywhere, so that there is no peak to leave out: half to three quarters of
the lattice points. Screw axes and glide planes make absent only reflections on lines and
planes of reciprocal space. The ellipsoid about those points is excluded all the same:
they are few, and multiple scattering may put intensity there.
"""

from __future__ import annotations

import numpy as np

from cctbx import sgtbx

from dials_diffuse.util.compat import miller_index_from_numpy

TWELFTHS = 12  # all centring translations are multiples of a twelfth of the cell edges


def centring_translations(group: sgtbx.space_group) -> np.ndarray:
    """Centring translations of a space group, without the one of no length.

    Returns:
        int32 array of shape (n, 3), in twelfths of the cell edges, n at most 3 for the
        conventional lattices (F).
    """
    translations = [
        np.array(op.t().num()) * TWELFTHS // op.t().den()
        for op in group.all_ops()
        if op.r().is_unit_mx()
    ]
    result = np.array(translations, dtype=np.int32).reshape(-1, 3) % TWELFTHS
    return result[np.any(result != 0, axis=1)]


def is_centring_absent(hkl: np.ndarray, translations: np.ndarray) -> np.ndarray:
    """Whether lattice points are absent by centring: h·t is no integer for some t.

    Args:
        hkl: Miller indices, integers, shape (..., 3).
        translations: Of ``centring_translations``.

    Returns:
        Boolean array of shape (...).
    """
    products = np.asarray(hkl, dtype=np.int64) @ translations.T.astype(np.int64)
    return np.any(products % TWELFTHS != 0, axis=-1)


def is_absent(hkl: np.ndarray, group: sgtbx.space_group) -> np.ndarray:
    """Whether reflections are absent by centring, screw axes or glide planes.

    Args:
        hkl: Miller indices, integers, shape (n, 3).
        group: Space group.
    """
    flags = group.is_sys_absent(miller_index_from_numpy(np.asarray(hkl)))
    return np.array(list(flags), dtype=bool)
