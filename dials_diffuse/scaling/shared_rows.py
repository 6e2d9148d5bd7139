"""All observations of the voxels that some experiments share with others, in files.

Symmetry spreads the rows of a voxel over the table. So all rows are dealt out by voxel to
files, in portions of which one is in memory at once, and of each portion those voxels are
kept that one of the experiments in question has seen and something else, too: another
experiment or a reference map.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator

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
from dials_diffuse.scaling.start import with_reference


class PairFiles:
    """Pairs of voxels and experiments in files, one of which is read at once.

    Args:
        folder: For the files, which replace those of an earlier set in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: list[Path] = []

    def append(self, pairs: Pairs) -> None:
        """Write a part."""
        path = self._folder / f"pairs_{len(self._paths)}"
        with open(path, "wb") as handle:
            for column in pairs:
                np.save(handle, column)
        self._paths.append(path)

    def __iter__(self) -> Iterator[Pairs]:
        for path in self._paths:
            with open(path, "rb") as handle:
                yield Pairs(*(np.load(handle) for _ in Pairs._fields))


class SharedRows:
    """Rows with the model applied, 40 bytes each on disk, and 28 for each pair.

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
    ) -> tuple[PairFiles, np.ndarray]:
        """The sums of each voxel and experiment, without outliers, in files.

        Args:
            log_k: Logarithm of what the scale of each experiment is multiplied by, to
                judge outliers, 0 where it is not finite; the sums are those without it.
            threshold: Deviation from which on a row is an outlier; None: none is.
            error_model: Scatter beyond that of counting.
            exempt: Whether each experiment has no outliers.

        Returns:
            The pairs of each portion, whose voxels are numbered from 0, until the next
            call, and the number of rows of each experiment in them.
        """
        parts = PairFiles(self._folder)
        n_rows = np.zeros(self.n_experiments, dtype=np.int64)
        for path in self._paths:
            rows = np.fromfile(path, dtype=RECORD)
            start = starts_of(rows["voxel"])
            known_map = self._map_of(rows["voxel"][start[:-1]])
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
                    reference=known_map,
                )
            if exempt is not None:
                use |= exempt[rows["experiment"]]
            n_rows += np.bincount(rows["experiment"][use], minlength=self.n_experiments)
            pairs = _pairs(rows, start, use)
            parts.append(with_reference(known_map, pairs, self.n_experiments))
        return parts, n_rows

    def _map_of(self, voxel: np.ndarray) -> Reference | None:
        return None if self._reference is None else self._reference.of(voxel)


def _pairs(rows: np.ndarray, start: np.ndarray, use: np.ndarray) -> Pairs:
    """The sums of some rows."""
    group = np.repeat(np.arange(len(start) - 1), np.diff(start))
    chosen = rows[use]
    return add_up_pairs(
        group[use],
        chosen["experiment"],
        chosen["counts"].astype(float) - chosen["base"],
        chosen["response"].astype(float),
    )


def seen_by_several(experiment: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Whether each voxel has rows of more than one experiment.

    Args:
        experiment: Number of the experiment of each row, sorted by voxel.
        first: First row of each voxel.
    """
    low, high = (f.reduceat(experiment, first) for f in (np.minimum, np.maximum))
    return low < high


def _is_shared(
    rows: np.ndarray, chosen: np.ndarray, reference: Reference | None
) -> np.ndarray:
    """Whether each row is of a voxel that a chosen experiment shares with another."""
    if len(rows) == 0:
        return np.zeros(0, dtype=bool)
    start = starts_of(rows["voxel"])
    first, experiment = start[:-1], rows["experiment"]
    shared = seen_by_several(experiment, first)
    if reference is not None:
        shared |= reference.of(rows["voxel"][first]).known
    shared &= np.logical_or.reduceat(chosen[experiment], first)
    return np.repeat(shared, np.diff(start))
