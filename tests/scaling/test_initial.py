from __future__ import annotations

import json

import numpy as np
import pytest

from dials_diffuse.command_line import diffuse_merge
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.scaling import initial
from dials_diffuse.scaling.initial import (
    ScaledTable,
    add_up_pairs,
    put_on_one_scale,
    relative_scales,
    scale_experiments,
)

GRID = Grid((20.0, 20.0, 30.0, 90.0, 90.0, 90.0), (2, 2, 2), "P 4w", 2.5)


def scales_of(voxel, experiment, photons, weight):
    pairs = add_up_pairs(voxel, experiment, photons, weight)
    return relative_scales(pairs, int(experiment.max()) + 1).scale


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
    found = scales_of(voxel, experiment, photons, weight)
    error = 1 / np.sqrt(np.bincount(experiment, photons))
    assert found.mean() == pytest.approx(1)
    assert np.max(np.abs(found / truth - 1) / error) < 4
    assert np.max(np.abs(found - 1)) > 0.2  # there was something to find


def test_scales_are_exact_without_noise():
    truth, voxel, experiment, _, weight = simulate(np.random.default_rng(7))
    intensity = np.random.default_rng(8).exponential(1.0, 800)
    photons = truth[experiment] * weight * intensity[voxel]
    found = scales_of(voxel, experiment, photons, weight)
    np.testing.assert_allclose(found, truth, rtol=1e-6)


def test_low_counts_do_not_bias_the_scales():
    """0.01 counts per observation: most are zero."""
    rng = np.random.default_rng(11)
    errors = []
    for _ in range(20):
        truth, voxel, experiment, photons, weight = simulate(
            rng, n_voxels=20_000, mean=0.01
        )
        found = scales_of(voxel, experiment, photons, weight)
        errors.append((found / truth - 1) * np.sqrt(np.bincount(experiment, photons)))
    mean = np.mean(errors)
    assert abs(mean) < 3 * np.std(errors) / np.sqrt(np.size(errors))


def test_experiment_without_common_voxels_keeps_its_scale():
    voxel = np.array([0, 0, 1, 1, 2])
    experiment = np.array([0, 1, 0, 1, 2])
    photons = np.array([10.0, 20.0, 10.0, 20.0, 1000.0])
    found = scales_of(voxel, experiment, photons, np.ones(5))
    assert found == pytest.approx([2 / 3, 4 / 3, 1])
    assert found[2] == 1


def test_chain_of_experiments_is_followed_to_its_ends():
    """60 experiments that share half of their voxels with each neighbour."""
    rng = np.random.default_rng(7)
    truth = np.linspace(0.5, 1.5, 60)
    experiment = np.repeat(np.arange(60), 40)
    voxel = experiment * 20 + np.tile(np.arange(40), 60)
    intensity = rng.exponential(1.0, voxel.max() + 1) + 0.2
    weight = rng.uniform(0.2, 3.0, len(voxel))
    photons = truth[experiment] * weight * intensity[voxel]
    for brightness in (1e-3, 1, 1e9):
        found = scales_of(voxel, experiment, brightness * photons, weight)
        np.testing.assert_allclose(found, truth, rtol=1e-5)


@pytest.mark.parametrize("fill", [0, 1000], ids=["products", "matrix"])
def test_scales_are_where_the_expected_photons_are_the_observed(fill, monkeypatch):
    """The condition of the greatest likelihood, by another formula: the fixed point."""
    monkeypatch.setattr(initial, "MAX_FILL", fill)
    _, voxel, experiment, photons, weight = simulate(np.random.default_rng(3))
    k = scales_of(voxel, experiment, photons, weight)
    expected = np.bincount(voxel, k[experiment] * weight)
    intensity = np.bincount(voxel, photons) / np.maximum(expected, 1e-30)
    due = np.bincount(experiment, k[experiment] * weight * intensity[voxel])
    np.testing.assert_allclose(due, np.bincount(experiment, photons), rtol=1e-5)


def test_rows_of_a_pair_count_as_their_sum():
    _, voxel, experiment, photons, weight = simulate(np.random.default_rng(3))
    expected = scales_of(voxel, experiment, photons, weight)
    part = np.random.default_rng(4).uniform(0.1, 0.9, len(voxel))
    halves = [np.concatenate([x * part, x * (1 - part)]) for x in (photons, weight)]
    found = scales_of(np.tile(voxel, 2), np.tile(experiment, 2), *halves)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_experiments_without_common_photons_and_groups():
    """A pair, a blank one that saw the same, a pair elsewhere, and a one-way link."""
    rows = [  # voxel, experiment, photons
        (0, 0, 10.0), (0, 1, 30.0), (0, 2, 0.0), (1, 2, -1.0), (1, 0, 5.0), (1, 1, 15.0),
        (2, 3, 4.0), (2, 4, 4.0), (3, 1, 7.0), (3, 3, 0.0),
    ]  # fmt: skip
    voxel, experiment, photons = map(np.array, zip(*rows))
    pairs = add_up_pairs(voxel, experiment, photons, np.ones(len(rows)))
    scale, group = relative_scales(pairs, 6)
    assert scale == pytest.approx([0.5, 1.5, 0, 1, 1, 0])
    assert list(group[[2, 5]]) == [-1, -1]
    assert group[0] == group[1] != group[3] == group[4]


def test_no_convergence_is_told(monkeypatch, caplog):
    monkeypatch.setattr(initial, "MAX_CYCLES", 1)
    _, voxel, experiment, photons, weight = simulate(np.random.default_rng(3))
    scales_of(voxel, experiment, photons, weight)
    assert "scales of 6 experiments did not converge in 1 cycles" in caplog.text


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


def test_blank_and_unlinked_experiments_are_named(write_observations, tmp_path, caplog):
    """A blank still is left out of the merge, one of other voxels keeps its scale."""
    columns = observations(np.random.default_rng(7), [0.5, 1.0, 1.5])
    columns["counts"][columns["id"] == 1] = 0
    asu = GRID.asu_indices()[3::7]
    other = {"miller_index": asu, "id": np.full(len(asu), 3), "counts": asu[:, 2] + 9}
    other["normalisation"] = np.ones(len(asu))
    columns = {k: np.concatenate([columns[k], other[k]]) for k in columns}
    expt, refl = write_observations("x", GRID, columns, ("a", "blank", "c", "far"))
    outputs = [f"output.{name}=None" for name in ("plot", "log")]
    outputs += [f"output.map={tmp_path}/m.h5", f"output.json={tmp_path}/m.json"]
    diffuse_merge.run([expt, refl, *outputs])
    assert "1 of 4 experiments are left out" in caplog.text
    assert "where others have some: blank\n" in caplog.text
    assert "links the experiments of 2 groups" in caplog.text
    assert "Experiments in each: 2, 1\n" in caplog.text
    statistics = json.loads((tmp_path / "m.json").read_text())
    expected = {"a": 0.5, "blank": 0, "c": 1.5, "far": 1}
    assert statistics["scales"] == pytest.approx(expected, rel=1e-6)
    assert statistics["overall"]["n_obs"] == np.sum(columns["id"] != 1)


def test_scaled_and_unscaled_tables_are_not_mixed(write_observations):
    columns = observations(np.random.default_rng(7), [1.0])
    _, first = write_observations("first", GRID, columns, ("a",))
    _, second = write_observations("second", GRID, columns, ("b",))
    with ObservationFile(first) as one, ObservationFile(second) as two:
        scaled = ScaledTable(two, {0: 2.0})
        assert put_on_one_scale([scaled]) == ([scaled], {})
        with pytest.raises(
            ValueError, match="second.refl has been scaled, .*first.refl"
        ):
            put_on_one_scale([one, scaled])


@pytest.mark.parametrize("max_rows", [100, 600, 10_000])
def test_every_experiment_is_in_the_sample(write_observations, monkeypatch, max_rows):
    """The last has a few voxels only, in another file."""
    monkeypatch.setattr(initial, "MAX_ROWS", max_rows)
    columns = observations(np.random.default_rng(7), [0.5, 1.0, 1.5])
    few = {k: v[columns["id"] == 2][-9:] for k, v in columns.items()}
    few["id"] = np.zeros(9, int)
    rest = {k: v[columns["id"] != 2] for k, v in columns.items()}
    _, first = write_observations("first", GRID, rest, ("a", "b"))
    _, second = write_observations("second", GRID, few, ("c",))
    with ObservationFile(first) as one, ObservationFile(second) as two:
        scales = scale_experiments([one, two])
    assert scales[0] == pytest.approx({0: 0.5, 1: 1.0}, rel=1e-5)
    assert scales[1] == pytest.approx({0: 1.5}, rel=1e-5)


def test_flagged_rows_do_not_count(write_observations):
    truth = np.array([0.5, 1.0, 1.5])
    columns = observations(np.random.default_rng(7), truth)
    columns["num_pixels.valid"] = np.ones(len(columns["id"]), int)
    columns["num_pixels.valid"][::5] = 0
    columns["counts"][::5] = 1e6
    _, refl = write_observations("x", GRID, columns)
    with ObservationFile(refl) as table:
        (scales,) = scale_experiments([table])
    assert list(scales.values()) == pytest.approx(truth, rel=1e-6)
