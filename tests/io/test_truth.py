from __future__ import annotations

import h5py
import numpy as np
import pytest

from dials_diffuse.grid import Grid
from dials_diffuse.io.truth import PARTS, SeriesTruth, Truth, TruthFile, write_truth
from dials_diffuse.merging.sums import number_voxels, unique_voxels, unpack

GRID = Grid((20.0, 20.0, 30.0, 90.0, 90.0, 90.0), (2, 2, 2), "P 4", 4.0)


@pytest.fixture
def written(tmp_path):
    """A truth file, and the values of its voxels."""
    packed = unique_voxels(GRID)
    index = unpack(packed)
    rng = np.random.default_rng(7)
    parts = {name: rng.random(len(index)) for name in PARTS}
    truth = Truth(
        composition={"C": 12.0, "H": 20.5},
        scattering_power=3.5,
        isotropic={"s": np.arange(3.0), "solvent": np.ones(3), "compton": np.zeros(3)},
        air={"two_theta": np.arange(4.0), "rate": np.full(4, 7.0)},
        defects=[
            {
                "hot": np.array([3, 5]),
                "excess": np.array([10.0, 20.0]),
                "flickering": np.array([8]),
                "dead": np.array([], dtype=int),
            }
        ],
        miller_index=np.array([[1, 0, 0], [1, 1, 2]]),
        f_squared=np.array([4.0, 9.0]),
        series=[
            SeriesTruth(["a"], np.array([1.0, 2.0]), 0.5, np.eye(3)[0], np.eye(3)[1]),
            SeriesTruth(["b", "c"], np.ones(2), 0.0, np.eye(3)[0], np.eye(3)[1]),
        ],
    )
    path = tmp_path / "truth.h5"
    numbers = number_voxels(GRID, packed)
    write_truth(path, GRID, index, parts, numbers, truth, "seed=7")
    return path, index, parts


def test_everything_comes_back(written):
    path, index, parts = written
    with TruthFile(path) as truth:
        assert truth.grid == GRID
        columns = truth.columns(["index", *PARTS])
        np.testing.assert_array_equal(columns["index"], index)
        for name in PARTS:
            np.testing.assert_array_equal(columns[name], parts[name])
        assert truth.scattering_power == 3.5
        assert truth.composition == {"C": 12.0, "H": 20.5}
        reflections, f_squared = truth.bragg()
        np.testing.assert_array_equal(reflections, [[1, 0, 0], [1, 1, 2]])
        np.testing.assert_array_equal(f_squared, [4.0, 9.0])
        assert set(truth.isotropic()) == {"s", "solvent", "compton"}
        first, second = truth.series()
        assert second.identifiers == ["b", "c"]
        np.testing.assert_array_equal(first.scale, [1.0, 2.0])
        assert first.absorption == 0.5
        np.testing.assert_array_equal(first.way_out, [1, 0, 0])
        np.testing.assert_array_equal(first.way_in, [0, 1, 0])
        np.testing.assert_array_equal(truth.air()["rate"], 7.0)
        (defects,) = truth.defects()
        np.testing.assert_array_equal(defects["hot"], [3, 5])
        assert len(defects["dead"]) == 0


def test_dense_map_has_the_symmetry(written):
    path, index, parts = written
    with h5py.File(path) as f:
        assert f.attrs["default"] == "entry"
        assert f["entry"].attrs["default"] == "map"
        box = f["entry/map/cloud"][()]
        assert f["entry/map"].attrs["signal"] == "intensity"
        assert f["entry/map/cloud"].attrs["units"] == "electron^2"
    centre = np.array(GRID.half_size)
    found = {tuple(i): value for i, value in zip(index, parts["cloud"])}
    for (h, k, l), value in list(found.items())[5:60]:
        if not np.all(np.abs([h, k, l]) <= centre):
            continue
        for equivalent in ([h, k, l], [-k, h, l], [-h, -k, -l], [h, k, -l]):
            place = tuple(centre + equivalent)
            assert box[place] == np.float32(value)
    assert np.isnan(box[0, 0, 0])  # beyond d_min


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as f:
        f["x"] = 1
    with pytest.raises(ValueError, match="other.h5 is not the truth of a simulation"):
        TruthFile(path)
