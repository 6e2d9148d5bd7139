"""Sums over the observations of each symmetry-unique voxel, one set for each half.

A table of rows (one per voxel, block of images and panel) becomes independent
observations: a voxel seen by one experiment, which is a sweep or a still. Each
observation falls into one of two halves by a hash of its voxel, its experiment and a
seed, so that the choice depends neither on the order of the rows nor on how they are
read. The sums of the observations of all symmetry-equivalent voxels are then added up
under the equivalent in the asymmetric unit, in the order of the rows: the result does
not depend, to the last bit, on the size of the slabs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Mapping, Sequence

import numpy as np

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid

# What is summed for each half: photons, photons, photons^2, s.sr, numbers.
SUMS = ("counts", "background", "background_variance", "normalisation", "n_pixels")

HALVES = (0, 1)

# Half voxel diagonals beyond d_min where a voxel may still hold pixels: a little more
# than 1, for a reference cell that obeys its symmetry only approximately.
MARGIN = 1.01

# Bits for each component of a packed voxel index.
_BITS = 21
_OFFSET = 1 << (_BITS - 1)


@dataclasses.dataclass(frozen=True)
class Observations:
    """Independent observations: whole voxels, each seen by one experiment.

    Args:
        index: Voxel indices, int32, shape (n, 3), equal ones adjacent.
        experiment: Number of the experiment, shape (n,).
        sums: Sum over the rows of the observation of each of ``SUMS``, shape (n,).
    """

    index: np.ndarray
    experiment: np.ndarray
    sums: Mapping[str, np.ndarray]


def pack(index: np.ndarray) -> np.ndarray:
    """One int64 for each voxel index, in the order h, k, l (h slowest).

    Unlike ``Grid.key`` it does not depend on the resolution limits and also holds the
    equivalents of boundary voxels that fall outside the bounding box.
    """
    h, k, l = np.asarray(index, dtype=np.int64).T + _OFFSET
    return (((h << _BITS) | k) << _BITS) | l


def unpack(packed: np.ndarray) -> np.ndarray:
    """The voxel indices of packed ones: inverse of ``pack``."""
    mask = (1 << _BITS) - 1
    columns = [(packed >> shift) & mask for shift in (2 * _BITS, _BITS, 0)]
    return (np.stack(columns, axis=-1) - _OFFSET).astype(np.int32)


def group_observations(
    index: np.ndarray, experiment: np.ndarray, columns: Mapping[str, np.ndarray]
) -> Observations:
    """Add up the rows of each voxel and experiment.

    Args:
        index: Voxel index of each row, shape (n, 3).
        experiment: Number of its experiment, shape (n,).
        columns: Each of ``SUMS`` for each row.
    """
    packed = pack(index)
    step = np.diff(packed)
    if np.any((step < 0) | ((step == 0) & (np.diff(experiment) < 0))):
        order = np.lexsort((experiment, packed))
        packed, experiment = packed[order], experiment[order]
        columns = {name: columns[name][order] for name in SUMS}
    new = np.ones(len(packed), dtype=bool)
    new[1:] = (np.diff(packed) != 0) | (np.diff(experiment) != 0)
    group = np.cumsum(new) - 1
    return Observations(
        index=unpack(packed[new]),
        experiment=experiment[new],
        # bincount adds in the order of the rows, unlike the pairwise sums of reduceat.
        sums={name: np.bincount(group, weights=columns[name]) for name in SUMS},
    )


def hash_identifiers(identifiers: Sequence[str]) -> np.ndarray:
    """A uint64 for each experiment identifier, the same on every machine."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8) for name in identifiers]
    return np.array(
        [int.from_bytes(d.digest(), "little") for d in digests], dtype=np.uint64
    )


def split_halves(
    index: np.ndarray, experiment_hash: np.ndarray, seed: int
) -> np.ndarray:
    """The half, 0 or 1, of each independent observation.

    Args:
        index: Voxel indices before the reduction to the asymmetric unit, so that each
            symmetry operator counts as an observation of its own; shape (n, 3).
        experiment_hash: From ``hash_identifiers``, shape (n,).
        seed: Another seed gives another split.

    Returns:
        int64 array of shape (n,).
    """
    state = pack(index).view(np.uint64)
    state = _splitmix64(state ^ _splitmix64(np.array([seed], dtype=np.uint64)))
    return (_splitmix64(state ^ experiment_hash) >> np.uint64(63)).astype(np.int64)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit integers (modulo 2^64).

    Steele, Lea & Flood (2014), https://doi.org/10.1145/2660193.2660195.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def unique_voxels(grid: Grid) -> np.ndarray:
    """All symmetry-unique voxels that can hold pixels of the resolution range.

    They are the voxels whose centres lie at most half a voxel diagonal beyond d_min, and
    the origin.

    Returns:
        Packed indices in ascending order, int64, shape (n,).
    """
    packed = pack(grid.asu_indices(margin=MARGIN * grid.half_diagonal))
    return np.sort(np.append(packed, pack(np.zeros((1, 3)))))


class Accumulator:
    """Adds up observations under the symmetry-unique voxels of a list.

    Args:
        voxels: Packed indices of the unique voxels, ascending, shape (n,).
        grid: The grid of the observations.

    Attributes:
        sums: Each of ``SUMS``, and ``n_obs``, float64 or int64, shape (2, n): one row
            for each half.
    """

    def __init__(self, voxels: np.ndarray, grid: Grid) -> None:
        self.voxels = voxels
        self._laue_group = grid.laue_group
        dtypes = dict.fromkeys(SUMS, np.float64)
        dtypes.update(n_pixels=np.int64, n_obs=np.int64)
        self.sums = {
            name: np.zeros((2, len(voxels)), dtype) for name, dtype in dtypes.items()
        }

    def add(self, observations: Observations, half: np.ndarray) -> int:
        """Add observations that belong to the voxels of the list.

        Args:
            observations: The observations, equal voxels adjacent.
            half: The half of each, 0 or 1.

        Returns:
            Number of observations added; the others belong to voxels not in the list.
        """
        place, known = self._find(observations.index)
        place = half[known] * len(self.voxels) + place[known]
        for name in SUMS:
            # In the order of the observations, so that slabs leave no trace.
            values = observations.sums[name][known]
            total = self.sums[name].reshape(-1)
            np.add.at(total, place, values.astype(total.dtype, copy=False))
        np.add.at(self.sums["n_obs"].reshape(-1), place, 1)
        return len(place)

    def _find(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place in the list of each observation, and whether it is in the list."""
        new = np.ones(len(index), dtype=bool)
        new[1:] = np.any(np.diff(index, axis=0) != 0, axis=1)
        unique = pack(symmetry.map_to_asu(index[new], self._laue_group))
        place = np.searchsorted(self.voxels, unique)
        place[place == len(self.voxels)] = 0
        known = self.voxels[place] == unique
        voxel = np.cumsum(new) - 1
        return place[voxel], known[voxel]

    def observed(self) -> dict[str, np.ndarray]:
        """The voxels with observations: their ``index`` and their sums, shape (2, n)."""
        seen = self.sums["n_obs"].sum(axis=0) > 0
        sums = {name: values[:, seen] for name, values in self.sums.items()}
        return {"index": unpack(self.voxels[seen]), **sums}
