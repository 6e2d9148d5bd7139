"""Resolution rings on a detector, and levels and spreads of pixels in them.

Pixels are seen in a plane that the beam meets perpendicularly at unit distance. Rings of
equal width there are rings of resolution: 2θ is the same all around each.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from dxtbx.model import Beam, Detector

from dials_diffuse.geometry.directions import lab_coordinates
from dials_diffuse.geometry.interpolation import row_chunks

RING_WIDTH = 2  # pixels, near the beam
MAX_TAN = 5.0  # of 2θ: farther out is all one ring
OUTLIER = 5.0  # standard deviations beyond which a count is cut off
MAX_SAMPLE = 400_000  # pixels for the levels of the rings of one image
N_ITERATIONS = 9


@dataclasses.dataclass(frozen=True)
class Rings:
    """Where the pixels lie about the beam, as flat arrays over all panels.

    Attributes:
        u, v: Coordinates in the plane, in pixels: u to +x and v to +y of the laboratory
            if the beam is along -z; float32, NaN where 2θ is near or above 90°.
        number: Ring of each pixel, int32.
        n_rings: Number of rings.
        step: Size of a pixel in the plane, radians near the beam.
    """

    u: np.ndarray
    v: np.ndarray
    number: np.ndarray
    n_rings: int
    step: float


def make_rings(detector: Detector, beam: Beam) -> Rings:
    """The rings of a detector in a beam."""
    s0 = np.array(beam.get_unit_s0())
    up = np.array((0.0, 1.0, 0.0)) if abs(s0[1]) < 0.9 else np.array((1.0, 0.0, 0.0))
    right = np.cross(s0, up)
    right /= np.linalg.norm(right)
    frame = np.array([right, np.cross(right, s0), s0])
    step = min(
        min(panel.get_pixel_size()) / max(_distance(panel, s0), 1e-3)
        for panel in detector
    )
    u, v = [], []
    for panel in detector:
        n_fast, n_slow = panel.get_image_size()
        for rows in row_chunks((n_slow, n_fast)):
            slow = np.arange(n_slow)[rows]
            r = lab_coordinates(panel, np.arange(n_fast), slow, parallax=False)
            x, y, z = frame @ r.reshape(3, -1)
            forward = z * MAX_TAN > np.hypot(x, y)
            for values, part in ((u, x), (v, y)):
                scaled = np.full(len(z), np.nan, dtype=np.float32)
                scaled[forward] = part[forward] / z[forward] / step
                values.append(scaled)
    u, v = np.concatenate(u), np.concatenate(v)
    radius = np.hypot(u, v) / RING_WIDTH
    known = np.isfinite(radius)
    n_rings = int(radius[known].max(initial=0)) + 2
    number = np.full(len(u), n_rings - 1, dtype=np.int32)
    number[known] = radius[known]
    return Rings(u, v, number, n_rings, step)


def _distance(panel, s0: np.ndarray) -> float:
    """Distance of the farthest corner of a panel along the beam, mm."""
    n_fast, n_slow = panel.get_image_size()
    corners = [
        panel.get_pixel_lab_coord((x, y)) for x in (0, n_fast) for y in (0, n_slow)
    ]
    return max(float(np.dot(corner, s0)) for corner in corners)


def ring_quantiles(
    values: np.ndarray,
    number: np.ndarray,
    n_rings: int,
    quantiles: Sequence[float] = (0.5,),
) -> np.ndarray:
    """Quantiles of the values in each ring.

    Args:
        values: Flat values.
        number: Ring of each.
        n_rings: Number of rings.
        quantiles: From 0 to 1.

    Returns:
        Shape (len(quantiles), n_rings); NaN where a ring is empty.
    """
    order = np.lexsort((values, number))
    n = np.bincount(number, minlength=n_rings)
    start = np.cumsum(n) - n
    result = np.full((len(quantiles), n_rings), np.nan)
    filled = n > 0
    for row, quantile in zip(result, quantiles):
        place = start + np.rint(quantile * (n - 1)).astype(int)
        row[filled] = values[order[place[filled]]]
    return result


def ring_centre_and_spread(
    values: np.ndarray, number: np.ndarray, n_rings: int
) -> tuple[np.ndarray, np.ndarray]:
    """Median of each ring, and its standard deviation from the quartiles.

    σ = (q75 - q25)/1.349, that of a normal distribution, which outliers do not move.
    """
    low, median, high = ring_quantiles(values, number, n_rings, (0.25, 0.5, 0.75))
    return median, (high - low) / 1.349


def ring_levels(
    counts: np.ndarray, number: np.ndarray, n_rings: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the counts of each ring, outliers cut off.

    Counts farther than 5σ + 5 from the mean are brought to that limit, with the mean and
    the variance of the round before, until Bragg peaks and hot pixels hardly count. A
    median would do no better than whole numbers.

    Args:
        counts: Counts of good pixels, flat.
        number: Ring of each.
        n_rings: Number of rings.

    Returns:
        Mean and variance, shape (n_rings,); zero where a ring is empty.
    """
    step = max(1, len(counts) // MAX_SAMPLE)
    counts, number = counts[::step].astype(float), number[::step]
    n = np.maximum(np.bincount(number, minlength=n_rings), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(number, values, minlength=n_rings) / n

    level = mean(counts)
    variance = mean((counts - level[number]) ** 2)
    for _ in range(N_ITERATIONS):
        limit = outlier_limit(level, variance)
        cut = np.clip(counts, (level - limit)[number], (level + limit)[number])
        level = mean(cut)
        variance = mean((cut - level[number]) ** 2)
    return level, variance


def outlier_limit(level: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """How far from its expectation a count may be: 5σ + 5, at least that of Poisson."""
    return OUTLIER * (np.sqrt(np.maximum(variance, np.maximum(level, 0))) + 1)
