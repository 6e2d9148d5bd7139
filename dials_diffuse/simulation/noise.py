"""From expected photons to the integers that a detector stores."""

from __future__ import annotations

import dataclasses

import numpy as np

from dials_diffuse.simulation.settings import SimulationSettings

DEFECTS, PHOTONS = 201, 202  # purposes of random numbers
GAP_VALUE = -1
FLICKER = 0.2  # fraction of the images in which a flickering pixel counts too many
HOT_COUNTS = (20.0, 2000.0)  # smallest and largest excess per image


@dataclasses.dataclass(frozen=True)
class Defects:
    """Faulty pixels of a panel, as flat indices.

    Attributes:
        hot: Pixels that always count too many, and their excess in ``excess``.
        flickering: Pixels that do so in some images.
        dead: Pixels that count nothing.
    """

    hot: np.ndarray
    excess: np.ndarray
    flickering: np.ndarray
    dead: np.ndarray


def make_defects(settings: SimulationSettings, number: int, n_pixels: int) -> Defects:
    """The faulty pixels of a panel: half of the hot ones flicker."""
    rng = np.random.default_rng([settings.seed, DEFECTS, number])
    n_hot = round(settings.detector.hot_fraction * n_pixels)
    n_dead = round(settings.detector.dead_fraction * n_pixels)
    chosen = rng.permutation(n_pixels)[: n_hot + n_dead]
    hot, flickering = np.array_split(chosen[:n_hot], 2)
    excess = np.exp(rng.uniform(*np.log(HOT_COUNTS), size=len(hot)))
    return Defects(hot, excess, flickering, chosen[n_hot:])


def image_generator(
    settings: SimulationSettings, series: int, image: int, panel: int
) -> np.random.Generator:
    """The random numbers of one panel in one image, whoever simulates it."""
    return np.random.default_rng([settings.seed, PHOTONS, series, image, panel])


def detect(
    photons: np.ndarray,
    active: np.ndarray,
    defects: Defects,
    settings: SimulationSettings,
    rng: np.random.Generator,
) -> np.ndarray:
    """What the detector stores of expected photons.

    Args:
        photons: Expected photons, flat.
        active: False in the gaps between modules, flat.
        defects: Faulty pixels.
        settings: Noise, gain and largest count.
        rng: Random numbers of this image and panel.

    Returns:
        int32 array, flat: Poisson counts times the gain; ``GAP_VALUE`` in gaps; one more
        than detector.count_cutoff where the detector is saturated.
    """
    photons = photons.copy()
    photons[defects.hot] += defects.excess
    bright = defects.flickering[rng.random(len(defects.flickering)) < FLICKER]
    photons[bright] += np.exp(rng.uniform(*np.log(HOT_COUNTS), size=len(bright)))
    counts = rng.poisson(photons) if settings.noise == "poisson" else photons
    cutoff = settings.detector.count_cutoff
    values = np.minimum(np.rint(counts * settings.detector.gain), cutoff + 1)
    values[defects.dead] = 0
    return np.where(active, values, GAP_VALUE).astype(np.int32)
