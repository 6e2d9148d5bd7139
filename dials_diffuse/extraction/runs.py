"""Sorting the observations of all blocks by voxel, in bounded memory.

Workers write *runs*: files of observations sorted by voxel, each of a range of
consecutive blocks. At the end the grid is cut into slabs of about equal numbers of
rows; the parts of all runs that fall into a slab are joined in the order of the blocks,
sorted (stably, so that rows of a voxel keep that order) and appended to the table. The
result does not depend on how the blocks were dealt out.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import math
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np

from dials_diffuse.bragg.points import PointGrid
from dials_diffuse.bragg.statistical import bragg_voxels
from dials_diffuse.extraction.loop import SUMS
from dials_diffuse.extraction.totals import ObservationTotals
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ROWS_PER_SLAB, ObservationWriter

RUN_ROWS = 2_000_000  # 144 MB
PEAK_ROWS = 1_000_000  # of Bragg peaks at a time: 72 MB
# What rows are copied as: numpy copies those of several fields field by field.
BYTES = np.dtype(f"V{SUMS.itemsize}")
SAMPLE = 997  # every so many rows, a key that says how the rows are distributed


def write_runs(blocks: Iterable[np.ndarray], folder: Path, name: str) -> list[Path]:
    """Write the observations of consecutive blocks as sorted runs.

    Args:
        blocks: Arrays of dtype ``SUMS``, in the order of the blocks.
        folder: Where to write.
        name: Stem of the files, sorting in the order of the blocks.

    Returns:
        The files, in the order of the blocks.
    """
    paths: list[Path] = []
    held: list[np.ndarray] = []

    def write() -> None:
        rows = sorted_by_key(held)
        path = folder / f"{name}_{len(paths):06d}.bin"
        # numpy's own writers do not say that the disk is full
        path.write_bytes(rows.view(np.uint8).data)
        paths.append(path)
        held.clear()

    for rows in blocks:
        held.append(rows)
        if sum(map(len, held)) >= RUN_ROWS:
            write()
    if any(map(len, held)):
        write()
    return paths


def sorted_by_key(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of some arrays of dtype ``SUMS``, those of a key in their order."""
    rows = np.concatenate([part.view(BYTES) for part in parts])
    key = np.concatenate([part["key"] for part in parts])
    return rows[np.argsort(key, kind="stable")].view(SUMS)


def slab_limits(paths: Sequence[Path], max_rows: int) -> list[int]:
    """Voxel keys that cut all rows into slabs of about ``max_rows`` rows.

    Returns:
        Increasing keys; slab i holds the keys from element i up to element i + 1.
    """
    n_rows, samples = 0, []
    for path in paths:
        run = np.memmap(path, dtype=SUMS, mode="r")
        n_rows += len(run)
        samples.append(np.array(run["key"][::SAMPLE]))
    sample = np.sort(np.concatenate(samples))
    n_slabs = max(1, math.ceil(n_rows / max_rows))
    inner = sample[np.arange(1, n_slabs) * len(sample) // n_slabs]
    return [0, *map(int, np.unique(inner[inner > 0])), int(np.iinfo(np.int32).max)]


def rows_between(path: Path, lower: int, upper: int) -> np.ndarray:
    """The rows of a run with keys from ``lower`` up to ``upper``.

    The file is closed again: there may be more runs than a process may open files.
    """
    run = np.memmap(path, dtype=SUMS, mode="r")
    # np.searchsorted would copy all keys
    start, stop = (bisect.bisect_left(run["key"], key) for key in (lower, upper))
    return np.array(run[start:stop].view(BYTES)).view(SUMS)


def sorted_slabs(
    paths: Sequence[Path], max_rows: int = ROWS_PER_SLAB
) -> Iterator[np.ndarray]:
    """The rows of all runs, sorted by voxel, in slabs of whole voxels."""
    limits = slab_limits(paths, max_rows)
    for lower, upper in zip(limits, limits[1:]):
        slab = sorted_by_key([rows_between(path, lower, upper) for path in paths])
        if len(slab):
            yield slab


def voxels_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the voxels of sorted rows, and which of them each row belongs to."""
    key = rows["key"]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    lengths = np.diff(starts, append=len(key))
    return key[starts], np.repeat(np.arange(len(starts)), lengths)


def observation_columns(rows: np.ndarray, grid: Grid) -> dict[str, np.ndarray]:
    """The columns of the reflection table of some rows of sums.

    Left out are voxels wholly beyond d_min in the reference cell. A crystal with a
    larger cell reaches them, but merging could not place them.

    Args:
        rows: Array of dtype ``SUMS``, sorted by voxel.
        grid: The voxel grid.
    """
    voxels, voxel_of_row = voxels_of(rows)
    index = grid.index(voxels)
    s = grid.s(index)
    inside = s <= 1 / grid.d_min + grid.half_diagonal
    if not inside.all():
        rows, voxel_of_row = (
            rows[inside[voxel_of_row]],
            voxel_of_row[inside[voxel_of_row]],
        )
    d = np.divide(1.0, s, out=np.zeros_like(s), where=s > 0)
    zero = np.zeros(len(rows))
    centroid = [rows[axis] / rows["n_pixels"] for axis in "xyz"]
    return {
        "miller_index": index[voxel_of_row],
        "id": rows["id"],
        "panel": rows["panel"].astype(np.uint64),
        "counts": rows["counts"],
        "background.sum.value": rows["background"],
        "background.sum.variance": rows["background_variance"],
        "normalisation": rows["normalisation"],
        "num_pixels.valid": rows["n_pixels"],
        "xyzobs.px.value": np.stack(centroid, axis=-1),
        "d": d[voxel_of_row],
        "flags": zero.astype(np.uint64),
    }


def voxel_sums(paths: Sequence[Path], grid: Grid) -> np.ndarray:
    """Counts and normalisation of every voxel of all runs, sorted by voxel.

    Returns:
        Array with the fields key, counts and normalisation, one row for each voxel.
    """
    dtype = [(name, SUMS[name]) for name in ("key", "counts", "normalisation")]
    parts = [np.zeros(0, dtype=dtype)]
    n_voxels = PointGrid(grid).n_voxels
    for slab in sorted_slabs(paths):
        slab = slab[: np.searchsorted(slab["key"], n_voxels)]
        keys, voxel = voxels_of(slab)
        sums = np.zeros(len(keys), dtype=dtype)
        sums["key"] = keys
        for name in ("counts", "normalisation"):
            sums[name] = np.bincount(voxel, slab[name], minlength=len(keys))
        parts.append(sums)
    return np.concatenate(parts)


def statistical_peaks(paths: Sequence[Path], grid: Grid) -> np.ndarray:
    """Keys of the voxels whose counts stand out of their surroundings, ascending.

    By ``bragg.statistical``, from all observations of a voxel together.
    """
    sums = voxel_sums(paths, grid)
    if len(sums) == 0:
        return sums["key"]
    is_peak = bragg_voxels(
        grid.index(sums["key"]), sums["counts"], sums["normalisation"], grid
    )
    return sums["key"][is_peak]


def merge_runs(
    paths: Sequence[Path],
    grid: Grid,
    writer: ObservationWriter,
    left_out: np.ndarray | None = None,
    totals: ObservationTotals | None = None,
    take_peaks: Callable[[np.ndarray], None] | None = None,
) -> int:
    """Append the observations of all runs, sorted by voxel, to a table.

    Args:
        paths: The runs.
        grid: The voxel grid.
        writer: Writes the table.
        left_out: Keys of voxels to leave out, ascending.
        totals: Gets what is written added.
        take_peaks: Called with the rows of Bragg peaks, which go with no voxel: all of
            some lattice points at a time, sorted by point, about ``PEAK_ROWS`` of them.

    Returns:
        The number of observations left out because they lie beyond d_min in the
        reference cell.
    """
    if not paths:
        return 0
    peaks: list[np.ndarray] = []
    n_voxels = PointGrid(grid).n_voxels
    slabs = sorted_slabs(paths)
    n_beyond = 0
    # one thread sorts the next slab while this one is written
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, slabs, None)
        while (slab := following.result()) is not None:
            following = pool.submit(next, slabs, None)
            # sorted: the peaks come last
            n_rows = np.searchsorted(slab["key"], n_voxels)
            if take_peaks is not None and n_rows < len(slab):
                peaks.append(slab[n_rows:].copy())
                if sum(map(len, peaks)) >= PEAK_ROWS:
                    take_peaks(_taken(peaks))
            slab = slab[:n_rows]
            if left_out is not None:
                slab = slab[~np.isin(slab["key"], left_out)]
            if len(slab) == 0:
                continue
            columns = observation_columns(slab, grid)
            n_beyond += len(slab) - len(columns["id"])
            writer.append(columns)
            if totals is not None:
                totals.add(columns)
    if peaks:
        take_peaks(_taken(peaks))
    return n_beyond


def _taken(parts: list[np.ndarray]) -> np.ndarray:
    """Some arrays as one; the list is left empty, so that they are not held twice."""
    rows = np.concatenate(parts)
    parts.clear()
    return rows
