"""What every pixel did in a series of images, as sums in bounded memory.

Each image is compared with itself: the expectation λ of a pixel is the mean of the box
around it, without the pixel and with outliers cut off. So the scale of the image, and
diffuse features that move over the detector, are in λ. The variance is that of its
resolution ring, at least that of Poisson.

A pixel is *high* in an image if it counts more than λ and its ring explain and is
*isolated*: its neighbours, but for one, do not stand out with it, as they would in a Bragg
peak. Consecutive images in which it is high are one *run*: a peak may stay for some
images of a rotation.
"""

from __future__ import annotations

import dataclasses
from typing import Iterable, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment

from dials.util import progress
from dials_diffuse.extraction.loop import read_image
from dials_diffuse.extraction.tables import lookup_mask
from dials_diffuse.masks.neighbours import neighbour_values, surroundings
from dials_diffuse.masks.rings import Rings, outlier_limit, ring_levels
from dials_diffuse.masks.series import flatten, split
from dials_diffuse.masks.settings import MaskSettings
from dials_diffuse.util.compat import inclusive_trusted_range
from dials_diffuse.util.parallel import forked_results
from dials_diffuse.util.signals import progress_bar

HIGH_SIGMA, HIGH_COUNTS = 4.5, 3.5  # a chance of about 1e-6 by Poisson
ISOLATED = 2.5  # ratio of the excess of a pixel to that of its second highest neighbour
MAX_Z = 3.0  # deviations beyond are cut off in their mean square
MIN_VARIANCE = 0.01
MAX_TASKS = 8


@dataclasses.dataclass
class PixelSums:
    """Sums over images, flat arrays over all pixels.

    Attributes:
        n_images: Number of images.
        n: Images in which the value was in the trusted range.
        below, above: Images in which it was below or above it.
        total: Photons, with those beyond λ + 5σ + 5 cut off.
        variance: Their expected variance.
        square: Squares of (c - λ)/σ, up to 3.
        smallest, largest: Photons.
        high: Images in which the pixel was high.
        runs: Runs of such images.
        excess: Photons beyond λ where it was high.
        around: The same of its neighbours but the highest.
        first, last: Whether it was high in the first and the last image.
    """

    n_images: int
    n: np.ndarray
    below: np.ndarray
    above: np.ndarray
    total: np.ndarray
    variance: np.ndarray
    square: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray
    high: np.ndarray
    runs: np.ndarray
    excess: np.ndarray
    around: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def empty(cls, n_pixels: int) -> PixelSums:
        """The sums over no image."""
        types = {
            **dict.fromkeys(("n", "below", "above", "high", "runs"), np.uint32),
            **dict.fromkeys(("total", "variance", "square"), np.float64),
            **dict.fromkeys(("smallest", "largest", "excess", "around"), np.float32),
            **dict.fromkeys(("first", "last"), bool),
        }
        arrays = {name: np.zeros(n_pixels, dtype) for name, dtype in types.items()}
        arrays["smallest"].fill(np.inf)
        arrays["largest"].fill(-np.inf)
        return cls(0, **arrays)

    def add(self, other: PixelSums) -> None:
        """Add the sums over the images that come next in the series."""
        self.runs += other.runs
        self.runs -= self.last & other.first  # one run goes on
        if self.n_images == 0:
            self.first = other.first
        self.last = other.last
        self.n_images += other.n_images
        for name in ("n", "below", "above", "high", "total", "variance", "square"):
            getattr(self, name).__iadd__(getattr(other, name))
        for name in ("excess", "around"):
            getattr(self, name).__iadd__(getattr(other, name))
        np.minimum(self.smallest, other.smallest, out=self.smallest)
        np.maximum(self.largest, other.largest, out=self.largest)

    def mean(self) -> np.ndarray:
        """Mean photons in an image, outliers cut off; NaN where never trusted."""
        with np.errstate(invalid="ignore"):
            return np.where(self.n > 0, self.total / self.n, np.nan)

    def noise(self) -> np.ndarray:
        """Variance of the mean, from the scatter but at least that of Poisson.

        The expected variance is that of the ring, with all its peaks; the mean square of
        the deviations in units of it, which outliers hardly change, corrects that.
        """
        n = np.maximum(self.n, 1)
        return np.maximum(self.variance * self.square / n, self.total) / n**2.0


@dataclasses.dataclass(frozen=True)
class PixelModel:
    """What the values of the pixels mean.

    Attributes:
        shapes: (n_slow, n_fast) of each panel.
        usable: Pixels that no model and no file leaves out, flat.
        low, high: Limits of the trusted range of each panel, inclusive.
        gain, pedestal: Of each panel.
        rings: Where the pixels lie.
    """

    shapes: Sequence[tuple[int, int]]
    usable: np.ndarray
    low: Sequence[float]
    high: Sequence[float]
    gain: Sequence[float]
    pedestal: Sequence[float]
    rings: Rings

    @classmethod
    def of_detector(
        cls, detector, usable: np.ndarray, rings: Rings, settings: MaskSettings
    ) -> PixelModel:
        """The model of a detector."""
        limits = [
            settings.trusted_range or inclusive_trusted_range(p) for p in detector
        ]
        return cls(
            shapes=[panel.get_image_size()[::-1] for panel in detector],
            usable=usable,
            low=[low for low, _ in limits],
            high=[high for _, high in limits],
            gain=[settings.gain or panel.get_gain() for panel in detector],
            pedestal=[panel.get_pedestal() for panel in detector],
            rings=rings,
        )

    def photons(
        self, panels: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Photons of the panels of an image, and which are below and above; flat."""
        counts = np.empty(len(self.usable), dtype=np.float32)
        below, above = (np.empty(len(self.usable), dtype=bool) for _ in range(2))
        targets = (split(array, self.shapes) for array in (counts, below, above))
        for i, (raw, c, b, a) in enumerate(zip(panels, *targets)):
            c[:] = (raw - self.pedestal[i]) / self.gain[i]
            b[:] = ~(raw >= self.low[i])  # not a number counts as below
            a[:] = raw > self.high[i]
        counts[below] = 0
        return counts, below, above


def add_image(
    sums: PixelSums, panels: Sequence[np.ndarray], model: PixelModel, usable: np.ndarray
) -> None:
    """Add one image to the sums.

    Args:
        sums: The sums, changed in place.
        panels: Raw values, one array for each panel.
        model: What they mean.
        usable: Pixels of this image that are not masked, flat.
    """
    counts, below, above = model.photons(panels)
    good = usable & ~below & ~above
    expected, variance = expectation(counts, good, model)
    limit = outlier_limit(expected, variance)
    residual = np.minimum(counts - expected, limit)
    sums.n_images += 1
    sums.n += good
    sums.below += below
    sums.above += above
    sums.total += np.where(good, expected + residual, 0)
    sums.variance += np.where(good, variance, 0)
    square = np.minimum(residual**2 / variance, MAX_Z**2)
    sums.square += np.where(good, square, 0)
    np.minimum(sums.smallest, counts, out=sums.smallest, where=good)
    np.maximum(sums.largest, counts, out=sums.largest, where=good)
    _add_high(sums, counts, usable & ~below, expected, variance, model)


def expectation(
    counts: np.ndarray, good: np.ndarray, model: PixelModel
) -> tuple[np.ndarray, np.ndarray]:
    """Expected photons λ of each pixel of an image, and their variance, flat."""
    rings = model.rings
    level, spread = ring_levels(counts[good], rings.number[good], rings.n_rings)
    of_ring = level[rings.number].astype(np.float32)
    variance = spread[rings.number].astype(np.float32)
    # diffuse features may well have twice the mean of their ring
    top = (2 * np.maximum(level, 0) + outlier_limit(level, spread))[rings.number]
    cut = np.minimum(counts, top)
    expected = surroundings(cut, good, model.shapes, of_ring)
    cut = np.minimum(cut, expected + outlier_limit(expected, variance))
    expected = surroundings(cut, good, model.shapes, of_ring)
    variance = np.maximum(np.maximum(variance, expected), MIN_VARIANCE)
    return expected, variance


def _add_high(
    sums: PixelSums,
    counts: np.ndarray,
    known: np.ndarray,
    expected: np.ndarray,
    variance: np.ndarray,
    model: PixelModel,
) -> None:
    """Find the pixels that are high in an image and count them."""
    limit = expected + HIGH_SIGMA * np.sqrt(variance) + HIGH_COUNTS
    pixels = np.flatnonzero(known & (counts > limit))
    lam = expected[pixels]
    around = neighbour_values(counts, known, model.shapes, pixels, lam) - lam
    excess = counts[pixels] - lam
    isolated = excess > ISOLATED * around[-2]
    pixels = pixels[isolated]
    sums.high[pixels] += 1
    sums.runs[pixels] += ~sums.last[pixels]
    sums.excess[pixels] += excess[isolated]
    sums.around[pixels] += around[:-1, isolated].sum(axis=0)
    sums.last = np.zeros_like(sums.last)
    sums.last[pixels] = True
    if sums.n_images == 1:
        sums.first = sums.last.copy()


_job: tuple[Sequence[tuple[Experiment, int]], PixelModel] | None = None


def _sum_task(start: int, stop: int) -> PixelSums:
    """The sums over some consecutive images of the job."""
    images, model = _job
    sums = PixelSums.empty(len(model.usable))
    for experiment, array_index in images[start:stop]:
        panels = [flumpy.to_numpy(p) for p in read_image(experiment, array_index)]
        usable = model.usable
        own = lookup_mask(experiment.imageset)
        if own is not None:
            usable = usable & flatten(own)
        add_image(sums, panels, model, usable)
    return sums


def sum_images(
    images: Sequence[tuple[Experiment, int]], model: PixelModel, nproc: int
) -> PixelSums:
    """The sums over a series of images.

    The images are cut into tasks without regard to the number of processes, and added
    in their order: the result does not depend on it.

    Raises:
        ValueError: An image cannot be read.
    """
    global _job
    n_tasks = min(MAX_TASKS, len(images))
    cuts = [i * len(images) // n_tasks for i in range(n_tasks + 1)]
    sums = PixelSums.empty(len(model.usable))
    _job = images, model
    try:
        with progress_bar(total=len(images), desc="Reading", unit=" images") as bar:
            tasks = list(zip(cuts, cuts[1:]))
            nproc = min(nproc, n_tasks)
            with forked_results(_sum_task, tasks, nproc, n_ahead=nproc) as results:
                _add_all(sums, results, bar)
    finally:
        _job = None
    return sums


def _add_all(sums: PixelSums, results: Iterable[PixelSums], bar: progress) -> None:
    for part in results:
        sums.add(part)
        bar.update(part.n_images)
