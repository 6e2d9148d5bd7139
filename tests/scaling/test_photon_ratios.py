"""Scales of some experiments by their photons in voxels that others saw, too."""

from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse.scaling.initial import Pairs, maximise_likelihood
from dials_diffuse.scaling.photon_ratios import add_up, find_ratios


def draw_pairs(
    scale: np.ndarray, n_voxels: int = 400, share: float = 0.3, photons: float = 20.0
) -> Pairs:
    """Counts of experiments that see a part of all voxels each."""
    rng = np.random.default_rng(3)
    seen = rng.random((n_voxels, len(scale))) < share
    voxel, experiment = np.nonzero(seen)
    intensity = photons * rng.gamma(2.0, 0.5, n_voxels)
    weight = rng.uniform(0.5, 1.5, len(voxel))
    expected = scale[experiment] * weight * intensity[voxel]
    return Pairs(voxel, experiment, rng.poisson(expected).astype(float), weight)


def in_parts(pairs: Pairs, n: int) -> list[Pairs]:
    """The pairs in several parts with whole voxels, numbered anew."""
    parts = (pairs.select(pairs.voxel % n == i) for i in range(n))
    return [part._replace(voxel=part.voxel // n) for part in parts]


SCALE = np.array([1.0, 0.3, 2.0, 0.7, 1.4])


def test_a_single_unknown_scale_is_the_weighted_ratio():
    """Solved by hand: k = Σ u n / Σ u x I with the u that belong to this k."""
    pairs = draw_pairs(SCALE)
    known = np.append(SCALE[:4], 1.0)
    unknown = np.arange(5) == 4
    k = np.exp(find_ratios([pairs], unknown, np.log(known))[4])
    mine = pairs.experiment == 4
    weight = pairs.weight * known[pairs.experiment]
    others_photons = np.bincount(pairs.voxel, pairs.photons * ~mine, 400)
    others = np.bincount(pairs.voxel, weight * ~mine, 400)
    n = np.bincount(pairs.voxel, pairs.photons * mine, 400)
    x = np.bincount(pairs.voxel, pairs.weight * mine, 400)
    both = others > 0
    n, x, others = n[both], x[both], others[both]
    u = others / (others + k * x)
    assert k == pytest.approx(
        (u @ n) / (u @ (x * others_photons[both] / others)), rel=1e-3
    )
    assert k == pytest.approx(SCALE[4], rel=0.03)


def test_sums_of_the_other_parts_are_those_of_one():
    pairs = draw_pairs(SCALE)
    log_k = np.log([1.0, 2.0, 1.0, 0.5, 1.0])
    whole, parts = add_up([pairs], log_k), add_up(in_parts(pairs, 3), log_k)
    for a, b in zip(whole, parts):
        assert b == pytest.approx(a)


def test_slope_of_the_likelihood():
    """Against finite differences, away from the maximum."""
    pairs = draw_pairs(SCALE)
    log_k, step = np.log([1.0, 2.0, 1.0, 0.5, 1.0]), 1e-5
    sums = add_up([pairs], log_k)
    for number in range(5):
        aside = step * (np.arange(5) == number)
        high, low = (add_up([pairs], log_k + sign * aside).value for sign in (1, -1))
        slope = (high - low) / (2 * step)
        assert abs(slope) > 100
        assert sums.due[number] - sums.seen[number] == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("n, share", [(2, 0.9), (5, 0.3), (60, 0.06)])
def test_all_unknown_as_the_likelihood_has_it(n, share):
    """Up to a factor of all, by other means; also if no other scale is known."""
    scale = np.exp(np.linspace(-1, 1, n))
    pairs = draw_pairs(scale, share=share)
    several = np.bincount(pairs.voxel) > 1
    pairs = pairs.select(several[pairs.voxel])
    pairs = pairs._replace(voxel=np.unique(pairs.voxel, return_inverse=True)[1])
    found = find_ratios(in_parts(pairs, 2), np.ones(n, dtype=bool))
    expected = maximise_likelihood(pairs)
    error = 1 / np.sqrt(np.bincount(pairs.experiment, pairs.photons))
    difference = found - expected
    difference -= np.average(difference, weights=error**-2)
    assert np.all(np.abs(difference) < 0.1 * error)
    assert np.std(expected) > 0.3
    assert np.std(found - np.log(scale)) < 3 * np.sqrt(np.mean(error**2))


def test_chain():
    """Each experiment shares voxels with the next one only."""
    n = 30
    rng = np.random.default_rng(6)
    scale = np.exp(0.5 * rng.standard_normal(n))
    voxel = np.repeat(np.arange(50 * (n - 1)), 2)
    experiment = voxel // 50 + np.tile([0, 1], 50 * (n - 1))
    photons = rng.poisson(1000 * scale[experiment]).astype(float)
    pairs = Pairs(voxel, experiment, photons, np.ones(len(voxel)))
    unknown = np.arange(n) > 0
    found = find_ratios([pairs], unknown)
    # each step by the root of 2/50000
    assert np.abs(found - np.log(scale / scale[0])).max() < 0.1
    assert found[0] == 0


def test_blank_experiment_takes_no_part():
    """It would draw down the mean of what the others are compared with."""
    pairs = draw_pairs(SCALE)
    blank = pairs._replace(photons=np.where(pairs.experiment == 1, 0, pairs.photons))
    unknown = np.ones(5, dtype=bool)
    found = find_ratios([blank], unknown)
    without = find_ratios([pairs.select(pairs.experiment != 1)], unknown)
    assert found[1] == -np.inf
    rest = np.arange(5) != 1
    assert found[rest] == pytest.approx(without[rest], abs=1e-6)


def test_experiment_without_common_voxels():
    pairs = draw_pairs(SCALE)
    alone = pairs._replace(
        voxel=np.where(pairs.experiment == 2, pairs.voxel + 400, pairs.voxel)
    )
    found = find_ratios([alone], np.ones(5, dtype=bool))
    assert list(np.isfinite(found)) == [True, True, False, True, True]


def test_few_photons_over_a_background_give_no_bias():
    """Photons less background are negative in many voxels."""
    rng = np.random.default_rng(9)
    n, base = 40, 2.0
    voxel, experiment = np.divmod(np.arange(2000 * n), n)
    use = rng.random(2000 * n) < 0.2
    voxel, experiment = voxel[use], experiment[use]
    scale = np.where(np.arange(n) % 2, 2.0, 0.5)
    photons = rng.poisson(0.5 * scale[experiment] + base) - base
    pairs = Pairs(voxel, experiment, photons, np.ones(len(voxel)))
    assert np.mean(np.bincount(voxel, photons) < 0) > 0.05
    found = find_ratios([pairs], np.ones(n, dtype=bool))
    ratio = np.mean(np.exp(found[1::2])) / np.mean(np.exp(found[::2]))
    # 20 of each: those of the weaker ones are known to 30 %, their mean to 7 %
    assert ratio == pytest.approx(4, rel=0.1)
