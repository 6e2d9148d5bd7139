"""Sums over all observations and Bragg peaks, by image and resolution, as they come."""

from __future__ import annotations

import dataclasses
from typing import Mapping, Sequence

import numpy as np

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.bragg.sums import PeakIntensities
from dials_diffuse.extraction.blocks import Block
from dials_diffuse.grid import Grid
from dials_diffuse.merging.statistics import shell_number

N_SHELLS = 20  # of equal width in 1/d

# Columns of the table that are summed
SUMMED = {
    "n_pixels": "num_pixels.valid",
    "photons": "counts",
    "background": "background.sum.value",
    "normalisation": "normalisation",
}


def shell_limits(grid: Grid) -> np.ndarray:
    """Limits of shells of equal width in 1/d, 1/Å, shape (``N_SHELLS`` + 1,)."""
    low = 1 / grid.d_max if grid.d_max else 0.0
    return np.linspace(low, 1 / grid.d_min, N_SHELLS + 1)


class ObservationTotals:
    """Sums over the observations of a table.

    Args:
        grid: The voxel grid, for its resolution limits.
        blocks: The blocks that the observations are made from.

    Attributes:
        blocks: ``n_observations`` and those of ``SUMMED`` of each block of images.
        shells: The same in shells of resolution.
        edges: Limits of the shells, 1/Å, shape (n_shells + 1,).
    """

    def __init__(self, grid: Grid, blocks: Sequence[Block]) -> None:
        self.edges = shell_limits(grid)
        names = ("n_observations", *SUMMED)
        self.blocks = {name: np.zeros(len(blocks)) for name in names}
        self.shells = {name: np.zeros(N_SHELLS) for name in names}
        self._blocks = blocks

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Add some observations.

        Args:
            rows: Columns of the reflection table.
        """
        d = rows["d"]
        s = np.divide(1.0, d, out=np.zeros_like(d), where=d > 0)
        block = block_of_rows(self._blocks, rows["id"], rows["xyzobs.px.value"][:, 2])
        for sums, number in (
            (self.blocks, block),
            (self.shells, shell_number(s, self.edges)),
        ):
            size = len(sums["n_observations"])
            sums["n_observations"] += np.bincount(number, minlength=size)
            for name, column in SUMMED.items():
                sums[name] += np.bincount(number, rows[column], minlength=size)


class PeakTotals:
    """Numbers of Bragg peaks, and sums over them in shells of resolution.

    Args:
        grid: The voxel grid, for its resolution limits.
        experiments: The experiments that the ids of the peaks count.

    Attributes:
        n_peaks: Number of peaks; ``n_complete`` of complete ones, ``n_unique`` of
            lattice points, ``n_pixels`` of their pixels.
        shells: In each shell, of the peaks of stills and the complete ones of sweeps:
            ``n_peaks`` and the sums of ``weight``, weight x ``intensity``, and
            ``i_over_sigma``.
    """

    def __init__(self, grid: Grid, experiments: ExperimentList) -> None:
        self.n_peaks = self.n_complete = self.n_unique = self.n_pixels = 0
        names = ("n_peaks", "weight", "intensity", "i_over_sigma")
        self.shells = {name: np.zeros(N_SHELLS) for name in names}
        self._edges = shell_limits(grid)
        self._cells = dataclasses.replace(grid, ndiv=(1, 1, 1))
        self._is_still = np.array([e.is_still() for e in experiments])

    def add(self, peaks: PeakIntensities) -> None:
        """Add some peaks: all of some lattice points that come once."""
        self.n_peaks += len(peaks.hkl)
        self.n_complete += int(np.sum(peaks.complete))
        self.n_unique += len(np.unique(peaks.hkl, axis=0))
        self.n_pixels += int(np.sum(peaks.n_pixels))
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = peaks.intensity / np.sqrt(peaks.variance)
        usable = np.isfinite(ratio) & (peaks.complete | self._is_still[peaks.id])
        shell = shell_number(self._cells.s(peaks.hkl[usable]), self._edges)
        weight = peaks.weight[usable]
        for name, values in (
            ("n_peaks", np.ones(len(shell))),
            ("weight", weight),
            ("intensity", weight * peaks.intensity[usable]),
            ("i_over_sigma", ratio[usable]),
        ):
            self.shells[name] += np.bincount(shell, values, minlength=N_SHELLS)


def block_of_rows(
    blocks: Sequence[Block], experiment: np.ndarray, z: np.ndarray
) -> np.ndarray:
    """Number of the block of each observation.

    Args:
        blocks: The blocks, in the order of experiments and images.
        experiment: Number of the experiment, shape (n,).
        z: Mean position in the scan, images, shape (n,).
    """
    starts = np.array([(b.experiment, b.array_indices.start) for b in blocks])
    most = max(int(starts[:, 1].max()), int(z.max(initial=0))) + 1
    keys = starts[:, 0] * most + starts[:, 1]
    wanted = experiment.astype(np.int64) * most + np.floor(z).astype(np.int64)
    return np.clip(np.searchsorted(keys, wanted, side="right") - 1, 0, None)
