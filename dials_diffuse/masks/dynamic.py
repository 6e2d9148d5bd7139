"""Faulty pixels, from what they did in a series of images.

No single threshold decides. A pixel is

    hot         high and isolated in half of the images, or in their mean,
    dead        without photons where its surroundings have some,
    flickering  high in more runs of images than a Bragg peak by chance,
    unstable    too low in the mean, too much or too little scatter, isolated.

What is usual is taken from the pixels of the same resolution ring: how often peaks make
them stand out, how far their means lie from those of their surroundings, how much they
scatter. Limits are such that about one good pixel in a million is lost.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np
from scipy import stats

from dials_diffuse.masks.neighbours import neighbour_values, surroundings
from dials_diffuse.masks.rings import (
    Rings,
    outlier_limit,
    ring_centre_and_spread,
    ring_quantiles,
)
from dials_diffuse.masks.statistics import ISOLATED, MAX_Z, PixelSums

FALSE_POSITIVES = 1e-6  # of the good pixels
N_SIGMA = 7.0  # of means
MIN_IMAGES_HIGH = 3  # for hot and flickering pixels
MIN_IMAGES_SCATTER = 10  # for the scatter
MIN_PHOTONS = 20.0  # in the whole series, for weak pixels and the scatter
MIN_EXCESS = 0.15  # of the mean: what detectors have as uneven response
MIN_VISITS = 3  # times what a Bragg peak adds to the sum at the most
VISITED = 0.5  # fraction of the images in which a peak might stay
SPREAD = 0.15  # excess of the neighbours of a hot pixel, in parts of its own
MIN_SCATTER = 1.5  # in units of the expected variance
DEAD, WEAK = 0.2, 0.5  # parts of what the surroundings have
MAX_UNEVENNESS = 0.5  # of the means of the neighbours, in parts of their mean
MIN_LIVE = 0.1  # of the pixels of a ring, to say what the others should count
MANY_PHOTONS = 30.0  # expected by its ring of a pixel that never counted one
FLICKER = 0.2  # fraction of the images for which the log tells the chance
N_ZONES = 12  # of rings, in which peaks are equally frequent


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What the series allows to find.

    Attributes:
        min_runs: Runs from which on a pixel is called flickering, largest of all zones;
            None with too few images.
        chance: Of finding a pixel that flickers in a fifth of the images, smallest.
        n_without: Pixels with too few photons to tell whether they are dead.
        scatter: Whether there are enough images to judge the scatter.
    """

    min_runs: int | None
    chance: float
    n_without: int
    scatter: bool


@dataclasses.dataclass(frozen=True)
class _View:
    """The sums and what all tests need of them; flat arrays.

    Attributes:
        sums: The sums.
        judged: Pixels to judge.
        level: Mean photons of the surroundings in an image.
        mean: Mean photons.
        rings, shapes: Where the pixels are.
    """

    sums: PixelSums
    judged: np.ndarray
    level: np.ndarray
    mean: np.ndarray
    rings: Rings
    shapes: Sequence[tuple[int, int]]

    @property
    def expected(self) -> np.ndarray:
        """Photons of the surroundings in the whole series."""
        return self.sums.n * self.level

    @property
    def variance(self) -> np.ndarray:
        """Expected variance of the sum, at least that of Poisson."""
        return np.maximum(self.sums.variance, self.expected)

    @property
    def photons(self) -> np.ndarray:
        """Number of photons that scatter by Poisson as much as the expected sum."""
        return self.expected**2 / np.maximum(self.variance, 1e-6)


def find_faulty(
    sums: PixelSums, masked: np.ndarray, rings: Rings, shapes: Sequence[tuple[int, int]]
) -> tuple[dict[str, np.ndarray], Sensitivity]:
    """The layers hot, dead, flickering and unstable, and what could be found.

    Args:
        sums: The sums over the images.
        masked: Pixels that are masked anyway, which are not judged; flat.
        rings: Where the pixels lie.
        shapes: Of the panels.

    Returns:
        True for faulty pixels, flat, for each layer; a pixel is in one of them.
    """
    judged = ~masked & (sums.n + sums.above > 0)
    hot = judged & _often_high(sums)
    flickering, min_runs, chance = _flickering(sums, judged & ~hot, rings)
    good = judged & ~hot & ~flickering & (sums.n > 0)
    mean = np.where(sums.n > 0, sums.mean(), 0)
    medians = ring_quantiles(mean[good], rings.number[good], rings.n_rings)[0]
    of_ring = np.nan_to_num(medians)[rings.number]
    level = np.maximum(surroundings(mean, good, shapes, of_ring), 0)
    view = _View(sums, good, level, mean, rings, shapes)
    hot |= _high_in_the_mean(view)
    dead = _dead(view) & ~hot
    view = dataclasses.replace(view, judged=good & ~hot & ~dead)
    unstable = _weak(view) | _scattering(view) | _stuck(view)
    sensitivity = Sensitivity(
        min_runs=min_runs,
        chance=chance,
        n_without=np.count_nonzero(view.judged & ~can_tell_dead(view.photons)),
        scatter=sums.n_images >= MIN_IMAGES_SCATTER,
    )
    layers = {"hot": hot, "dead": dead, "flickering": flickering, "unstable": unstable}
    return layers, sensitivity


def can_tell_dead(photons: np.ndarray) -> np.ndarray:
    """Whether no photon at all would be a surprise: exp(-E) < 1e-6."""
    return photons > -np.log(FALSE_POSITIVES)


def _often_high(sums: PixelSums) -> np.ndarray:
    """Pixels that are high in at least half of their images, and alone so."""
    seen = sums.n + sums.above
    often = (sums.high >= MIN_IMAGES_HIGH) & (2 * sums.high >= seen)
    return often & _alone(sums)


def _alone(sums: PixelSums) -> np.ndarray:
    """Whether the neighbours had little excess when a pixel was high."""
    with np.errstate(invalid="ignore", divide="ignore"):
        usual = np.where(sums.n > 0, sums.variance / sums.n, 0)
    noise = np.sqrt(7 * usual * sums.high)  # of seven neighbours
    return sums.around <= SPREAD * sums.excess + 3 * noise


def _high_in_the_mean(view: _View) -> np.ndarray:
    """Pixels whose sum is far above their surroundings', and alone so.

    The excess must be 7σ, in the σ of the ring too, 15 % of the sum, and more than Bragg
    peaks on the pixel can add in three images, and in half of them.
    """
    sums, expected, variance = view.sums, view.expected, view.variance
    if sums.n_images < MIN_IMAGES_HIGH:
        return np.zeros_like(view.judged)
    excess = sums.total - expected
    n = np.maximum(sums.n, 1)
    a_visit = outlier_limit(view.level, variance / n)
    high = view.judged & (excess > N_SIGMA * _spread(view, excess, variance))
    visits = np.maximum(MIN_VISITS, VISITED * n)
    high &= excess > np.maximum(MIN_EXCESS * expected, visits * a_visit)
    pixels = np.flatnonzero(high)
    level = view.level[pixels]
    around = neighbour_values(view.mean, view.judged, view.shapes, pixels, level)
    isolated = view.mean[pixels] - level > ISOLATED * (around[-2] - level)
    high[pixels[~isolated]] = False
    return high


def _spread(view: _View, excess: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Standard deviation of the sums about their surroundings, that of the ring if more."""
    sigma = np.sqrt(np.maximum(variance, 1e-6))
    z = (excess / sigma)[view.judged]
    number = view.rings.number
    _, spread = ring_centre_and_spread(z, number[view.judged], view.rings.n_rings)
    return sigma * np.maximum(np.nan_to_num(spread), 1)[number]


def _too_few(view: _View, fraction: float) -> np.ndarray:
    """Pixels below a fraction of their surroundings, beyond chance."""
    expected, total = view.expected, view.sums.total
    low = view.judged & (total < fraction * expected) & can_tell_dead(view.photons)
    pixels = np.flatnonzero(low)
    # counts in units in which they scatter as Poisson's
    unit = view.variance[pixels] / expected[pixels]
    chance = stats.poisson.cdf(total[pixels] / unit, expected[pixels] / unit)
    low[pixels[chance > FALSE_POSITIVES]] = False
    return low


def _isolated_low(view: _View, low: np.ndarray) -> np.ndarray:
    """Those of the low pixels that have at most two neighbours like them.

    At the edge of a shadow a pixel has more.
    """
    pixels = np.flatnonzero(low)
    around = neighbour_values(
        view.mean, view.judged, view.shapes, pixels, view.level[pixels]
    )
    result = np.zeros_like(low)
    result[pixels[view.mean[pixels] < 0.7 * around[2]]] = True
    return result


def _dead(view: _View) -> np.ndarray:
    """Pixels that count next to nothing."""
    low = _isolated_low(view, _too_few(view, DEAD))
    never = (view.sums.largest == 0) & (view.sums.smallest == 0)
    dead = (low & never) | _among_equals(view, low)
    expected = view.sums.n * _live_level(view, never)
    many = expected**2 > MANY_PHOTONS * np.maximum(view.sums.variance, expected)
    return dead | (view.judged & never & many)


def _live_level(view: _View, never: np.ndarray) -> np.ndarray:
    """Mean photons in an image of the pixels of a ring that do count, for each pixel.

    Where hardly any pixel of a ring counts, that of the next ring inside.
    """
    number, n_rings = view.rings.number, view.rings.n_rings
    live = view.judged & ~never
    level = ring_quantiles(view.mean[live], number[live], n_rings)[0]
    n_live = np.bincount(number[live], minlength=n_rings)
    n_judged = np.bincount(number[view.judged], minlength=n_rings)
    known = n_live > MIN_LIVE * n_judged
    last = np.maximum.accumulate(np.where(known, np.arange(n_rings), 0))
    return np.nan_to_num(level[last])[number]


def _weak(view: _View) -> np.ndarray:
    """Pixels that count less than half of what they should."""
    low = _too_few(view, WEAK) & (view.photons > MIN_PHOTONS)
    lack = view.expected - view.sums.total
    low &= lack > N_SIGMA * _spread(view, lack, view.variance)
    return _among_equals(view, _isolated_low(view, low))


def _among_equals(view: _View, pixels_found: np.ndarray) -> np.ndarray:
    """Those of the pixels whose neighbours have all about the same mean.

    Where Bragg peaks crowd, and at the edge of a shadow, no pixel is like another.
    """
    pixels = np.flatnonzero(pixels_found)
    level = view.level[pixels]
    around = neighbour_values(view.mean, view.judged, view.shapes, pixels, level)
    # the lowest and the highest may be faulty themselves
    allowed = MAX_UNEVENNESS * level + 4 * np.sqrt(level / view.sums.n[pixels])
    result = np.zeros_like(pixels_found)
    result[pixels[around[-2] - around[1] <= allowed]] = True
    return result


def _scattering(view: _View) -> np.ndarray:
    """Pixels that scatter more than those of their ring, and than their neighbours."""
    sums = view.sums
    if sums.n_images < MIN_IMAGES_SCATTER:
        return np.zeros_like(view.judged)
    judged = view.judged & (view.photons > MIN_PHOTONS)
    judged &= sums.n >= MIN_IMAGES_SCATTER
    n = np.maximum(sums.n, 1)
    # a pixel that is always off by some percent does not scatter
    offset = np.minimum((view.mean - view.level) ** 2, MAX_Z**2 * view.variance / n)
    scatter = sums.square / n - offset * n / np.maximum(view.variance, 1e-6)
    number, n_rings = view.rings.number, view.rings.n_rings
    usual, spread = ring_centre_and_spread(scatter[judged], number[judged], n_rings)
    usual, spread = (np.nan_to_num(x)[number] for x in (usual, spread))
    sigma = np.maximum(spread, np.sqrt(2 / n))
    limit = np.maximum(
        usual + (N_SIGMA + 1) * sigma, np.maximum(2 * usual, MIN_SCATTER)
    )
    high = judged & (scatter > np.minimum(limit, 0.95 * MAX_Z**2))
    pixels = np.flatnonzero(high)
    around = neighbour_values(scatter, judged, view.shapes, pixels, usual[pixels])
    excess = scatter[pixels] - usual[pixels]
    high[pixels[excess <= ISOLATED * (around[-2] - usual[pixels])]] = False
    # a pixel with a mean of its own lies in a peak, or is hot
    high &= view.mean <= (1 + MAX_UNEVENNESS) * view.level
    return _among_equals(view, high)


def _stuck(view: _View) -> np.ndarray:
    """Pixels that give the same number in all images where photons would not.

    The chance is at most p^(n - 1), with the probability p of the likeliest number.
    """
    sums = view.sums
    stuck = view.judged & (sums.smallest == sums.largest) & (sums.n > 1)
    pixels = np.flatnonzero(stuck & (view.photons > MIN_PHOTONS))
    level = view.level[pixels]
    chance = stats.poisson.pmf(np.floor(level), level) ** (sums.n[pixels] - 1.0)
    result = np.zeros_like(stuck)
    result[pixels[chance < FALSE_POSITIVES]] = True
    return result


def _flickering(
    sums: PixelSums, judged: np.ndarray, rings: Rings
) -> tuple[np.ndarray, int | None, float]:
    """Pixels that are high in too many runs of images, and what it takes.

    A peak makes a pixel of a zone of rings high with a probability p per image, which
    is found from all the pixels of the zone that are not flickering, again and again until
    nothing changes.

    Returns:
        The pixels; the largest number of runs that is needed in a zone, None if there are
        too few images; the smallest chance to find a pixel that flickers in a fifth of the
        images.
    """
    found = np.zeros_like(judged)
    if sums.n_images < MIN_IMAGES_HIGH:
        return found, None, 0.0
    candidates = judged & _alone(sums)
    zones = _zones(rings, judged)
    needed = np.full(N_ZONES, MIN_IMAGES_HIGH)
    n = sums.n + sums.above
    for _ in range(10):
        usual = judged & ~found
        runs = np.bincount(zones[usual], sums.runs[usual], minlength=N_ZONES)
        seen = np.bincount(zones[usual], n[usual], minlength=N_ZONES)
        p = runs / np.maximum(seen, 1)
        needed = np.maximum(
            stats.binom.isf(FALSE_POSITIVES, sums.n_images, p) + 1, MIN_IMAGES_HIGH
        )
        before, found = found, candidates & (sums.runs >= needed[zones])
        if np.array_equal(before, found):
            break
    filled = np.bincount(zones[judged], minlength=N_ZONES) > 0
    most = int(needed[filled].max(initial=MIN_IMAGES_HIGH))
    # a run begins where a bright image follows one that is not
    chance = stats.binom.sf(most - 1, sums.n_images, FLICKER * (1 - FLICKER))
    return found, most, float(chance)


def _zones(rings: Rings, judged: np.ndarray) -> np.ndarray:
    """Zones of rings with about equal numbers of pixels; number of each pixel."""
    n = np.cumsum(np.bincount(rings.number[judged], minlength=rings.n_rings))
    zone = np.minimum(n * N_ZONES // max(int(n[-1]), 1), N_ZONES - 1)
    return zone[rings.number]
