"""The scaling model applied to whole tables, in bounded memory.

Outliers are judged by all observations of a voxel, which symmetry spreads over the table,
and by a map that was scaled to. So the rows are dealt out by voxel to files, in portions
of which one is in memory at once; the numbers of outliers go to a file of their own. Then
the tables are written as one, range of voxels by range of voxels.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np

from dials_diffuse.io.observations import ROWS_PER_SLAB, SCALED_COLUMNS
from dials_diffuse.merging.observations import ObservationTable, lookup
from dials_diffuse.scaling.block import (
    EXCLUDED,
    OF_SCALING,
    OUTLIER,
    SCALED,
    RowReader,
)
from dials_diffuse.scaling.outlier_rows import OutlierRows
from dials_diffuse.scaling.outliers import find_outliers
from dials_diffuse.scaling.portions import (
    ScaleFinder,
    deal_out,
    read_portion,
    starts_of,
)
from dials_diffuse.scaling.result import Scaling
from dials_diffuse.util.memory import giving_back
from dials_diffuse.util.signals import progress_bar

logger = logging.getLogger("dials.diffuse.scale")

MAX_NAMES = 10  # of experiments in the log


def all_outliers(
    reader: RowReader, scaling: Scaling, threshold: float, folder: Path
) -> OutlierRows:
    """The outliers among all rows of all tables.

    Args:
        reader: Of the observations.
        scaling: The model, which has been refined.
        threshold: Deviation from which on an observation is an outlier.
        folder: For temporary files; the caller removes it.
    """
    known = scaling.refiner.map
    outliers = OutlierRows(folder, len(reader.tables))
    portions = deal_out(reader, ScaleFinder(scaling), folder, "Applying the model")
    bar = progress_bar(portions, desc="Finding outliers", unit="portion")
    for path in giving_back(bar):
        rows = read_portion(path)
        os.unlink(path)
        start = starts_of(rows["voxel"])
        outlier = find_outliers(
            rows["counts"],
            rows["response"],
            rows["base"],
            rows["variance"],
            start,
            threshold=threshold,
            error_model=scaling.error_model,
            reference=None if known is None else known.of(rows["voxel"][start[:-1]]),
        )
        outliers.add(rows["table"][outlier], rows["number"][outlier])
    return outliers


def ranges_of_voxels(
    tables: Sequence[ObservationTable], max_rows: int
) -> Iterator[list[tuple[int, int]]]:
    """Ranges of voxels, as ranges of the rows of each table.

    Together the ranges hold about ``max_rows`` rows, at most twice as many but for voxels
    that have more by themselves. For the limits each table is sampled in steps of 1/n of
    that many rows for n tables, and each n-th of the sampled voxels taken.
    """
    step = max(max_rows // len(tables), 1)
    samples = [_keys(table, range(0, table.n_rows, step)) for table in tables]
    keys = np.unique(np.sort(np.concatenate(samples))[:: len(tables)])
    starts = [0] * len(tables)
    for key in keys[1:]:
        stops = [
            _first_row(table, key, sample, step)
            for table, sample in zip(tables, samples)
        ]
        yield list(zip(starts, stops))
        starts = stops
    yield list(zip(starts, (table.n_rows for table in tables)))


def _keys(table: ObservationTable, rows: Iterable[int]) -> np.ndarray:
    """Keys of the voxels of some rows."""
    index = [
        table.read(row, row + 1, ["miller_index"])["miller_index"][0] for row in rows
    ]
    return table.grid.key(np.array(index).reshape(-1, 3))


def _first_row(table: ObservationTable, key: int, sample: np.ndarray, step: int) -> int:
    """First row of a table whose voxel has this key or a greater one.

    Args:
        table: The table.
        key: The key.
        sample: Keys of every ``step``-th row.
        step: Number of rows from one of them to the next.
    """
    place = int(np.searchsorted(sample, key))
    if place == 0:
        return 0
    start, stop = (place - 1) * step, min(place * step, table.n_rows)
    index = table.read(start, stop, ["miller_index"])["miller_index"]
    return start + int(np.searchsorted(table.grid.key(index), key))


def scaled_rows(
    reader: RowReader, scaling: Scaling, outliers: OutlierRows | None
) -> Iterator[dict[str, np.ndarray]]:
    """All rows of all tables with factors, offsets and flags, in the order of voxels.

    Args:
        reader: Of the observations.
        scaling: The model.
        outliers: Which rows are outliers.

    Yields:
        ``SCALED_COLUMNS`` of some rows; ``id`` is the number of the experiment.
    """
    finder = ScaleFinder(scaling)
    # Numbers of experiments in another order than their ids change that of the rows.
    ascending = all(
        np.all(np.diff([numbers[i] for i in sorted(numbers)]) > 0)
        for numbers in reader.numbers
    )
    ranges = list(ranges_of_voxels(reader.tables, ROWS_PER_SLAB))
    for limits in giving_back(progress_bar(ranges, desc="Writing", unit="slab")):
        parts = []
        for number, (start, stop) in enumerate(limits):
            if stop > start:
                part = _scale(reader, number, start, stop, finder)
                if outliers is not None:
                    outlier = outliers.flags(number, start, stop)
                    part["flags"] |= np.where(outlier, OUTLIER, np.uint64(0))
                parts.append(part)
        if not parts:
            continue
        rows = {
            name: np.concatenate([p[name] for p in parts]) for name in SCALED_COLUMNS
        }
        if len(parts) > 1 or not ascending:
            key = reader.tables[0].grid.key(rows["miller_index"])
            order = np.lexsort((rows["xyzobs.px.value"][:, 2], rows["id"], key))
            rows = {name: values[order] for name, values in rows.items()}
        yield rows


def _scale(
    reader: RowReader,
    number: int,
    start: int,
    stop: int,
    finder: ScaleFinder,
) -> dict[str, np.ndarray]:
    """Rows of a table with what scaling adds."""
    table = reader.tables[number]
    names = [name for name in SCALED_COLUMNS if name in table.columns]
    rows = table.read(start, stop, names)
    experiment = lookup(reader.numbers[number], rows["id"], table.path)
    cells = reader.cells(experiment, rows)
    factor, offset = finder.find(cells, len(experiment))
    rows["inverse_scale_factor"], rows["additive_offset"] = factor, offset
    rows["id"] = experiment.astype(np.int32)
    flags = rows["flags"].astype(np.uint64) & ~OF_SCALING
    excluded = reader.is_excluded(experiment, rows["xyzobs.px.value"][:, 2])
    rows["flags"] = flags | np.where(excluded, EXCLUDED, SCALED)
    return rows


class Counts(NamedTuple):
    """Numbers of rows of each experiment, shape (n_experiments,).

    Args:
        all: All of them.
        outliers: Outliers.
        excluded: Of images that are left out.
    """

    all: np.ndarray
    outliers: np.ndarray
    excluded: np.ndarray

    def log(self) -> None:
        """How many observations are outliers, and how many are left out."""
        n, n_outliers = int(self.all.sum()), int(self.outliers.sum())
        share = 100 * n_outliers / max(n, 1)
        logger.info("%d of %d observations are outliers (%.3f%%)", n_outliers, n, share)
        concerned = np.flatnonzero(self.excluded)
        for number in concerned[:MAX_NAMES]:
            logger.info(
                "%d of %d observations of experiment %d are of images left out",
                self.excluded[number],
                self.all[number],
                number,
            )
        if len(concerned) > MAX_NAMES:
            logger.info(
                "and %d observations of %d further experiments",
                self.excluded[concerned[MAX_NAMES:]].sum(),
                len(concerned) - MAX_NAMES,
            )


def count(
    rows: Iterator[dict[str, np.ndarray]],
    use: Callable[[Any], None],
    n_experiments: int,
) -> Counts:
    """Hand all rows on, and count them."""
    counts = Counts(*np.zeros((3, n_experiments), dtype=np.int64))
    for part in rows:
        flags = part["flags"]
        chosen = (slice(None), (flags & OUTLIER) != 0, (flags & EXCLUDED) != 0)
        for total, mine in zip(counts, chosen):
            total += np.bincount(part["id"][mine], minlength=n_experiments)
        use(part)
    return counts
