"""The pixels of a detector that the background is made from, as flat arrays.

All panels one after the other: direction, normalisation, s, place on the panel. And what
an image has there: photons, whether they can be trusted, and whether the pixel is near a
Bragg position.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment

from dials_diffuse import symmetry
from dials_diffuse.background.settings import BackgroundSettings
from dials_diffuse.extraction.loop import read_image
from dials_diffuse.extraction.tables import good_pixels, panel_arrays
from dials_diffuse.geometry.orientation import FrameModel, inverse
from dials_diffuse.util.compat import inclusive_trusted_range

CHUNK = 1 << 18  # pixels at a time


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The pixels of all panels that no static mask leaves out.

    Attributes:
        shapes: (n_slow, n_fast) of each panel.
        flat: Number of each pixel in the image, panel after panel, shape (n,).
        ends: End of each panel's part in the arrays.
        e: Unit vectors to the pixels, float32, shape (3, n).
        normalisation: P ΔΩ ε A_air, sr, shape (n,), without the exposure time.
        s: 1/d, 1/Å, shape (n,).
    """

    shapes: tuple[tuple[int, int], ...]
    flat: np.ndarray
    ends: tuple[int, ...]
    e: np.ndarray
    normalisation: np.ndarray
    s: np.ndarray

    @property
    def panels(self) -> list[slice]:
        """The part of each panel in the arrays."""
        return [slice(a, b) for a, b in zip((0, *self.ends), self.ends)]

    def places(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates (fast, slow) in px of a panel's pixels."""
        first = sum(n * m for n, m in self.shapes[:number])
        slow, fast = np.divmod(
            self.flat[self.panels[number]] - first, self.shapes[number][1]
        )
        return fast + 0.5, slow + 0.5


def make_pixels(experiment: Experiment, settings: BackgroundSettings) -> Pixels:
    """The pixels of an experiment's detector."""
    flat, e, normalisation, shapes, first = [], [], [], [], 0
    mask = settings.mask_of(experiment)
    for number, panel in enumerate(experiment.detector):
        good = good_pixels(panel, number, experiment.imageset, mask)
        arrays = panel_arrays(panel, experiment.beam, good, settings.corrections)
        # a pixel in the plane of its panel counts nothing
        index = np.flatnonzero(good & (arrays.weight > 0))
        flat.append(first + index)
        e.append(arrays.e.reshape(3, -1)[:, index])
        normalisation.append(arrays.weight.ravel()[index] * arrays.weight_unit)
        shapes.append(good.shape)
        first += good.size
    directions = np.concatenate(e, axis=1)
    return Pixels(
        shapes=tuple(shapes),
        flat=np.concatenate(flat),
        ends=tuple(int(n) for n in np.cumsum([len(x) for x in flat])),
        e=directions,
        normalisation=np.concatenate(normalisation),
        s=length_of_rlp(directions, experiment.beam.get_s0()),
    )


def length_of_rlp(e: np.ndarray, s0: tuple[float, float, float]) -> np.ndarray:
    """s = |e/λ - s0| = |s0| |e - e0|, 1/Å, shape (n,)."""
    wave_number = np.linalg.norm(s0)
    square = np.zeros(e.shape[1])
    for component, beam in zip(e, np.asarray(s0) / wave_number):
        square += (component - beam) ** 2
    return wave_number * np.sqrt(square)


def read_photons(
    experiment: Experiment, array_index: int, settings: BackgroundSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Photons of all pixels of an image, and which of them are within trusted range.

    Raises:
        ValueError: The image cannot be read.
    """
    photons, trusted = [], []
    # named, as flumpy's arrays live only as long as what they are made from
    data = read_image(experiment, array_index)
    for panel, raw in zip(experiment.detector, data):
        values = flumpy.to_numpy(raw).ravel()
        low, high = settings.trusted_range or inclusive_trusted_range(panel)
        trusted.append((values >= low) & (values <= high))
        gain = settings.gain or panel.get_gain()
        photons.append((values - panel.get_pedestal()) / gain)
    return np.concatenate(photons), np.concatenate(trusted)


def near_bragg(
    e: np.ndarray,
    model: FrameModel,
    experiment: Experiment,
    settings: BackgroundSettings,
) -> np.ndarray:
    """Whether each pixel is within the ellipsoid about a reciprocal lattice point.

    Args:
        e: Unit vectors to the pixels, shape (3, n).
        model: Orientation and beam of the image.
        experiment: It has a crystal.
        settings: They say how large the ellipsoid is.
    """
    crystal = experiment.crystal
    laue = symmetry.laue_group(crystal.get_space_group())
    metric = settings.bragg.metric(
        crystal.get_unit_cell(), symmetry.rotation_matrices(laue)
    )
    result = np.zeros(e.shape[1], dtype=bool)
    if metric is None:
        return result
    to_hkl = inverse(model.setting)
    wave_number = float(np.linalg.norm(model.s0))
    g11, g22, g33, g12, g13, g23 = metric
    for start in range(0, e.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        h = to_hkl @ (wave_number * e[:, part] - model.s0[:, None])
        a, b, c = h - np.floor(h + 0.5)
        square = g11 * a * a + g22 * b * b + g33 * c * c
        square += 2 * (g12 * a * b + g13 * a * c + g23 * b * c)
        result[part] = square < 1
    return result
