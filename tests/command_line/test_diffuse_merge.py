from __future__ import annotations

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from libtbx.utils import Sorry

from dials_diffuse.command_line import diffuse_merge
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import MapFile, read_map

GRID = Grid((9.1, 10.3, 12.2, 90, 100, 90), (2, 3, 2), " P 2yb", 1.8)
OUTPUT = [
    "merged.h5",
    "merged.png",
    "dials.diffuse_merge.json",
    "dials.diffuse_merge.log",
]


@pytest.fixture
def observed(write_observations):
    """Two observations of every voxel with a constant mean of 5 photons."""
    index = GRID.index(np.arange(np.prod(GRID.shape)))
    index = index[GRID.in_resolution_range(GRID.s(index))]
    index = np.repeat(index, 2, axis=0)
    rng = np.random.default_rng(7)
    counts = rng.poisson(5, len(index)).astype(float)
    ids = np.arange(len(index)) % 2
    columns = {"miller_index": index, "counts": counts, "id": ids}
    return write_observations("extracted", GRID, columns, ("sweep 1", "sweep 2"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_merge(observed, tmp_path):
    diffuse_merge.run([*observed, "n_shells=4"])
    assert all((tmp_path / name).is_file() for name in OUTPUT)

    merged = read_map("merged.h5")
    assert len(merged) == len(GRID.asu_indices())
    error = np.sqrt(5 / merged["n_obs"].sum())
    mean = np.average(merged["intensity"], weights=merged["n_obs"])
    assert mean == pytest.approx(5, abs=3 * error)
    with MapFile("merged.h5") as handle:
        assert handle.identifiers == ["sweep 1", "sweep 2"]

    statistics = json.loads((tmp_path / "dials.diffuse_merge.json").read_text())
    assert statistics["overall"]["completeness"] == 1
    assert len(statistics["shells"]) == 4
    assert statistics["overall"]["n_obs"] == merged["n_obs"].sum()
    assert statistics["overall"]["multiplicity"] == pytest.approx(8, rel=0.1)

    log = (tmp_path / "dials.diffuse_merge.log").read_text()
    assert "n_shells = 4" in log
    assert f"Completeness to {1 / GRID.s(merged['index']).max():.2f} Å: 100.00%" in log
    assert "Map written to merged.h5" in log
    assert "CC1/2" in log
    with h5py.File("merged.h5") as handle:
        phil = handle["entry/dials_diffuse/phil"][()].decode()
    assert "n_shells = 4" in phil
    assert "seed = 42" in phil


def test_no_extra_files_on_request(observed, tmp_path):
    diffuse_merge.run([*observed, "plot=None", "json=None", "output.log=None"])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"extracted.expt", "extracted.refl", "merged.h5"}


def test_several_files(write_observations):
    voxels = {"miller_index": GRID.asu_indices()}
    first = write_observations("first", GRID, voxels, ("a",))
    second = write_observations("second", GRID, voxels, ("b",))
    diffuse_merge.run([*first, *second])
    assert set(read_map("merged.h5")["n_obs"]) == {2}


def test_experiments_without_observations_are_reported(write_observations, caplog):
    caplog.set_level("INFO", logger="dials.diffuse.merge")
    voxels = {"miller_index": GRID.asu_indices()}
    expt, _ = write_observations("all", GRID, voxels, ("a", "b"))
    _, refl = write_observations("part", GRID, voxels, ("a",))
    diffuse_merge.run([expt, refl])
    assert "1 of 2 experiments have no observations" in caplog.text


@pytest.mark.parametrize("mean", [0.01, 0.1, 1, 10, 100])
def test_poisson_means_are_found_without_bias(write_observations, mean):
    """With a background and unequal scales and exposures, to the error of counting."""
    rng = np.random.default_rng(7)
    index = np.repeat(GRID.index(np.arange(np.prod(GRID.shape))), 4, axis=0)
    index = index[GRID.in_resolution_range(GRID.s(index))]
    ids = np.arange(len(index)) % 4
    weight = rng.uniform(0.5, 2, len(index))
    background = 0.5 * mean * weight
    signal = np.array([0.4, 0.8, 1.2, 1.6])[ids] * weight * mean
    columns = {
        "miller_index": index,
        "id": ids,
        "counts": rng.poisson(signal + background).astype(float),
        "background.sum.value": background,
        "normalisation": weight,
    }
    files = write_observations("extracted", GRID, columns, ("a", "b", "c", "d"))
    diffuse_merge.run([*files, "output.plot=None"])
    merged = read_map("merged.h5", ["intensity", "sigma", "normalisation"])
    total = merged["normalisation"].sum()
    found = np.sum(merged["intensity"] * merged["normalisation"]) / total
    error_of_mean = np.sqrt(columns["counts"].sum()) / total
    assert found == pytest.approx(mean, abs=4 * error_of_mean)
    if mean >= 1:  # fewer counts in a voxel than some tens make its own error uncertain
        pull = (merged["intensity"] - mean) / merged["sigma"]
        assert np.mean(pull**2) == pytest.approx(1, abs=0.2)


def test_negative_cc_half_and_halves_of_experiments(write_observations, caplog):
    """Three experiments have too much where the other three have too little."""
    rng = np.random.default_rng(7)
    n = len(GRID.asu_indices())
    index, ids = np.tile(GRID.asu_indices(), (6, 1)), np.repeat(np.arange(6), n)
    sign = 2 * (ids % 2) - 1
    mean = 1000 + 300 * sign * np.cos(20 * GRID.s(index))
    columns = {"miller_index": index, "id": ids, "counts": rng.poisson(mean) * 1.0}
    names = tuple(f"image {i}" for i in range(6))
    files = write_observations("extracted", GRID, columns, names)
    diffuse_merge.run([*files, "output.plot=None"])
    warning = "shells is significantly negative: observations of one voxel disagree"
    assert warning in caplog.text
    assert "half_split=experiments measures CC1/2 without" in caplog.text
    caplog.clear()
    diffuse_merge.run([*files, "output.plot=None", "half_split=experiments"])
    assert warning not in caplog.text


def test_all_experiments_in_one_half(write_observations, caplog):
    files = write_observations("x", GRID, {"miller_index": GRID.asu_indices()}, ("a",))
    diffuse_merge.run([*files, "output.plot=None", "half_split=experiments"])
    assert "CC1/2 is not defined" in caplog.text


def error(args) -> str:
    """The error message of the command, which must be one line for each error."""
    with pytest.raises(Sorry) as sorry:
        diffuse_merge.run(args)
    assert sorry.value.__suppress_context__
    return str(sorry.value)


def test_missing_files(observed):
    expt, refl = observed
    assert error([expt, "nowhere.refl"]) == "nowhere.refl does not exist"
    assert error([]).splitlines() == [
        "Please give an experiment list (.expt)",
        "Please give an observation file (.refl of dials.diffuse_extract)",
    ]
    assert error([refl]) == "Please give an experiment list (.expt)"


def test_reflections_that_are_not_observations(observed, tmp_path):
    from dials.array_family import flex

    expt, _ = observed
    native = str(tmp_path / "native.refl")
    flex.reflection_table().as_file(native)
    assert "native.refl is empty, damaged or of a kind" in error([expt, native])
    with h5py.File("other.refl", "w"):
        pass
    assert error([expt, "other.refl"]) == (
        "other.refl has no diffuse observations: give the output of dials.diffuse_extract"
    )


def test_empty_table(write_observations):
    files = write_observations("a", GRID, {"miller_index": np.zeros((0, 3), int)})
    assert "a.refl has no observations: check the masks" in error(files)
    assert not os.path.exists("merged.h5")


def test_experiments_of_other_observations(observed, write_observations):
    voxel = {"miller_index": np.ones((1, 3), int)}
    expt, _ = write_observations("other", GRID, voxel, ("sweep 1", "sweep 3"))
    message = error([expt, observed[1]])
    assert "extracted.refl belongs to other experiments" in message
    assert "1 of its 2 identifiers are not in it, the first is sweep 2" in message


def test_incompatible_grids(write_observations):
    voxel = {"miller_index": np.ones((1, 3), int)}
    other = Grid(GRID.unit_cell, GRID.ndiv, GRID.space_group, 1.9)
    first = write_observations("first", GRID, voxel, ("a",))
    second = write_observations("second", other, voxel, ("b",))
    assert "second.refl has a grid with d_min=1.9" in error([*first, *second])


def test_output_folder_that_does_not_exist(observed):
    message = error([*observed, "output.map=nowhere/merged.h5"])
    assert message.startswith("output.map=nowhere/merged.h5: there is no folder")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("option", ["map", "plot", "json", "log"])
def test_output_that_would_replace_the_input(observed, option):
    before = os.path.getsize("extracted.refl")
    message = error([*observed, f"output.{option}=extracted.refl"])
    assert f"output.{option}=extracted.refl is in use" in message
    assert os.path.getsize("extracted.refl") == before


def test_two_outputs_with_one_name(observed):
    message = error([*observed, "output.map=out", "output.json=./out"])
    assert message == "output.json=./out is in use: give another name"


def test_parameters_that_do_not_exist(observed):
    assert "n_shels" in error([*observed, "n_shels=3"])


FULL_DISK = """
import resource, sys
from dials_diffuse.command_line import diffuse_merge
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
diffuse_merge.run(sys.argv[2:])
"""


@pytest.mark.parametrize("limit", [2_000, 90_000])
@pytest.mark.slow
def test_full_disk(observed, tmp_path, limit):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), *observed, "output.log=None"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines() == [
        "Sorry: Cannot write merged.h5: no space left on the device (or over the file "
        "size limit). Free some space or choose another output folder"
    ]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"extracted.expt", "extracted.refl"}


@pytest.mark.parametrize("option", ["-h", "-c", "-c -e2 -a2"])
def test_help(option, capsys):
    with pytest.raises(SystemExit) as stop:
        diffuse_merge.run(option.split())
    assert not stop.value.code
    text = capsys.readouterr().out
    assert "n_shells = 20" in text
    assert ("voxels_per_pass" in text) == ("-e2" in option)


def test_same_experiments_twice(observed):
    with pytest.raises(Sorry, match="hold the same experiment .*give each only once"):
        diffuse_merge.run([*observed, *observed])


@pytest.mark.parametrize("option", ["map", "plot", "json"])
def test_output_folder_is_checked_first(observed, tmp_path, option):
    with pytest.raises(Sorry, match=f"output.{option}=no/x: there is no folder .*/no"):
        diffuse_merge.run([*observed, f"output.{option}=no/x"])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["extracted.expt", "extracted.refl"]
