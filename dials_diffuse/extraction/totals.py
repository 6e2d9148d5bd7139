"""Sums over all observations, by block of images and by resolution, as they are written."""

from __future__ import annotations

from typing import Mapping, Sequence

import numpy as np

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
        low = 1 / grid.d_max if grid.d_max else 0.0
        self.edges = np.linspace(low, 1 / grid.d_min, N_SHELLS + 1)
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
