"""A detector as it is seen along the beam, reduced to some thousand of its pixels.

Pixels are put where they are seen from the sample, on a plane that the beam meets
perpendicularly: any number of panels in any position makes one picture. What is shown
varies smoothly, so pixels some way apart stand for those around them, and a picture takes
as long for any size of detector.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from dxtbx.model import Beam, Detector, Panel

from dials_diffuse.masks.rings import Rings, make_rings

ROUND_D = (50, 30, 20, 15, 10, 8, 6, 5, 4, 3, 2.5, 2, 1.7, 1.5, 1.3, 1.2, 1.1, 1)
ROUND_D += (0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4)


def pixel_spacing(detector: Detector, n_pixels: int) -> int:
    """Pixels between those that are looked at.

    Args:
        detector: The detector.
        n_pixels: How many to look at, about.
    """
    n = sum(int(np.prod(panel.get_image_size())) for panel in detector)
    return max(1, int(math.sqrt(n / n_pixels)))


def n_fields(panel: Panel, spacing: int) -> tuple[int, int]:
    """How many fields of about equal size a panel has along either axis.

    Args:
        panel: The panel.
        spacing: Pixels along the edge of a field, about.
    """
    n_fast, n_slow = (max(1, round(n / spacing)) for n in panel.get_image_size())
    return n_fast, n_slow


def spaced_pixels(panel: Panel, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the middle pixels of the fields, along either axis."""
    fast, slow = (
        ((np.arange(n) + 0.5) * size / n).astype(int)
        for n, size in zip(n_fields(panel, spacing), panel.get_image_size())
    )
    return fast, slow


def coarse_detector(detector: Detector, spacing: int) -> Detector:
    """A detector in the same place whose pixels are the fields of the given one."""
    coarse = Detector()
    for panel in detector:
        fields = n_fields(panel, spacing)
        edges = zip(panel.get_image_size(), panel.get_pixel_size(), fields)
        new = coarse.add_panel()
        new.set_image_size(fields)
        new.set_pixel_size(tuple(size * pixel / n for size, pixel, n in edges))
        new.set_frame(panel.get_fast_axis(), panel.get_slow_axis(), panel.get_origin())
    return coarse


@dataclasses.dataclass(frozen=True)
class BeamView:
    """Where the pixels that are looked at are seen.

    Attributes:
        rings: Coordinates in the plane that the beam meets perpendicularly, in pixels.
        beam: The beam.
        size: Pixels along the edge of a cell of a picture.
    """

    rings: Rings
    beam: Beam
    size: float

    @property
    def is_empty(self) -> bool:
        """Whether no pixel is in the forward direction."""
        return not np.isfinite(self.rings.u).any()

    def _corner(self) -> tuple[float, float]:
        """The left and the upper limit: edges of fields, which are half a cell wide."""
        u, v = self.rings.u, self.rings.v
        return float(np.nanmin(u)) - self.size / 4, float(np.nanmax(v)) + self.size / 4

    def cells(self) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Row and column of each pixel in a picture, -1 if it has none, and its shape."""
        u, v = self.rings.u, self.rings.v
        left, top = self._corner()
        known = np.isfinite(u)
        row, column = (np.full(len(u), -1) for _ in range(2))
        row[known] = (top - v[known]) // self.size
        column[known] = (u[known] - left) // self.size
        return row, column, (int(row.max()) + 1, int(column.max()) + 1)

    def extent(self, shape: tuple[int, int]) -> tuple[float, float, float, float]:
        """Limits of a picture in pixels from the beam: left, right, bottom, top."""
        left, top = self._corner()
        return left, left + shape[1] * self.size, top - shape[0] * self.size, top


def beam_view(detector: Detector, beam: Beam, spacing: int) -> BeamView:
    """The view of a detector along the beam, +x to the right and +y upwards.

    Args:
        detector, beam: The models.
        spacing: Pixels between those that are looked at; they come in the order of the
            panels, and of the ``spaced_pixels`` of each.
    """
    coarse = coarse_detector(detector, spacing)
    rings = make_rings(coarse, beam)
    # from the pixels of the coarse detector to those of the given one
    factor = _smallest_pixel(coarse) / _smallest_pixel(detector)
    rings = dataclasses.replace(
        rings, u=rings.u * factor, v=rings.v * factor, step=rings.step / factor
    )
    # two, so that stretched pixels of a tilted detector leave no holes
    return BeamView(rings, beam, 2 * spacing)


def _smallest_pixel(detector: Detector) -> float:
    return min(min(panel.get_pixel_size()) for panel in detector)


def resolution_circles(
    beam: Beam, step: float, extent: tuple[float, float, float, float]
) -> list[tuple[float, float]]:
    """Round d-spacings (Å), and the radii in pixels at which they are seen.

    2θ = 2 arcsin(λ/2d) is seen at tan 2θ from the beam.

    Args:
        beam: The beam.
        step: Size of a pixel in the plane, radians near the beam.
        extent: Limits of the picture in pixels: left, right, bottom, top.
    """
    wavelength = beam.get_wavelength()
    two_theta = math.atan(max(map(abs, extent)) * step)
    d_values = circle_resolutions(wavelength / (2 * math.sin(two_theta / 2)))
    angles = [2 * math.asin(wavelength / (2 * d)) for d in d_values]
    return [(d, math.tan(angle) / step) for d, angle in zip(d_values, angles)]


def circle_resolutions(d_min: float) -> list[float]:
    """Round d-spacings (Å) for circles about evenly spaced in s, and d_min itself."""
    chosen: list[float] = []
    last = 0.0
    for d in ROUND_D:
        fraction = d_min / d
        if fraction - last >= 0.2 and fraction <= 0.87:
            chosen.append(float(d))
            last = fraction
    return [*chosen, d_min]


def to_picture(
    values: np.ndarray, row: np.ndarray, column: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Mean of the values in each cell of a picture, NaN where there are none."""
    inside = (row >= 0) & np.isfinite(values)
    place = row[inside] * shape[1] + column[inside]
    n = np.bincount(place, minlength=shape[0] * shape[1])
    total = np.bincount(place, values[inside], minlength=len(n))
    with np.errstate(invalid="ignore"):
        return np.where(n > 0, total / n, np.nan).reshape(shape)


def close_gaps(picture: np.ndarray) -> np.ndarray:
    """The picture without empty cells between two others, whose mean they get.

    Narrow gaps between panels would be seen or not by where the cells happen to lie, and
    the pixels of a tilted panel leave holes; wider gaps stay.

    Args:
        picture: Of what varies smoothly, NaN where it is empty, shape (n_rows, n_columns).
    """
    edged = np.pad(picture, 1, constant_values=np.nan)
    n_rows, n_columns = picture.shape

    def shifted(down: int, right: int) -> np.ndarray:
        return edged[1 + down : 1 + down + n_rows, 1 + right : 1 + right + n_columns]

    closed = picture.copy()
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        mean = (shifted(down, right) + shifted(-down, -right)) / 2
        closed = np.where(np.isnan(closed), mean, closed)
    return closed
