"""Smooth functions of a panel's pixels, computed at few of them and interpolated.

Directions and corrections cost up to 1 µs a pixel, through dxtbx and in numpy, but vary
little from pixel to pixel. They are computed at every ``STEPS[0]``-th pixel along either
axis; cubic Lagrange interpolation is then off by less than 1e-7 on usual detectors.
Random pixels tell whether it is: for a detector that is too close, or a strategy with a
table of offsets, more pixels or all of them are computed.
"""

from __future__ import annotations

from typing import Callable, Iterator

import numpy as np
import scipy.sparse

STEPS = (8, 2, 1)  # pixels between the nodes, tried in turn
N_POINTS = 4  # of the Lagrange polynomial: cubic
CHUNK = 1 << 16  # pixels at a time, so that intermediate arrays stay in the cache

# From pixel numbers along fast and slow to values, shape (n_values, n_slow, n_fast)
PixelFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


def nodes(n: int, step: int) -> np.ndarray:
    """Pixel numbers from 0 to n - 1 with a spacing of ``step`` or less.

    At least ``N_POINTS`` of them, or all.
    """
    return np.unique(
        np.append(np.arange(0, n, min(step, max(1, n // N_POINTS))), n - 1)
    )


def lagrange_matrix(n: int, at: np.ndarray) -> scipy.sparse.csr_matrix:
    """Matrix of shape (n, len(at)) that interpolates from nodes to all pixels.

    Lagrange polynomials through the ``N_POINTS`` nodes about a pixel; a pixel that is
    itself a node has the node's value.

    Args:
        n: Number of pixels.
        at: Pixel numbers of the nodes, increasing, from 0 to n - 1.
    """
    pixels = np.arange(n)
    n_points = min(N_POINTS, len(at))
    last_start = len(at) - n_points
    start = np.searchsorted(at, pixels, "right") - n_points // 2
    columns = np.clip(start, 0, last_start)[:, None] + np.arange(n_points)
    x = at[columns].astype(float)
    weights = np.ones(columns.shape)
    for i in range(n_points):
        for j in range(n_points):
            if j != i:
                weights[:, i] *= (pixels - x[:, j]) / (x[:, i] - x[:, j])
    row_ends = np.arange(n + 1) * n_points
    return scipy.sparse.csr_matrix(
        (weights.ravel(), columns.ravel(), row_ends), shape=(n, len(at))
    )


def row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of some rows of an array of shape (n_slow, n_fast) at a time."""
    n_rows = max(1, CHUNK // shape[1])
    for start in range(0, shape[0], n_rows):
        yield slice(start, min(start + n_rows, shape[0]))


class PixelInterpolation:
    """The values of a function at all pixels of a panel.

    Args:
        function: The function.
        shape: Size of the panel, (n_slow, n_fast).
        tolerance: Largest error of each value, shape (n_values,).
        smooth: False if the function may jump from pixel to pixel.

    Attributes:
        step: Pixels between the nodes.
        values: The function at the nodes, shape (n_values, n_slow, n_fast) of the nodes.
    """

    def __init__(
        self,
        function: PixelFunction,
        shape: tuple[int, int],
        tolerance: np.ndarray,
        smooth: bool = True,
    ) -> None:
        self._shape = shape
        for self.step in STEPS if smooth else (1,):
            slow, fast = (nodes(n, self.step) for n in shape)
            self.values = function(fast, slow)
            self._by_slow = lagrange_matrix(shape[0], slow)
            self._by_fast = lagrange_matrix(shape[1], fast)
            if self.step == 1 or self._is_good(function, tolerance):
                break
        self._samples: np.ndarray | None = None

    def set_scale(self, scale: np.ndarray) -> None:
        """Multiply the values by constants, shape (n_values,)."""
        n_values, n_slow = self.values.shape[:2]
        # one matrix for all values: rows are (value, fast), values one after the other
        samples = np.empty((n_slow, n_values, self._shape[1]))
        for i in range(n_values):
            samples[:, i] = (self._by_fast @ (self.values[i] * scale[i]).T).T
        self._samples = samples.reshape(n_slow, -1)

    def rows(self, rows: slice) -> np.ndarray:
        """The values of some rows, shape (n_values, n_rows, n_fast)."""
        if self._samples is None:  # if threads find it so, all make the same
            self.set_scale(np.ones(len(self.values)))
        result = self._by_slow[rows] @ self._samples
        n_values = len(self.values)
        return np.moveaxis(result.reshape(-1, n_values, self._shape[1]), 1, 0)

    def _is_good(self, function: PixelFunction, tolerance: np.ndarray) -> bool:
        """Whether some random pixels, and some near the corners, are within tolerance.

        Half-way between the outermost nodes the polynomial is at its worst.
        """
        rng = np.random.default_rng(7)
        half = self.step // 2
        slow, fast = (
            np.unique([half, n - 1 - half, *rng.integers(n, size=10)]).clip(0, n - 1)
            for n in self._shape
        )
        exact = function(fast, slow)
        by_slow, by_fast = self._by_slow[slow], self._by_fast[fast]
        found = np.stack([by_slow @ (by_fast @ v.T).T for v in self.values])
        return bool(np.all(np.abs(found - exact) <= tolerance[:, None, None]))
