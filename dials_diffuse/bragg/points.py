"""The reciprocal lattice points of a voxel grid, where Bragg peaks may be."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from cctbx import sgtbx
from dxtbx import flumpy

from dials_diffuse.grid import Grid
from dials_diffuse.util.compat import miller_index_from_numpy


@dataclasses.dataclass(frozen=True)
class PointGrid:
    """All lattice points whose reciprocal cells reach into the box of a voxel grid.

    Args:
        grid: The voxel grid.
    """

    grid: Grid

    @property
    def half_size(self) -> tuple[int, int, int]:
        """Largest Miller index along each axis."""
        return tuple(
            int(np.floor((half + 0.5) / ndiv + 0.5))
            for half, ndiv in zip(self.grid.half_size, self.grid.ndiv)
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of points along h, k and l."""
        return tuple(2 * n + 1 for n in self.half_size)

    @property
    def n_voxels(self) -> int:
        """Number of voxels of the grid's box: keys of points begin here."""
        return int(np.prod(self.grid.shape))

    def key(self, hkl: np.ndarray) -> np.ndarray:
        """Key of each point: its place in the C-ordered box after that of the voxels.

        Args:
            hkl: Miller indices, shape (n, 3), inside the box.
        """
        place = np.asarray(hkl, dtype=np.int64) + self.half_size
        return self.n_voxels + np.ravel_multi_index(tuple(place.T), self.shape)

    def hkl(self, key: np.ndarray) -> np.ndarray:
        """Miller indices of the points of some keys, shape (n, 3)."""
        place = np.unravel_index(np.asarray(key) - self.n_voxels, self.shape)
        return (np.stack(place, axis=-1) - self.half_size).astype(np.int32)

    def s(self, key: np.ndarray) -> np.ndarray:
        """s = 1/d of voxel centres and points by their keys, 1/Å, shape (n,)."""
        key = np.asarray(key)
        is_point = key >= self.n_voxels
        index = np.empty((len(key), 3), dtype=np.int32)
        index[~is_point] = self.grid.index(key[~is_point])
        index[is_point] = self.hkl(key[is_point]) * np.array(self.grid.ndiv)
        return self.grid.s(index)

    def nearest(self, index: np.ndarray) -> np.ndarray:
        """Miller indices of the lattice point nearest to the centre of each voxel.

        Args:
            index: Voxel indices, shape (n, 3).
        """
        hkl = np.floor(np.asarray(index) / self.grid.ndiv + 0.5).astype(np.int32)
        return np.clip(hkl, -np.array(self.half_size), self.half_size)

    def around(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lattice points that each voxel is around: two or more half-way between.

        Args:
            index: Voxel indices, shape (n, 3).

        Returns:
            Number of the voxel, and Miller indices of the point, shapes (m,) and (m, 3).
        """
        ndiv = np.array(self.grid.ndiv)
        upper = self.nearest(index)
        half_way = (2 * np.asarray(index) + ndiv) % (2 * ndiv) == 0
        voxels, points = [], []
        for steps in itertools.product((0, 1), repeat=3):
            step = np.array(steps)
            point = upper - step
            is_around = np.all(half_way | (step == 0), axis=1)
            is_around &= np.all(point >= -np.array(self.half_size), axis=1)
            voxels.append(np.flatnonzero(is_around))
            points.append(point[is_around])
        return np.concatenate(voxels), np.concatenate(points)

    def is_absent(self) -> np.ndarray:
        """Which points symmetry forbids to have a peak, in C order, shape (n,)."""
        return _is_absent(self)


@functools.lru_cache(maxsize=2)
def _is_absent(points: PointGrid) -> np.ndarray:
    n_points = int(np.prod(points.shape))
    hkl = points.hkl(points.n_voxels + np.arange(n_points))
    return is_absent(hkl, sgtbx.space_group(points.grid.space_group))


def is_absent(hkl: np.ndarray, group: sgtbx.space_group) -> np.ndarray:
    """Whether reflections are absent by centring, screw axes or glide planes.

    Args:
        hkl: Miller indices, integers, shape (n, 3).
        group: Space group.
    """
    flags = group.is_sys_absent(miller_index_from_numpy(np.asarray(hkl)))
    return flumpy.to_numpy(flags).copy()
