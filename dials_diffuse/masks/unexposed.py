"""Areas in which all images have one and the same value, as where a sensor is not lit.

A CCD behind a round window has corners that were never exposed. Their value lies in the
trusted range of many headers, so nothing masks them, and they dilute what is averaged in
rings. Whether an area is dark or only weak the images alone do not tell for sure: it is
reported, not masked.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np
from scipy import ndimage

from dials_diffuse.masks.series import split
from dials_diffuse.masks.statistics import PixelModel, PixelSums

BOX = 15  # pixels along an edge of the smallest area
FILLED = 0.9  # part of its limits that an area must fill to be called a rectangle
MIN_SHARE = 1e-3  # of the pixels
# Photons that an area would have at the usual level. In weak corners there are few.
MIN_PHOTONS = 1000.0


@dataclasses.dataclass(frozen=True)
class UnexposedArea:
    """Areas of a panel with one value in all images.

    Attributes:
        panel: Number of the panel.
        value: The value, in detector units.
        n_pixels: Number of pixels in all areas of this panel with this value.
        box: x0, x1, y0, y1 of the largest, x0 <= x < x1.
        is_box: Whether it nearly fills them.
    """

    panel: int
    value: float
    n_pixels: int
    box: tuple[int, int, int, int]
    is_box: bool


def unexposed_areas(
    sums: PixelSums, seen: np.ndarray, model: PixelModel
) -> list[UnexposedArea]:
    """Areas of at least 15 x 15 pixels with one value in all images, largest first.

    Args:
        sums: The sums over the images.
        seen: Pixels to look at, flat.
        model: What the values of the pixels mean.
    """
    constant = seen & (sums.n > 0) & (sums.smallest == sums.largest)
    lit = seen & (sums.n > 0) & ~constant
    if not (constant.any() and lit.any()):
        return []
    usual = float(np.median(sums.mean()[lit]))
    result = []
    panels = zip(split(constant, model.shapes), split(sums.smallest, model.shapes))
    for number, (here, photons) in enumerate(panels):
        for value in _frequent_values(photons[here]):
            area = ndimage.binary_opening(
                here & (photons == value), np.ones((BOX, BOX), dtype=bool)
            )
            n_pixels = np.count_nonzero(area)
            enough = n_pixels * sums.n_images * usual >= MIN_PHOTONS
            if n_pixels >= MIN_SHARE * len(seen) and enough:
                raw = float(value) * model.gain[number] + model.pedestal[number]
                box, is_box = _largest_box(area)
                result.append(UnexposedArea(number, raw, n_pixels, box, is_box))
    return sorted(result, key=lambda area: -area.n_pixels)


def _frequent_values(values: np.ndarray, most: int = 3) -> np.ndarray:
    """The values that most pixels have."""
    found, n = np.unique(values, return_counts=True)
    return found[np.argsort(-n, kind="stable")[:most]]


def _largest_box(area: np.ndarray) -> tuple[tuple[int, int, int, int], bool]:
    """Limits x0, x1, y0, y1 of the largest connected part; whether it fills them."""
    labels, _ = ndimage.label(area)
    largest = np.argmax(np.bincount(labels[area]))
    y, x = ndimage.find_objects((labels == largest).astype(np.uint8))[0]
    is_box = np.mean(labels[y, x] == largest) >= FILLED
    return (x.start, x.stop, y.start, y.stop), bool(is_box)


def unexposed_hint(areas: Sequence[UnexposedArea], n_pixels: int) -> list[str]:
    """What the user should know of such areas, in one sentence; none without areas.

    Args:
        areas: The areas, largest first.
        n_pixels: Of the detector.
    """
    if not areas:
        return []
    first = areas[0]
    total = sum(area.n_pixels for area in areas)
    x0, x1, y0, y1 = first.box
    shape = (
        f"untrusted.rectangle={x0},{x1},{y0},{y1}"
        if first.is_box
        else "shapes (untrusted.polygon) about them; they do not fill that rectangle"
    )
    return [
        f"{total} pixels ({100 * total / n_pixels:.2g}%) lie in areas that have one value "
        f"in all images, {first.value:g} in the largest (panel {first.panel}, x {x0} to "
        f"{x1}, y {y0} to {y1}). If the detector is not exposed there, leave them out: "
        f"by trusted_range, from {first.value + 1:g} on, or by {shape}"
    ]
