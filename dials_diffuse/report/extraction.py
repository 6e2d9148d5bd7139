"""The page of ``dials.diffuse_extract``: its figures, and plots of all images.

Plots are drawn by plotly when the page is opened. Of tables with a row for each image the
page has the worst, and the JSON file all.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np

from dials_diffuse.extraction.geometry_report import worst_images
from dials_diffuse.extraction.indexing_report import least_sure
from dials_diffuse.extraction.prepare import Prepared
from dials_diffuse.extraction.report import format_cell
from dials_diffuse.report.correction_plots import correction_plots
from dials_diffuse.report.corrections import FACTORS
from dials_diffuse.report.embedding import format_figure
from dials_diffuse.report.image_axis import ImageAxis
from dials_diffuse.report.plotly_page import (
    BLUE,
    GREEN,
    GREY,
    RED,
    Plot,
    layout_of,
    log_axis,
    render_plots,
    resolution_axis,
    significant,
    trace_of,
    whole_numbers,
    with_steps,
)

SETTING_COLOURS = (BLUE, "#d9822b", GREEN, "#8e44ad", "#7f5539", "#17a2b8")
WIDE_RANGE = 8.0  # of distances over the tolerance, from which the axis is logarithmic
MANY_BARS = 500  # of errors, which would make a black surface


def plot_geometry(
    geometry: Mapping[str, Any], experiments: Mapping[str, Sequence[Any]]
) -> Plot:
    """Distance of the spots of each image from their Bragg positions.

    Args:
        geometry: As of ``geometry_record``.
        experiments: See ``ImageAxis``.
    """
    images = {name: np.array(column) for name, column in geometry["images"].items()}
    axis = ImageAxis(experiments)
    x = axis.place(images["experiment"], images["array_index"] + 1)
    beyond, tolerance = images["is_beyond"].astype(bool), geometry["tolerance"]
    few = len(x) <= MANY_BARS
    kinds = [
        ("largest", np.ones(len(x), dtype=bool), "largest of an image", GREY),
        ("mean", ~beyond, "mean, with its standard error" if few else "mean", BLUE),
    ]
    if beyond.any():
        kinds.append(("mean", beyond, "mean beyond the tolerance", RED))
    data = []
    for name, chosen, label, colour in kinds:
        y = significant(images[name][chosen])
        data.append(trace_of(x[chosen].tolist(), y, label, colour, "markers"))
    if few:
        bars = significant(images["mean_error"][~beyond])
        data[1]["error_y"] = {"array": bars, "width": 0, "thickness": 0.7}
    if beyond.any():
        data[2]["marker"].update(symbol="square", size=6)
    data.append(_limit(x, tolerance, "tolerance of the mean"))
    label = "|q<sub>obs</sub> − q<sub>model</sub>| (Å<sup>-1</sup>)"
    layout = layout_of("Spots against Bragg positions", axis.label, label)
    layout["yaxis"]["rangemode"] = "tozero"
    if images["largest"].max() > WIDE_RANGE * tolerance:
        values = [*images["mean"].tolist(), *images["largest"].tolist(), tolerance]
        layout["yaxis"] = log_axis(label, values)
    _complete(layout, axis, x)
    return {"data": [with_steps(trace) for trace in data], "layout": layout}


def _limit(x: np.ndarray, level: float, label: str) -> Plot:
    """A dashed line through all points."""
    ends = [float(x.min()) - 0.5, float(x.max()) + 0.5]
    line = trace_of(ends, [level] * 2, label, RED, "lines")
    line["line"]["dash"] = "dash"
    return line


def _complete(layout: Plot, axis: ImageAxis, x: Sequence[float]) -> None:
    """Add the beginnings of sweeps to a layout, and ticks at images."""
    layout["xaxis"].update(whole_numbers(x))
    for name, marks in axis.marks().items():
        layout.setdefault(name, []).extend(marks)


def intensity_unit(switched_off: Sequence[str]) -> str:
    """What intensities are in, without the factors that were not taken in."""
    unit = "photons"
    if FACTORS["exposure"].name not in switched_off:
        unit += " s⁻¹"
    solid_angle = FACTORS["solid_angle"].name not in switched_off
    return unit + (" sr⁻¹" if solid_angle else " per pixel")


def plot_blocks(
    blocks: Mapping[str, Sequence[Any]],
    experiments: Mapping[str, Sequence[Any]],
    unit: str = intensity_unit(()),
) -> Plot:
    """Counts, background, mean intensity and pixels of each block of images.

    Args:
        blocks: As of ``blocks_record``.
        experiments: See ``ImageAxis``.
        unit: Of intensities.
    """
    axis = ImageAxis(experiments)
    middle = np.array(blocks["first_image"]) + (np.array(blocks["n_images"]) - 1) / 2
    x = axis.place(blocks["experiment"], middle).tolist()
    background = _floats(blocks["background_per_pixel"])
    pixels = np.array(blocks["n_pixels"]) / np.array(blocks["n_images"]) / 1000
    rows = [
        ("y", blocks["photons_per_pixel"], "all photons", BLUE),
        ("y2", blocks["intensity"], "mean intensity", RED),
        ("y3", pixels, "pixels", GREEN),
    ]
    if np.any(background != 0):
        rows.insert(1, ("y", background, "background", GREY))
    data = []
    for name, values, label, colour in rows:
        trace = trace_of(x, significant(_floats(values)), label, colour, "markers")
        data.append(with_steps({**trace, "yaxis": name}))
    layout = layout_of("Counts, mean intensity and pixels", axis.label, "")
    layout["xaxis"]["anchor"] = "y3"
    labels = ("10³ pixels per image", f"⟨I⟩ ({unit})", "Photons per pixel")
    for i, (name, label) in enumerate(zip(("yaxis3", "yaxis2", "yaxis"), labels)):
        layout[name] = {
            "title": {"text": label},
            "domain": [round(0.345 * i, 3), round(0.345 * i + 0.31, 3)],
            "rangemode": "tozero",
        }
    _complete(layout, axis, x)
    return {"data": data, "layout": layout}


def plot_shells(
    shells: Sequence[Mapping[str, Any]], unit: str = intensity_unit(())
) -> dict[str, Plot]:
    """Mean intensity, and counts and background, against resolution: two plots."""
    limits = [(1 / x["d_max"] if x["d_max"] else 0.0, 1 / x["d_min"]) for x in shells]
    s = np.mean(limits, axis=1).round(5).tolist()

    def trace(name: str, label: str, colour: str) -> Plot:
        y = significant(_column(shells, name))
        return trace_of(s, y, label, colour, "lines+markers")

    counts = [trace("photons_per_pixel", "all photons", BLUE)]
    background = _column(shells, "background_per_pixel")
    if np.nanmax(np.abs(background), initial=0) > 0:
        counts.append(trace("background_per_pixel", "background", GREY))
    intensity = [trace("intensity", "mean intensity", BLUE)]
    plots = {}
    for name, title, label, data in (
        ("shells_intensity", "Mean intensity", f"⟨I⟩ ({unit})", intensity),
        ("shells_counts", "Counts", "Photons per pixel", counts),
    ):
        title = f"{title} against resolution"
        layout = layout_of(title, "", label, showlegend=len(data) > 1)
        layout["xaxis"] = resolution_axis(limits[0][0], limits[-1][1])
        layout["xaxis"]["range"] = [limits[0][0], limits[-1][1]]
        layout["yaxis"]["rangemode"] = "tozero"
        plots[name] = {"data": data, "layout": layout}
    return plots


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in values], dtype=float)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return _floats([row[name] for row in rows])


def plot_indexing(indexing: Mapping[str, Any]) -> Plot:
    """How surely each crystal has the setting that was found, coloured by the setting.

    Args:
        indexing: As of ``indexing_record``.
    """
    crystals = indexing["crystals"]
    number = np.array([crystal["experiments"][0] for crystal in crystals])
    evidence = _column(crystals, "evidence")
    best = np.array([crystal["best_operator"] for crystal in crystals])
    data = []
    for i, operator in enumerate(indexing["operators"]):
        of_it = best == operator
        if not of_it.any():
            continue
        data.append(
            trace_of(
                number[of_it].tolist(),
                significant(evidence[of_it]),
                f"{operator}: {int(of_it.sum())}",
                SETTING_COLOURS[i % len(SETTING_COLOURS)],
                "markers",
            )
        )
    label = "Evidence (standard deviations)"
    layout = layout_of("Evidence for the setting", "Experiment", label, showlegend=True)
    layout["yaxis"]["rangemode"] = "tozero"
    data.append(_limit(number, indexing["sure_from"], "sure above"))
    return {"data": [with_steps(trace) for trace in data], "layout": layout}


def make_plots(record: Mapping[str, Any]) -> dict[str, Plot]:
    """The plots that a record gives, by name."""
    experiments = record["experiments"]
    unit = intensity_unit(record["corrections"]["switched_off"])
    plots = {
        "blocks": plot_blocks(record["blocks"], experiments, unit),
        **plot_shells(record["shells"], unit),
    }
    if record["geometry"]:
        plots["geometry"] = plot_geometry(record["geometry"], experiments)
    if record["indexing"] and record["indexing"]["is_telling"]:
        plots["indexing"] = plot_indexing(record["indexing"])
    return plots


def render_page(record: Mapping[str, Any], prepared: Prepared) -> str:
    """The page as HTML, with all that it needs.

    Args:
        record: What is written as JSON too; see ``dials.diffuse_extract``.
        prepared: What was extracted, for pictures of the corrections.
    """
    plots, detectors, n_detectors = correction_plots(
        prepared.experiments, prepared.settings
    )
    geometry, indexing = record["geometry"], record["indexing"]
    return render_plots(
        "extraction.html",
        {**make_plots(record), **plots},
        {"cell": format_cell, "significant": lambda x: format_figure(x, ".5g")},
        **record,
        unit=intensity_unit(record["corrections"]["switched_off"]),
        detectors=detectors,
        n_detectors=n_detectors,
        worst=worst_images(geometry) if geometry else [],
        unsure=least_sure(indexing) if indexing else [],
    )
