from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse.merging import estimate


@pytest.mark.parametrize("mean", [0.01, 0.2, 1, 5, 100])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
def test_merged_intensity_is_unbiased(mean, equal):
    # Voxels of ten observations of four pixels (or one to seven), counts of a true mean
    # per pixel of unit normalisation
    rng = np.random.default_rng(7)
    n_voxels, n_obs = 2000, 10
    shape = (n_voxels, n_obs)
    m = np.full(shape, 4.0)
    if not equal:
        m = rng.integers(1, 8, shape) * rng.uniform(0.3, 1, shape)
    background = 0.1 * m
    counts = rng.poisson(mean * m + background)

    merged = estimate.intensity(
        counts.sum(axis=1), background.sum(axis=1), m.sum(axis=1)
    )
    standard_error = np.sqrt(((mean + 0.1) / m.sum(axis=1)).sum()) / n_voxels
    assert abs(merged.mean() - mean) < 3 * standard_error

    # Negative control: weights 1/σ² with σ² = counts (one for none) are biased
    single = (counts - background) / m
    weight = m**2 / np.maximum(counts, 1)
    weighted = (weight * single).sum(axis=1) / weight.sum(axis=1)
    assert weighted.mean() - mean < -4 * standard_error


@pytest.mark.parametrize("mean", [0.04, 0.5, 3, 30])
def test_sigma_describes_the_scatter(mean):
    rng = np.random.default_rng(7)
    m = rng.uniform(0.5, 2, 100_000)
    counts = rng.poisson(mean * m).astype(float)
    rate = estimate.shell_rate(counts.sum(), m.sum())
    sigma = estimate.sigma(counts, np.zeros_like(m), m, rate)
    assert np.all(sigma > 0)
    # The mean variance is that of the scatter, at the most twice as much for few counts
    true = (mean / m).mean()
    assert 0.95 * true < (sigma**2).mean() < 2.1 * true


def test_sigma_is_that_of_the_counts_above_the_mean_of_the_shell():
    counts, m = np.array([9.0, 100.0]), np.array([2.0, 4.0])
    sigma = estimate.sigma(counts, np.array([7.0, 0.0]), m, 4.5)
    np.testing.assert_allclose(sigma, [np.sqrt(9 + 7) / 2, 10 / 4])


def test_expected_counts_by_hand():
    # E (N + 1) / (E + 1) below the mean E, else N
    counts = np.array([0, 0, 1, 3, 4, -2.0])
    mean = np.array([0.25, 1e9, 3, 3, 3, 1])
    np.testing.assert_allclose(
        estimate.expected_counts(counts, mean), [0.2, 1, 1.5, 3, 4, 0.5]
    )


def test_expected_counts_are_the_posterior_mean():
    # Numerical integral over an exponential prior of mean E
    rate = np.linspace(0, 80, 400_001)
    for counts, mean in ((0, 0.3), (1, 2.5), (2, 7.0)):
        posterior = rate**counts * np.exp(-rate - rate / mean)
        expected = (rate * posterior).sum() / posterior.sum()
        found = estimate.expected_counts(np.array([counts]), np.array([mean]))
        np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_shell_without_photons_has_a_rate():
    rate = estimate.shell_rate(np.array([0.0, 9.0, 0.0]), np.array([4.0, 5.0, 0.0]))
    np.testing.assert_allclose(rate, [0.25, 2, np.nan])
    assert estimate.sigma(np.zeros(1), np.zeros(1), np.ones(1), rate[0])[0] > 0


def test_voxels_without_observations_are_nan():
    zero = np.zeros(1)
    assert np.isnan(estimate.intensity(zero, zero, zero))
    assert np.isnan(estimate.sigma(zero, zero, zero, np.array([np.nan])))


def test_shells_are_interpolated_and_gaps_bridged():
    shell_s = np.array([0.004, 0.015, 0.025, 0.035])
    mean = np.array([np.nan, 2.0, np.nan, 4.0])
    s = np.array([0.015, 0.025, 0.03, 0.04, 0.01])
    found = estimate.interpolate_shells(s, shell_s, mean)
    np.testing.assert_allclose(found, [2, 3, 3.5, 4.5, 1.5])
    # Far beyond the ends the line is not followed
    far = estimate.interpolate_shells(np.array([0.5]), shell_s, mean)
    np.testing.assert_allclose(far, [5])


def test_a_single_shell_is_a_constant():
    one = estimate.interpolate_shells(np.array([0.1, 0.3]), np.ones(1), np.full(1, 3.0))
    np.testing.assert_array_equal(one, [3, 3])
    none = estimate.interpolate_shells(np.ones(1), np.ones(1), np.full(1, np.nan))
    assert np.isnan(none)
