"""Which rows of tables are outliers, in files.

Outliers are found voxel by voxel, and symmetry spreads the rows of a voxel over the table.
So each lot of them is added as a sorted run of row numbers, and of each run those in a
range of rows are looked up: what is in memory does not grow with the tables.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

NUMBER = np.dtype("i8")


class OutlierRows:
    """Numbers of rows, 8 bytes each on disk.

    Args:
        folder: For temporary files; the caller removes it.
        n_tables: Number of tables.
    """

    def __init__(self, folder: Path, n_tables: int) -> None:
        self._paths = [folder / f"outliers_{i}" for i in range(n_tables)]
        self._ends: list[list[int]] = [[0] for _ in self._paths]

    def add(self, table: np.ndarray, number: np.ndarray) -> None:
        """Add rows that are outliers.

        Args:
            table: Number of the table of each row, shape (n,).
            number: Number of the row in its table.
        """
        for i, (path, ends) in enumerate(zip(self._paths, self._ends)):
            run = np.sort(number[table == i]).astype(NUMBER)
            if len(run):
                with open(path, "ab") as handle:
                    run.tofile(handle)
                ends.append(ends[-1] + len(run))

    def flags(self, table: int, start: int, stop: int) -> np.ndarray:
        """Whether each row of a table from ``start`` up to ``stop`` is an outlier."""
        flags = np.zeros(stop - start, dtype=bool)
        ends = self._ends[table]
        if len(ends) > 1:
            # Closed again with this call: pages that have been read count as memory.
            numbers = np.asarray(np.memmap(self._paths[table], dtype=NUMBER, mode="r"))
            for first, last in zip(ends, ends[1:]):
                run = numbers[first:last]
                low, high = np.searchsorted(run, (start, stop))
                flags[run[low:high] - start] = True
        return flags
