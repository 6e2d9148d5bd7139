from __future__ import annotations

import json

import numpy as np
import pytest

from dials_diffuse.command_line import diffuse_merge
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.scaling.initial import (
    ScaledTable,
    relative_scales,
    scale_experiments,
)

GRID = Grid((20.0, 20.0, 30.0, 90.0, 90.0, 90.0), (2, 2, 2), "P 4w", 2.5)


def simulate(rng, n_experiments=6, n_voxels=800, mean=5.0, sigma=0.35):
    """Poisson counts of voxels that each experiment sees with a chance of one half."""
    scale = rng.lognormal(0.0, sigma, n_experiments)
    intensity = rng.exponential(1.0, n_voxels) + 0.2
    voxel, experiment = np.nonzero(rng.random((n_voxels, n_experiments)) < 0.5)
    weight = mean * rng.uniform(0.2, 3.0, len(voxel))
    photons = rng.poisson(scale[experiment] * weight * intensity[voxel])
    return scale / scale.mean(), voxel, experiment, photons.astype(float), weight


def test_scales_are_found_to_the_error_of_counting():
    """Known truth: the error of a scale is about 1/sqrt(counts of the experiment)."""
    truth, voxel, experiment, photons, weight = simulate(np.random.default_rng(7))
    found = relative_scales(voxel, experiment, photons, weight)
    error = 1 / np.sqrt(np.bincount(experiment, photons))
    assert found.mean() == pytest.approx(1)
    assert np.max(np.abs(found / truth - 1) / error) < 4
    assert np.max(np.abs(found - 1)) > 0.2  # there was something to find


def test_scales_are_exact_without_noise():
    truth, voxel, experiment, _, weight = simulate(np.random.default_rng(7))
    intensity = np.random.default_rng(8).exponential(1.0, 800)
    photons = truth[experiment] * weight * intensity[voxel]
    found = relative_scales(voxel, experiment, photons, weight)
    np.testing.assert_allclose(found, truth, rtol=3e-4)


def test_low_counts_do_not_bias_the_scales():
    """0.01 counts per observation: most are zero."""
    rng = np.random.default_rng(11)
    errors = []
    for _ in range(20):
        truth, voxel, experiment, photons, weight = simulate(
            rng, n_voxels=20_000, mean=0.01
        )
        found = relative_scales(voxel, experiment, photons, weight)
        errors.append((found / truth - 1) * np.sqrt(np.bincount(experiment, photons)))
    mean = np.mean(errors)
    assert abs(mean) < 3 * np.std(errors) / np.sqrt(np.size(errors))


def test_experiment_without_common_voxels_keeps_its_scale():
    voxel = np.array([0, 0, 1, 1, 2])
    experiment = np.array([0, 1, 0, 1, 2])
    photons = np.array([10.0, 20.0, 10.0, 20.0, 1000.0])
    found = relative_scales(voxel, experiment, photons, np.ones(5))
    assert found[1] / found[0] == pytest.approx(2)
    assert found.mean() == pytest.approx(1)


def observations(rng, scales):
    """The same voxels, and their symmetry mates, seen by experiments of some scales."""
    index = GRID.asu_indices()[::7]
    columns = {"miller_index": [], "id": [], "counts": [], "normalisation": []}
    intensity = rng.exponential(50.0, len(index)) + 10
    for number, scale in enumerate(scales):
        h, k, l = index.T
        mates = index if number % 2 else np.stack([-k, h, l], axis=-1)
        columns["miller_index"].append(mates)
        columns["id"].append(np.full(len(index), number))
        columns["counts"].append(scale * intensity)
        columns["normalisation"].append(np.ones(len(index)))
    return {name: np.concatenate(values) for name, values in columns.items()}


def test_scales_use_symmetry(write_observations):
    truth = np.array([0.5, 1.0, 1.5])
    columns = observations(np.random.default_rng(7), truth)
    _, refl = write_observations("x", GRID, columns)
    with ObservationFile(refl) as table:
        (scales,) = scale_experiments([table])
        assert list(scales.values()) == pytest.approx(truth, rel=1e-3)
        scaled = ScaledTable(table, scales)
        rows = scaled.read(0, table.n_rows, ["inverse_scale_factor", "counts"])
        ids = table.read(0, table.n_rows, ["id"])["id"]
    assert set(rows) == {"inverse_scale_factor", "counts"}
    np.testing.assert_allclose(rows["inverse_scale_factor"], truth[ids], rtol=1e-3)


@pytest.mark.parametrize("use", [True, False])
def test_merge_puts_experiments_on_one_scale(
    write_observations, tmp_path, monkeypatch, use
):
    """The halves of the map agree when scaled; without scales (control) they do not."""
    monkeypatch.chdir(tmp_path)
    columns = observations(np.random.default_rng(7), [0.3, 1.0, 1.7])
    expt, refl = write_observations("x", GRID, columns)
    diffuse_merge.run([expt, refl, f"scale_experiments={use}", "output.plot=None"])
    statistics = json.loads((tmp_path / "dials.diffuse_merge.json").read_text())
    if use:
        assert statistics["overall"]["cc_half"] > 0.99
        assert list(statistics["scales"].values()) == pytest.approx(
            [0.3, 1.0, 1.7], rel=1e-3
        )
    else:
        assert statistics["overall"]["cc_half"] < 0.9
        assert statistics["scales"] == {}
