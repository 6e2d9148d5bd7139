"""Scattering of the crystal that depends on s = 1/d alone: bulk solvent and Compton."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.interpolate import CubicSpline

from dials_diffuse.simulation.structure import atomic_number, form_factor

# Water has its first maximum at 3.2 Å, about 0.12 Å⁻¹ wide at half height.
RING_POSITION = 1 / 3.2  # Å⁻¹
RING_WIDTH = 0.05  # Å⁻¹, standard deviation
LOW_ANGLE_HEIGHT = 0.1  # of the density fluctuations at small s, relative to the ring
LOW_ANGLE_WIDTH = 0.08  # Å⁻¹, standard deviation

ELECTRON_REST_ENERGY = 510.99895  # keV
KEV_ANGSTROM = 12.398419843  # h c

COMPTON_STEP = 0.002  # Å⁻¹, of the table
COMPTON_SMALLEST = 0.001  # s/2 in Å⁻¹, below which xraylib's tables do not reach


def _ring_shape(s: np.ndarray) -> np.ndarray:
    return np.exp(
        -0.5 * ((s - RING_POSITION) / RING_WIDTH) ** 2
    ) + LOW_ANGLE_HEIGHT * np.exp(-0.5 * (s / LOW_ANGLE_WIDTH) ** 2)


def solvent_ring(
    s: np.ndarray, height: float, isotropic: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The ring of bulk solvent, electrons² per unit cell.

    A Gaussian at 1/3.2 Å⁻¹ and a weak one at the origin.

    Args:
        s: 1/d, Å⁻¹, any shape.
        height: Of the maximum, in units of ``isotropic`` at that s.
        isotropic: Electrons² per unit cell as a function of s.
    """
    # The Gaussian at the origin moves the maximum by less than 1e-4 Å⁻¹.
    near = RING_POSITION + np.linspace(-1e-3, 1e-3, 2001)
    shape = _ring_shape(near)
    maximum = near[[np.argmax(shape)]]
    scale = height * float(isotropic(maximum)[0]) / shape.max()
    return scale * _ring_shape(np.asarray(s, dtype=float))


def compton(
    composition: Mapping[str, float], s: np.ndarray, wavelength: float
) -> np.ndarray:
    """Compton scattering as a photon counter sees it, electrons² per unit cell.

        I = R² Σ_j n_j S_j(s),    R = 1/(1 + (E/511 keV)(1 - cos 2θ))

    with the ratio R of the energies after and before, 1 - cos 2θ = λ²s²/2. One factor R²
    remains of the Klein-Nishina formula (1929, doi:10.1007/BF01366453) at these energies.
    S of xraylib is that of Hubbell et al. (1975) J. Phys. Chem. Ref. Data 4, 471,
    doi:10.1063/1.555523. The hydrogens are bonded: S = 1 - f².

    Args:
        composition: Number of atoms of each element in the cell.
        s: 1/d, Å⁻¹, any shape.
        wavelength: Å.

    Raises:
        ValueError: The package xraylib is missing.
    """
    s = np.asarray(s, dtype=float)
    if s.size == 0:
        return np.zeros(s.shape)
    # The table goes on beyond s, where the end of the spline does no harm.
    table = np.arange(int(s.max() / COMPTON_STEP) + 10) * COMPTON_STEP
    total = np.zeros(len(table))
    for element, number in composition.items():
        total += number * _incoherent_factor(element, table)
    energy = KEV_ANGSTROM / wavelength
    recoil = 1 + energy / ELECTRON_REST_ENERGY * (wavelength * s) ** 2 / 2
    return np.maximum(CubicSpline(table, total)(s), 0.0) / recoil**2


def _incoherent_factor(element: str, s: np.ndarray) -> np.ndarray:
    """S of one atom at s = 1/d, shape (n,), electrons²."""
    try:
        import xraylib
    except ImportError:
        raise ValueError(
            "Compton scattering needs the Python package xraylib: install the Python "
            "package xraylib or set background.compton=False"
        ) from None
    if element == "H":
        # The tabulated f is 0.9995 at the origin.
        free = form_factor(element, np.zeros(1))
        return 1 - (form_factor(element, s) / free) ** 2
    z = atomic_number(element)
    return np.array(
        [xraylib.SF_Compt(z, x) if x >= COMPTON_SMALLEST else 0.0 for x in s / 2]
    )
