"""Spreading of symmetry-unique voxels over the whole sphere."""

from __future__ import annotations

from typing import Iterable

import numpy as np

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid


def expand_to_p1(
    grid: Grid,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    dtype: str = "float32",
    fill: float = np.nan,
) -> np.ndarray:
    """The values of unique voxels at all their equivalents in the bounding box.

    Args:
        grid: The grid.
        blocks: Voxel indices, shape (n, 3), and values, shape (n,), block by block.
        dtype: Type of the result.
        fill: Value of the voxels that are not among the given ones.

    Returns:
        Array of the shape of the grid, axes h, k, l.
    """
    box = np.full(grid.shape, fill, dtype=dtype)
    flat = box.reshape(-1)
    matrices = symmetry.rotation_matrices(grid.laue_group)
    for index, values in blocks:
        values = np.asarray(values).astype(dtype)
        for matrix in matrices:
            equivalent = index @ matrix
            # Partly covered voxels just beyond d_min may leave the box.
            inside = np.all(np.abs(equivalent) <= grid.half_size, axis=1)
            flat[grid.key(equivalent[inside])] = values[inside]
    return box
