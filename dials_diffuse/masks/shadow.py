"""Shadows: of the goniometer, by the format of the images, and of a beam stop.

A beam stop shows in the mean image as a connected region around the beam, or from the
innermost pixels on, in which far fewer photons arrive than in the rest of each resolution
ring. Rings that lie in the shadow as a whole have no rest: the intensity just outside the
sharp edge is theirs too. A smooth decrease towards the beam is no shadow, nor is a dark
corner of one panel beside a hole for the beam: what stops the beam hides most of the
innermost pixels.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
from scipy import ndimage

from dxtbx import flumpy
from dxtbx.imageset import ImageSequence
from dxtbx.model import Experiment

from dials_diffuse.extraction.blocks import image_number
from dials_diffuse.masks.neighbours import Shapes, box_sum
from dials_diffuse.masks.rings import Rings, ring_quantiles
from dials_diffuse.masks.series import flatten

BOXES = (1, 3, 5, 7)  # pixels along an edge
ENOUGH = 40.0  # (mean/sigma)^2, photons by Poisson, of a box that decides about a pixel
MAX_CELLS = 40_000_000  # of the common plane
NEAR = 5.0  # pixels, from the beam or the innermost pixel
SOFT = 0.9  # below this fraction a pixel beside the shadow is in its soft edge
CENTRAL = 0.5  # fraction of the innermost pixels that a beam stop hides at least
EDGE = 3  # rings over which a sharp edge of a shadow extends
MIN_PIXELS = 50
MAX_FRACTION = 0.2  # of the pixels: what is larger is no beam stop


def goniometer_shadow(
    images: Sequence[tuple[Experiment, int]], n_pixels: int
) -> np.ndarray:
    """Pixels that the goniometer shadows in all images, by the format; flat."""
    shadow = np.ones(n_pixels, dtype=bool)
    for experiment, array_index in images:
        imageset = experiment.imageset
        if not (isinstance(imageset, ImageSequence) and imageset.has_dynamic_mask()):
            return np.zeros(n_pixels, dtype=bool)
        number = image_number(experiment, array_index)
        angle = imageset.get_scan(number).get_angle_from_array_index(array_index)
        good = imageset.masker().get_mask(experiment.detector, angle)
        shadow &= ~flatten([flumpy.to_numpy(mask) for mask in good])
        if not shadow.any():
            break
    return shadow


def moving_shadows(images: Sequence[tuple[Experiment, int]]) -> bool:
    """Whether a format knows shadows that change from image to image."""
    return any(experiment.imageset.has_dynamic_mask() for experiment, _ in images)


def reference_profile(medians: np.ndarray, fraction: float) -> np.ndarray:
    """What the rings would have without a shadow.

    From the outside inwards, a ring has its own median, unless it falls below a fraction
    of the level a few rings farther out: then it has that level.

    Args:
        medians: Median of each ring, from the inside; NaN for empty rings.
        fraction: Fraction below which there may be a shadow.

    Returns:
        The reference of each ring, NaN outside the outermost with a median.
    """
    result = np.full(len(medians), np.nan)
    outer: list[float] = []  # the references of the rings farther out
    for i in range(len(medians) - 1, -1, -1):
        if np.isnan(medians[i]):
            result[i] = outer[-1] if outer else np.nan
            continue
        beyond = outer[-EDGE] if len(outer) >= EDGE else medians[i]
        result[i] = medians[i] if medians[i] >= fraction * beyond else beyond
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
    values = np.where(good, mean, 0).astype(np.float32)
    usual = ring_quantiles(noise[good], rings.number[good], rings.n_rings)[0]
    usual = np.maximum(np.nan_to_num(usual), 1e-6)[rings.number]
    low, soft = (np.zeros(len(values), dtype=bool) for _ in range(2))
    undecided = good.copy()
    for size in BOXES:
        n = np.rint(box_sum(good, shapes, size)) if size > 1 else good
        total = box_sum(values, shapes, size) if size > 1 else values
        boxed = total / np.maximum(n, 1)
        medians = ring_quantiles(boxed[good], rings.number[good], rings.n_rings)[0]
        reference = reference_profile(medians, fraction)[rings.number]
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
    nearest = tuple(
        ndimage.distance_transform_edt(
            ~seen.reshape(shape), return_distances=False, return_indices=True
        )
    )
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
