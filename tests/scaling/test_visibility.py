"""Terms whose effect hardly shows in equivalent observations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from simulated_observations import ROTATION, draw, observe, read_models
from truth_ladder import vary

from dials_diffuse import symmetry
from dials_diffuse.command_line import diffuse_scale
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.sums import pack
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.scale import scale as run_scaling
from dials_diffuse.scaling.visibility import visibility
from dials_diffuse.util.command import parse_arguments

VOXEL = np.repeat(np.arange(200), 5)
SHELL = VOXEL // 20


def normal(n: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n)


def test_variance_within_and_between_voxels():
    within, between = 0.02 * normal(1000), 0.05 * normal(200, 8)[VOXEL]
    found = visibility(within + between, np.ones(1000), VOXEL, [])
    assert found.size == pytest.approx(np.hypot(0.02, 0.05), rel=0.1)
    # of five values the mean takes up a fifth of the variance
    assert found.seen == pytest.approx(0.02 * np.sqrt(0.8), rel=0.1)
    assert found.share == pytest.approx(found.seen**2 / found.size**2)


def test_weights_are_those_of_photons():
    values, weight = 0.02 * normal(1000), np.ones(1000)
    values[VOXEL >= 100] *= 100
    weight[VOXEL >= 100] = 0
    found = visibility(values, weight, VOXEL, [])
    alone = visibility(values[:500], weight[:500], VOXEL[:500], [])
    assert found == pytest.approx(alone)


def test_what_is_common_to_a_shell_or_an_image_is_not_looked_at():
    values = 0.02 * normal(1000)
    image = np.tile(np.arange(5), 200)
    added = values + normal(10)[SHELL] + normal(5, 9)[image]
    plain = visibility(values, np.ones(1000), VOXEL, [image, SHELL])
    assert visibility(added, np.ones(1000), VOXEL, [image, SHELL]) == pytest.approx(
        plain
    )
    assert visibility(added, np.ones(1000), VOXEL, []).size > 10 * plain.size


def test_a_map_is_one_more_observation():
    """Of a voxel: 0 where it is, so that more of a factor shows the more it knows."""
    values, ones = 0.05 * normal(200, 8)[VOXEL], np.ones(1000)
    nothing = visibility(values, ones, VOXEL, [], np.zeros(200))
    assert nothing == visibility(values, ones, VOXEL, [])
    assert nothing.share == pytest.approx(0, abs=1e-20)
    # five rows of the same value x and one of 0: squares of x/6, five times, and 5x/6
    one = visibility(values - values.mean(), ones, VOXEL, [], np.ones(200))
    assert one.share == pytest.approx(5 / 36 / 5 + 25 / 36 / 5)
    exact = visibility(values, ones, VOXEL, [], np.full(200, 1e9))
    assert exact.share == pytest.approx(1)


def test_nothing_to_see():
    none = visibility(normal(1000), np.zeros(1000), VOXEL, [SHELL])
    assert none == (0, 0) and none.share == 1
    constant = visibility(np.full(1000, 3.0), np.ones(1000), VOXEL, [])
    assert constant.size == pytest.approx(0, abs=1e-12)


@pytest.fixture
def short_sweep(tmp_path, monkeypatch):
    """20° of a crystal whose intensities differ from symmetry by 8 % in smooth waves.

    A surface over the detector describes some of it, as equivalent voxels that it meets
    are near each other.
    """
    monkeypatch.chdir(tmp_path)
    settings = vary(
        ROTATION,
        n_images=20,
        scan={"width": 1.0},
        detector={"size": (60, 60), "pixel": 1.5},
    )
    geometry = observe(settings, tmp_path)
    h = geometry.columns["miller_index"] / 10
    waves = 0.08 * np.sin(h @ np.array([1.1, 0.7, 0.4]) + 0.5)
    return draw(geometry, tmp_path, np.exp(waves), counts_per_pixel=100)


def scale(observed, *options: str) -> dict:
    diffuse_scale.run([*observed.files, "output.html=None", *options])
    with open("dials.diffuse_scale.json") as file:
        return json.load(file)


def components() -> set[str]:
    (experiment,) = read_models("scaled.expt")
    return set(experiment.scaling_model.components)


def test_surfaces_of_a_short_sweep_are_given_up(short_sweep, caplog):
    scale(short_sweep, "model.offset.use=no")
    assert not {"detector", "absorption"} & components()
    assert "shows in differences between equivalent observations" in caplog.text


def test_surfaces_that_the_user_wants_stay(short_sweep, caplog):
    scale(short_sweep, "model.offset.use=no", "model.detector.use=yes")
    assert "detector" in components()
    assert "term detector is switched off" not in caplog.text


def test_only_term_is_given_up(short_sweep):
    """Nothing is left to refine; the command goes on."""
    scale(short_sweep, "model.scale.use=no", "model.offset.use=no")
    assert not {"scale", "detector", "absorption"} & components()


@pytest.mark.parametrize("n_known, stays", [(5, False), (None, True)])
def test_a_map_tells_of_the_voxels_that_it_has(short_sweep, n_known, stays):
    """A map of all voxels determines a surface, one of a few does not."""
    geometry = short_sweep.geometry
    index = geometry.columns["miller_index"]
    unique = pack(symmetry.map_to_asu(index, geometry.grid.laue_group))
    voxel, first = np.unique(unique, return_index=True)
    chosen = np.sort(np.random.default_rng(1).permutation(len(voxel))[:n_known])
    response = 100 * geometry.columns["normalisation"][first]
    nothing = np.zeros(len(chosen))
    reference = Reference(
        voxel[chosen],
        short_sweep.intensity[first][chosen],
        response[chosen],
        nothing,
        nothing,
    )
    parser = diffuse_scale.make_parser()
    arguments = [*short_sweep.files, "model.offset.use=no"]
    params, _, files = parse_arguments(parser, arguments)
    with ObservationFile(files[0]) as table:
        models = geometry.experiments
        result, _ = run_scaling(models, [table], [{0: 0}], params, (), reference)
    assert ("detector" in result.components) == stays
