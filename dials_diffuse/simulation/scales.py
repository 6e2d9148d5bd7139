"""Factors that differ from image to image: exposure, beam and sample.

    counts = K · k_i · T_i(x, y) · ...

K photons per second and steradian of one electron² per cell, k_i relative scale of image
i, T_i transmission of the sample. All are smooth closed forms with random phases.
"""

from __future__ import annotations

import numpy as np

from dials_diffuse.simulation.settings import SimulationSettings

ELECTRON_RADIUS = 2.8179403205e-12  # mm, CODATA 2022
SCALES, ABSORPTION = 101, 102  # purposes of random numbers


def scattering_power(settings: SimulationSettings, volume: float) -> float:
    """K = flux/beam area · r_e² · number of illuminated cells, photons/(s sr electron²).

    Args:
        settings: Beam and crystal, both taken as square.
        volume: Volume of the unit cell, Å³.
    """
    beam, crystal = settings.beam, settings.crystal
    illuminated = min(beam.size, crystal.size) ** 2 * crystal.size  # mm³
    n_cells = illuminated * 1e21 / volume
    return beam.flux / beam.size**2 * ELECTRON_RADIUS**2 * n_cells


def image_scales(settings: SimulationSettings, series: int) -> np.ndarray:
    """Relative scales k_i of the images of a series, about one, shape (n_images,).

    Stills: lognormal with a standard deviation of scale.variation. Rotation: an
    exponential of a sine of two periods in the sweep, with the same root-mean-square,
    times a lognormal factor of the crystal.
    """
    rng = np.random.default_rng([settings.seed, SCALES, series])
    variation = settings.scale.variation
    if settings.is_stills:
        return np.exp(variation * rng.normal(size=settings.n_images))
    crystal = np.exp(variation * rng.normal()) if settings.n_crystals > 1 else 1.0
    turn = (np.arange(settings.n_images) + 0.5) / settings.n_images
    wave = np.sin(2 * np.pi * (2 * turn + rng.random()))
    return crystal * np.exp(np.sqrt(2.0) * variation * wave)


class Absorption:
    """Transmission of the sample for incoming and outgoing beams.

        T = exp(-a · [(1 + u·e) / 2 + (1 - v·e0) / 2] / 2)

    with the directions e (diffracted) and e0 (incident) in the frame of the crystal on
    its goniometer head, and unit vectors u, v fixed in it: from 1 for the shortest to
    exp(-a) for the longest way.

    Args:
        settings: Gives a, scale.absorption.
        series: Number of the series: crystals differ.
    """

    def __init__(self, settings: SimulationSettings, series: int) -> None:
        self.strength = settings.scale.absorption
        rng = np.random.default_rng([settings.seed, ABSORPTION, series])
        u, v = rng.normal(size=(2, 3))
        self.u, self.v = u / np.linalg.norm(u), v / np.linalg.norm(v)

    def transmission(
        self, e: np.ndarray, s0: np.ndarray, goniometer: np.ndarray
    ) -> np.ndarray | float:
        """T of directions.

        Args:
            e: Unit vectors, shape (3, n), laboratory frame.
            s0: Incident beam, any length, laboratory frame.
            goniometer: S R(φ) F, from the goniometer head to the laboratory.
        """
        if self.strength == 0:
            return 1.0
        e0 = s0 / np.linalg.norm(s0)
        way_out = 0.5 * (1 + (goniometer @ self.u) @ e)
        way_in = 0.5 * (1 - (goniometer @ self.v) @ e0)
        return np.exp(-self.strength * 0.5 * (way_out + way_in))
