"""The surroundings of pixels: means over boxes, and the eight neighbours of a few."""

from __future__ import annotations

from typing import Sequence

import numpy as np
from scipy.ndimage import uniform_filter

from dials_diffuse.masks.series import split

BOX = 7  # pixels along an edge
OFFSETS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]

Shapes = Sequence[tuple[int, int]]


def box_sum(values: np.ndarray, shapes: Shapes, size: int = BOX) -> np.ndarray:
    """Sum over the box around each pixel, within its panel; flat float32."""
    result = np.empty(len(values), dtype=np.float32)
    for source, target in zip(split(values, shapes), split(result, shapes)):
        uniform_filter(
            source.astype(np.float32, copy=False), size, target, mode="constant"
        )
    result *= size * size
    return result


def surroundings(
    values: np.ndarray, good: np.ndarray, shapes: Shapes, otherwise: np.ndarray
) -> np.ndarray:
    """Mean over the good pixels of the box around each pixel, without itself.

    Args:
        values: Flat values.
        good: Which of them count.
        shapes: Of the panels.
        otherwise: Value where no good pixel is in the box.
    """
    weighted = np.where(good, values, 0).astype(np.float32)
    total = box_sum(weighted, shapes) - weighted
    number = np.rint(box_sum(good, shapes)) - good
    return np.where(number > 0, total / np.maximum(number, 1), otherwise)


def neighbour_values(
    values: np.ndarray,
    good: np.ndarray,
    shapes: Shapes,
    pixels: np.ndarray,
    otherwise: np.ndarray,
) -> np.ndarray:
    """Values of the eight neighbours of some pixels, sorted.

    Args:
        values: Flat values of all pixels.
        good: Which of them are known.
        shapes: Of the panels.
        pixels: Flat indices, increasing, shape (n,).
        otherwise: Value in place of neighbours that are not there or not good, (n,).

    Returns:
        Shape (8, n), increasing along the first axis.
    """
    result = np.repeat(otherwise[None].astype(float), len(OFFSETS), axis=0)
    start = 0
    for n_slow, n_fast in shapes:
        stop = start + n_slow * n_fast
        inside = slice(*np.searchsorted(pixels, (start, stop)))
        slow, fast = np.divmod(pixels[inside] - start, n_fast)
        for row, (i, j) in zip(result, OFFSETS):
            there = (0 <= slow + i) & (slow + i < n_slow)
            there &= (0 <= fast + j) & (fast + j < n_fast)
            at = np.where(there, start + (slow + i) * n_fast + fast + j, start)
            there &= good[at]
            row[inside] = np.where(there, values[at], row[inside])
        start = stop
    return np.sort(result, axis=0)
