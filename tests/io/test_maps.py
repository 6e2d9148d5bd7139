from __future__ import annotations

import h5py
import numpy as np
import pytest

from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import (
    ASU_COLUMNS,
    BOXES,
    TABLES,
    MapFile,
    MapWriter,
    read_map,
)

GRID = Grid((8.1, 9.3, 11.2, 75, 100, 110), (2, 3, 1), " P 1", 2.5)


@pytest.fixture
def map_path(tmp_path):
    """A map of two unique voxels, whose values are made up."""
    path = tmp_path / "map.h5"
    with MapWriter(path, GRID, ["sweep 1", "sweep 2"], "seed = 42", ["a.refl"]) as out:
        index = np.array([[1, 2, 0], [0, 1, 3]])
        columns = {name: np.arange(2) + i for i, name in enumerate(ASU_COLUMNS)}
        out.append({**columns, "index": index})
        numbers = np.full(GRID.shape, -1)
        for sign in (1, -1):
            numbers.reshape(-1)[GRID.key(sign * index)] = [0, 1]
        for name, (dtype, fill, _, _) in BOXES.items():
            out.write_box(name, np.array([5, 7, fill], dtype), numbers)
        for name, table in TABLES.items():
            out.write_table(name, {key: np.arange(3) for key in table.columns})
    return path


def text(value) -> str:
    return value.decode() if isinstance(value, bytes) else value


def test_default_plot_is_the_map(map_path):
    # The chain that viewers follow: https://manual.nexusformat.org/datarules.html
    with h5py.File(map_path) as handle:
        node = handle
        while "default" in node.attrs:
            node = node[text(node.attrs["default"])]
        assert node.name == "/entry/map"
        assert text(node.attrs["NX_class"]) == "NXdata"
        assert text(node.parent.attrs["NX_class"]) == "NXentry"


@pytest.mark.parametrize("name", ["map", "half_1", "half_2", *TABLES])
def test_nxdata_groups_are_complete(map_path, name):
    with h5py.File(map_path) as handle:
        group = handle["entry"][name]
        assert text(group.attrs["NX_class"]) == "NXdata"
        signal = group[text(group.attrs["signal"])]
        axes = [text(axis) for axis in group.attrs["axes"]]
        assert signal.shape == tuple(len(group[axis]) for axis in axes)
        if f"{signal.name}_errors" in handle:
            assert handle[f"{signal.name}_errors"].shape == signal.shape


def test_every_array_has_units_and_every_group_a_class(map_path):
    with h5py.File(map_path) as handle:

        def check(name, node):
            if isinstance(node, h5py.Group):
                known = "dials_diffuse/grid" in name
                assert known or text(node.attrs["NX_class"]).startswith("NX"), name
            elif node.dtype.kind in "fiu":
                assert text(node.attrs["units"]), name
                assert text(node.attrs["long_name"]), name

        handle.visititems(check)


def test_dense_arrays_are_compressed_single_precision(map_path):
    with h5py.File(map_path) as handle:
        for name in ("map/intensity", "map/intensity_errors", "half_1/intensity"):
            dataset = handle["entry"][name]
            assert dataset.dtype == np.float32
            assert dataset.shape == GRID.shape
            assert dataset.compression == "gzip"
            assert dataset.shuffle


def test_box_has_values_at_the_voxels_and_nan_elsewhere(map_path):
    with MapFile(map_path) as handle:
        box = handle.box()
        assert np.isfinite(box).sum() == 4
        assert np.count_nonzero(handle.box("map/n_obs")) == 4
    with h5py.File(map_path) as handle:
        group = handle["entry/map"]
        h, k, l = (list(group[axis][()]) for axis in "hkl")
        place = h.index(-1 / 2), k.index(-2 / 3), l.index(0)
        assert group["intensity"][place] == 5
        place = h.index(0), k.index(1 / 3), l.index(3)
        assert group["intensity"][place] == 7


def test_axes_are_shared(map_path):
    with h5py.File(map_path) as handle:
        assert handle["entry/map/h"] == handle["entry/half_2/h"]


def test_layers(map_path):
    with MapFile(map_path) as handle:
        nh, nk, nl = GRID.half_size
        layer = handle.layer("map/intensity", 2)
        assert layer.shape == GRID.shape[:2]
        assert layer[nh + 1, nk + 2] == 5
        layer = handle.layer("map/intensity", 2, 3)
        assert layer[nh, nk + 1] == 7
        with pytest.raises(ValueError, match="no layer l=30: the map ends at 4"):
            handle.layer("map/intensity", 2, 30)


def test_contents_return(map_path):
    merged = read_map(map_path, ["index", "d", "half_2/sigma"])
    assert merged.grid == GRID
    assert len(merged) == 2
    np.testing.assert_array_equal(merged["index"], [[1, 2, 0], [0, 1, 3]])
    np.testing.assert_array_equal(merged["d"], [1, 2])
    assert merged["half_2/sigma"][0] == list(ASU_COLUMNS).index("half_2/sigma")
    with MapFile(map_path) as handle:
        assert handle.identifiers == ["sweep 1", "sweep 2"]
        assert [len(block["d"]) for block in handle.blocks(["d"], 1)] == [1, 1]
        np.testing.assert_array_equal(handle.table("isotropic")["n_voxels"], [0, 1, 2])


def test_reciprocal_basis_gives_the_same_s(map_path):
    with h5py.File(map_path) as handle:
        basis = handle["entry/sample/reciprocal_basis"][()]
    index = np.array([[1, -2, 3], [4, 1, 0]])
    rlp = (index / GRID.ndiv) @ basis.T
    np.testing.assert_allclose(np.linalg.norm(rlp, axis=1), GRID.s(index))


def test_provenance(map_path):
    with h5py.File(map_path) as handle:
        process = handle["entry/dials_diffuse"]
        assert text(process.attrs["NX_class"]) == "NXprocess"
        assert text(process["program"][()]) == "dials.diffuse_merge"
        assert text(process["phil"][()]) == "seed = 42"
        assert "a.refl" in text(process["inputs"][()])


def test_map_without_voxels(tmp_path):
    path = tmp_path / "empty.h5"
    MapWriter(path, GRID, []).close()
    assert len(read_map(path)) == 0


def test_file_that_is_not_hdf5(tmp_path):
    path = tmp_path / "notes.h5"
    path.write_text("not HDF5")
    with pytest.raises(ValueError, match="Cannot read .*notes.h5: it is not HDF5"):
        MapFile(path)


def test_file_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="nowhere.h5 does not exist"):
        MapFile(tmp_path / "nowhere.h5")


def test_hdf5_file_of_another_kind(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as handle:
        handle.create_group("entry")
    with pytest.raises(
        ValueError, match="other.h5 is not a merged map: give the output"
    ):
        MapFile(path)


def test_file_of_a_newer_version(map_path):
    with h5py.File(map_path, "r+") as handle:
        handle["entry/dials_diffuse"].attrs["schema"] = 99
    with pytest.raises(ValueError, match="schema 99, this version reads up to 1"):
        MapFile(map_path)
