"""Quantiles of Poisson counts as robust estimates of their mean.

A quantile is indifferent to how bright a Bragg spot is, but one of integers takes only
integer values, and differs from the mean. Counts n are therefore spread evenly over
[n, n + 1): the quantile Q_q(μ) of the spread counts of a Poisson distribution is a
continuous, increasing function of its mean μ,

    Q_q(μ) = n + (q - F(n - 1; μ)) / p(n; μ)        with F(n - 1; μ) < q <= F(n; μ)

and the share of the spread count n that lies below it is h = clip(Q_q(μ) - n, 0, 1).
Whatever μ is, the mean of h is q. So for pixels with different expected counts
μ_i = a_i + x m_i the solution x of

    Σ_i [ h(n_i; μ_i) - q ] = 0

is free of bias, at 0.01 counts per pixel as at 1000. A fraction ε of outliers, however
large, moves μ by about ε q σ / φ(z_q): 1.25 ε σ for the median.

Spreading counts: Machado & Santos Silva (2005) J. Am. Stat. Assoc. 100, 1226,
doi:10.1198/016214505000000330.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy import special

ROOT_STEP = 0.005  # of the table of Q, in sqrt(μ)
LARGEST_ROOT = 30.0  # beyond it the expansion is good to 1e-3 counts
BISECTIONS = 40
CLASS_WIDTH = 0.02  # relative width of the classes of expected counts
SLOPE_STEP = 0.25  # standard deviations


@functools.lru_cache(maxsize=8)
def _table(q: float) -> tuple[np.ndarray, np.ndarray]:
    """Q_q at equal steps of sqrt(μ)."""
    root = np.arange(0.0, LARGEST_ROOT + ROOT_STEP, ROOT_STEP)
    mean = root * root
    n = np.ceil(special.pdtrik(q, np.maximum(mean, 1e-12))).clip(0)
    n[np.exp(-mean) >= q] = 0
    # rounding may leave the neighbour
    n += special.pdtr(n, mean) < q
    n -= (n > 0) & (special.pdtr(np.maximum(n - 1, 0), mean) >= q)
    below = np.where(n > 0, special.pdtr(np.maximum(n - 1, 0), mean), 0.0)
    share = special.xlogy(n, mean) - mean - special.gammaln(n + 1)
    return root, n + (q - below) / np.exp(share)


def poisson_quantile(mean: np.ndarray, q: float) -> np.ndarray:
    """Quantile Q_q of spread Poisson counts.

    Above 900 counts by the expansion of Cornish and Fisher,
    Q = μ + z sqrt(μ) + (z² - 1)/6 + 1/2.

    Args:
        mean: Expected counts, not negative.
        q: Fraction of the distribution below the quantile.
    """
    root = np.sqrt(mean)
    z = special.ndtri(q)
    result = np.interp(root, *_table(q))
    large = root > LARGEST_ROOT
    result[large] = (mean + z * root + (z * z + 2) / 6)[large]
    return result


@dataclasses.dataclass(frozen=True)
class Cells:
    """Pixels of one bin, of equal counts and about equal expected counts, together.

    Attributes:
        bins: Number of the bin.
        counts: Photons, whole numbers.
        known: Mean of the known part a of the expected photons.
        m: Mean of the factor m of the unknown.
        n_pixels: How many pixels there are.
    """

    bins: np.ndarray
    counts: np.ndarray
    known: np.ndarray
    m: np.ndarray
    n_pixels: np.ndarray


def make_cells(
    bins: np.ndarray, counts: np.ndarray, m: np.ndarray, known: np.ndarray | None
) -> Cells:
    """Group pixels: a hundred times fewer of them at a few counts per pixel.

    Expected counts within a class differ by ``CLASS_WIDTH`` at most, which moves the
    solution by the square of that.

    Args:
        bins: Bin of each pixel, shape (n,).
        counts: Photons; rounded to whole numbers.
        m: Factor of the unknown, positive.
        known: Known part of the expected photons, or None for 0.
    """
    counts = np.rint(counts)
    lowest = counts.min(initial=0)
    scale = m if known is None else np.maximum(known, 0.1 * m)
    classes = np.rint(np.log(np.maximum(scale, 1e-30)) / CLASS_WIDTH).astype(np.int64)
    classes -= classes.min(initial=0)
    n_values = int(counts.max(initial=0) - lowest) + 1
    n_classes = int(classes.max(initial=0)) + 1
    key = (bins.astype(np.int64) * n_classes + classes) * n_values
    key += (counts - lowest).astype(np.int64)
    key, inverse, n_pixels = np.unique(key, return_inverse=True, return_counts=True)
    inverse = inverse.ravel()
    return Cells(
        bins=key // (n_classes * n_values),
        counts=key % n_values + lowest,
        known=(
            np.zeros(len(key))
            if known is None
            else np.bincount(inverse, known) / n_pixels
        ),
        m=np.bincount(inverse, m) / n_pixels,
        n_pixels=n_pixels,
    )


@dataclasses.dataclass(frozen=True)
class Solution:
    """The unknown of each bin.

    Attributes:
        value: Shape (n_bins,); NaN where there are no pixels.
        variance: Its variance; infinite there.
        n_pixels: Number of pixels.
    """

    value: np.ndarray
    variance: np.ndarray
    n_pixels: np.ndarray


class _Equation:
    """The share of the pixels below the quantile, for each bin, less q."""

    def __init__(self, cells: Cells, n_bins: int, q: float) -> None:
        self.cells, self.n_bins, self.q = cells, n_bins, q
        self.n_pixels = self.sum(np.ones(len(cells.bins)))

    def sum(self, values: np.ndarray) -> np.ndarray:
        weighted = values * self.cells.n_pixels
        return np.bincount(self.cells.bins, weighted, minlength=self.n_bins)

    def expected(self, x: np.ndarray) -> np.ndarray:
        """Expected photons of the cells; never negative."""
        c = self.cells
        return np.maximum(c.known + x[c.bins] * c.m, 0.0)

    def shares(self, x: np.ndarray) -> np.ndarray:
        quantile = poisson_quantile(self.expected(x), self.q)
        return np.clip(quantile - self.cells.counts, 0.0, 1.0)

    def excess(self, x: np.ndarray) -> np.ndarray:
        return self.sum(self.shares(x) - self.q)


def solve_bins(
    bins: np.ndarray,
    counts: np.ndarray,
    m: np.ndarray,
    n_bins: int,
    q: float,
    known: np.ndarray | None = None,
) -> Solution:
    """The unknown x of each bin, by the quantile of counts with mean a + x m.

    The variance is that of the root of an estimating equation,
    Σ (h_i - q)² / (d/dx Σ h_i)², the slope found over half a standard deviation; so
    noise other than of counting is in it. It is at least that of one photon in the bin.

    Args:
        bins: Bin of each pixel, 0 <= bin < n_bins, shape (n,).
        counts: Photons of the pixels.
        m: Factor of the unknown, positive.
        n_bins: Number of bins.
        q: Fraction of the pixels below the quantile, between 0 and 1.
        known: Known part a of the expected photons; None for 0, which makes x positive.
    """
    cells = make_cells(bins, counts, m, known)
    equation = _Equation(cells, n_bins, q)
    n_pixels = equation.n_pixels
    total = equation.sum(cells.m)
    seen = n_pixels > 0
    m_mean = total / np.where(seen, n_pixels, 1)
    m_mean[~seen] = 1.0
    mean = equation.sum(np.maximum(cells.counts, 0)) / np.where(seen, n_pixels, 1)
    start = np.zeros(n_bins)
    step = (mean + 1.0) / m_mean
    low = start if known is None else start - step
    x = _bisect(equation, low, start + step, known is not None)
    expected = x * m_mean + equation.sum(cells.known) / np.where(seen, n_pixels, 1)
    # no step to below zero counts
    step = np.minimum(SLOPE_STEP * np.sqrt(np.maximum(expected, 0)), 0.2 * expected)
    delta = np.maximum(step, 1e-3) / m_mean
    slope = (equation.excess(x + delta) - equation.excess(x - delta)) / (2 * delta)
    spread = equation.sum((equation.shares(x) - q) ** 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.maximum(spread / slope**2, 1 / total**2)
    good = seen & (slope > 0)
    return Solution(
        value=np.where(good, x, np.nan),
        variance=np.where(good, variance, np.inf),
        n_pixels=n_pixels.astype(np.int64),
    )


def _bisect(
    equation: _Equation, low: np.ndarray, high: np.ndarray, both_ways: bool
) -> np.ndarray:
    """Root of the increasing excess of each bin, from a guess of where it is."""
    step = high - low
    for _ in range(BISECTIONS):
        short = equation.excess(high) < 0
        if not short.any():
            break
        step = np.where(short, 2 * step, step)
        high = np.where(short, high + step, high)
    for _ in range(BISECTIONS if both_ways else 0):
        short = (equation.excess(low) > 0) & np.any(equation.expected(low) > 0)
        if not short.any():
            break
        step = np.where(short, 2 * step, step)
        low = np.where(short, low - step, low)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        above = equation.excess(middle) >= 0
        low, high = np.where(above, low, middle), np.where(above, middle, high)
        if np.all(high - low <= 1e-7 * np.maximum(np.abs(high), 1e-300)):
            break
    return 0.5 * (low + high)
