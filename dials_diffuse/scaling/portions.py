"""All rows with the scaling model applied, dealt out by voxel to files.

Symmetry spreads the rows of a voxel over the tables. Each of the files, the portions, has
all rows of its voxels, and one of them is in memory at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Mapping

import numpy as np

from dials_diffuse.merging import sums
from dials_diffuse.scaling.block import RowReader, Rows
from dials_diffuse.scaling.result import Scaling
from dials_diffuse.scaling.terms import TERMS, Role

# Each is a file, and in memory twice while it is sorted.
ROWS_PER_PORTION = 1_000_000

RECORD = np.dtype(
    [
        ("voxel", "i8"),
        ("table", "i4"),
        ("number", "i8"),
        ("experiment", "i4"),
        ("counts", "f4"),
        ("response", "f4"),
        ("base", "f4"),
        ("variance", "f4"),
    ]
)


class ScaleFinder:
    """The factor and the offset of observations.

    Args:
        scaling: The model.
    """

    def __init__(self, scaling: Scaling) -> None:
        self._terms = [
            (name, TERMS[name].role, component.cell_values())
            for name, component in scaling.components.items()
        ]

    def find(self, cells: Mapping[str, np.ndarray], n: int) -> tuple[np.ndarray, ...]:
        """g = a b and the offset a c of n observations, photons s⁻¹ sr⁻¹.

        Args:
            cells: Cell of each observation in each term.
            n: Number of observations.
        """
        outer, inner, offset = np.ones(n), np.ones(n), np.zeros(n)
        for name, role, values in self._terms:
            value = values[cells[name]]
            if role is Role.OUTER:
                outer *= value
            elif role is Role.INNER:
                inner *= value
            else:
                offset += value
        return outer * inner, outer * offset


def deal_out(
    reader: RowReader, finder: ScaleFinder, folder: Path, text: str
) -> list[Path]:
    """Write the rows of each voxel to the file of its portion.

    Args:
        reader: Of the observations.
        finder: Of the model.
        folder: For the files.
        text: Of the progress bar.

    Returns:
        The files, of dtype ``RECORD``, for ``read_portion``.
    """
    n_portions = -(-reader.n_rows // ROWS_PER_PORTION)
    paths = [folder / f"portion_{i}" for i in range(n_portions)]
    for path in paths:
        path.touch()
    for table, start, stop in reader.slabs(text):
        rows = reader.read(table, start, stop)
        portion = sums.mix_bits(rows.voxel.view(np.uint64)) % np.uint64(n_portions)
        order = np.argsort(portion, kind="stable")
        record = _records(rows, table, finder)[order]
        ends = np.cumsum(np.bincount(portion.astype(np.int64), minlength=n_portions))
        for path, chosen in zip(paths, np.split(record, ends[:-1])):
            if len(chosen):
                with open(path, "ab") as handle:
                    chosen.tofile(handle)
    return paths


def _records(rows: Rows, table: int, finder: ScaleFinder) -> np.ndarray:
    factor, offset = finder.find(rows.cells, len(rows.voxel))
    record = np.empty(len(rows.voxel), dtype=RECORD)
    record["voxel"], record["table"], record["number"] = rows.voxel, table, rows.number
    record["experiment"] = rows.experiment
    record["counts"], record["variance"] = rows.counts, rows.variance
    record["response"] = rows.normalisation * factor
    record["base"] = rows.background + rows.normalisation * offset
    return record


def read_portion(path: Path) -> np.ndarray:
    """The rows of a portion, sorted by voxel."""
    rows = np.fromfile(path, dtype=RECORD)
    return rows[np.argsort(rows["voxel"], kind="stable")]


def starts_of(voxel: np.ndarray) -> np.ndarray:
    """First row of each voxel and, last, the number of rows; rows sorted by voxel."""
    first = np.flatnonzero(np.diff(voxel, prepend=-1))
    return np.append(first, len(voxel)).astype(np.int64)
