"""Direction of every pixel of a panel, as seen from the sample.

The centre of pixel (i, j) is (i + 1/2, j + 1/2) in dxtbx' pixel coordinates. Pixel to mm
goes through the panel's own px_mm strategy, so the parallax of a thick sensor is as in
the refined model. That call is slow (0.4 µs a pixel) and the parallax is smooth, so it
is sampled at every ``STEP``-th pixel and interpolated; where random pixels show that
this is not good enough, and for strategies with a table of offsets, every pixel is
computed.
"""

from __future__ import annotations

from typing import Iterator

import numpy as np
import scipy.sparse

from dxtbx import flumpy
from dxtbx.model import Panel

STEP = 8  # pixels between the samples of the parallax shift
TOLERANCE = 1e-3  # pixels
CHUNK = 1 << 15  # pixels at a time, so that intermediate arrays stay in the cache


def pixel_to_millimeter(panel: Panel, px: np.ndarray) -> np.ndarray:
    """Millimetre coordinates of pixel coordinates, by the panel's strategy.

    Args:
        panel: The panel.
        px: Pixel coordinates (fast, slow), shape (n, 2).

    Returns:
        Coordinates (fast, slow) in mm, shape (n, 2).
    """
    px = np.ascontiguousarray(px, dtype=float)
    return flumpy.to_numpy(panel.pixel_to_millimeter(flumpy.vec_from_numpy(px)))


def _nodes(n: int, step: int) -> np.ndarray:
    """Pixel numbers from 0 to n - 1 with a spacing of ``step`` or less."""
    return np.unique(np.append(np.arange(0, n, step), n - 1))


def _interpolation(n: int, nodes: np.ndarray) -> scipy.sparse.csr_matrix:
    """Matrix, shape (n, len(nodes)), that interpolates linearly between the nodes."""
    pixels = np.arange(n)
    if len(nodes) == 1:
        return scipy.sparse.csr_matrix(np.ones((n, 1)))
    left = np.clip(np.searchsorted(nodes, pixels, "right") - 1, 0, len(nodes) - 2)
    weight = (pixels - nodes[left]) / (nodes[left + 1] - nodes[left])
    return scipy.sparse.csr_matrix(
        (
            np.concatenate([1 - weight, weight]),
            (np.tile(pixels, 2), np.concatenate([left, left + 1])),
        ),
        shape=(n, len(nodes)),
    )


def _shift_at(panel: Panel, fast: np.ndarray, slow: np.ndarray) -> np.ndarray:
    """What the strategy adds to centre x pixel size, mm, shape (n_slow, n_fast, 2)."""
    px = np.stack(np.meshgrid(fast + 0.5, slow + 0.5), axis=-1)
    mm = pixel_to_millimeter(panel, px.reshape(-1, 2)).reshape(px.shape)
    return mm - px * panel.get_pixel_size()


class ParallaxShift:
    """Shift of the pixel centres of a panel by its px_mm strategy.

    Args:
        panel: The panel.
    """

    def __init__(self, panel: Panel) -> None:
        nfast, nslow = panel.get_image_size()
        strategy = panel.get_px_mm_strategy().name()
        self.is_zero = strategy == "SimplePxMmStrategy"
        if self.is_zero:
            return
        self._sample(panel, _nodes(nfast, STEP), _nodes(nslow, STEP))
        # random pixels may miss the few that a table of offsets moves
        if strategy != "ParallaxCorrectedPxMmStrategy" or not self._is_good(panel):
            self._sample(panel, np.arange(nfast), np.arange(nslow))

    def _sample(self, panel: Panel, fast: np.ndarray, slow: np.ndarray) -> None:
        nfast, nslow = panel.get_image_size()
        self._by_slow = _interpolation(nslow, slow)
        by_fast = _interpolation(nfast, fast).T
        samples = np.moveaxis(_shift_at(panel, fast, slow), -1, 0)
        self._samples = [np.ascontiguousarray(sample @ by_fast) for sample in samples]

    def _is_good(self, panel: Panel) -> bool:
        """Whether random pixels are within ``TOLERANCE`` of the exact strategy."""
        rng = np.random.default_rng(7)
        nfast, nslow = panel.get_image_size()
        size = np.array(panel.get_pixel_size())
        slow = np.unique(rng.integers(nslow, size=30))
        fast = rng.integers(nfast, size=(len(slow), 30))
        for j, columns in zip(slow, fast):
            exact = _shift_at(panel, columns, np.array([j]))[0]
            found = self.rows(slice(j, j + 1))[:, 0, columns].T
            if np.max(np.abs(exact - found) / size) > TOLERANCE:
                return False
        return True

    def rows(self, rows: slice) -> np.ndarray | None:
        """The shift along fast and slow in mm, shape (2, n_rows, n_fast).

        None where the strategy shifts nothing.
        """
        if self.is_zero:
            return None
        return np.stack([self._by_slow[rows] @ sample for sample in self._samples])


def row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of some rows of an array of shape (n_slow, n_fast) at a time."""
    n_rows = max(1, CHUNK // shape[1])
    for start in range(0, shape[0], n_rows):
        yield slice(start, min(start + n_rows, shape[0]))


def lab_coordinates(
    panel: Panel, rows: slice, shift: np.ndarray | None = None
) -> np.ndarray:
    """Laboratory coordinates of pixel centres, moved by a shift on the panel.

    Args:
        panel: The panel.
        rows: Which rows (slow).
        shift: Shift along fast and slow in mm, shape (2, n_rows, n_fast), or None.

    Returns:
        mm, laboratory frame, shape (3, n_rows, n_fast).
    """
    nfast, nslow = panel.get_image_size()
    size_fast, size_slow = panel.get_pixel_size()
    x = (np.arange(nfast) + 0.5) * size_fast
    y = ((np.arange(nslow)[rows] + 0.5) * size_slow)[:, None]
    if shift is not None:
        x, y = x + shift[0], y + shift[1]
    d = np.array(panel.get_d_matrix()).reshape(3, 3)
    result = np.empty((3, rows.stop - rows.start, nfast))
    for i in range(3):
        np.add(d[i, 0] * x, d[i, 1] * y + d[i, 2], out=result[i])
    return result
