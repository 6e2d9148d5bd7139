"""Direction of every pixel of a panel, as seen from the sample.

The centre of pixel (i, j) is (i + 1/2, j + 1/2) in dxtbx' pixel coordinates. Pixel to mm
goes through the panel's own px_mm strategy, so the parallax of a thick sensor is as in
the refined model. That call is slow (0.4 µs a pixel) and the parallax is smooth, so it
is sampled at every ``STEP``-th pixel and interpolated; where random pixels show that
this is not good enough (strategies with a table of offsets), every pixel is computed.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

from dxtbx import flumpy
from dxtbx.model import Panel

STEP = 8  # pixels between the samples of the parallax shift
TOLERANCE = 1e-3  # pixels
ROWS = 256  # rows at a time: bounds the memory for intermediate arrays


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


def parallax_shift(panel: Panel) -> np.ndarray:
    """Shift of each pixel centre by the panel's px_mm strategy.

    Returns:
        Shift along fast and slow in mm, float64, shape (2, n_slow, n_fast).
    """
    nfast, nslow = panel.get_image_size()
    if panel.get_px_mm_strategy().name() == "SimplePxMmStrategy":
        return np.zeros((2, nslow, nfast))
    fast, slow = _nodes(nfast, STEP), _nodes(nslow, STEP)
    samples = _shift_at(panel, fast, slow)
    by_slow, by_fast = _interpolation(nslow, slow), _interpolation(nfast, fast)
    shift = np.stack([(by_fast @ (by_slow @ samples[..., i]).T).T for i in range(2)])
    rng = np.random.default_rng(7)
    i, j = rng.integers(nfast, size=1000), rng.integers(nslow, size=1000)
    centres = np.stack([i, j], axis=-1) + 0.5
    pixel_size = np.array(panel.get_pixel_size())
    exact = pixel_to_millimeter(panel, centres) - centres * pixel_size
    if np.max(np.abs(exact - shift[:, j, i].T) / pixel_size) > TOLERANCE:
        return np.moveaxis(_shift_at(panel, np.arange(nfast), np.arange(nslow)), -1, 0)
    return shift


def lab_coordinates(panel: Panel, rows: slice, shift: np.ndarray) -> np.ndarray:
    """Laboratory coordinates of pixel centres, moved by a shift on the panel.

    Args:
        panel: The panel.
        rows: Which rows (slow).
        shift: Shift along fast and slow in mm, shape (2, n_rows, n_fast).

    Returns:
        mm, laboratory frame, shape (3, n_rows, n_fast).
    """
    nfast, nslow = panel.get_image_size()
    size_fast, size_slow = panel.get_pixel_size()
    x = (np.arange(nfast) + 0.5) * size_fast + shift[0]
    y = ((np.arange(nslow)[rows] + 0.5) * size_slow)[:, None] + shift[1]
    d = np.array(panel.get_d_matrix()).reshape(3, 3)
    return np.stack([d[i, 0] * x + d[i, 1] * y + d[i, 2] for i in range(3)])
