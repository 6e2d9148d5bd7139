from __future__ import annotations

import resource

import numpy as np
import pytest

from dials_diffuse.bragg.points import PointGrid
from dials_diffuse.extraction import runs
from dials_diffuse.extraction.loop import SUMS
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import COLUMNS, ObservationFile, ObservationWriter

GRID = Grid((20, 25, 30, 80, 95, 100), (2, 2, 2), "P 1", 2.0)

ALL_KEYS = np.arange(np.prod(GRID.shape))
KEYS = ALL_KEYS[GRID.s(GRID.index(ALL_KEYS)) <= 1 / GRID.d_min]


def random_blocks(n_blocks, seed=3, rows=(0, 60), n_keys=None):
    """Observations of blocks; each sorted by panel and voxel, as the loop gives them."""
    rng = np.random.default_rng(seed)
    result = []
    keys = KEYS[:n_keys]
    for number in range(n_blocks):
        block = np.zeros(rng.integers(*rows), dtype=SUMS)
        block["key"] = rng.choice(keys, len(block))
        block["panel"] = rng.integers(0, 3, len(block))
        block["id"] = number // 4
        block["n_pixels"] = rng.integers(1, 9, len(block))
        for name in ("counts", "normalisation", "x", "y"):
            block[name] = rng.random(len(block))
        block["z"] = number * block["n_pixels"]
        result.append(block[np.lexsort([block["key"], block["panel"]])])
    return result


def plainly_sorted(blocks):
    rows = np.concatenate(blocks)
    return rows[np.argsort(rows["key"], kind="stable")]


@pytest.mark.parametrize("run_rows", [1, 50, 10**9])
@pytest.mark.parametrize("slab_rows", [1, 37, 10**9])
@pytest.mark.parametrize("n_keys", [1, 5, None])
def test_slabs_are_all_rows_sorted(tmp_path, monkeypatch, run_rows, slab_rows, n_keys):
    monkeypatch.setattr(runs, "RUN_ROWS", run_rows)
    monkeypatch.setattr(runs, "SAMPLE", 3)
    blocks = random_blocks(20, n_keys=n_keys)
    paths = [
        path
        for first in (0, 5, 13)
        for path in runs.write_runs(
            blocks[first : {0: 5, 5: 13, 13: 20}[first]], tmp_path, f"run_{first:08d}"
        )
    ]
    assert paths == sorted(paths)
    slabs = list(runs.sorted_slabs(paths, slab_rows))
    np.testing.assert_array_equal(np.concatenate(slabs), plainly_sorted(blocks))
    for slab, following in zip(slabs, slabs[1:]):  # no voxel is in two
        assert slab["key"][-1] < following["key"][0]
    if slab_rows == 37 and n_keys is None:
        assert max(map(len, slabs)) < 4 * slab_rows


def test_blocks_without_rows(tmp_path):
    empty = np.zeros(0, dtype=SUMS)
    assert runs.write_runs([], tmp_path, "none") == []
    assert runs.write_runs([empty, empty], tmp_path, "none") == []
    blocks = [empty, *random_blocks(1, rows=(5, 6)), empty]
    (path,) = runs.write_runs(blocks, tmp_path, "some")
    (slab,) = runs.sorted_slabs([path])
    np.testing.assert_array_equal(slab, plainly_sorted(blocks))


def test_largest_key_is_not_lost(tmp_path):
    (block,) = random_blocks(1, rows=(5, 6))
    block["key"][-1] = np.iinfo(np.int32).max - 1
    (path,) = runs.write_runs([block], tmp_path, "run")
    assert sum(map(len, runs.sorted_slabs([path], 2))) == 5


def test_more_runs_than_open_files(tmp_path, monkeypatch):
    """Many processes leave many runs; a process may open 1024 files."""
    monkeypatch.setattr(runs, "RUN_ROWS", 1)
    blocks = random_blocks(200, rows=(1, 3))
    paths = runs.write_runs(blocks, tmp_path, "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # the limit is the largest descriptor: other tests' log files are open already
    with open(tmp_path / "next", "w") as handle:
        limit = handle.fileno() + 50
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        slabs = list(runs.sorted_slabs(paths, 50))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(np.concatenate(slabs), plainly_sorted(blocks))


def test_merged_table(tmp_path):
    blocks = random_blocks(12)
    paths = runs.write_runs(blocks, tmp_path, "run")
    with ObservationWriter(tmp_path / "o.refl", GRID, {0: "a"}) as writer:
        runs.merge_runs(paths, GRID, writer)
    rows = plainly_sorted(blocks)
    with ObservationFile(tmp_path / "o.refl") as f:
        table = f.read(0, f.n_rows, list(COLUMNS))
    np.testing.assert_array_equal(GRID.key(table["miller_index"]), rows["key"])
    for column, name in (
        ("id", "id"),
        ("panel", "panel"),
        ("counts", "counts"),
        ("normalisation", "normalisation"),
        ("num_pixels.valid", "n_pixels"),
    ):
        np.testing.assert_array_equal(table[column], rows[name])
    for i, axis in enumerate("xyz"):
        np.testing.assert_allclose(
            table["xyzobs.px.value"][:, i] * rows["n_pixels"], rows[axis], atol=1e-12
        )
    hkl = table["miller_index"] / np.array(GRID.ndiv)
    b = np.array(GRID.cell.fractionalization_matrix()).reshape(3, 3).T
    s = np.linalg.norm(hkl @ b.T, axis=1)
    np.testing.assert_allclose(table["d"][s > 0], 1 / s[s > 0], rtol=1e-12)


def test_origin_has_no_d_spacing():
    row = np.ones(1, dtype=SUMS)
    row["key"] = GRID.key(np.zeros((1, 3), dtype=int))
    columns = runs.observation_columns(row, GRID)
    assert columns["miller_index"].tolist() == [[0, 0, 0]]
    assert columns["d"][0] == 0


def test_voxels_beyond_d_min_of_the_reference_cell_are_left_out(tmp_path):
    """Crystals with a larger cell reach them; merging could not place them."""
    s = GRID.s(GRID.index(ALL_KEYS))
    block = np.zeros(len(ALL_KEYS), dtype=SUMS)
    block["key"], block["n_pixels"] = ALL_KEYS, 1
    (path,) = runs.write_runs([block], tmp_path, "run")
    with ObservationWriter(tmp_path / "x.refl", GRID, {0: "a"}) as writer:
        n_beyond = runs.merge_runs([path], GRID, writer, take_peaks=pytest.fail)
    with ObservationFile(tmp_path / "x.refl") as table:
        index = table.read(0, table.n_rows, ["miller_index"])["miller_index"]
    # half a voxel diagonal: its pixels may still be within the limit
    limit = 1 / GRID.d_min + GRID.half_diagonal
    np.testing.assert_array_equal(GRID.key(index), ALL_KEYS[s <= limit])
    assert n_beyond == np.count_nonzero(s > limit) > 0


def test_voxels_that_stand_out_are_left_out(tmp_path):
    """Poisson counts of mean 5 in each of four blocks, but 500 in one voxel."""
    rng = np.random.default_rng(4)
    blocks = []
    peak = int(GRID.key(np.array([[2, 1, -3]]))[0])
    for number in range(4):
        block = np.zeros(len(ALL_KEYS), dtype=SUMS)
        block["key"], block["n_pixels"], block["id"] = ALL_KEYS, 1, number
        block["normalisation"] = 1.0
        block["counts"] = rng.poisson(5.0, len(block))
        block["counts"][block["key"] == peak] = 500
        blocks.append(block)
    paths = runs.write_runs(blocks, tmp_path, "run")
    sums = runs.voxel_sums(paths, GRID)
    np.testing.assert_array_equal(sums["key"], ALL_KEYS)
    np.testing.assert_array_equal(sums["counts"], sum(b["counts"] for b in blocks))
    np.testing.assert_array_equal(sums["normalisation"], 4.0)
    found = runs.statistical_peaks(paths, GRID)
    assert found.tolist() == [peak]
    with ObservationWriter(tmp_path / "x.refl", GRID, {0: "a"}) as writer:
        runs.merge_runs(paths, GRID, writer, found)
    with ObservationFile(tmp_path / "x.refl") as table:
        index = table.read(0, table.n_rows, ["miller_index"])["miller_index"]
    assert peak not in GRID.key(index)
    assert len(index) % 4 == 0


def test_peaks_are_handed_over_in_parts(tmp_path, monkeypatch):
    """All rows of some lattice points at a time, and never many of them."""
    monkeypatch.setattr(runs, "PEAK_ROWS", 120)
    monkeypatch.setattr(runs.sorted_slabs, "__defaults__", (50,))
    monkeypatch.setattr(runs, "SAMPLE", 1)
    n_voxels = PointGrid(GRID).n_voxels
    rng = np.random.default_rng(7)
    blocks = random_blocks(40)
    for block in blocks:
        block["key"][::2] = n_voxels + rng.integers(0, 200, len(block[::2]))
        block.sort(order="key", kind="stable")
    paths = runs.write_runs(blocks, tmp_path, "run")
    taken = []
    with ObservationWriter(tmp_path / "o.refl", GRID, {0: "a"}) as writer:
        runs.merge_runs(paths, GRID, writer, take_peaks=taken.append)
    rows = plainly_sorted(blocks)
    peaks = rows[rows["key"] >= n_voxels]
    assert len(taken) > 3 and max(map(len, taken)) < 120 + 60 < len(peaks) / 3
    for part, following in zip(taken, taken[1:]):
        assert part["key"][-1] < following["key"][0]
    np.testing.assert_array_equal(np.concatenate(taken), peaks)
    assert writer.n_rows == len(rows) - len(peaks)
