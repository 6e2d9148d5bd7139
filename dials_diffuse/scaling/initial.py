"""One scale factor per experiment, from the ratio of counts that it should have seen.

With photons n_i = N_i - B_i of observation i of experiment e and normalisation M_i, the
scales k_e and the merged intensities I_v of the voxels are found in turn,

    I_v = Σ n_i / Σ k_e M_i      over the observations of voxel v
    k_e = Σ n_i / Σ M_i I_v      over the observations of experiment e

which climbs the likelihood of Poisson counts. Only voxels (of the asymmetric unit) that
several experiments saw say anything. The scales' mean is 1. They stand for flux and
illuminated volume; everything smooth within an experiment is left to scaling proper.
"""

from __future__ import annotations

import logging

import numpy as np

from dials_diffuse import symmetry
from dials_diffuse.io.observations import ObservationFile

logger = logging.getLogger("dials.diffuse.scale")

MAX_ROWS = 5_000_000  # of the table, spread over the voxels, are enough
MAX_CYCLES = 100
CONVERGED = 1e-4  # largest relative change of a scale


def relative_scales(
    voxel: np.ndarray, experiment: np.ndarray, photons: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Scale factors of experiments by the fixed point of the equations above.

    Args:
        voxel: Number of the symmetry-unique voxel of each observation, from 0.
        experiment: Number of its experiment, from 0.
        photons: N - B.
        weight: Normalisation M.

    Returns:
        k of each experiment, of mean 1; 1 for one that shares no voxel with others.
    """
    n_experiments, n_voxels = int(experiment.max()) + 1, int(voxel.max()) + 1
    pairs = np.unique(voxel.astype(np.int64) * n_experiments + experiment)
    shared = np.bincount(pairs // n_experiments, minlength=n_voxels) > 1
    use = shared[voxel]
    voxel, experiment = voxel[use], experiment[use]
    photons, weight = photons[use], weight[use]
    seen = np.bincount(experiment, photons, n_experiments)
    total = np.bincount(voxel, photons, n_voxels)
    scale = np.ones(n_experiments)
    for _ in range(MAX_CYCLES):
        expected = np.bincount(voxel, scale[experiment] * weight, n_voxels)
        intensity = np.divide(
            total, expected, out=np.zeros(n_voxels), where=expected > 0
        )
        due = np.bincount(experiment, weight * intensity[voxel], n_experiments)
        new = np.divide(
            seen, due, out=np.ones(n_experiments), where=(due > 0) & (seen > 0)
        )
        new /= new.mean()
        change = np.max(np.abs(new / scale - 1))
        scale = new
        if change < CONVERGED:
            break
    return scale


def scale_experiments(tables: list[ObservationFile]) -> list[dict[int, float]]:
    """Scale factor of each experiment of each table, by its ``id``.

    Args:
        tables: Observations on the same grid.
    """
    names = ["miller_index", "id", "counts", "background.sum.value", "normalisation"]
    step = -(-sum(table.n_rows for table in tables) // MAX_ROWS)
    parts, offset = [], 0
    for table in tables:
        for start, stop in list(table.slabs(MAX_ROWS // 20))[::step]:
            rows = table.read(start, stop, names)
            index, inverse = np.unique(
                table.grid.key(rows["miller_index"]), return_inverse=True
            )
            asu = symmetry.map_to_asu(table.grid.index(index), table.grid.laue_group)
            parts.append(
                (
                    table.grid.key(asu)[inverse],
                    rows["id"] + offset,
                    rows["counts"] - rows["background.sum.value"],
                    rows["normalisation"],
                )
            )
        offset += max(table.identifiers) + 1
    key, experiment, photons, weight = (np.concatenate(c) for c in zip(*parts))
    _, voxel = np.unique(key, return_inverse=True)
    scale = np.ones(offset)
    found = relative_scales(voxel, experiment, photons, weight)
    scale[: len(found)] = found
    result, offset = [], 0
    for table in tables:
        result.append({i: float(scale[offset + i]) for i in table.identifiers})
        offset += max(table.identifiers) + 1
    return result


class ScaledTable:
    """A table of observations with a scale factor for each experiment.

    Adds the column ``inverse_scale_factor``; the rest is that of the table.

    Args:
        table: Observations without that column.
        scales: Scale factor of each experiment, by its ``id``.
    """

    def __init__(self, table: ObservationFile, scales: dict[int, float]) -> None:
        self.path = table.path
        self.grid = table.grid
        self.identifiers = table.identifiers
        self.n_rows = table.n_rows
        self.slabs = table.slabs
        self.columns = (*table.columns, "inverse_scale_factor")
        self._table = table
        self._scale = np.ones(max(scales) + 1)
        self._scale[list(scales)] = list(scales.values())

    def read(self, start: int, stop: int, names: list[str]) -> dict[str, np.ndarray]:
        """Some columns of the rows from ``start`` up to ``stop``."""
        stored = [name for name in names if name != "inverse_scale_factor"]
        rows = self._table.read(start, stop, [*stored, "id"])
        if "inverse_scale_factor" in names:
            rows["inverse_scale_factor"] = self._scale[rows["id"]]
        return {name: rows[name] for name in names}
