"""Sums over the observations of each symmetry-unique voxel, one set for each half.

A table of rows (one per voxel, block of images and panel) becomes independent
observations: a voxel seen by one experiment, which is a sweep or a still. Each
observation falls into one of two halves by a hash of its voxel, its experiment and a
seed (or of the last two), so that the choice depends neither on the order of the rows nor
on how they are read. The sums of the observations of all symmetry-equivalent voxels are
then added up under one unique voxel, in the order of the rows: the result does not
depend, to the last bit, on the size of the slabs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Iterator, Mapping, Sequence

import numpy as np

from dials_diffuse.grid import Grid
from dials_diffuse.merging.expansion import expand_to_p1

# What is summed for each half: photons, photons, photons^2, s.sr, (s.sr)^2, numbers.
SUMS = (
    "counts",
    "background",
    "background_variance",
    "normalisation",
    "fractional",
    "n_pixels",
)

# Summed like these, but not stored: Σ r M and Σ r B, r = (a/a_max)², by which the counts of
# signal and background scatter less than those of the table with the largest a of an error
# model.
COUNTING = ("counting_signal", "counting_background")

# Unique voxels that are handled at once.
VOXELS_PER_BLOCK = 1 << 20

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
        sums: Sum over the rows of the observation of each of ``SUMS``, and of
            ``COUNTING`` where error models differ, shape (n,).
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
        columns: Each of ``SUMS``, and perhaps ``COUNTING``, for each row.
    """
    packed = pack(index)
    step = np.diff(packed)
    if np.any((step < 0) | ((step == 0) & (np.diff(experiment) < 0))):
        order = np.lexsort((experiment, packed))
        packed, experiment = packed[order], experiment[order]
        columns = {name: values[order] for name, values in columns.items()}
    new = np.ones(len(packed), dtype=bool)
    new[1:] = (np.diff(packed) != 0) | (np.diff(experiment) != 0)
    group = np.cumsum(new) - 1
    return Observations(
        index=unpack(packed[new]),
        experiment=experiment[new],
        # bincount adds in the order of the rows, unlike the pairwise sums of reduceat.
        sums={name: np.bincount(group, weights=x) for name, x in columns.items()},
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
    state = mix_bits(state ^ mix_bits(np.array([seed], dtype=np.uint64)))
    return (mix_bits(state ^ experiment_hash) >> np.uint64(63)).astype(np.int64)


def split_experiments(experiment_hash: np.ndarray, seed: int) -> np.ndarray:
    """The half, 0 or 1, of each observation: one for all those of an experiment.

    Args:
        experiment_hash: From ``hash_identifiers``, shape (n,).
        seed: Another seed gives another split.

    Returns:
        int64 array of shape (n,).
    """
    state = mix_bits(np.array([seed], dtype=np.uint64))
    return (mix_bits(state ^ experiment_hash) >> np.uint64(63)).astype(np.int64)


def mix_bits(x: np.ndarray) -> np.ndarray:
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

    Raises:
        ValueError: An axis has more voxels than can be packed.
    """
    if max(grid.half_size) >= _OFFSET // 2:
        raise ValueError(
            f"a grid of {' x '.join(map(str, grid.shape))} voxels is too long on one "
            "axis: use a smaller ndiv"
        )
    index = grid.asu_indices(margin=MARGIN * grid.half_diagonal)
    packed = np.empty(len(index) + 1, dtype=np.int64)
    packed[0] = pack(np.zeros((1, 3)))[0]
    for start in range(0, len(index), VOXELS_PER_BLOCK):
        block = index[start : start + VOXELS_PER_BLOCK]
        packed[start + 1 : start + 1 + len(block)] = pack(block)
    packed.sort()
    return packed


def number_voxels(grid: Grid, voxels: np.ndarray) -> np.ndarray:
    """The place in the list of unique voxels for each voxel of the bounding box.

    Args:
        grid: The grid.
        voxels: Packed unique voxels, from ``unique_voxels``.

    Returns:
        int32 array of the shape of the grid, -1 where a voxel has no place.
    """

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(voxels), VOXELS_PER_BLOCK):
            stop = min(start + VOXELS_PER_BLOCK, len(voxels))
            yield unpack(voxels[start:stop]), np.arange(start, stop)

    return expand_to_p1(grid, blocks(), "int32", -1)


class Accumulator:
    """Adds up observations under a range of the unique voxels.

    Args:
        start: First voxel of the range, by its place in the list of unique voxels.
        stop: One beyond the last voxel.
        names: What is summed.

    Attributes:
        sums: Each of the names, and ``n_obs``, float64 or int64, shape
            (2, stop - start): one row for each half.
    """

    def __init__(self, start: int, stop: int, names: Sequence[str] = SUMS) -> None:
        self.start, self.stop = start, stop
        self.names = tuple(names)
        dtypes = dict.fromkeys(self.names, np.float64)
        dtypes.update(n_pixels=np.int64, n_obs=np.int64)
        self.sums = {
            name: np.zeros((2, stop - start), dtype) for name, dtype in dtypes.items()
        }

    def add(
        self, observations: Observations, number: np.ndarray, half: np.ndarray
    ) -> int:
        """Add the observations that belong to the range.

        Args:
            observations: The observations.
            number: Place of the unique voxel of each, shape (n,).
            half: The half of each, 0 or 1, shape (n,).

        Returns:
            Number of observations added.
        """
        mine = (number >= self.start) & (number < self.stop)
        place = half[mine] * (self.stop - self.start) + number[mine] - self.start
        for name in self.names:
            # In the order of the observations, so that slabs leave no trace.
            total = self.sums[name].reshape(-1)
            values = observations.sums[name][mine].astype(total.dtype, copy=False)
            np.add.at(total, place, values)
        np.add.at(self.sums["n_obs"].reshape(-1), place, 1)
        return len(place)

    def observed(self) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Places of the voxels that have observations, and their sums, in blocks.

        Yields:
            Places, shape (n,), and each of the sums, shape (2, n).
        """
        for first in range(0, self.stop - self.start, VOXELS_PER_BLOCK):
            block = slice(first, first + VOXELS_PER_BLOCK)
            sums = {name: values[:, block] for name, values in self.sums.items()}
            seen = np.flatnonzero(sums["n_obs"].any(axis=0))
            if len(seen):
                columns = {name: values[:, seen] for name, values in sums.items()}
                yield self.start + first + seen, columns
