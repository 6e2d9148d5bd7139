"""Pictures of the corrections: each factor where the pixels are seen along the beam.

The factors are smooth, so pixels some way apart stand for those around them: a picture
takes as long for any size of detector.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dxtbx.model import Beam, Detector, Experiment, Panel
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.blocks import exposure_times
from dials_diffuse.extraction.settings import CorrectionSettings, ExtractionSettings
from dials_diffuse.extraction.tables import pixel_vectors
from dials_diffuse.masks.rings import MAX_TAN, Rings
from dials_diffuse.report import masks as pictures
from dials_diffuse.report.corrections import (
    FACTORS,
    Factor,
    detector_groups,
    panel_factors,
    product_of,
)
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.extract")

PICTURE_PIXELS = 120_000  # of a detector that are looked at
MOST_PICTURES = 10

# Inches
EDGE = 3.8  # of a picture
BESIDE = 1.6  # it, for its colour bar and the numbers of the next picture
ABOVE = 0.8  # it, for its title and the numbers below the next picture
LEFT, BELOW, TITLE = 0.65, 0.5, 0.45  # of the figure


def pixel_spacing(detector: Detector) -> int:
    """Pixels between those that are looked at."""
    n = sum(int(np.prod(panel.get_image_size())) for panel in detector)
    return max(1, int(math.sqrt(n / PICTURE_PIXELS)))


def spaced_pixels(panel: Panel, spacing: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the middle pixels of fields of about equal size, along either axis.

    Args:
        panel: The panel.
        spacing: Pixels along the edge of a field, about.
    """
    numbers = []
    for n in panel.get_image_size():
        n_fields = max(1, round(n / spacing))
        numbers.append(((np.arange(n_fields) + 0.5) * n / n_fields).astype(int))
    return numbers[0], numbers[1]


def pixel_values(
    detector: Detector, beam: Beam, settings: CorrectionSettings, spacing: int = 1
) -> dict[str, np.ndarray]:
    """The factors at the ``spaced_pixels`` of all panels, ``product`` last, flat."""
    parts = [
        panel_factors(panel, beam, settings, *spaced_pixels(panel, spacing))
        for panel in detector
    ]
    return {
        name: np.concatenate([part[name].ravel() for part in parts])
        for name in parts[0]
    }


@dataclasses.dataclass(frozen=True)
class DetectorView:
    """Where the pixels that are looked at are seen, as the pictures of masks need it.

    Attributes:
        rings: Coordinates in the plane that the beam meets perpendicularly, in pixels.
        beam: The beam.
        size: Pixels along the edge of a cell of the picture.
    """

    rings: Rings
    beam: Beam
    size: float

    def cells(self) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Row and column of each pixel in a picture, -1 if it has none, and its shape."""
        u, v = self.rings.u, self.rings.v
        known = np.isfinite(u)
        row, column = (np.full(len(u), -1) for _ in range(2))
        row[known] = (np.nanmax(v) - v[known]) // self.size
        column[known] = (u[known] - np.nanmin(u)) // self.size
        return row, column, (int(row.max()) + 1, int(column.max()) + 1)


def detector_view(detector: Detector, beam: Beam, spacing: int) -> DetectorView:
    """The view of a detector along the beam, +x to the right and +y upwards.

    Args:
        detector, beam: The models.
        spacing: As of ``pixel_values``.
    """
    s0 = np.array(beam.get_unit_s0())
    up = np.array((0.0, 1.0, 0.0)) if abs(s0[1]) < 0.9 else np.array((1.0, 0.0, 0.0))
    right = np.cross(s0, up)
    right /= np.linalg.norm(right)
    frame = np.array([right, np.cross(right, s0), s0])
    positions = [
        pixel_vectors(panel, *spaced_pixels(panel, spacing))[0].reshape(3, -1)
        for panel in detector
    ]
    x, y, z = frame @ np.concatenate(positions, axis=1)
    step = min(min(panel.get_pixel_size()) for panel in detector) / max(z.max(), 1e-3)
    forward = z * MAX_TAN > np.hypot(x, y)
    u, v = (np.full(len(z), np.nan) for _ in range(2))
    u[forward] = x[forward] / z[forward] / step
    v[forward] = y[forward] / z[forward] / step
    rings = Rings(u, v, np.zeros(len(z), dtype=np.int32), 1, step)
    # two, so that stretched pixels of a tilted detector leave no holes
    return DetectorView(rings, beam, 2 * spacing)


def plot_corrections(
    experiments: Sequence[Experiment], settings: ExtractionSettings
) -> Figure:
    """The factors of a detector, one picture each.

    Args:
        experiments: Those of the detector; the beam is that of the first.
        settings: The settings of extraction.
    """
    detector, beam = experiments[0].detector, experiments[0].beam
    spacing = pixel_spacing(detector)
    values = pixel_values(detector, beam, settings.corrections, spacing)
    names = list(values)[:-1]
    factors = [*(FACTORS[name] for name in names), product_of(names)]
    n_plots = len(factors) + settings.corrections.exposure
    view = detector_view(detector, beam, spacing)
    cells = view.cells()
    figure, axes = _axes_of(n_plots, pictures.aspect(cells[2]))
    for ax, factor, flat in zip(axes, factors, values.values()):
        _plot_factor(ax, factor, flat, view, cells)
    if settings.corrections.exposure:
        _plot_exposure(axes[len(factors)], experiments)
    panels = "1 panel" if len(detector) == 1 else f"{len(detector)} panels"
    figure.suptitle(
        f"Corrections of a detector of {panels}, {beam.get_wavelength():.4f} Å\n"
        "pixels from the beam, along +x (right) and +y (up) of the laboratory",
        fontsize="medium",
    )
    return figure


def _axes_of(n_plots: int, aspect: float) -> tuple[Figure, list[Axes]]:
    """A figure with places for some pictures, their colour bars and titles.

    Placed by hand: an automatic layout takes longer than all that is drawn.
    """
    n_columns = min(3, n_plots)
    n_rows = -(-n_plots // n_columns)
    height = EDGE * aspect
    wide = LEFT + n_columns * (EDGE + BESIDE)
    high = BELOW + n_rows * (height + ABOVE) + TITLE
    figure = Figure(figsize=(wide, high))
    axes = []
    for number in range(n_plots):
        row, column = divmod(number, n_columns)
        x = LEFT + column * (EDGE + BESIDE)
        y = BELOW + (n_rows - 1 - row) * (height + ABOVE)
        place = (x / wide, y / high, EDGE / wide, height / high)
        axes.append(figure.add_axes(place))
    return figure, axes


def _plot_factor(
    ax: Axes,
    factor: Factor,
    values: np.ndarray,
    view: DetectorView,
    cells: tuple[np.ndarray, np.ndarray, tuple[int, int]],
) -> None:
    """A picture of the values of all pixels, with a colour bar."""
    row, column, shape = cells
    extent = pictures.picture_extent(view, shape, view.size)
    picture = pictures.to_picture(values * factor.scale, row, column, shape)
    image = ax.imshow(
        np.ma.masked_invalid(picture),
        cmap="YlOrRd",
        extent=extent,
        interpolation="nearest",
    )
    pictures.draw_rings(ax, view, extent)
    ax.plot(0, 0, "+", color="#1f77b4", ms=12, mew=1.5)
    ax.set_xlim(extent[:2])
    ax.set_ylim(extent[2:])
    ax.set_title(factor.name)
    unit = f" ({factor.unit})" if factor.unit else ""
    bar = ax.inset_axes((1.03, 0, 0.04, 1))
    ax.figure.colorbar(image, cax=bar, label=factor.symbol + unit)


def _plot_exposure(ax: Axes, experiments: Sequence[Experiment]) -> None:
    """Exposure time of the images, in their order."""
    times = np.concatenate([exposure_times(experiment) for experiment in experiments])
    few = len(times) < 100
    number = np.arange(1, len(times) + 1)
    ax.plot(number, times, ".-" if few else "-", drawstyle="steps-mid", color="#1f77b4")
    ax.set_ylim(0, 1.15 * times.max())
    ax.set_xlabel("image")
    ax.set_ylabel("t (s)")
    ax.set_title("exposure")


def draw_corrections(
    path: str | os.PathLike, experiments: ExperimentList, settings: ExtractionSettings
) -> list[Path]:
    """Write the factors as PNG files, one for each distinct detector.

    Args:
        path: Name of the first; those of further detectors, ``MOST_PICTURES`` in all,
            get a number, ``a_2.png``.
        experiments: The experiments.
        settings: The settings of extraction.

    Returns:
        The files.

    Raises:
        ValueError: A file cannot be written.
    """
    path = Path(path)
    groups = detector_groups(experiments)
    written = []
    for number, members in enumerate(groups[:MOST_PICTURES], 1):
        name = path if number == 1 else path.with_name(f"{path.stem}_{number}.png")
        figure = plot_corrections([experiments[i] for i in members], settings)
        with atomic_path(name) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        written.append(name)
    if len(groups) > len(written):
        logger.info(
            "Pictures of the corrections of the first %d of %d detectors only",
            len(written),
            len(groups),
        )
    return written
