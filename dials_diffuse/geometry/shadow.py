"""The moving shadow of a goniometer on a detector, over the rotation of an image.

Maskers of dxtbx know the outline of the shadow on each panel, a convex polygon, at one
angle. DIALS takes the angle at which an image begins for all of it; but a pixel that
comes into the shadow during the image counts for a part of the exposure only. Left out
is what lies in the shadow at any of some angles over the image, so many that its edge
moves by about a pixel between them, ``MAX_ANGLES`` at the most: of very wide images a thin
rim stays.

The pixels of a polygon are found row by row, by the rule that dxtbx applies to each
pixel, which takes up to half a second for 6 million pixels.
"""

from __future__ import annotations

import numpy as np

from dxtbx.imageset import ImageSequence
from dxtbx.masking import GoniometerShadowMasker
from dxtbx.model import Detector, Experiment, Panel

MAX_ANGLES = 5  # of an image


def knows_shadow(experiment: Experiment) -> bool:
    """Whether the format of an experiment's images knows the shadow."""
    imageset = experiment.imageset
    return isinstance(imageset, ImageSequence) and imageset.has_dynamic_mask()


def image_shadow(experiment: Experiment, array_index: int) -> list[np.ndarray]:
    """The pixels of each panel that are in the shadow during an image.

    Args:
        experiment: One whose format knows the shadow.
        array_index: Array index of the image.

    Returns:
        For each panel, True for shadowed pixels, shape (n_slow, n_fast).
    """
    masker = experiment.imageset.masker()
    scan, detector = experiment.imageset.get_scan(), experiment.detector
    start, end = (scan.get_angle_from_array_index(array_index + x) for x in (0, 1))
    shapes = [panel.get_image_size()[::-1] for panel in detector]
    ends = [outlines(masker, detector, angle) for angle in (start, end)]
    motion = max(polygon_distance(*polygons) for polygons in zip(*ends))
    n_angles = int(min(np.ceil(motion) + 1, MAX_ANGLES))
    between = np.linspace(start, end, n_angles)[1:-1]
    at_angles = [ends[0], *(outlines(masker, detector, a) for a in between)]
    if n_angles > 1:
        at_angles.append(ends[1])
    inverted = _is_inverted(masker, detector[0], start)
    return [
        np.logical_or.reduce([pixels_inside(p, shape) ^ inverted for p in polygons])
        for shape, polygons in zip(shapes, zip(*at_angles))
    ]


def outlines(
    masker: GoniometerShadowMasker, detector: Detector, angle: float
) -> list[np.ndarray]:
    """The outline of the shadow on each panel, px, shape (n, 2); n = 0 without any.

    Args:
        masker: The masker.
        detector: The detector.
        angle: Of the scan, degrees.
    """
    polygons = masker.project_extrema(detector, angle)
    # fewer corners than three are no shadow to dxtbx either
    return [
        np.array(polygon) if len(polygon) >= 3 else np.zeros((0, 2))
        for polygon in polygons
    ]


def polygon_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The farthest that a corner of one polygon is from the other's edges.

    Args:
        a, b: Corners, shape (n, 2).

    Returns:
        The larger of both distances; infinite if one of them has no corners.
    """
    if len(a) == 0 or len(b) == 0:
        return 0.0 if len(a) == len(b) else np.inf
    return max(_farthest(a, b), _farthest(b, a))


def _farthest(corners: np.ndarray, polygon: np.ndarray) -> float:
    start = polygon
    edge = np.roll(polygon, -1, axis=0) - start
    to_corner = corners[:, None] - start
    length2 = np.maximum(np.sum(edge**2, axis=1), np.finfo(float).tiny)
    t = np.clip(np.einsum("cei,ei->ce", to_corner, edge) / length2, 0, 1)
    away = np.linalg.norm(to_corner - t[..., None] * edge, axis=-1)
    return float(away.min(axis=1).max())


def pixels_inside(polygon: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie in a convex polygon.

    Args:
        polygon: Corners (fast, slow), px, shape (n, 2).
        shape: Of the panel, (n_slow, n_fast).
    """
    inside = np.zeros(shape, dtype=bool)
    if len(polygon) == 0:
        return inside
    (x, y), (x_next, y_next) = polygon.T, np.roll(polygon, -1, axis=0).T
    first = max(int(np.floor(y.min())), 0)
    rows = np.arange(first, min(int(np.ceil(y.max())) + 1, shape[0]))
    centre = rows[:, None] + 0.5
    crosses = (y > centre) != (y_next > centre)
    slope = np.divide(x - x_next, y - y_next, out=np.zeros(len(x)), where=y != y_next)
    at = slope * (centre - y_next) + x_next
    # a convex outline crosses a row twice, or not at all
    left = np.min(at, axis=1, initial=np.inf, where=crosses)
    right = np.max(at, axis=1, initial=-np.inf, where=crosses)
    columns = np.arange(shape[1]) + 0.5
    inside[rows] = (columns >= left[:, None]) & (columns < right[:, None])
    return inside


def _is_inverted(masker: GoniometerShadowMasker, panel: Panel, angle: float) -> bool:
    """Whether a masker leaves only what lies inside the outline, as of a pressure cell.

    Maskers do not tell: by a copy of a panel with the first pixel alone.
    """
    copy = panel.to_dict()
    copy["image_size"] = (1, 1)
    one = Detector()
    one.add_panel(Panel.from_dict(copy))
    (outline,) = outlines(masker, one, angle)
    (mask,) = masker.get_mask(one, angle)
    return bool(mask[0]) == bool(pixels_inside(outline, (1, 1))[0, 0])
