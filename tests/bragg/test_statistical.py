from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import nbinom

from dials_diffuse.bragg.statistical import (
    OutlierSettings,
    bragg_voxels,
    discovery_threshold,
    upper_tail,
)
from dials_diffuse.grid import Grid

NDIV = 11
GRID = Grid((30.0, 30.0, 30.0, 90, 90, 90), (NDIV,) * 3, "P 1", 6.0)


def voxels():
    """All voxels of a box, and their distance from the lattice point, in cells."""
    axis = np.arange(-3 * NDIV // 2, 3 * NDIV // 2 + 1)
    index = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    dh = index / NDIV - np.rint(index / NDIV)
    return index, np.linalg.norm(dh, axis=1)


def simulated(mean: float, peak: float = 3e4, seed: int = 7, n_blocks: int = 2):
    """Counts of voxels with halos and, on two thirds of the lattice points, peaks.

    Returns:
        Rows of index, counts and normalisation; expected Bragg photons of each row.
    """
    rng = np.random.default_rng(seed)
    index, r = voxels()
    halo = mean * (0.5 + 0.7 / (1 + (r / 0.25) ** 2))
    present = np.mod(np.rint(index / NDIV).sum(axis=1), 3) != 0
    bragg = np.where(present, peak * mean / 50 * np.exp(-0.5 * (r / 0.06) ** 2), 0.0)
    rows = []
    for _ in range(n_blocks):
        m = rng.uniform(0.5, 1.5, len(index))
        rows.append((index, rng.poisson(m * (halo + bragg)), m, m * bragg, m * halo))
    return [np.concatenate(column) for column in zip(*rows)]


@pytest.mark.parametrize("mean", [2.0, 50.0])
def test_peaks_are_found_and_halos_kept(mean):
    index, counts, m, bragg, halo = simulated(mean)
    found = bragg_voxels(index, counts, m, GRID)
    assert bragg[found].sum() > 0.99 * bragg.sum()
    nothing = bragg < 0.01 * halo
    assert nothing.sum() > 10_000
    assert found[nothing].mean() < 1e-3


@pytest.mark.parametrize("mean", [0.1, 2.0, 50.0])
def test_halos_alone_lose_nothing(mean):
    index, counts, m, _, _ = simulated(mean, peak=0.0)
    assert bragg_voxels(index, counts, m, GRID).mean() < 1e-3


def test_all_observations_of_a_voxel_go_together():
    index, counts, m, _, _ = simulated(5.0)
    found = bragg_voxels(index, counts, m, GRID)
    first, second = np.split(found, 2)
    assert first.any()
    np.testing.assert_array_equal(first, second)
    order = np.random.default_rng(3).permutation(len(index))
    again = bragg_voxels(index[order], counts[order], m[order], GRID)
    np.testing.assert_array_equal(again, found[order])


def test_slabs_make_no_difference(monkeypatch):
    index, counts, m, _, _ = simulated(5.0)
    whole = bragg_voxels(index, counts, m, GRID)
    monkeypatch.setattr("dials_diffuse.bragg.statistical.SLAB_VOXELS", 5000)
    np.testing.assert_array_equal(bragg_voxels(index, counts, m, GRID), whole)


def test_tail_is_that_of_the_negative_binomial():
    n, m, n_b, m_b = 7.0, 0.8, 21.0, 6.0
    expected = nbinom.sf(n - 1, n_b + 0.5, m_b / (m_b + m))
    found = upper_tail(*(np.array([x]) for x in (n, m, n_b, m_b)))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    empty = upper_tail(*(np.array([x]) for x in (0.0, m, n_b, m_b)))
    assert empty[0] == 1


def test_discoveries_by_hand():
    p = np.array([0.9, 0.001, 0.02, 0.03, 0.5])
    # 0.05 i/5 = 0.01, 0.02, 0.03: the third is at its limit
    assert discovery_threshold(p, 0.05) == 0.03
    assert discovery_threshold(p, 0.004) == 0.0


def test_few_neighbours_decide_nothing():
    index = np.array([[0, 0, 0], [0, 0, 1], [5, 5, 5]])
    found = bragg_voxels(index, np.array([1, 500, 2]), np.ones(3), GRID)
    assert not found.any()


def test_impossible_settings():
    with pytest.raises(ValueError, match="reach of 0 voxels"):
        OutlierSettings(reach=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        OutlierSettings(false_discovery=1.0)
    with pytest.raises(ValueError, match="do not go together"):
        bragg_voxels(np.zeros((2, 3), int), np.zeros(2), np.zeros(3), GRID)
