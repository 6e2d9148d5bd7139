"""Ranges of voxels of several tables."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import COLUMNS, ObservationFile, ObservationWriter
from dials_diffuse.scaling.apply import ranges_of_voxels

GRID = Grid((20.0, 20.0, 20.0, 90.0, 90.0, 90.0), (2, 2, 2), " P 1", 2.0)


def write_table(path: Path, rows: np.ndarray, n_slabs: int) -> None:
    """A table with voxels of these keys, in so many slabs of whole voxels."""
    rows = np.sort(rows)
    limits = np.searchsorted(rows, rows[:: max(len(rows) // n_slabs, 1)])
    with ObservationWriter(path, GRID, {0: path.name}) as writer:
        for start, stop in zip(limits, [*limits[1:], len(rows)]):
            part = {"miller_index": GRID.index(rows[start:stop])}
            for name, column in COLUMNS.items():
                shape = (stop - start, column.width)[: 1 + (column.width > 1)]
                part.setdefault(name, np.zeros(shape, column.dtype))
            writer.append(part)


def draw_keys(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    """Keys of voxels: spread over all, or of a part of them only."""
    n_voxels = int(np.prod(GRID.shape))
    low = rng.uniform(0, 0.8) if kind == "parts" else 0.0
    high = low + 0.2 if kind == "parts" else 1.0
    return rng.integers(int(low * n_voxels), int(high * n_voxels), n)


@pytest.mark.parametrize("kind", ["all", "parts"])
@pytest.mark.parametrize("n_tables, n_slabs", [(1, 1), (1, 7), (3, 2), (20, 1)])
def test_ranges_hold_whole_voxels_and_not_too_many_rows(
    tmp_path, kind, n_tables, n_slabs
):
    """However long the slabs of the tables are, and how many tables there are."""
    rng, max_rows = np.random.default_rng(n_tables), 1000
    paths = [tmp_path / f"{i}.refl" for i in range(n_tables)]
    for path in paths:
        n = int(rng.integers(500, 5000))
        write_table(path, draw_keys(rng, kind, n), n_slabs)
    with contextlib.ExitStack() as stack:
        tables = [stack.enter_context(ObservationFile(path)) for path in paths]
        ranges = list(ranges_of_voxels(tables, max_rows))
        keys = [
            table.grid.key(
                table.read(0, table.n_rows, ["miller_index"])["miller_index"]
            )
            for table in tables
        ]
    last, ends = -1, [0] * n_tables
    for limits in ranges:
        assert [start for start, _ in limits] == ends
        mine = np.concatenate([k[slice(*limit)] for k, limit in zip(keys, limits)])
        assert len(mine) <= 2 * max_rows + np.bincount(mine, minlength=1).max()
        if len(mine):
            assert mine.min() > last
            last = mine.max()
        ends = [stop for _, stop in limits]
    n_rows = [len(k) for k in keys]
    assert ends == n_rows
    assert len(ranges) <= 2 + sum(n_rows) / max_rows + n_tables


def test_a_voxel_with_more_rows_stays_whole(tmp_path):
    path = tmp_path / "one.refl"
    write_table(path, np.repeat([3, 5, 9], [10, 3000, 20]), 1)
    with ObservationFile(path) as table:
        ranges = list(ranges_of_voxels([table], 1000))
    assert [stop for ((_, stop),) in ranges] == [10, 3030]
