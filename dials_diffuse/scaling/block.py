"""The observations of a choice of symmetry-unique voxels, lean and sorted by voxel.

Refinement needs no more than these. The block holds 20 bytes and 4 for each term a row:
experiment, counts, background, variance, normalisation and cells. The refinement adds the
photons, weights and flags of use, 9 bytes a row; the sums in C++ share all these arrays.
While a block is sorted, there are 17 more bytes a row for voxels and places, and one column
twice. All observations of a voxel are in or none is, and the choice, by a hash of the
voxel, depends on nothing but the number asked for. Voxels with a single observation say
nothing about scales and are left out, unless there is a map to scale to.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from dials.array_family import flex
from dials_diffuse.io.observations import ROWS_PER_SLAB
from dials_diffuse.merging import sums
from dials_diffuse.merging.observations import (
    ObservationTable,
    asu_voxels,
    lookup,
    usable_rows,
)
from dials_diffuse.scaling.coordinates import COLUMNS, CoordinateFinder
from dials_diffuse.scaling.layout import Layout
from dials_diffuse.util.memory import giving_back
from dials_diffuse.util.signals import progress_bar

FLAGS = flex.reflection_table.flags
OUTLIER = np.uint64(int(FLAGS.outlier_in_scaling))
EXCLUDED = np.uint64(int(FLAGS.user_excluded_in_scaling))
SCALED = np.uint64(int(FLAGS.scaled))
OF_SCALING = OUTLIER | EXCLUDED | SCALED

NEEDED = (
    "miller_index",
    "id",
    "counts",
    "background.sum.value",
    "background.sum.variance",
    "normalisation",
    "num_pixels.valid",
    *COLUMNS,
)

COLUMNS_OF_BLOCK = ("experiment", "counts", "background", "variance", "normalisation")


class NoObservations(ValueError):
    """There is nothing to refine against."""


class ImageRange(NamedTuple):
    """Images of an experiment.

    Args:
        experiment: Number of the experiment.
        first: Array index of the first image.
        stop: Array index after the last; all by default.
    """

    experiment: int
    first: float = -math.inf
    stop: float = math.inf


@dataclasses.dataclass
class ObservationBlock:
    """Observations sorted by symmetry-unique voxel; n rows in n_groups groups.

    Args:
        start: Limits of the groups, int32, shape (n_groups + 1,).
        voxel: Packed index of the voxel of each group (``merging.sums.pack``); of a
            Bragg peak its bits are inverted, which makes it negative.
        experiment: Number of the experiment of each row, int32.
        counts: Photons, background included, float32.
        background: Photons of the background, float32.
        variance: Variance of the background, photons², float32.
        normalisation: s.sr, float32.
        cells: The cell of each row in each term, int32, by the name of the term.
    """

    start: np.ndarray
    voxel: np.ndarray
    experiment: np.ndarray
    counts: np.ndarray
    background: np.ndarray
    variance: np.ndarray
    normalisation: np.ndarray
    cells: dict[str, np.ndarray]

    @property
    def n_rows(self) -> int:
        """Number of observations."""
        return len(self.counts)

    @property
    def n_groups(self) -> int:
        """Number of symmetry-unique voxels."""
        return len(self.start) - 1

    @property
    def is_diffuse(self) -> np.ndarray:
        """Whether each row is of a voxel, not of a Bragg peak."""
        return np.repeat(self.voxel >= 0, np.diff(self.start))

    @property
    def group(self) -> np.ndarray:
        """Number of the group of each row."""
        return np.repeat(np.arange(self.n_groups), np.diff(self.start))


@dataclasses.dataclass
class Rows:
    """The same columns, not yet sorted, with the voxel of each row."""

    voxel: np.ndarray
    experiment: np.ndarray
    counts: np.ndarray
    background: np.ndarray
    variance: np.ndarray
    normalisation: np.ndarray
    cells: dict[str, np.ndarray]
    number: np.ndarray  # place of the row in its table


class RowReader:
    """Reads observations with their cells from tables, slab by slab.

    Args:
        tables: Observations on one grid.
        numbers: For each table the number of each experiment by its ``id``.
        finder: Coordinates of the observations.
        layouts: Parameters and cells of each term.
        excluded: Images to leave out.
    """

    def __init__(
        self,
        tables: Sequence[ObservationTable],
        numbers: Sequence[Mapping[int, int]],
        finder: CoordinateFinder,
        layouts: Mapping[str, Layout],
        excluded: Sequence[ImageRange] = (),
    ) -> None:
        self.tables, self.numbers = tables, numbers
        self.finder, self.layouts = finder, layouts
        self.names = set().union(*(x.coordinates for x in layouts.values()))
        self.excluded = tuple(excluded)
        whole = {images.experiment for images in excluded if images.first == -math.inf}
        self._whole = np.array(sorted(whole), dtype=np.int64)
        self._ranges = [images for images in excluded if images.first > -math.inf]

    @property
    def n_rows(self) -> int:
        """Number of rows of all tables."""
        return sum(table.n_rows for table in self.tables)

    def slabs(self, description: str) -> Iterator[tuple[int, int, int]]:
        """Number of the table, first row and row after the last of each slab."""
        slabs = [
            (i, *limits)
            for i, table in enumerate(self.tables)
            for limits in table.slabs(ROWS_PER_SLAB)
        ]
        yield from giving_back(progress_bar(slabs, desc=description, unit="slab"))

    def read(
        self, table_number: int, start: int, stop: int, step: int = 1, phase: int = 0
    ) -> Rows:
        """The usable rows of a slab whose voxels are chosen.

        Args:
            table_number: Number of the table.
            start: First row.
            stop: Row after the last.
            step: One in ``step`` symmetry-unique voxels is chosen.
            phase: Which of the ``step`` disjoint choices.
        """
        table = self.tables[table_number]
        wanted = [*NEEDED, *{"flags"}.intersection(table.columns)]
        rows = table.read(start, stop, wanted)
        rows["number"] = np.arange(start, stop)
        if "flags" in rows:  # what an earlier scaling has flagged is judged anew
            rows["flags"] = rows["flags"].astype(np.uint64) & ~OF_SCALING
        rows = usable_rows(rows)
        voxel = asu_voxels(rows["miller_index"], table.grid.laue_group)
        chosen = np.ones(len(voxel), dtype=bool)
        if step > 1:
            hashes = sums.mix_bits(voxel.view(np.uint64))
            chosen = hashes % np.uint64(step) == np.uint64(phase)
        experiment = lookup(self.numbers[table_number], rows["id"], table.path)
        chosen &= ~self.is_excluded(experiment, rows["xyzobs.px.value"][:, 2])
        if not chosen.all():
            rows = {name: values[chosen] for name, values in rows.items()}
            voxel, experiment = voxel[chosen], experiment[chosen]
        return Rows(
            voxel=voxel,
            experiment=experiment.astype(np.int32),
            counts=rows["counts"].astype(np.float32),
            background=rows["background.sum.value"].astype(np.float32),
            variance=rows["background.sum.variance"].astype(np.float32),
            normalisation=rows["normalisation"].astype(np.float32),
            cells=self.cells(experiment, rows),
            number=rows["number"],
        )

    def cells(
        self, experiment: np.ndarray, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The cell of each row in each term, int32.

        Args:
            experiment: Number of the experiment of each row.
            columns: ``coordinates.COLUMNS`` of the rows.
        """
        coordinates = self.finder.find(experiment, columns, self.names)
        return {
            name: layout.cell(experiment, coordinates)
            for name, layout in self.layouts.items()
        }

    def is_excluded(self, experiment: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Whether each observation is of an image that is left out."""
        result = np.isin(experiment, self._whole)
        for images in self._ranges:
            result |= (
                (experiment == images.experiment)
                & (frame >= images.first)
                & (frame < images.stop)
            )
        return result


class GrowingColumns:
    """Columns to which rows are appended, each in one array.

    Many arrays below the size that the C library maps by itself would leave the memory in
    pieces when they are freed.
    """

    def __init__(self) -> None:
        self.n_rows = 0
        self._columns: dict[str, np.ndarray] = {}

    def append(self, part: Mapping[str, np.ndarray], n: int) -> None:
        """Append n rows of all columns, which are those of the first part."""
        stop = self.n_rows + n
        for name, values in part.items():
            column = self._columns.get(name, np.empty(0, values.dtype))
            if len(column) < stop:
                larger = np.empty(max(stop, 2 * len(column)), column.dtype)
                larger[: self.n_rows] = column[: self.n_rows]
                self._columns[name] = column = larger
            column[self.n_rows : stop] = values
        self.n_rows = stop

    def take(self, name: str) -> np.ndarray:
        """All rows of a column, which is not kept."""
        return self._columns.pop(name)[: self.n_rows]


def _sort_voxels(
    voxel: np.ndarray, single: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows sorted by voxel, without those of voxels with a single one unless they count.

    Returns:
        Numbers of the rows in the new order, and the voxel and the first row of each
        group.
    """
    order = np.argsort(voxel, kind="stable")
    voxel = voxel[order]
    first = np.ones(len(voxel), dtype=bool)
    first[1:] = voxel[1:] != voxel[:-1]
    if not single:
        last = np.ones(len(voxel), dtype=bool)
        last[:-1] = first[1:]
        several = ~(first & last)
        order, first, voxel = order[several], first[several], voxel[several]
    starts = np.flatnonzero(first)
    return order, voxel[starts], starts


def sort_rows(
    rows: GrowingColumns, cells: GrowingColumns, names: Iterable[str], single: bool
) -> ObservationBlock:
    """Sort rows by voxel, and leave out those of voxels with a single one.

    Args:
        rows: ``COLUMNS_OF_BLOCK`` and the voxel; taken one by one, to save memory.
        cells: The cells in each term; taken one by one.
        names: Of the terms.
        single: Keep voxels with a single row all the same.
    """
    order, voxel, starts = _sort_voxels(rows.take("voxel"), single)
    return ObservationBlock(
        start=np.append(starts, len(order)).astype(np.int32),
        voxel=voxel,
        **{name: rows.take(name)[order] for name in COLUMNS_OF_BLOCK},
        cells={name: cells.take(name)[order] for name in names},
    )


def read_block(
    reader: RowReader,
    step: int = 1,
    phase: int = 0,
    single: bool = False,
    further: Sequence[Rows] = (),
    description: str = "Reading",
) -> ObservationBlock:
    """The observations of one in ``step`` symmetry-unique voxels.

    Args:
        reader: Of the observations.
        step: 1 for all voxels.
        phase: Which of the ``step`` disjoint choices.
        single: Keep voxels with a single observation.
        further: Observations of something else, such as Bragg peaks.
        description: For the progress bar.

    Raises:
        NoObservations: There are none.
    """
    rows, cells = GrowingColumns(), GrowingColumns()

    def append(part: Rows) -> None:
        columns = {name: getattr(part, name) for name in ("voxel", *COLUMNS_OF_BLOCK)}
        rows.append(columns, len(part.voxel))
        cells.append(part.cells, len(part.voxel))

    for slab in reader.slabs(description):
        append(reader.read(*slab, step, phase))
    if rows.n_rows == 0:
        raise NoObservations(
            f"{reader.tables[0].path} has no usable observations: all of its rows have no "
            "pixels, or are of images that are left out"
        )
    for part in further:
        append(part)
    return sort_rows(rows, cells, list(reader.layouts), single)


def read_sorted_cells(
    reader: RowReader, step: int, single: bool, description: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The cells of the rows of a block alone, in its order.

    Args: as those of ``read_block``.

    Returns:
        The voxel of each group, and the cells by the name of the layout.
    """
    voxel, cells = GrowingColumns(), GrowingColumns()
    for slab in reader.slabs(description):
        part = reader.read(*slab, step)
        voxel.append({"voxel": part.voxel}, len(part.voxel))
        cells.append(part.cells, len(part.voxel))
    order, voxels, _ = _sort_voxels(voxel.take("voxel"), single)
    return voxels, {name: cells.take(name)[order] for name in reader.layouts}
