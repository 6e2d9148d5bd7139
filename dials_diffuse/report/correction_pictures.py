"""Pictures of the corrections as PNG: each factor where pixels are seen along the beam."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.report.correction_view import CorrectionView, view_corrections
from dials_diffuse.report.corrections import Factor, detector_groups
from dials_diffuse.report.masks import aspect, draw_rings
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.extract")

PICTURE_PIXELS = 120_000  # of a detector that are looked at
MOST_PICTURES = 10

# Inches
EDGE = 3.8  # of a picture
BESIDE = 1.6  # it, for its colour bar and the numbers of the next picture
ABOVE = 0.8  # it, for its title and the numbers below the next picture
LEFT, BELOW, TITLE = 0.65, 0.5, 0.45  # of the figure


def plot_corrections(
    experiments: Sequence[Experiment], settings: ExtractionSettings
) -> Figure:
    """The factors of a detector, one picture each.

    Args:
        experiments: Those of the detector; the beam is that of the first.
        settings: The settings of extraction.

    Raises:
        ValueError: No pixel is in the forward direction.
    """
    view = view_corrections(experiments, settings, PICTURE_PIXELS)
    if not view.pictures:
        raise ValueError(
            "There is nothing to draw of a detector at scattering angles near 90 degrees "
            "and above: leave out output.corrections"
        )
    n_plots = len(view.factors) + (view.times is not None)
    figure, axes = _axes_of(n_plots, aspect(view.pictures[0].shape))
    for ax, factor, picture in zip(axes, view.factors, view.pictures):
        _plot_factor(ax, factor, picture, view)
    if view.times is not None:
        _plot_exposure(axes[len(view.factors)], view.times)
    figure.suptitle(
        f"Corrections of a {view.title}\n"
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
    ax: Axes, factor: Factor, picture: np.ndarray, view: CorrectionView
) -> None:
    """A picture of a factor, with a colour bar."""
    image = ax.imshow(
        np.ma.masked_invalid(picture),
        cmap="YlOrRd",
        extent=view.extent,
        interpolation="nearest",
    )
    draw_rings(ax, view.beam_view, view.extent)
    ax.plot(0, 0, "+", color="#1f77b4", ms=12, mew=1.5)
    ax.set_xlim(view.extent[:2])
    ax.set_ylim(view.extent[2:])
    ax.set_title(factor.name)
    bar = ax.inset_axes((1.03, 0, 0.04, 1))
    ax.figure.colorbar(image, cax=bar, label=factor.symbol_and_unit)


def _plot_exposure(ax: Axes, times: np.ndarray) -> None:
    """Exposure time of the images, in their order."""
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
