"""The reciprocal lattice points of a voxel grid, where Bragg peaks may be."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Sequence

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
        voxels, points = [np.arange(len(index))], [self.nearest(index)]
        # only even divisions have voxels half-way: add the point below on each axis
        for axis in np.flatnonzero(ndiv % 2 == 0):
            position = 2 * np.asarray(index)[:, axis] + ndiv[axis]
            half_way = position % (2 * ndiv[axis]) == 0
            for voxel, point in list(zip(voxels, points)):
                inside = point[:, axis] > -self.half_size[axis]
                chosen = np.flatnonzero(half_way[voxel] & inside)
                below = point[chosen]
                below[:, axis] -= 1
                voxels.append(voxel[chosen])
                points.append(below)
        return np.concatenate(voxels), np.concatenate(points)

    def is_absent(self) -> np.ndarray:
        """Which points symmetry forbids to have a peak, in C order, shape (n,)."""
        return _is_absent(self)


@functools.lru_cache(maxsize=2)
def _is_absent(points: PointGrid) -> np.ndarray:
    group = sgtbx.space_group(points.grid.space_group)
    h = np.ogrid[tuple(slice(-n, n + 1) for n in points.half_size)]
    absent = np.zeros(points.shape, dtype=bool)
    # an operation combined with a centring forbids what one of the two does
    centrings = [(i, 0, 0) for i in range(group.n_ltr())]
    rest = itertools.product((0,), range(group.f_inv()), range(group.n_smx()))
    for numbers in (*centrings, *rest):
        _add_absences(absent, h, group(*numbers))
    return absent.ravel()


def _add_absences(
    absent: np.ndarray, h: Sequence[np.ndarray], operation: sgtbx.rt_mx
) -> None:
    """Mark the reflections that an operation (W, w) forbids.

    They are those that it leaves where they are, and whose phase it shifts:

        h W = h,    h·w not an integer

    (International Tables for Crystallography B, 1.4.2; cctbx' ``is_sys_absent`` gives
    the same point by point, which takes long for a box.)

    Args:
        absent: Flags to set, shape (nh, nk, nl).
        h: Indices along each axis, broadcasting to that shape.
        operation: The symmetry operation.
    """
    denominator = operation.t().den()
    w = np.array(operation.t().num()) % denominator
    if not w.any():
        return
    moved = np.array(operation.r().as_double()).reshape(3, 3) - np.eye(3)
    if not moved.any():  # a centring
        absent |= sum(h_i * w_i for h_i, w_i in zip(h, w) if w_i) % denominator != 0
        return
    stays = np.ones(absent.shape, dtype=bool)
    for column in np.rint(moved).astype(int).T:
        if column.any():
            stays &= sum(h_i * x for h_i, x in zip(h, column) if x) == 0
    place = np.nonzero(stays)
    phase = sum(h_i.ravel()[i] * w_i for h_i, i, w_i in zip(h, place, w))
    absent[place] |= phase % denominator != 0


def is_absent(hkl: np.ndarray, group: sgtbx.space_group) -> np.ndarray:
    """Whether reflections are absent by centring, screw axes or glide planes.

    Args:
        hkl: Miller indices, integers, shape (n, 3).
        group: Space group.
    """
    flags = group.is_sys_absent(miller_index_from_numpy(np.asarray(hkl)))
    return flumpy.to_numpy(flags).copy()
