"""Direction of every pixel of a panel, as seen from the sample.

The centre of pixel (i, j) is (i + 1/2, j + 1/2) in dxtbx' pixel coordinates. Pixel to mm
goes through the panel's own px_mm strategy, so the parallax of a thick sensor is as in
the refined model.
"""

from __future__ import annotations

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Panel


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


def lab_coordinates(
    panel: Panel, fast: np.ndarray, slow: np.ndarray, parallax: bool
) -> np.ndarray:
    """Laboratory coordinates of pixel centres.

    Args:
        panel: The panel.
        fast, slow: Numbers of the pixels along either axis.
        parallax: Whether by the panel's strategy, or where the pixels are themselves.

    Returns:
        mm, laboratory frame, shape (3, len(slow), len(fast)).
    """
    px = np.stack(np.meshgrid(fast + 0.5, slow + 0.5), axis=-1).reshape(-1, 2)
    if parallax:
        mm = pixel_to_millimeter(panel, px)
    else:
        mm = px * panel.get_pixel_size()
    d = np.array(panel.get_d_matrix()).reshape(3, 3)
    r = d[:, :2] @ mm.T + d[:, 2:]
    return r.reshape(3, len(slow), len(fast))


def has_smooth_parallax(panel: Panel) -> bool:
    """Whether the panel's strategy is a smooth function of the pixel's place.

    One with a table of offsets is not.
    """
    return panel.get_px_mm_strategy().name() in (
        "SimplePxMmStrategy",
        "ParallaxCorrectedPxMmStrategy",
    )
