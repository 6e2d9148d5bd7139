"""The page of ``dials.diffuse_extract``: its figures, and plots of all images.

All plots are pictures, so that the page stays small for any number of images; of tables
with a row for each image the page has the worst, and the JSON file all.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dials_diffuse.extraction.geometry_report import worst_images
from dials_diffuse.extraction.indexing_report import least_sure
from dials_diffuse.extraction.prepare import Prepared
from dials_diffuse.extraction.report import format_cell
from dials_diffuse.report.correction_pictures import plot_corrections
from dials_diffuse.report.corrections import detector_groups
from dials_diffuse.report.embedding import (
    draw,
    embed,
    format_figure,
    page_environment,
)

DPI = 110
WIDTH = 10.2  # inches
BLUE, RED, GREY, GREEN = "#1f4e79", "#c0392b", "#9aa5b1", "#2a8a57"
SETTING_COLOURS = (BLUE, "#d9822b", GREEN, "#8e44ad", "#7f5539", "#17a2b8")
D_TICKS = (20, 10, 6, 4, 3, 2.5, 2, 1.8, 1.6, 1.4, 1.2, 1.1, 1, 0.9, 0.8, 0.7, 0.6)
WIDE_RANGE = 8.0  # of distances over the tolerance, from which the axis is logarithmic


class ImageAxis:
    """The images of all experiments in one row, for plots.

    Experiments of one image each have their number as place, the images of a single
    sweep their own; those of several sweeps are counted through.

    Args:
        experiments: Lists ``first_image`` and ``n_images``, an element per experiment.
    """

    def __init__(self, experiments: Mapping[str, Sequence[int]]) -> None:
        self._first = np.array(experiments["first_image"])
        n_images = np.array(experiments["n_images"])
        self._offset = np.cumsum(n_images) - n_images
        self.label = "Image, all sweeps in their order"
        self.sweeps: list[int] = []  # where each sweep begins
        if len(n_images) == 1:
            self._offset = self._first.copy()
            self.label = "Image"
        elif n_images.max() == 1:
            self.label = "Experiment"
        else:
            self.sweeps = self._offset.tolist()
        self.n = int(n_images.sum())

    def place(self, experiment: Sequence[int], image: Sequence[float]) -> np.ndarray:
        """Where images stand.

        Args:
            experiment: Numbers of the experiments.
            image: Numbers of the images, from 1 as in the names of files.
        """
        number = np.asarray(experiment, dtype=int)
        return self._offset[number] + np.asarray(image) - self._first[number]

    def draw(self, ax: Axes) -> None:
        """Label the horizontal axis, and mark where sweeps begin."""
        ax.set_xlabel(self.label)
        ax.grid(alpha=0.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if len(self.sweeps) > 30:
            return  # would cover the data
        for number, start in enumerate(self.sweeps):
            ax.axvline(start - 0.5, color="0.6", lw=0.7)
            ax.annotate(
                f" {number}",
                (start - 0.5, 1),
                xycoords=("data", "axes fraction"),
                va="bottom",
                fontsize="x-small",
                color="0.4",
            )

    @property
    def marker_size(self) -> float:
        """Of a point for each image."""
        return 4.0 if self.n <= 200 else 2.5 if self.n <= 2000 else 1.2


def plot_geometry(
    geometry: Mapping[str, Any], experiments: Mapping[str, Sequence[Any]]
) -> Figure:
    """Distance of the spots of each image from their Bragg positions.

    Args:
        geometry: As of ``geometry_record``.
        experiments: See ``ImageAxis``.
    """
    images = {name: np.array(column) for name, column in geometry["images"].items()}
    axis = ImageAxis(experiments)
    x = axis.place(images["experiment"], images["array_index"] + 1)
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    ax = figure.subplots()
    size, beyond = axis.marker_size, images["is_beyond"].astype(bool)
    ax.plot(x, images["largest"], ".", ms=size, color=GREY, label="largest of an image")
    few = len(x) <= 500  # more bars would make a black surface
    ax.errorbar(
        x[~beyond],
        images["mean"][~beyond],
        images["mean_error"][~beyond] if few else None,
        fmt="o",
        ms=size,
        lw=0.7,
        color=BLUE,
        label="mean, with its standard error" if few else "mean",
    )
    if beyond.any():
        ax.plot(
            x[beyond],
            images["mean"][beyond],
            "s",
            ms=size + 2,
            color=RED,
            label="mean beyond the tolerance",
        )
    tolerance = geometry["tolerance"]
    ax.axhline(tolerance, color=RED, ls="--", lw=1.2, label="tolerance of the mean")
    if images["largest"].max() > WIDE_RANGE * tolerance:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    axis.draw(ax)
    ax.set_ylabel("|q$_{obs}$ − q$_{model}$| (Å$^{-1}$)")
    _legend_above(ax)
    return figure


def _legend_above(ax: Axes) -> None:
    """A legend in one line above the axes, where it covers no point."""
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.03),
        ncols=6,
        fontsize="small",
        frameon=False,
        borderaxespad=0.0,
    )


def plot_blocks(
    blocks: Mapping[str, Sequence[Any]], experiments: Mapping[str, Sequence[Any]]
) -> Figure:
    """Counts, background, mean intensity and pixels of each block of images.

    Args:
        blocks: As of ``blocks_record``.
        experiments: See ``ImageAxis``.
    """
    axis = ImageAxis(experiments)
    middle = np.array(blocks["first_image"]) + (np.array(blocks["n_images"]) - 1) / 2
    x = axis.place(blocks["experiment"], middle)
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    upper, middle, lower = figure.subplots(3, 1, sharex=True)
    style = {"ms": axis.marker_size, "ls": "", "marker": "o"}
    photons = _floats(blocks["photons_per_pixel"])
    background = _floats(blocks["background_per_pixel"])
    upper.plot(x, photons, color=BLUE, label="all", **style)
    if np.any(background != 0):
        upper.plot(x, background, color=GREY, label="background", **style)
        _legend_above(upper)
    upper.set_ylabel("Photons per pixel")
    intensity = _floats(blocks["intensity"])
    middle.plot(x, intensity, color=RED, **style)
    middle.set_ylabel("⟨I⟩ (s⁻¹ sr⁻¹)")
    pixels = np.array(blocks["n_pixels"]) / np.array(blocks["n_images"]) / 1000
    lower.plot(x, pixels, color=GREEN, **style)
    lower.set_ylabel("10³ pixels per image")
    for ax, values in ((upper, photons), (middle, intensity), (lower, pixels)):
        axis.draw(ax)
        if np.nanmin(values, initial=0) >= 0:
            ax.set_ylim(0, 1.15 * np.nanmax(values, initial=0) or 1)
        if ax is not lower:
            ax.set_xlabel("")
    return figure


def plot_shells(shells: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean intensity, counts and background against resolution."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    limits = [(1 / x["d_max"] if x["d_max"] else 0.0, 1 / x["d_min"]) for x in shells]
    s = np.mean(limits, axis=1)
    style = {"marker": "o", "ms": 3.5, "lw": 1.2}
    left.plot(s, _column(shells, "intensity"), color=BLUE, **style)
    left.set_ylabel("Mean intensity (photons s⁻¹ sr⁻¹)")
    photons = _column(shells, "photons_per_pixel")
    right.plot(s, photons, color=BLUE, label="all", **style)
    background = _column(shells, "background_per_pixel")
    if np.nanmax(np.abs(background), initial=0) > 0:
        right.plot(s, background, color=GREY, label="background", **style)
        right.legend(fontsize="small")
    right.set_ylabel("Photons per pixel")
    for ax in (left, right):
        if np.nanmin(_column(shells, "intensity"), initial=0) >= 0:
            ax.set_ylim(bottom=0)
        _resolution_axis(ax, limits[0][0], limits[-1][1])
    return figure


def _resolution_axis(ax: Axes, s_min: float, s_max: float) -> None:
    """An axis of 1/d with ticks at values of d."""
    ax.set_xlim(s_min, s_max)
    ticks: list[float] = []
    for d in D_TICKS:
        apart = not ticks or 1 / d - 1 / ticks[-1] > 0.07 * (s_max - s_min)
        if s_min <= 1 / d <= s_max and apart:
            ticks.append(d)
    ax.set_xticks([1 / d for d in ticks], [f"{d:g}" for d in ticks])
    ax.set_xlabel("d (Å), linear in 1/d")
    ax.grid(alpha=0.3)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in values], dtype=float)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return _floats([row[name] for row in rows])


def plot_indexing(indexing: Mapping[str, Any]) -> Figure:
    """How surely each crystal has the setting that was found, coloured by the setting.

    Args:
        indexing: As of ``indexing_record``.
    """
    crystals = indexing["crystals"]
    number = np.array([crystal["experiments"][0] for crystal in crystals])
    evidence = _column(crystals, "evidence")
    best = np.array([crystal["best_operator"] for crystal in crystals])
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    ax = figure.subplots()
    size = 5.0 if len(crystals) <= 200 else 2.0
    for i, operator in enumerate(indexing["operators"]):
        of_it = best == operator
        if not of_it.any():
            continue
        ax.plot(
            number[of_it],
            evidence[of_it],
            "o",
            ms=size,
            color=SETTING_COLOURS[i % len(SETTING_COLOURS)],
            label=f"{operator}: {int(of_it.sum())}",
        )
    ax.axhline(indexing["sure_from"], color=RED, ls="--", lw=1.2, label="sure above")
    ax.set_ylim(bottom=min(0, np.nanmin(evidence, initial=0)))
    ax.set_xlabel("Experiment")
    ax.set_ylabel("Evidence (standard deviations)")
    ax.grid(alpha=0.3)
    _legend_above(ax)
    return figure


def make_pictures(record: Mapping[str, Any]) -> dict[str, str]:
    """The plots that a record gives, as data of img elements."""
    experiments = record["experiments"]
    figures = {
        "blocks": plot_blocks(record["blocks"], experiments),
        "shells": plot_shells(record["shells"]),
    }
    if record["geometry"]:
        figures["geometry"] = plot_geometry(record["geometry"], experiments)
    if record["indexing"] and record["indexing"]["is_telling"]:
        figures["indexing"] = plot_indexing(record["indexing"])
    return {name: _picture(figure) for name, figure in figures.items()}


def _picture(figure: Figure) -> str:
    return embed(draw(figure, "png", DPI), "png")


def render_page(record: Mapping[str, Any], prepared: Prepared) -> str:
    """The page as HTML, pictures embedded.

    Args:
        record: What is written as JSON too; see ``dials.diffuse_extract``.
        prepared: What was extracted, for a picture of the corrections.
    """
    environment = page_environment()
    environment.filters["cell"] = format_cell
    environment.filters["significant"] = lambda x: format_figure(x, ".5g")
    pictures = make_pictures(record)
    experiments = prepared.experiments
    first = [experiments[i] for i in detector_groups(experiments)[0]]
    pictures["corrections"] = _picture(plot_corrections(first, prepared.settings))
    geometry, indexing = record["geometry"], record["indexing"]
    return environment.get_template("extraction.html").render(
        **record,
        pictures=pictures,
        worst=worst_images(geometry) if geometry else [],
        unsure=least_sure(indexing) if indexing else [],
    )
