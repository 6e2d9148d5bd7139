"""Rejection of observations that disagree with the rest of their group.

Each row, N counts expected to be x·I + base, is compared with the other rows of its
group of symmetry equivalents, as in the standard outlier rejection of dials.scale:
their intensity, the row left out, is

    I' = Σ (N_j - base_j) / Σ x_j        (j ≠ i)

Counts are few, so the test is that of Poisson counts: given the sum T of the counts of
the group, those of the row are binomial with the share p of the row in the expected
counts, whatever I is (Przyborowski & Wilenski 1940,
https://doi.org/10.1093/biomet/31.3-4.313). What scatters beyond Poisson counts, the
variance v of the base and (b x I)² of the error model, is added to both the counts and
their expectation, and a² divides all, which gives them the mean and the variance that
they should have. A map to scale to (``reference``) is one more row of the rest, with so
many effective counts that it has its error as stated, without a and b.

Rejecting a tail moves the mean of what is left: without the counts n >= k of a binomial
distribution it is too low by the fraction P(n = k - 1) of T - 1 photons. At low counts
the lower tail does not exist, nothing makes up for it, and tails of equal probability
would bias the map: at 0.1 photons, k = 3 has a chance of 1e-4 but carries 0.5 % of the
photons. So the tails are weighted by photons: a photon's T - 1 companions in the group
decide, P(n >= k - 1) or P(n <= k) of T - 1. The bias is less than the tail of the
threshold, whatever the counts; where they are many this is the usual test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import betainc, xlogy
from scipy.stats import norm

from dials_diffuse.scaling.error_model import ErrorModel, Rows, blocks_of_rows

if TYPE_CHECKING:
    from dials_diffuse.scaling.reference import Reference

# Deviation of an outlier, in standard deviations of the normal distribution.
THRESHOLD = 3.4

# With two rows that disagree it is not known which is wrong.
MIN_ROWS = 3

# Below this deviation no tail is computed; deviates and tails nearly agree.
MARGIN = 0.7


def find_outliers(
    counts: np.ndarray,
    response: np.ndarray,
    base: np.ndarray,
    variance: np.ndarray,
    start: np.ndarray,
    threshold: float = THRESHOLD,
    error_model: ErrorModel = ErrorModel(),
    reference: Reference | None = None,
) -> np.ndarray:
    """Which rows deviate from the rest of their group by more than a threshold.

    The worst row of each group is rejected if it is an outlier, and its group is tested
    again without it: a gross outlier makes all others deviate. In groups of two rows
    both stay, as in the standard rejection of dials.scale: to reject both makes a hole in
    the map, to choose the smaller one a bias. A map to scale to is not judged but judges:
    what it knows may lose all of its rows, even a single one.

    Args:
        counts: N, photons, shape (n,), sorted by group; they need be neither integers
            nor positive.
        response: x, normalisation times inverse scale factor, positive, s·sr.
        base: Expected photons that are not signal.
        variance: Variance of the base, photons².
        start: First row of each group and, last, the number of rows, int64, shape
            (n_groups + 1,).
        threshold: Deviation whose normal tail is the limit for both tails, in standard
            deviations.
        error_model: Scatter beyond that of counting.
        reference: What a map says of each group, one more row of it that stays.

    Raises:
        ValueError: Arrays that do not fit, a response or a threshold that is not
            positive.
    """
    if not threshold > 0:
        raise ValueError(f"The threshold of outliers, {threshold}, must be positive")
    outlier = np.zeros(len(counts), dtype=bool)
    columns = (counts, response, base, variance, start)
    for place, rows in blocks_of_rows(*columns, reference):
        outlier[place] = _find_in_block(rows, threshold, error_model)
    return outlier


def _find_in_block(rows: Rows, threshold: float, model: ErrorModel) -> np.ndarray:
    """The outliers among some groups of rows."""
    outlier = np.zeros(len(rows.group), dtype=bool)
    number = np.flatnonzero(rows.size() >= least_rows(rows))
    rows = rows.select(number)
    while len(number):
        worst = worst_outliers(rows, threshold, model)
        outlier[number[worst]] = True
        # Only groups that lost a row can hold another outlier.
        again = np.zeros(rows.group[-1] + 1, dtype=bool)
        again[rows.group[worst]] = True
        again = again[rows.group] & (rows.size() > least_rows(rows))
        again[worst] = False
        number, rows = number[again], rows.select(again)
    return outlier


def least_rows(rows: Rows) -> np.ndarray:
    """So many rows the group of each row must have to be tested; with a map, one."""
    return np.where(rows.known, 1, MIN_ROWS)


def worst_outliers(rows: Rows, threshold: float, model: ErrorModel) -> np.ndarray:
    """Numbers of the rows that are the worst of their group and outliers.

    Args:
        rows: Of groups of several rows, or with a map.
    """
    n, total, share = shares(rows, model)
    z = deviates(n, total, share)
    size = np.abs(z)
    new = np.ones(len(size), dtype=bool)
    new[1:] = rows.group[1:] != rows.group[:-1]
    first = np.flatnonzero(new)
    largest = np.maximum.reduceat(size, first)
    place = np.cumsum(new) - 1
    candidate = np.flatnonzero(
        (size == largest[place]) & (size > max(threshold - MARGIN, 0))
    )
    # Of equal ones, the first.
    candidate = candidate[np.unique(place[candidate], return_index=True)[1]]
    tail = tails(n[candidate], total[candidate], share[candidate], z[candidate])
    return candidate[tail < norm.sf(threshold)]


def shares(rows: Rows, model: ErrorModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of each row, those of its group, and its expected share of them.

    They are effective counts, Poisson distributed as far as mean and variance go: with
    all that scatters, n = (N + v + (b x I')²) / a², of mean (σ² + (b x I')²) / a².

    Args:
        rows: Of groups of several rows, or with a map.

    Returns:
        n, T and p, each of shape (n,).
    """
    x, a_squared = rows.response, model.a**2
    photons, map_x, map_base = map_as_row(rows, model)

    def others(values: np.ndarray, of_map: np.ndarray | float = 0.0) -> np.ndarray:
        return rows.total(values) - values + of_map

    response = others(x, map_x)
    # No intensity is known to be less than one photon in all others.
    signal = np.maximum(others(rows.counts - rows.base, photons), 1.0)
    intensity = signal / response
    added = model.b**2 * intensity**2
    own = rows.variance + added * x**2
    rest = others(rows.variance) + added * others(x**2)
    mean = rows.base + x * intensity + own
    mean_of_rest = others(rows.base, map_base) + signal + rest
    # Those of an integrating detector may be negative.
    n_of_rest = np.maximum(others(rows.counts, photons + map_base) + rest, 0.0)
    n = rows.counts + own
    # The base is subtracted by its expectation, which is never negative.
    share = np.clip(mean / (mean + mean_of_rest), 1e-12, 1 - 1e-12)
    return n / a_squared, (n + n_of_rest) / a_squared, share


def map_as_row(
    rows: Rows, model: ErrorModel
) -> tuple[np.ndarray, np.ndarray | float, np.ndarray | float]:
    """A map as one more row of each group that gives its intensity the stated error.

    The share of a row in the counts says how much the errors of the others add to those
    of the row only if all have the same share of base and scatter. So the map gets as
    much as the row, q = mean/x counts per response instead of I, and the response
    a² q/var(I) whose counts over a² are as uncertain as the map is.

    Args:
        rows: Of groups of several rows, or with a map.
        model: Scatter of the rows.

    Returns:
        Photons less base, response and base, all 0 where there is no map.
    """
    known = rows.reference
    if known is None:
        return np.zeros(len(rows.group)), 0.0, 0.0
    x, a_squared = rows.response, model.a**2
    # Of all rows: by its own intensity a map that is too weak would be too certain.
    photons = rows.total(rows.counts - rows.base) + a_squared * known.photons
    response = rows.total(x) + a_squared * known.response
    intensity = np.maximum(photons, 1.0) / response
    scatter = rows.base + rows.variance + (model.b * x * intensity) ** 2
    excess = np.maximum(scatter, 0.0) / x
    own = a_squared * (intensity + excess) * known.weights(intensity)
    return own * known.intensity, own, own * excess


def deviates(n: np.ndarray, total: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Signed roots of the deviance of binomial counts, nearly standard normal.

    That of the counts and the total in which ``tails`` takes its tails. Counts below
    zero, which no binomial distribution has, continue it by normal deviates.

    Args:
        n: Effective counts of each row.
        total: Those of its group.
        share: Expected share.
    """
    companions = np.maximum(total - 1, 0.0)
    mean = companions * share
    above = n - 1 > mean
    k = np.where(above, n - 1, np.minimum(np.maximum(n, 0.0), mean))
    rest = np.maximum(companions - k, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        deviance = xlogy(k, k / mean) + xlogy(rest, rest / (companions - mean))
    root = np.sqrt(2 * np.maximum(np.nan_to_num(deviance, posinf=0.0), 0.0))
    return np.where(above, root, -root) + np.minimum(normal_deviates(n, mean, share), 0)


def normal_deviates(n: np.ndarray, mean: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Deviates of counts below zero, in standard deviations, and zero for others."""
    scale = np.sqrt(np.maximum(mean, 1.0) / (1 - share))
    return np.where(n < 0, n / scale, 0.0)


def tails(
    n: np.ndarray, total: np.ndarray, share: np.ndarray, deviate: np.ndarray
) -> np.ndarray:
    """Tail of the binomial distribution from the counts on, weighted by photons.

    P(n >= k - 1) above the mean and P(n <= k) below it, of T - 1 photons: with the
    regularised incomplete beta function also for counts that are no integers.

    Args:
        n, total, share: As those of ``deviates``.
        deviate: Their deviates: the sign says which tail is meant.
    """
    above = deviate > 0
    k = np.where(above, n - 1, np.maximum(n, 0.0))
    rest = total - 1 - k
    upper = betainc(np.maximum(k, 1e-9), np.maximum(rest + 1, 1e-9), share)
    lower = betainc(np.maximum(rest, 1e-9), k + 1, 1 - share)
    # Below zero the distribution has come to its end: as for a normal one.
    lower = np.where(n < 0, norm.cdf(deviate), lower)
    return np.where(above, upper, lower)
