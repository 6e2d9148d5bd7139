"""What a pixel counts per unit of scattering: the normalisation and its factors.

    counts = K · t · P · ΔΩ · ε · A_air · I

P polarization, ΔΩ solid angle, ε efficiency of the sensor, A_air transmission of the
path from the sample to the pixel. All depend on the geometry alone. They multiply the
*normalisation*, by which counts are divided once they have been summed; no count is
ever corrected by itself. There is no Lorentz factor: the mean over a voxel is an
average, not an integral.

Directions e include the parallax of the sensor, as DIALS' s1 does; the solid angle and
the path are those of the pixel itself.
"""

from __future__ import annotations

import numpy as np

from cctbx.eltbx import attenuation_coefficient

GAS_CONSTANT = 8.31446261815324  # J / (mol K)

# Mole fractions of the gas on the way. Dry air: U.S. Standard Atmosphere (1976).
GASES: dict[str, dict[str, float]] = {
    "air": {"N": 2 * 0.78084, "O": 2 * 0.20948, "Ar": 0.00934},
    "helium": {"He": 1.0},
    "vacuum": {},
}
ATOMIC_MASS = {"N": 14.007, "O": 15.999, "Ar": 39.948, "He": 4.002602}  # g/mol


def project(vector: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Scalar product of one vector with many, shape (3, ...) -> (...)."""
    return vector[0] * r[0] + vector[1] * r[1] + vector[2] * r[2]


def length(r: np.ndarray) -> np.ndarray:
    """Lengths of vectors, shape (3, ...) -> (...)."""
    return np.sqrt(r[0] * r[0] + r[1] * r[1] + r[2] * r[2])


def polarization(
    e: np.ndarray, s0: np.ndarray, normal: np.ndarray, fraction: float
) -> np.ndarray:
    """Polarization factor P of each direction.

        P = (1 - 2p)(1 - (n·e)²) + p (1 + (e·e0)²)

    Kahn et al. (1982) J. Appl. Cryst. 15, 330, doi:10.1107/S0021889882012060, in the
    convention of DIALS and XDS: p = 1/2 is an unpolarized beam.

    Args:
        e: Unit vectors, shape (3, ...), laboratory frame.
        s0: Incident beam, any length.
        normal: Normal n of the polarization plane.
        fraction: Fraction p of the intensity polarized in that plane.

    Returns:
        P, shape (...); the azimuthal mean is (1 + cos² 2θ)/2 for every p.
    """
    e0 = np.asarray(s0) / np.linalg.norm(s0)
    n = np.asarray(normal) / np.linalg.norm(normal)
    cos_normal = project(n, e)
    cos_two_theta = project(e0, e)
    return (1 - 2 * fraction) * (1 - cos_normal * cos_normal) + fraction * (
        1 + cos_two_theta * cos_two_theta
    )


def solid_angle(
    position: np.ndarray, normal: np.ndarray, pixel_size: tuple[float, float]
) -> np.ndarray:
    """Solid angle ΔΩ = p_x p_y |r·n| / r³ of each pixel, sr.

    Args:
        position: Pixel centres r, mm, shape (3, ...), sample at the origin.
        normal: Unit normal of the panel.
        pixel_size: Size of a pixel along fast and slow, mm.
    """
    distance = length(position)
    area = pixel_size[0] * pixel_size[1]
    return area * np.abs(project(normal, position)) / (distance * distance * distance)


def sensor_efficiency(
    e: np.ndarray, normal: np.ndarray, mu: float, thickness: float
) -> np.ndarray | float:
    """Fraction ε = 1 - exp(-μ t / |e·n|) of the photons that the sensor absorbs.

    A panel without material or thickness (μ t = 0) counts all of them: ε = 1.

    Args:
        e: Unit vectors, shape (3, ...).
        normal: Unit normal of the panel.
        mu: Linear attenuation coefficient of the sensor, 1/mm.
        thickness: Thickness of the sensor, mm.
    """
    if not mu * thickness > 0:
        return 1.0
    return -np.expm1(-mu * thickness / np.abs(project(normal, e)))


def gas_attenuation(
    medium: str, wavelength: float, temperature: float, pressure: float
) -> float:
    """Linear attenuation coefficient of a gas, 1/mm.

        μ = Σ_j x_j M_j (μ/ρ)_j p / (R T)

    over the elements j of an ideal gas, mass attenuation coefficients (μ/ρ) from the
    NIST tables in cctbx (doi:10.18434/T4D01F).

    Args:
        medium: One of ``GASES``.
        wavelength: Å.
        temperature: K.
        pressure: Pa.
    """
    moles = pressure / (GAS_CONSTANT * temperature) * 1e-6  # mol/cm³
    mu = 0.0  # 1/cm
    for element, fraction in GASES[medium].items():
        table = attenuation_coefficient.get_table(element)
        mass_attenuation = table.mu_rho_at_angstrom(wavelength)  # cm²/g
        mu += fraction * moles * ATOMIC_MASS[element] * mass_attenuation
    return mu / 10


def gas_transmission(position: np.ndarray, mu: float) -> np.ndarray | float:
    """Transmission exp(-μ r) of the way from the sample to each pixel.

    Args:
        position: Pixel centres r, mm, shape (3, ...), sample at the origin.
        mu: Linear attenuation coefficient, 1/mm.
    """
    if mu == 0:
        return 1.0
    return np.exp(-mu * length(position))
