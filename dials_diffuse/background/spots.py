"""Bright spots of an image and their surroundings.

What a Bragg spot adds to the pixels beside it is less than their noise, but it is always
more, never less, and so moves a quantile. Pixels near a bright one are left out whatever
they count themselves, which does not favour low counts.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from dials_diffuse.background.pixels import Pixels

# Photons above the expected that make a pixel bright: standard deviations, a fraction of
# the expected (diffuse scattering is not a spot), and a constant for low counts. Less than
# 1 in 10 000 pixels are bright by chance.
SIGMAS, FRACTION, CONSTANT = 3.0, 0.3, 2.5


def near_spots(
    photons: np.ndarray,
    expected: np.ndarray,
    used: np.ndarray,
    pixels: Pixels,
    margin: int,
) -> np.ndarray:
    """Pixels of spots and those beside them.

    Args:
        photons: Photons of ``pixels``, shape (n,).
        expected: What is expected without spots.
        used: Pixels that may be bright; others, as those of defects, are not looked at.
        pixels: Where the pixels are.
        margin: Size of the surroundings in pixels along either axis; -1 finds nothing.

    Returns:
        True for pixels near spots, shape (n,).
    """
    if margin < 0:
        return np.zeros(len(photons), dtype=bool)
    bright = photons > (
        (1 + FRACTION) * expected + SIGMAS * np.sqrt(np.maximum(expected, 0)) + CONSTANT
    )
    bright &= used
    result, first = [], 0
    for part, shape in zip(pixels.panels, pixels.shapes):
        image = np.zeros(shape[0] * shape[1], dtype=bool)
        place = pixels.flat[part] - first
        image[place] = bright[part]
        grown = ndimage.maximum_filter(
            image.reshape(shape), size=2 * margin + 1, mode="constant"
        )
        result.append(grown.ravel()[place])
        first += shape[0] * shape[1]
    return np.concatenate(result)
