"""Everything in the crystal that scatters, in electrons² per unit cell."""

from __future__ import annotations

import math

import numpy as np
from scipy.interpolate import CubicSpline

from dials_diffuse.simulation import isotropic
from dials_diffuse.simulation.bragg import PeakShape
from dials_diffuse.simulation.diffuse_map import DiffuseMap
from dials_diffuse.simulation.scales import scattering_power
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.structure import BraggIntensities, CellContents

S_STEP = 0.002  # Å⁻¹, of the table of isotropic scattering
PEAK_PIXELS = 0.8  # default standard deviation of the peaks


class Sample:
    """The unit cell of a simulation and how strongly it scatters.

    Args:
        settings: The settings.
        contents: Atoms and cell.
        s_max: Largest s = 1/d on the detector or in the true map, Å⁻¹.

    Attributes:
        settings: The settings.
        contents: Atoms and cell.
        bragg: |F|² of the reflections.
        map: The diffuse map.
        peak_shape: Widths of the Bragg peaks.
        volume: Of the unit cell, Å³.
        power: K, photons/(s sr electron²).
        sharpness: 2π times the longest correlation length in the map, Å.
    """

    def __init__(
        self, settings: SimulationSettings, contents: CellContents, s_max: float
    ) -> None:
        self.settings = settings
        self.contents = contents
        self.volume = self.contents.volume
        self.power = scattering_power(settings, self.volume)
        margin = 2 * max(self.contents.unit_cell.reciprocal().parameters()[:3])
        self.bragg = BraggIntensities(self.contents, 1 / (s_max + margin))
        self.map = DiffuseMap(
            self.contents, self.bragg, settings.diffuse, settings.seed
        )
        self.peak_shape = _peak_shape(settings)
        longest = settings.diffuse.length
        if settings.diffuse.halo_displacement > 0:
            longest = max(longest, settings.diffuse.halo_length)
        self.sharpness = 2 * math.pi * longest
        # voxels of the true map reach beyond what the detector sees
        s = np.arange(0, s_max + margin, S_STEP)
        self._solvent = CubicSpline(s, self._solvent_ring(s, settings))
        compton = np.zeros_like(s)
        if settings.background.compton:
            compton = isotropic.compton(
                self.contents.composition, s, settings.beam.wavelength
            )
        self._compton = CubicSpline(s, compton)

    def _solvent_ring(self, s: np.ndarray, settings: SimulationSettings) -> np.ndarray:
        return isotropic.solvent_ring(
            s, settings.background.solvent, self.map.isotropic
        )

    def solvent(self, s: np.ndarray) -> np.ndarray:
        """Scattering of the bulk solvent."""
        return self._solvent(s)

    def compton(self, s: np.ndarray) -> np.ndarray:
        """Compton scattering R² Σ n S."""
        return self._compton(s)

    def isotropic(self, s: np.ndarray) -> np.ndarray:
        """All that depends on s = 1/d alone."""
        return self._solvent(s) + self._compton(s)

    def diffuse(self, hkl: np.ndarray) -> np.ndarray:
        """Cloudy and halo scattering at fractional Miller indices, shape (3, n)."""
        return self.map.intensity(hkl)


def _peak_shape(settings: SimulationSettings) -> PeakShape:
    sigma = settings.bragg.sigma
    if sigma is None:
        detector = settings.detector
        pixel = detector.pixel / (detector.distance * settings.beam.wavelength)
        sigma = PEAK_PIXELS * pixel
    return PeakShape(sigma, math.radians(settings.bragg.mosaicity))
