from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dials_diffuse.background.quantile import make_cells, poisson_quantile, solve_bins


@pytest.mark.parametrize("q", [0.2, 0.5])
@pytest.mark.parametrize("mean", [0.01, 0.3, 1.0, 7.7, 150.0, 899.9, 901.0, 5000.0])
def test_share_below_quantile_is_q_for_any_mean(mean, q):
    """Expectation of h over the Poisson distribution, summed term by term."""
    n = np.arange(0, int(mean + 12 * np.sqrt(mean) + 20))
    h = np.clip(poisson_quantile(np.array([mean]), q) - n, 0, 1)
    expected = np.sum(h * stats.poisson.pmf(n, mean))
    # the table, and the expansion beyond it, are as good as this
    assert expected == pytest.approx(q, abs=4e-4)


def test_quantile_is_continuous_and_increasing():
    mean = np.linspace(0.001, 40, 20001)
    steps = np.diff(poisson_quantile(mean, 0.5))
    assert steps.min() > 0
    assert steps.max() < 0.01


@pytest.mark.parametrize("q", [0.3, 0.5])
@pytest.mark.parametrize("mean", [0.3, 1.0, 10.0, 300.0])
def test_mean_is_unbiased_and_errors_are_right(mean, q):
    rng = np.random.default_rng(7)
    n_bins, n = 300, 120_000
    m = rng.uniform(0.5, 1.5, n)
    bins = np.arange(n) % n_bins
    solution = solve_bins(bins, rng.poisson(mean * m), m, n_bins, q)
    pulls = (solution.value - mean) / np.sqrt(solution.variance)
    assert abs(pulls.mean()) < 3 / np.sqrt(n_bins)
    assert pulls.std() == pytest.approx(1, abs=0.12)  # 3 standard errors
    assert solution.value.mean() == pytest.approx(mean, rel=6 / np.sqrt(n * mean))


def test_known_part_leaves_the_rest_which_may_be_negative():
    rng = np.random.default_rng(7)
    m = rng.uniform(0.5, 1.5, 90_000)
    bins = np.arange(len(m)) % 3
    known = np.array([1.0, 3.0, 8.0])[bins] * m
    solution = solve_bins(bins, rng.poisson(4 * m), m, 3, 0.5, known)
    pulls = (solution.value - [3, 1, -4]) / np.sqrt(solution.variance)
    assert np.abs(pulls).max() < 4


def test_bright_outliers_move_it_no_farther_than_promised():
    rng = np.random.default_rng(7)
    counts = rng.poisson(1.0, 200_000)
    clean = solve_bins(np.zeros_like(counts), counts, np.ones(len(counts)), 1, 0.5)
    counts[:2000] = 10_000  # 1 %
    found = solve_bins(np.zeros_like(counts), counts, np.ones(len(counts)), 1, 0.5)
    assert 0.005 < found.value[0] - clean.value[0] < 0.025
    assert counts.mean() > 100  # what the mean would say


def test_empty_and_dark_bins():
    counts, m = np.zeros(50), np.full(50, 2.0)
    solution = solve_bins(np.full(50, 1), counts, m, 2, 0.5)
    assert np.isnan(solution.value[0]) and np.isinf(solution.variance[0])
    assert solution.value[1] == pytest.approx(0, abs=1e-6)
    assert solution.variance[1] >= (1 / 100.0) ** 2  # one photon in the bin
    assert list(solution.n_pixels) == [0, 50]


def test_cells_keep_all_pixels_and_their_sums():
    rng = np.random.default_rng(7)
    bins, m = rng.integers(5, size=4000), rng.uniform(0.7, 1.4, 4000)
    counts = rng.poisson(2, 4000)
    cells = make_cells(bins, counts, m, None)
    assert len(cells.bins) < 2000
    for number in range(5):
        at, of = cells.bins == number, bins == number
        n = cells.n_pixels[at]
        assert n.sum() == of.sum()
        assert n @ cells.counts[at] == counts[of].sum()
        assert n @ cells.m[at] == pytest.approx(m[of].sum())
