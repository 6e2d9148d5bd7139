from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import binom, norm, poisson

from dials_diffuse.scaling import error_model
from dials_diffuse.scaling.error_model import ErrorModel
from dials_diffuse.scaling.outliers import THRESHOLD, deviates, find_outliers, tails
from dials_diffuse.scaling.reference import Reference


class Simulated(NamedTuple):
    """Rows, and the counts that were expected of them."""

    counts: np.ndarray
    response: np.ndarray
    base: np.ndarray
    variance: np.ndarray
    start: np.ndarray
    expected: np.ndarray

    def find(self, counts=None, **kwargs):
        counts = self.counts if counts is None else counts
        columns = (counts, self.response, self.base, self.variance, self.start)
        return find_outliers(*columns, **kwargs)

    def merged(self, use):
        """Intensity of each group from some of its rows."""
        first = self.start[:-1]
        photons = np.add.reduceat((self.counts - self.base) * use, first)
        return photons / np.add.reduceat(self.response * use, first)

    def error(self):
        """Standard error of each row against the rest of its group."""
        n, first = self.start[1], self.start[:-1]
        x = self.response
        rest = np.repeat(np.add.reduceat(x, first), n) - x
        var = self.expected + self.variance
        var_of_rest = np.repeat(np.add.reduceat(var, first), n) - var
        return np.sqrt(var + (x / rest) ** 2 * var_of_rest)


def simulate(multiplicity, mean, n_rows=200_000, b=0.0, background=0.3):
    """Poisson counts of unequal responses and intensities over a known background."""
    rng = np.random.default_rng(7)
    start = np.arange(n_rows // multiplicity + 1) * multiplicity
    n = start[-1]
    x = rng.lognormal(0.0, 0.3, n)
    signal = np.repeat(rng.gamma(4.0, 0.25, len(start) - 1), multiplicity) * x * mean
    signal *= 1 - background
    base = background * mean * x
    variance = (0.01 * base) ** 2
    seen = signal * (1 + b * rng.normal(size=n)) + base
    seen += rng.normal(size=n) * np.sqrt(variance)
    counts = rng.poisson(np.maximum(seen, 0)).astype(float)
    return Simulated(counts, x, base, variance, start, signal + base)


def group_of(*counts, x=1.0):
    """One group of rows alike, without a background."""
    n = len(counts)
    zero = np.zeros(n)
    return find_outliers(
        np.array(counts, dtype=float), np.full(n, x), zero, zero, np.array([0, n])
    )


@pytest.mark.parametrize(
    "multiplicity, mean", [(3, 1000), (8, 300), (8, 3000), (30, 300), (30, 3000)]
)
def test_deviations_of_5_sigma_are_found_and_good_rows_stay(multiplicity, mean):
    rows = simulate(multiplicity, mean)
    rng = np.random.default_rng(1)
    n = len(rows.counts)
    bad = rng.random(n) < 0.01
    sign = rng.choice([-1, 1], n)
    counts = np.where(bad, rows.expected + 5 * sign * rows.error(), rows.counts)
    found = rows.find(np.rint(counts))
    assert found[bad & (sign > 0)].mean() > 0.95
    assert found[bad & (sign < 0)].mean() > 0.95
    assert found[~bad].mean() < 1e-3


def test_rejection_of_one_side_only_misses_the_other():
    """Negative control of the test above."""
    rows = simulate(8, 3000, 100_000)
    bad = np.arange(len(rows.counts)) % 100 == 0
    counts = np.where(bad, rows.expected - 5 * rows.error(), rows.counts)
    found = rows.find(np.rint(counts))
    one_sided = found & (counts > rows.expected)
    assert found[bad].mean() > 0.95 > 0.1 > one_sided[bad].mean()


@pytest.mark.parametrize("multiplicity", [3, 8, 30])
@pytest.mark.parametrize("mean", [0.1, 0.3, 1, 3, 5, 30, 1000])
def test_good_rows_stay_and_the_map_is_not_biased(multiplicity, mean):
    rows = simulate(multiplicity, mean)
    found = rows.find()
    above = rows.counts > rows.expected
    assert np.mean(found & above) < 5e-4
    assert np.mean(found & ~above) < 5e-4
    before, after = rows.merged(np.ones(len(found))), rows.merged(~found)
    assert abs(after.mean() / before.mean() - 1) < 1e-3


@pytest.mark.parametrize("mean", [0.03, 0.1, 0.3])
def test_tails_of_equal_probability_would_bias_the_map(mean):
    """Negative control: with the expected counts known, and the usual tail."""
    counts = np.random.default_rng(7).poisson(mean, 2_000_000)
    good = poisson.sf(counts - 1, mean) > norm.sf(THRESHOLD)
    assert np.mean(~good) < 5e-4
    assert counts[good].mean() / mean < 1 - 2e-3


@pytest.mark.parametrize("multiplicity", [3, 8, 30])
@pytest.mark.parametrize("mean", [0.3, 30, 1000])
def test_gross_outliers_do_not_take_good_rows_with_them(multiplicity, mean):
    rows = simulate(multiplicity, mean, 60_000)
    rng = np.random.default_rng(1)
    groups = np.flatnonzero(rng.random(len(rows.start) - 1) < 0.2)
    place = rows.start[groups] + rng.integers(0, multiplicity, len(groups))
    bad = np.zeros(len(rows.counts), dtype=bool)
    bad[place] = True
    counts = rows.counts.copy()
    counts[bad] = np.rint(rows.expected + 100 * np.sqrt(rows.expected))[bad]
    found = rows.find(counts)
    assert found[bad].all()
    assert found[~bad].mean() < 1e-3


def test_rows_without_counts_are_outliers_only_where_many_are_expected():
    assert list(group_of(0, 1000, 1010, 990)) == [True, False, False, False]
    assert not group_of(0, 4, 5, 3, 4).any()
    assert not group_of(1, 0, 0, 0, 0, 0).any()
    assert not group_of(0, 0, 0).any()


def test_two_gross_outliers_of_a_group_go_one_after_the_other():
    found = group_of(5000, 100, 103, 95, 1, 99, 104, 800, 100, 97)
    assert list(np.flatnonzero(found)) == [0, 4, 7]


def against_a_map(mean, a, f, ratio, n=150_000):
    """Single rows of scatter a and a map of its own errors, normal ones.

    Args:
        mean: Photons of a row.
        a: Of the rows.
        f: Fractional error of the map.
        ratio: Response of the map over that of the rows.
    """
    rows = simulate(1, mean, n)
    counts = rows.expected + a * (rows.counts - rows.expected)
    rng = np.random.default_rng(2)
    truth = (rows.expected - rows.base) / rows.response
    m, base = ratio, 0.3 * mean / ratio
    sigma = np.sqrt(truth / m + base + (f * truth) ** 2)
    seen = truth + sigma * rng.normal(size=n)
    columns = (seen, np.full(n, float(m)), np.full(n, base), np.full(n, f**2))
    return rows, counts, Reference(np.arange(n), *columns)


@pytest.mark.parametrize("a, f, ratio", [(1, 0, 1), (1.5, 0.05, 3), (1, 0.03, 3)])
def test_against_a_map_single_rows_are_judged_by_its_own_error(a, f, ratio):
    """As often as the threshold says, and either way alike."""
    rows, counts, known = against_a_map(1000, a, f, ratio)
    model = ErrorModel(float(a))
    found = rows.find(counts, error_model=model, reference=known)
    assert np.mean(found) == pytest.approx(2 * norm.sf(THRESHOLD), rel=0.35)
    above = counts > rows.expected
    assert np.mean(above[found]) == pytest.approx(0.5, abs=0.2)
    assert not rows.find(counts, error_model=model).any()  # control: without the map
    # Control: with half the error, too many.
    sharp = Reference(
        known.voxel,
        known.intensity,
        4 * known.response,
        known.base / 4,
        known.fractional / 4,
    )
    many = rows.find(counts, error_model=ErrorModel(a / 2), reference=sharp)
    assert np.mean(many) > 0.05


def test_gross_rows_go_where_a_map_knows_the_voxel():
    rows, counts, known = against_a_map(100, 1, 0, 3, n=3000)
    unknown = np.arange(3000) % 2 == 0
    known.response[unknown] = 0
    bad = np.arange(3000) % 3 == 0
    counts = np.where(bad, counts + 300, counts)
    found = rows.find(counts, reference=known)
    assert np.all(found[bad & ~unknown]) and not found[unknown].any()
    assert np.sum(found & ~bad) <= 3
    # Two rows that disagree: the map tells which is wrong.
    start = np.arange(0, 3001, 2)
    pairs = rows._replace(
        response=np.full(3000, 100.0), base=np.zeros(3000), start=start
    )
    counts = np.tile([100.0, 400.0], 1500)
    one = Reference(np.arange(1500), *(np.full(1500, x) for x in (1, 300, 0, 0)))
    found = pairs.find(counts, reference=one)
    assert np.all(found == (counts == 400))
    assert not pairs.find(counts).any()  # control


def test_of_two_rows_none_is_rejected():
    assert not group_of(10, 100_000).any()
    # Two that disagree may be left of three.
    assert list(group_of(100_000, 10, 300)) == [True, False, False]


def test_single_rows_and_no_rows_are_not_rejected():
    n = 50
    counts = np.random.default_rng(7).poisson(3.0, n) ** 4.0
    found = find_outliers(
        counts, np.ones(n), np.zeros(n), np.zeros(n), np.arange(n + 1)
    )
    assert found.shape == (n,) and not found.any()
    none = np.empty(0)
    for start in (np.array([0]), np.array([0, 0, 0])):
        assert find_outliers(none, none, none, none, start).shape == (0,)


def test_groups_without_rows_change_nothing():
    rows = simulate(8, 100, 2000)
    counts = rows.counts.copy()
    counts[5] = 10_000
    start = np.repeat(rows.start, 2)
    again = rows._replace(start=start)
    assert np.array_equal(rows.find(counts), again.find(counts))
    assert rows.find(counts)[5]


def test_a_huge_threshold_rejects_nothing():
    rows = simulate(8, 100, 20_000)
    counts = rows.counts.copy()
    counts[::100] += 50
    assert rows.find(counts).sum() > 150
    assert not rows.find(counts, threshold=100.0).any()


def test_the_error_model_keeps_rows_that_scatter_more():
    rows = simulate(8, 3000, b=0.1)
    assert rows.find().mean() > 0.05
    assert rows.find(error_model=ErrorModel(1.0, 0.1)).mean() < 1.5e-3
    doubled = rows._replace(counts=4 * simulate(8, 3000 / 4).counts)
    assert doubled.find().mean() > 0.02
    assert doubled.find(error_model=ErrorModel(2.0, 0.0)).mean() < 1e-3


def test_noise_of_an_integrating_detector_stays():
    """Fractional and negative counts, whose variance is in that of the base."""
    rows = simulate(8, 0.5)
    noise = np.random.default_rng(3).normal(size=len(rows.counts))
    rows = rows._replace(counts=rows.counts + noise, variance=rows.variance + 1)
    assert (rows.counts < 0).mean() > 0.1
    assert rows.find().mean() < 1e-3
    counts = rows.counts.copy()
    counts[::80] = -30
    found = rows.find(counts)
    assert found[::80].all()
    assert np.delete(found, np.s_[::80]).mean() < 1e-3


def test_result_does_not_depend_on_units_order_or_blocks(monkeypatch):
    rows = simulate(8, 30, 8000)
    counts = rows.counts.copy()
    counts[::50] += 60
    found = rows.find(counts)
    assert found.sum() > 100
    scaled = rows._replace(response=rows.response * 1e-7)
    assert np.array_equal(scaled.find(counts), found)
    order = np.random.default_rng(2).permuted(np.arange(8000).reshape(-1, 8), axis=1)
    order = order.ravel()
    shuffled = Simulated(*(c[order] for c in rows[:4]), rows.start, rows.expected)
    assert np.array_equal(shuffled.find(counts[order]), found[order])
    monkeypatch.setattr(error_model, "ROWS_PER_BLOCK", 100)
    assert np.array_equal(rows.find(counts), found)


def test_tails_are_those_of_one_photon_less():
    rng = np.random.default_rng(7)
    total = rng.integers(2, 60, 500).astype(float)
    share = rng.uniform(0.02, 0.6, 500)
    n = rng.binomial(total.astype(int), share).astype(float)
    z = deviates(n, total, share)
    above, below = z > 0, z < 0
    upper = binom.sf(n - 2, total - 1, share)
    lower = binom.cdf(n, total - 1, share)
    found = tails(n, total, share, z)
    assert above.sum() > 50 and below.sum() > 50
    assert found[above] == pytest.approx(upper[above], abs=1e-8)
    assert found[below] == pytest.approx(lower[below], abs=1e-8)


def test_deviates_of_many_counts_are_normal_ones():
    total, share = np.full(9, 4e6), np.full(9, 0.2)
    z = np.linspace(-4, 4, 9)
    n = total * share + z * np.sqrt(total * share * (1 - share))
    assert deviates(n, total, share) == pytest.approx(z, abs=0.01)
    assert tails(n, total, share, z)[[0, 8]] == pytest.approx(norm.sf(4), rel=0.05)


def test_wrong_input_is_refused():
    one = np.ones(4)
    with pytest.raises(ValueError, match="differ in length: 4, 4, 4, 3"):
        find_outliers(one, one, one, one[:3], np.array([0, 4]))
    with pytest.raises(ValueError, match="limits of the groups do not fit"):
        find_outliers(one, one, one, one, np.array([0, 3]))
    with pytest.raises(ValueError, match="response of each row .* but one is -1"):
        find_outliers(one, -one, one, one, np.array([0, 4]))
    with pytest.raises(ValueError, match="threshold of outliers, 0, must be positive"):
        find_outliers(one, one, one, one, np.array([0, 4]), threshold=0)
