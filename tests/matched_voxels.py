"""Voxels of maps that are known to be correct, for the comparison with the truth."""

from __future__ import annotations

import dataclasses

import numpy as np

from dials_diffuse.grid import Grid
from dials_diffuse.simulation.comparison import MatchedVoxels


def correct_voxels(
    grid: Grid,
    truth: np.ndarray,
    normalisation: np.ndarray | float,
    rng: np.random.Generator,
    background_variance: float = 0.0,
) -> MatchedVoxels:
    """All unique voxels of a map with Poisson counts and no other error.

    Args:
        grid: The grid.
        truth: Expected intensity of each voxel, shape (n,).
        normalisation: Of each, or of all.
        rng: For the counts.
        background_variance: Of a background that is 0 on average.
    """
    index = grid.asu_indices()
    m = np.full(len(index), normalisation)
    noise = rng.poisson(m * truth)
    counts = noise + rng.normal(0, np.sqrt(background_variance), len(index))
    return MatchedVoxels(
        grid=grid,
        index=index,
        s=grid.s(index),
        truth=truth,
        intensity=counts / m,
        sigma=np.sqrt(np.maximum(counts, 1)) / m,
        normalisation=m,
        background=np.zeros(len(index)),
        background_variance=np.full(len(index), background_variance),
    )


def selected(voxels: MatchedVoxels, some: np.ndarray) -> MatchedVoxels:
    """The voxels for which a boolean array of shape (n,) is true."""
    columns = {
        field.name: getattr(voxels, field.name)[some]
        for field in dataclasses.fields(voxels)
        if field.name not in ("grid", "left_out")
    }
    return dataclasses.replace(voxels, **columns)
