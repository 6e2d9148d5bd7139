"""Shadows: of the goniometer, by the format of the images, and of a beam stop.

A beam stop shows in the mean image as a connected region around the beam, or from the
innermost pixels on, in which far fewer photons arrive than in the rest of each resolution
ring. The rest is known by its lower quartile, which Bragg peaks do not reach: near the
beam, where a few reflections make the same rings in all images, they raise the median.
Rings that lie in the shadow as a whole have no rest: the intensity just outside the
sharp edge is theirs too. A smooth decrease towards the beam is no shadow, nor is a dark
corner of one panel beside a hole for the beam: what stops the beam hides most of the
innermost pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np
from scipy import ndimage

from dxtbx.model import Experiment

from dials_diffuse.geometry.shadow import image_shadow, knows_shadow
from dials_diffuse.masks.neighbours import Shapes, box_sum
from dials_diffuse.masks.rings import OUTLIER, Rings, ring_quantiles
from dials_diffuse.masks.series import flatten

BOXES = (1, 3, 5, 7)  # pixels along an edge
ENOUGH = 40.0  # (mean/sigma)^2, photons by Poisson, of a box that decides about a pixel
MAX_CELLS = 40_000_000  # of the common plane
NEAR = 5.0  # pixels, from the beam or the innermost pixel
SOFT = 0.9  # below this fraction a pixel beside the shadow is in its soft edge
CENTRAL = 0.5  # fraction of the innermost pixels that a beam stop hides at least
EDGE = 3  # rings over which a sharp edge of a shadow extends
BUMP = 4  # rings that a ring of Bragg peaks is wide
MOST = 2.0  # times the level of its ring that a pixel may have in the means of boxes
DEEP = 0.25  # parts of the median: a lower quartile below it lies in a shadow itself
MIN_PIXELS = 50
MAX_FRACTION = 0.2  # of the pixels: what is larger is no beam stop


@dataclasses.dataclass(frozen=True)
class GoniometerShadow:
    """What the goniometer shadows in a series of images, by the format; flat.

    Attributes:
        always: Pixels that it shadows in all images.
        sometimes: Pixels that it shadows in some images, but not in all.
        known: Whether the format knows the shadow in all images.
    """

    always: np.ndarray
    sometimes: np.ndarray
    known: bool


def goniometer_shadow(
    images: Sequence[tuple[Experiment, int]], n_pixels: int
) -> GoniometerShadow:
    """The shadow of the goniometer in a series of images.

    Of an image, what is in the shadow at any time: that is what extraction leaves out,
    image by image (``geometry.shadow``).
    """
    always, ever = (np.full(n_pixels, x) for x in (True, False))
    known = bool(images)
    for experiment, array_index in images:
        if not knows_shadow(experiment):
            known = False
            continue
        shadow = flatten(image_shadow(experiment, array_index))
        always &= shadow
        ever |= shadow
    always &= known
    return GoniometerShadow(always, ever & ~always, known)


def ring_levels_without_peaks(
    values: np.ndarray, number: np.ndarray, n_rings: int
) -> np.ndarray:
    """What most pixels of each ring have at least, with few peaks and little shadow.

    The lower quartile, or the median where a quarter of the ring is in a shadow.

    Args:
        values: Flat values.
        number: Ring of each.
        n_rings: Number of rings.

    Returns:
        Shape (n_rings,); NaN where a ring is empty.
    """
    lower, median = ring_quantiles(values, number, n_rings, (0.25, 0.5))
    return np.where(lower < DEEP * median, median, lower)


def reference_profile(levels: np.ndarray, fraction: float) -> np.ndarray:
    """What the rings would have without a shadow.

    From the outside inwards, a ring has its own level, unless it falls below a fraction
    of the lowest level of some rings a little farther out: then it has that. A ring of
    Bragg peaks is not as wide as all of these.

    Args:
        levels: Level of each ring, from the inside; NaN for empty rings.
        fraction: Fraction below which there may be a shadow.

    Returns:
        The reference of each ring, NaN outside the outermost with a level.
    """
    result = np.full(len(levels), np.nan)
    outer: list[float] = []  # the references of the rings farther out
    for i in range(len(levels) - 1, -1, -1):
        if np.isnan(levels[i]):
            result[i] = outer[-1] if outer else np.nan
            continue
        beyond = min(outer[-EDGE - BUMP : len(outer) - EDGE + 1], default=levels[i])
        result[i] = levels[i] if levels[i] >= fraction * beyond else beyond
        outer.append(result[i])
    return result


def low_pixels(
    mean: np.ndarray,
    noise: np.ndarray,
    good: np.ndarray,
    rings: Rings,
    shapes: Shapes,
    fraction: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels with fewer photons than the reference of their ring.

    The mean over the smallest box in which the reference is far above its noise decides;
    where none is large enough, no pixel is called low.

    Args:
        mean: Mean photons in an image, flat.
        noise: Variance of this mean, flat.
        good: Pixels to look at.
        rings: Where they lie.
        shapes: Of the panels.
        fraction: The fraction.

    Returns:
        Pixels below the fraction of the reference, and those below 90 % of it.
    """
    number, n_rings = rings.number, rings.n_rings
    levels = ring_levels_without_peaks(mean[good], number[good], n_rings)
    usual = ring_quantiles(noise[good], number[good], n_rings, (0.25,))[0]
    usual = np.maximum(np.nan_to_num(usual), 1e-6)
    lit = levels > 0
    if lit.any():
        # in rings full of peaks the noise is that of most rings, in parts of the level
        most = np.median(usual[lit] / levels[lit])
        usual[lit] = np.minimum(usual[lit], most * levels[lit])
    # peaks would otherwise be in the boxes of many pixels about them
    top = (np.nan_to_num(levels) * MOST + OUTLIER * np.sqrt(usual))[number]
    values = np.where(good, np.minimum(mean, top), 0).astype(np.float32)
    usual = usual[number]
    low, soft = (np.zeros(len(values), dtype=bool) for _ in range(2))
    undecided = good.copy()
    for size in BOXES:
        n = np.rint(box_sum(good, shapes, size)) if size > 1 else good
        total = box_sum(values, shapes, size) if size > 1 else values
        boxed = total / np.maximum(n, 1)
        levels = ring_levels_without_peaks(boxed[good], number[good], n_rings)
        reference = reference_profile(levels, fraction)[number]
        decided = undecided & (reference**2 * n >= ENOUGH * usual)
        low[decided] = boxed[decided] < fraction * reference[decided]
        soft[decided] = boxed[decided] < SOFT * reference[decided]
        undecided &= ~decided
    return low, soft


def to_plane(rings: Rings) -> tuple[np.ndarray, np.ndarray, tuple[int, int], float]:
    """The pixels in a common plane that the beam meets perpendicularly.

    Returns:
        Cell of each pixel, flat, and which pixels have one; shape of the plane; size of a
        cell in pixels.
    """
    known = np.isfinite(rings.u)
    u, v = rings.u[known], rings.v[known]
    extent = (float(np.ptp(u)) + 2) * (float(np.ptp(v)) + 2)
    size = max(1.0, np.sqrt(extent / MAX_CELLS))
    row = np.rint((v.max() - v) / size).astype(np.int64)
    column = np.rint((u - u.min()) / size).astype(np.int64)
    shape = int(row.max()) + 1, int(column.max()) + 1
    cell = np.zeros(len(rings.u), dtype=np.int64)
    cell[known] = row * shape[1] + column
    return cell, known, shape, size


def nearest_seen(seen: np.ndarray) -> tuple[np.ndarray, ...]:
    """Indices of the nearest cell that is True, for each cell of a plane."""
    found = ndimage.distance_transform_edt(
        ~seen, return_distances=False, return_indices=True
    )
    return tuple(found)


def find_beamstop(
    mean: np.ndarray,
    noise: np.ndarray,
    good: np.ndarray,
    rings: Rings,
    shapes: Shapes,
    fraction: float,
    border: int,
) -> np.ndarray:
    """The shadow of a beam stop and of what holds it; flat, all False if there is none.

    Low regions are connected in the common plane of all panels. Gaps are taken for what
    the nearest pixel is, so that an arm goes on behind them.

    Args:
        mean: Mean photons in an image, flat.
        noise: Variance of this mean, flat.
        good: Pixels to look at.
        rings: Where they lie.
        shapes: Of the panels.
        fraction: What is below this fraction of the rest of its ring may be shadow.
        border: Pixels over which the shadow may have a soft edge.
    """
    found = np.zeros(len(mean), dtype=bool)
    radius = np.hypot(rings.u, rings.v)
    good = good & np.isfinite(radius)
    if not good.any():
        return found
    low, soft = low_pixels(mean, noise, good, rings, shapes, fraction)
    cell, known, shape, size = to_plane(rings)
    plane = np.zeros(shape[0] * shape[1], dtype=bool)
    seen = plane.copy()
    plane[cell[low]] = True
    seen[cell[good]] = True
    nearest = nearest_seen(seen.reshape(shape))
    labels, _ = ndimage.label(plane.reshape(shape)[nearest], np.ones((3, 3)))
    innermost = good & (radius <= radius[good].min() + NEAR)
    central = np.setdiff1d(labels.ravel()[cell[innermost & low]], [0])
    if len(central) == 0:
        return found
    # the beam itself may shine through the middle of the stop
    region = ndimage.binary_fill_holes(np.isin(labels, central))
    if region.ravel()[cell[innermost]].mean() < CENTRAL:
        return found
    if border:
        edge = np.zeros_like(plane)
        edge[cell[soft]] = True
        reach = max(1, round(border / size))
        region = ndimage.binary_dilation(
            region, np.ones((3, 3)), reach, mask=region | edge.reshape(shape)[nearest]
        )
    found[known] = region.ravel()[cell[known]]
    # fewer pixels are the chance of a few counts
    return (
        found if np.count_nonzero(found & good) >= MIN_PIXELS else np.zeros_like(found)
    )
