"""Expected photons of an image, pixel by pixel.

    n = shadow · P·ΔΩ·ε·A_air · t · [ K·k_i·T_i · (⟨I_cloud + I_halo + I_Bragg⟩_φ
                                        + I_solvent(s) + I_Compton(s)) + B_air(2θ) ]

with the mean over the rotation during the image: by Gauss-Legendre quadrature for the
diffuse part, in closed form for the Bragg peaks. Air scattering is seen with and without
crystal and is not absorbed by it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from dxtbx.model import Experiment

from dials_diffuse.simulation.bragg import peak_intensity
from dials_diffuse.simulation.pixels import (
    PanelPixels,
    laboratory_axis,
    moment,
    panel_pixels,
)
from dials_diffuse.simulation.quadrature import chunks, gauss_legendre
from dials_diffuse.simulation.sample import Sample
from dials_diffuse.simulation.scales import Absorption
from dials_diffuse.simulation.settings import SimulationSettings

CHUNK = 1 << 14  # pixels at a time, so that intermediate arrays stay in the cache
AIR_ANGLE = math.radians(12.0)  # 2θ over which air scattering falls to 1/e
BRAGG_STEP = 0.4  # reciprocal cells that a rotation may cross at a time


@dataclasses.dataclass(frozen=True)
class Exposure:
    """One image to be simulated.

    Attributes:
        experiment: Models; without a crystal nothing but air scatters.
        index: Number of the image in the sweep, from 0.
        scale: k_i.
        time: Exposure time t, s.
        absorption: The sample's.
    """

    experiment: Experiment
    index: int
    scale: float
    time: float
    absorption: Absorption


def rotation_width(experiment: Experiment) -> float:
    """Rotation during an image, radians; 0 for a still."""
    if experiment.scan is None:
        return 0.0
    return abs(experiment.scan.get_oscillation(deg=False)[1])


def air_rate(settings: SimulationSettings, two_theta: np.ndarray) -> np.ndarray:
    """Scattering of the air B_air(2θ), photons/(s sr).

    It falls off exponentially; background.air is for the solid angle of the pixel at the
    beam centre.

    Args:
        settings: The settings.
        two_theta: Scattering angle, radians.
    """
    pixel = settings.detector.pixel / settings.detector.distance
    return settings.background.air / pixel**2 * np.exp(-two_theta / AIR_ANGLE)


class Detector:
    """The pixels of a detector, and what lies between it and the sample.

    Args:
        experiment: Beam and detector.
        settings: The settings.
        shadows: Transmission of the beam stop for each panel, (n_slow, n_fast).
    """

    def __init__(
        self,
        experiment: Experiment,
        settings: SimulationSettings,
        shadows: list[np.ndarray],
    ) -> None:
        self.panels: list[PanelPixels] = panel_pixels(experiment, settings.air)
        self.shadows = [shadow.ravel() for shadow in shadows]
        s0 = np.array(experiment.beam.get_s0())
        e0 = s0 / np.linalg.norm(s0)
        self.air = [
            air_rate(settings, np.arccos(np.clip(e0 @ panel.e, -1, 1)))
            for panel in self.panels
        ]
        self.s_max = max(
            float(np.sqrt(2 * (1 - (e0 @ panel.e).min()))) for panel in self.panels
        ) * float(np.linalg.norm(s0))


class ImageModel:
    """Expected photons of any image of a simulation.

    Args:
        sample: What scatters.
        settings: The settings.
        detector: The pixels.
    """

    def __init__(
        self, sample: Sample, settings: SimulationSettings, detector: Detector
    ) -> None:
        self.sample, self.settings, self.detector = sample, settings, detector

    def photons(self, exposure: Exposure) -> list[np.ndarray]:
        """Expected photons of each panel, flat."""
        return [self._panel(exposure, i) for i in range(len(self.detector.panels))]

    def _panel(self, exposure: Exposure, number: int) -> np.ndarray:
        panel = self.detector.panels[number]
        rate = self.detector.air[number].copy()
        if exposure.experiment.crystal is not None:
            middle = moment(exposure.experiment, exposure.index, 0.5)
            for part in chunks(panel.e.shape[1], CHUNK):
                e = panel.e[:, part]
                intensity = self.intensity(exposure, e)
                transmission = exposure.absorption.transmission(
                    e, middle.s0, middle.goniometer
                )
                power = self.sample.power * exposure.scale
                rate[part] += power * transmission * intensity
        seen = panel.normalisation * self.detector.shadows[number]
        return rate * seen * exposure.time

    def intensity(self, exposure: Exposure, e: np.ndarray) -> np.ndarray:
        """Intensity in directions, averaged over the exposure.

        Args:
            exposure: The image.
            e: Unit vectors, shape (3, n), laboratory frame.

        Returns:
            Electrons² per unit cell, shape (n,).
        """
        experiment = exposure.experiment
        width = rotation_width(experiment)
        middle = moment(experiment, exposure.index, 0.5)
        length = np.linalg.norm(middle.s0)
        rlp = length * e - middle.s0[:, None]
        result = self.sample.isotropic(np.sqrt(np.einsum("in,in->n", rlp, rlp)))
        arc = self.detector.s_max * width
        for x, weight in zip(*gauss_legendre(self._n_nodes(arc))):
            now = moment(experiment, exposure.index, 0.5 + x)
            hkl = _to_hkl(now.setting, length * e - now.s0[:, None])
            result += weight * self.sample.diffuse(hkl)
        if self.settings.bragg.on:
            result += self._bragg(exposure, length * e, arc, width)
        return result

    def _n_nodes(self, arc: float) -> int:
        """Gauss-Legendre nodes for a path of some length, Å⁻¹, through the halos."""
        return 1 + math.ceil(arc * self.sample.sharpness)

    def _bragg(
        self, exposure: Exposure, s1: np.ndarray, arc: float, width: float
    ) -> np.ndarray:
        """Mean Bragg intensity, from parts of the rotation that cross one cell each."""
        experiment = exposure.experiment
        longest = max(experiment.crystal.get_unit_cell().parameters()[:3])
        n_parts = max(1, math.ceil(arc * longest / BRAGG_STEP))
        axis = laboratory_axis(experiment)
        total = np.zeros(s1.shape[1])
        for part in range(n_parts):
            now = moment(experiment, exposure.index, (part + 0.5) / n_parts)
            total += peak_intensity(
                _to_hkl(now.setting, s1 - now.s0[:, None]),
                now.setting,
                axis,
                width / n_parts,
                self.sample.bragg,
                self.sample.peak_shape,
                self.sample.volume,
            )
        return total / n_parts


def _to_hkl(setting: np.ndarray, rlp: np.ndarray) -> np.ndarray:
    """Fractional Miller indices of scattering vectors, shape (3, n)."""
    return np.linalg.inv(setting) @ rlp
