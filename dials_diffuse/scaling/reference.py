"""A merged map to scale to: one more observation of each of its voxels.

Its scale is 1 and its offset 0, so that it settles the gauge, and it has its own errors:
were the map taken for exact, its noise would draw all scales down. Where the intensity is
expected to be I, that of the map has the variance

    I/m + v + f I²        m = M/a²,  v = a² (B + V)/M²,  f = a² F/M²

by the sums of its observations (``merging.estimate``). As for all weights, I is what all
observations say, not what the map alone says: voxels that came out too weak by chance
would weigh more.
"""

from __future__ import annotations

import dataclasses
import logging
import os

import numpy as np

from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import VoxelList, read_map
from dials_diffuse.merging import estimate, sums

logger = logging.getLogger("dials.diffuse.scale")

NEEDED = (
    "index",
    "counts",
    "background",
    "background_variance",
    "normalisation",
    "fractional",
    "intensity",
    "sigma",
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Intensities of voxels and their errors, arrays of shape (n,).

    Args:
        voxel: Packed index of the symmetry-unique voxel, int64.
        intensity: Of the map, photons s⁻¹ sr⁻¹.
        response: m, by which the map counts as photons, s.sr; 0 for voxels that it does
            not have.
        base: v, variance that is not of the signal, of the intensity.
        fractional: f, square of the relative error that is not of counting.
    """

    voxel: np.ndarray
    intensity: np.ndarray
    response: np.ndarray
    base: np.ndarray
    fractional: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Whether the map has each voxel."""
        return self.response > 0

    @property
    def photons(self) -> np.ndarray:
        """Photons that the map counts for in each voxel."""
        return self.intensity * self.response

    def of(self, voxel: np.ndarray) -> Reference:
        """What the map says of some voxels, with a response of 0 where it says nothing.

        Args:
            voxel: Packed indices; those of the reference itself must ascend.
        """
        place = np.searchsorted(self.voxel, voxel)
        place = np.minimum(place, len(self.voxel) - 1)
        known = self.voxel[place] == voxel
        values = (self.intensity, self.response, self.base, self.fractional)
        return Reference(voxel, *(np.where(known, x[place], 0.0) for x in values))

    def select(self, place: np.ndarray) -> Reference:
        """What it says of the voxels at some places, which may be repeated."""
        fields = dataclasses.fields(self)
        return Reference(*(getattr(self, field.name)[place] for field in fields))

    def weights(self, expected: np.ndarray) -> np.ndarray:
        """Inverse of the variance of each intensity, 0 where the map has none.

        Args:
            expected: I, the expected intensities, positive.
        """
        m = np.where(self.known, self.response, 1.0)
        variance = expected / m + self.base + self.fractional * expected**2
        return np.divide(
            1.0,
            variance,
            out=np.zeros(len(variance)),
            where=self.known & (variance > 0),
        )


def read_reference(path: str | os.PathLike, grid: Grid, observed: str) -> Reference:
    """All voxels of a merged map.

    Args:
        path: The map.
        grid: The grid that it must have.
        observed: Name of the observations on that grid, for the message.

    Raises:
        ValueError: Its grid is another one, or it has no photons.
    """
    voxels = read_map(path, NEEDED)
    for name in ("ndiv", "space_group", "unit_cell"):
        mine, other = (getattr(g, name) for g in (grid, voxels.grid))
        if mine == other or (name == "unit_cell" and grid.has_cell_of(voxels.grid)):
            continue
        raise ValueError(
            f"reference={path} has a grid with {name}={other}, {observed} one with "
            f"{name}={mine}: extract the images on the grid of the map "
            "(grid.reference_cell=given grid.unit_cell=... grid.ndiv=...)"
        )
    reference = reference_from_sums(voxels)
    if not np.sum(reference.photons) > 0:
        raise ValueError(
            f"reference={path} has no photons: nothing can be scaled to it"
        )
    logger.info("Scaling to %d voxels of %s", len(reference.voxel), path)
    return reference


def reference_from_sums(voxels: VoxelList) -> Reference:
    """The reference of a map, from the ``NEEDED`` columns of its voxels.

    The sums of a merged map do not say how much of the variance of its counts each table
    gave, if tables of different error models were merged. So a² is an effective one: that
    by which a² (N' + V + F I²)/M² is the stated σ² of the voxel. Of tables with one error
    model it is that of the model.
    """
    good = (voxels["normalisation"] > 0) & (voxels["sigma"] > 0)
    columns = {name: voxels[name][good] for name in NEEDED}
    n, m = columns["counts"], columns["normalisation"]
    shell = estimate.thin_shell(voxels.grid.s(columns["index"]))
    rate = estimate.shell_rate(np.bincount(shell, n), np.bincount(shell, m))
    expected = estimate.expected_counts(n, rate[shell] * m)
    scatter = columns["fractional"] * np.maximum(columns["intensity"], 0) ** 2
    variance = expected + columns["background_variance"] + scatter
    a_squared = columns["sigma"] ** 2 * m**2 / variance
    base = np.maximum(columns["background"], 0) + columns["background_variance"]
    packed = sums.pack(columns["index"])
    order = np.argsort(packed)
    values = (
        columns["intensity"],
        m / a_squared,
        a_squared * base / m**2,
        a_squared * columns["fractional"] / m**2,
    )
    return Reference(packed[order], *(x[order] for x in values))
