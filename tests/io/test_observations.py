from __future__ import annotations

import h5py
import numpy as np
import pytest

from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import COLUMNS, ObservationFile, ObservationWriter

GRID = Grid((9.1, 10.3, 12.2, 75, 100, 110), (2, 3, 1), " P 2y", 2.0, 9.0)


def rows(n: int, n_voxels: int = 40) -> dict[str, np.ndarray]:
    """Sorted rows with made-up values."""
    rng = np.random.default_rng(7)
    index = rng.integers(-4, 5, (n_voxels, 3))[rng.integers(0, n_voxels, n)]
    index = index[np.argsort(GRID.key(index), kind="stable")]
    columns = {
        name: rng.integers(0, 5, (n, 3) if column.width == 3 else n).astype(
            column.dtype
        )
        for name, column in COLUMNS.items()
    }
    return {**columns, "miller_index": index.astype(np.int32)}


def write(path, columns, cuts=()):
    with ObservationWriter(path, GRID, {0: "a", 1: "b"}, "x = 1", ["i.expt"]) as writer:
        n = len(columns["id"])
        for start, stop in zip([0, *cuts], [*cuts, n]):
            writer.append({name: v[start:stop] for name, v in columns.items()})
    return path


def voxel_borders(columns, wanted):
    """The first row of the voxel that holds each wanted row."""
    key = GRID.key(columns["miller_index"])
    return sorted({int(np.searchsorted(key, key[row])) for row in wanted} - {0})


def test_contents_return(tmp_path):
    columns = rows(300)
    path = write(tmp_path / "a.refl", columns, voxel_borders(columns, [50, 200]))
    with ObservationFile(path) as handle:
        assert handle.grid == GRID
        assert handle.identifiers == {0: "a", 1: "b"}
        assert handle.n_rows == 300
        assert set(handle.columns) == set(COLUMNS)
        found = handle.read(0, 300, list(COLUMNS))
        for name, values in columns.items():
            np.testing.assert_array_equal(found[name], values)
            assert found[name].dtype == COLUMNS[name].dtype
        part = handle.read(10, 20, ["id"])
        np.testing.assert_array_equal(part["id"], columns["id"][10:20])


@pytest.mark.parametrize("max_rows", [1, 60, 120, 1000])
def test_slabs_cover_all_rows_and_cut_no_voxel(tmp_path, max_rows):
    columns = rows(300)
    cuts = voxel_borders(columns, range(20, 300, 20))
    path = write(tmp_path / "a.refl", columns, cuts)
    key = GRID.key(columns["miller_index"])
    largest = max(np.diff([0, *cuts, 300]))
    with ObservationFile(path) as handle:
        slabs = list(handle.slabs(max_rows))
    assert slabs[0][0] == 0 and slabs[-1][1] == 300
    for (start, stop), (following, _) in zip(slabs, [*slabs[1:], (300, None)]):
        assert stop == following
        assert 0 < stop - start <= max(max_rows, largest)
        assert stop == 300 or key[stop - 1] < key[stop]


def test_empty_table(tmp_path):
    path = write(tmp_path / "a.refl", rows(0, 1))
    with ObservationFile(path) as handle:
        assert handle.n_rows == 0
        assert list(handle.slabs()) == []


def test_rows_out_of_order(tmp_path):
    columns = rows(300)
    wrong = {name: values[::-1] for name, values in columns.items()}
    with ObservationWriter(tmp_path / "a.refl", GRID, {0: "a"}) as writer:
        with pytest.raises(ValueError, match="in the order of the voxels"):
            writer.append(wrong)
        writer.append(columns)
        with pytest.raises(ValueError, match="in the order of the voxels"):
            writer.append(columns)


def test_missing_columns(tmp_path):
    columns = rows(10)
    del columns["panel"]
    with ObservationWriter(tmp_path / "a.refl", GRID, {0: "a"}) as writer:
        with pytest.raises(ValueError, match="missing columns: panel"):
            writer.append(columns)
    path = write(tmp_path / "b.refl", rows(10))
    with ObservationFile(path) as handle:
        with pytest.raises(ValueError, match="b.refl has no column scale"):
            handle.read(0, 10, ["scale"])


def test_files_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match="nowhere.refl does not exist"):
        ObservationFile(tmp_path / "nowhere.refl")
    (tmp_path / "text.refl").write_text("text")
    with pytest.raises(ValueError, match="Cannot read .*text.refl: it is not HDF5"):
        ObservationFile(tmp_path / "text.refl")
    with h5py.File(tmp_path / "other.refl", "w"):
        pass
    with pytest.raises(ValueError, match="other.refl has no diffuse observations"):
        ObservationFile(tmp_path / "other.refl")
    path = write(tmp_path / "newer.refl", rows(10))
    with h5py.File(path, "r+") as handle:
        handle["dials_diffuse"].attrs["schema"] = 99
    with pytest.raises(ValueError, match="schema 99, this version reads up to"):
        ObservationFile(path)


def test_dials_reads_the_table(tmp_path):
    """DIALS 3.30 opens the file as any reflection table; 3.12 has no such reader."""
    table_reader = pytest.importorskip("dials.util.table_as_hdf5_file")
    columns = rows(300)
    path = write(tmp_path / "a.refl", columns, voxel_borders(columns, [50, 200]))
    assert table_reader is not None
    from dials.array_family import flex

    table = flex.reflection_table.from_file(str(path))
    assert len(table) == 300
    assert dict(table.experiment_identifiers()) == {0: "a", 1: "b"}
    np.testing.assert_array_equal(np.array(list(table["counts"])), columns["counts"])
    np.testing.assert_array_equal(
        np.array(list(table["miller_index"])), columns["miller_index"]
    )


def test_many_experiments(tmp_path):
    """Identifiers of 10^4 stills do not fit into an attribute of the old HDF5 format."""
    identifiers = {i: f"{i:032x}-uuid" for i in range(10_000)}
    with ObservationWriter(tmp_path / "x.refl", GRID, identifiers) as writer:
        writer.append(rows(5))
    with ObservationFile(tmp_path / "x.refl") as table:
        assert table.identifiers == identifiers


@pytest.mark.parametrize("part", ["dials_diffuse/grid", "dials_diffuse/slab_start"])
def test_damaged_file_is_named(tmp_path, part):
    path = tmp_path / "x.refl"
    with ObservationWriter(path, GRID, {0: "a"}) as writer:
        writer.append(rows(5))
    with h5py.File(path, "r+") as handle:
        del handle[part]
    with pytest.raises(ValueError, match="x.refl is damaged .*: make it again"):
        ObservationFile(path)


def test_regions_about_lattice_points(tmp_path):
    path = tmp_path / "a.refl"
    regions = np.arange(18.0).reshape(2, 9)
    with ObservationWriter(path, GRID, {0: "a"}) as writer:
        writer.write_bragg_regions(regions)
    with ObservationFile(path) as handle:
        np.testing.assert_array_equal(handle.bragg_regions, regions)
    with ObservationWriter(path, GRID, {0: "a"}):
        pass
    with ObservationFile(path) as handle:
        assert handle.bragg_regions.shape == (0, 9)


def test_blocks_of_images(tmp_path):
    path = tmp_path / "a.refl"
    limits = np.array([(0, 0, 3), (0, 4, 9), (1, 7, 8)])
    with ObservationWriter(path, GRID, {0: "a", 1: "b"}) as writer:
        writer.write_blocks(limits)
    with ObservationFile(path) as handle:
        np.testing.assert_array_equal(handle.blocks, limits)
    for limits in (None, np.zeros((0, 3))):
        with ObservationWriter(path, GRID, {0: "a"}) as writer:
            if limits is not None:
                writer.write_blocks(limits)
        with ObservationFile(path) as handle:  # unknown is not the same as none
            assert (handle.blocks is None) == (limits is None)


def test_blocks_of_many_stills_are_small(tmp_path):
    n = 20_000
    limits = np.stack([np.arange(n), np.arange(n), np.arange(1, n + 1)], axis=1)
    for path in (tmp_path / "without.refl", tmp_path / "with.refl"):
        with ObservationWriter(path, GRID, {0: "a"}) as writer:
            if path.stem == "with":
                writer.write_blocks(limits)
    with ObservationFile(path) as handle:
        np.testing.assert_array_equal(handle.blocks, limits)
    sizes = [(tmp_path / f"{x}.refl").stat().st_size for x in ("without", "with")]
    assert sizes[1] - sizes[0] < 5 * n
