"""Laue symmetry on the integer indices of a voxel grid.

A voxel is named by the integer triple h·ndiv. Its symmetry equivalents are the triples
that the rotation parts of the Laue group make of it: R(h·ndiv) = (Rh)·ndiv whenever the
axes that R mixes are divided alike, which ``check_subdivision`` ensures. Lattice
centring and translations do not act on intensities between the Bragg peaks: the group
used here is always the primitive (centring-free) Laue group, so that no voxel counts as
systematically absent.
"""

from __future__ import annotations

import numpy as np

from cctbx import miller, sgtbx

from dials_diffuse.util.compat import miller_index_from_numpy, miller_index_to_numpy


def laue_group(space_group: sgtbx.space_group) -> sgtbx.space_group:
    """The centrosymmetric point group of a space group, in its own setting."""
    return space_group.build_derived_laue_group()


def rotation_matrices(group: sgtbx.space_group) -> np.ndarray:
    """Rotation parts of all operators.

    Returns:
        Integer array of shape (n_ops, 3, 3). Acting on a Miller index written as a row
        vector from the right, h' = h R.
    """
    ops = [op.r().as_double() for op in group.all_ops()]
    return np.unique(np.rint(np.array(ops)).astype(np.int32).reshape(-1, 3, 3), axis=0)


def check_subdivision(group: sgtbx.space_group, ndiv: tuple[int, int, int]) -> None:
    """Check that symmetry maps a grid of ndiv voxels per reciprocal cell onto itself.

    Raises:
        ValueError: Two axes that a symmetry operator mixes are divided differently.
    """
    mixed = np.any(rotation_matrices(group) != 0, axis=0)
    for i in range(3):
        for j in range(i):
            if (mixed[i, j] or mixed[j, i]) and ndiv[i] != ndiv[j]:
                raise ValueError(
                    f"ndiv={ndiv[0]},{ndiv[1]},{ndiv[2]} does not fit the Laue group "
                    f"{group.info()}: symmetry mixes the axes {'hkl'[j]} and "
                    f"{'hkl'[i]}, so they need the same number of voxels"
                )


def map_to_asu(index: np.ndarray, group: sgtbx.space_group) -> np.ndarray:
    """The representative of each voxel in cctbx' asymmetric unit of the Laue group.

    Args:
        index: Voxel indices h·ndiv, int32, shape (n, 3).
        group: Laue group; Friedel mates are merged.

    Returns:
        Equivalent indices inside the asymmetric unit, int32, shape (n, 3).
    """
    if len(index) == 0:
        return np.empty((0, 3), dtype=np.int32)
    indices = miller_index_from_numpy(index)
    miller.map_to_asu(group.type(), False, indices)
    return miller_index_to_numpy(indices)
