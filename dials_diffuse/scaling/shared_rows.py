"""All observations of the voxels that some experiments share with others, in files.

Symmetry spreads the rows of a voxel over the table. So all rows are dealt out by voxel to
files, in such portions that one fits into memory, and of each portion those voxels are
kept that one of the experiments in question has seen and something else, too: another
experiment or a reference map.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dials_diffuse.scaling.block import RowReader
from dials_diffuse.scaling.error_model import ErrorModel
from dials_diffuse.scaling.initial import Pairs, add_up_pairs
from dials_diffuse.scaling.outliers import find_outliers
from dials_diffuse.scaling.portions import (
    RECORD,
    ScaleFinder,
    deal_out,
    read_portion,
    starts_of,
)
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.result import Scaling


class SharedRows:
    """Rows with the model applied, 40 bytes each on disk.

    Args:
        reader: Of all observations.
        scaling: The model.
        folder: For temporary files; the caller removes it.
    """

    def __init__(self, reader: RowReader, scaling: Scaling, folder: Path) -> None:
        self.n_experiments = len(scaling.extents)
        self.n_rows = np.zeros(self.n_experiments, dtype=np.int64)
        self._reference: Reference | None = None
        self._folder = folder
        self._paths = deal_out(
            reader, ScaleFinder(scaling), folder, "Reading what is left"
        )
        for path in self._paths:
            experiment = np.fromfile(path, dtype=RECORD)["experiment"]
            self.n_rows += np.bincount(experiment, minlength=self.n_experiments)

    def keep(self, chosen: np.ndarray, reference: Reference | None) -> None:
        """Sort the rows by voxel, and drop the voxels that tell nothing.

        Args:
            chosen: Whether each experiment is one of those in question.
            reference: A map that counts as one more experiment, the last.
        """
        self._reference = reference
        kept = []
        for path in self._paths:
            rows = read_portion(path)
            os.unlink(path)
            rows = rows[_is_shared(rows, chosen, reference)]
            if len(rows):
                rows.tofile(path)
                kept.append(path)
        self._paths = kept

    def add_up(
        self,
        log_k: np.ndarray,
        threshold: float | None,
        error_model: ErrorModel = ErrorModel(),
        exempt: np.ndarray | None = None,
    ) -> tuple[list[Pairs], np.ndarray]:
        """The sums of each voxel and experiment, without outliers, in files.

        Args:
            log_k: Logarithm of what the scale of each experiment is multiplied by, to
                judge outliers, 0 where it is not finite; the sums are those without it.
            threshold: Deviation from which on a row is an outlier; None: none is.
            error_model: Scatter beyond that of counting.
            exempt: Whether each experiment has no outliers.

        Returns:
            The pairs of each portion, whose voxels are numbered from 0, and the number
            of rows of each experiment in them.
        """
        parts, n_rows = [], np.zeros(self.n_experiments, dtype=np.int64)
        for path in self._paths:
            rows = np.memmap(path, dtype=RECORD, mode="r")
            start = starts_of(rows["voxel"])
            use = np.ones(len(rows), dtype=bool)
            if threshold is not None:
                known = np.where(np.isfinite(log_k), log_k, 0.0)
                factor = np.exp(known)[rows["experiment"]]
                use = ~find_outliers(
                    rows["counts"],
                    rows["response"] * factor,
                    rows["base"],
                    rows["variance"],
                    start,
                    threshold=threshold,
                    error_model=error_model,
                )
            if exempt is not None:
                use |= exempt[rows["experiment"]]
            n_rows += np.bincount(rows["experiment"][use], minlength=self.n_experiments)
            parts.append(self._in_files(self._pairs(rows, start, use), path))
        return parts, n_rows

    def _pairs(self, rows: np.ndarray, start: np.ndarray, use: np.ndarray) -> Pairs:
        """The sums of some rows, and of the reference map."""
        group = np.repeat(np.arange(len(start) - 1), np.diff(start))
        chosen = rows[use]
        pairs = add_up_pairs(
            group[use],
            chosen["experiment"],
            chosen["counts"].astype(float) - chosen["base"],
            chosen["response"].astype(float),
        )
        if self._reference is None:
            return pairs
        known = self._reference.of(rows["voxel"][start[:-1]])
        (place,) = np.nonzero(known.known)
        number = np.full(len(place), self.n_experiments)
        further = (place, number, known.photons[place], known.response[place])
        return Pairs(*(np.concatenate(columns) for columns in zip(pairs, further)))

    def _in_files(self, pairs: Pairs, portion: Path) -> Pairs:
        """The same pairs, in files, read when they are needed."""

        def in_file(name: str, column: np.ndarray) -> np.ndarray:
            path = self._folder / f"{portion.name}_{name}.npy"
            # Not overwritten: earlier ones may still be mapped to memory.
            path.unlink(missing_ok=True)
            np.save(path, column)
            return np.load(path, mmap_mode="r")

        return Pairs(*(in_file(*item) for item in pairs._asdict().items()))


def _is_shared(
    rows: np.ndarray, chosen: np.ndarray, reference: Reference | None
) -> np.ndarray:
    """Whether each row is of a voxel that a chosen experiment shares with another."""
    if len(rows) == 0:
        return np.zeros(0, dtype=bool)
    start = starts_of(rows["voxel"])
    first, experiment = start[:-1], rows["experiment"]
    shared = np.minimum.reduceat(experiment, first) < np.maximum.reduceat(
        experiment, first
    )
    if reference is not None:
        shared |= reference.of(rows["voxel"][first]).known
    shared &= np.logical_or.reduceat(chosen[experiment], first)
    return np.repeat(shared, np.diff(start))
