"""The plots of the report of ``dials.diffuse_scale``, for plotly, and its page.

Everything is drawn from the record that is written as JSON too.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np

from dials_diffuse.report.extraction_record import finite
from dials_diffuse.report.plotly_page import (
    BLUE,
    GREEN,
    GREY,
    RED,
    Plot,
    layout_of,
    level_at,
    log_axis,
    on_resolution,
    render_plots,
    trace_of,
)
from dials_diffuse.scaling.model import DIVERGING

STATES = {
    "before": ("Before", GREY),
    "after": ("After", BLUE),
    "error_model": ("After, over the error model", GREEN),
}
CHI_SQUARE = "χ² per degree of freedom"
COUNTS = "Expected counts of an observation (photons)"
FEW = 20  # observations; their χ² and share of outliers say nothing and are not drawn
WORST = 20  # experiments in the table


def make_plots(record: Mapping[str, Any]) -> dict[str, Plot]:
    """All plots that a record gives, by name, in the order of the page."""
    if record["refined_against"] is None:
        return {}
    images, resolution = record["images"], record["resolution"]
    detector, intensity = record["detector"], record["intensity"]
    plots: dict[str, Plot | None] = {
        "scale": plot_course(record, "scale", "Scale b", "Scale", 1.0),
        "relative_b": plot_course(
            record, "relative_b", "Relative B", "Relative B (Å²)", 0.0
        ),
        "cc": plot_agreement(images, "cc", "Correlation with the rest", "CC"),
        "delta_cc": plot_agreement(
            images, "delta_cc", "Gain of the mean CC without it", "ΔCC"
        ),
        "offset": plot_offset(record["offset"], resolution),
        "chi_square_images": plot_chi_square(
            images["x"], images, images["label"], "χ² along the images", "markers"
        ),
        "chi_square_resolution": on_resolution(
            plot_chi_square(resolution["s"], resolution, "", "χ² against resolution")
        ),
        "chi_square_intensity": plot_intensity(intensity),
        "chi_square_before": plot_chi_square_map(
            detector, "chi_square_before", "χ² on the detector, before"
        ),
        "chi_square_after": plot_chi_square_map(
            detector, "chi_square_after", "χ² on the detector, after"
        ),
    }
    total = record["refined_against"]
    if total["n_too_high"] + total["n_too_low"]:
        plots.update(plot_outliers(record))
    plots["normal_probability"] = plot_normal_probability(record["error_model"])
    for i, surface in enumerate(record["surfaces"]):
        plots[f"surface_{i}_{surface['term']}"] = surface["plot"]
    return {name: plot for name, plot in plots.items() if plot is not None}


def plot_course(
    record: Mapping[str, Any], name: str, title: str, label: str, neutral: float
) -> Plot | None:
    """A term along the images: a line for each sweep, a point for each still.

    Those of different sweeps are not joined.
    """
    images = record["images"]
    if name not in images:
        return None
    x, y, number = images["x"], images[name], images["experiment"]
    is_still = record["experiments"]["is_still"]
    stills = [i for i, k in enumerate(number) if is_still[k]]
    data = []
    if stills:
        own = [x[i] for i in stills], [y[i] for i in stills]
        data.append(trace_of(*own, "Stills", BLUE, "markers"))
    for k in dict.fromkeys(k for k in number if not is_still[k]):
        mine = [i for i, own in enumerate(number) if own == k]
        line = [x[i] for i in mine], [y[i] for i in mine]
        data.append(trace_of(*line, f"Sweep {k}", BLUE, "lines"))
    layout = layout_of(title, images["label"], label, showlegend=False)
    layout["shapes"] = [level_at(neutral)]
    return {"data": data, "layout": layout}


def plot_agreement(
    images: Mapping[str, Any], name: str, title: str, label: str
) -> Plot | None:
    """A correlation for each range of images."""
    if all(value is None for value in images[name]):
        return None
    data = [trace_of(images["x"], images[name], label, BLUE, "markers")]
    layout = layout_of(title, images["label"], label, showlegend=False)
    return {"data": data, "layout": layout}


def plot_chi_square(
    x: Sequence[float],
    found: Mapping[str, Any],
    label: str,
    title: str,
    mode: str = "lines+markers",
) -> Plot:
    """χ² in the three states."""
    data = [
        trace_of(x, of_many(found, f"chi_square_{state}"), name, colour, mode)
        for state, (name, colour) in STATES.items()
    ]
    layout = layout_of(title, label, CHI_SQUARE)
    layout["yaxis"]["rangemode"] = "tozero"
    values = [v for trace in data for v in trace["y"] if v is not None and v > 0]
    if values and max(values) > 10 * min(values):
        layout["yaxis"] = log_axis(CHI_SQUARE, values)
    layout["shapes"] = [level_at(1.0)]
    return {"data": data, "layout": layout}


def plot_intensity(intensity: Mapping[str, Any]) -> Plot | None:
    """χ² in bins of the expected counts."""
    if not intensity["limits"]:
        return None
    title = "χ² against intensity"
    plot = plot_chi_square(intensity["expected"], intensity, "", title)
    plot["layout"]["xaxis"] = log_axis(COUNTS, intensity["expected"])
    return plot


def plot_offset(
    offset: Mapping[str, Any] | None, resolution: Mapping[str, Any]
) -> Plot | None:
    """Offsets of stills against the resolution, with the mean intensity."""
    if offset is None:
        return None
    s, data = offset["s"], []
    if offset["profiles"]:
        for profile in offset["profiles"]:
            data.append(trace_of(s, profile, "Offset of a still", BLUE, "lines"))
        for trace in data[1:]:
            trace["showlegend"] = False
    else:
        n, parts = offset["n"], offset["percentiles"]
        for low, high, alpha in (("5", "95", 0.15), ("25", "75", 0.3)):
            edge = trace_of(s, parts[low], "", BLUE, "lines")
            edge.update(showlegend=False, line={"width": 0})
            band = trace_of(s, parts[high], f"{low} to {high} %", BLUE, "lines")
            band.update(
                fill="tonexty", fillcolor=f"rgba(31,78,121,{alpha})", line={"width": 0}
            )
            data += [edge, band]
        data.append(
            trace_of(s, parts["50"], f"Median offset of {n} stills", BLUE, "lines")
        )
    mean = trace_of(
        resolution["s"], resolution["intensity"], "Mean intensity", RED, "lines"
    )
    mean["line"]["dash"] = "dash"
    layout = layout_of("Offset c", "", "Photons s⁻¹ sr⁻¹")
    return on_resolution({"data": [*data, mean], "layout": layout})


def plot_chi_square_map(detector: Mapping[str, Any], name: str, title: str) -> Plot:
    """χ² over the detector: blue below 1 and red above, on a logarithmic scale."""
    values = np.array(of_many(detector, name), dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log10(values)
    known = np.abs(z[np.isfinite(z)])
    width = max(float(np.percentile(known, 99)) if len(known) else 0.0, 0.1)
    factors = (1, 1.2, 1.5, 2, 3, 5, 7) if width < 0.5 else (1, 2, 5)
    if width > 1.2:
        factors = (1,) if width > 3 else (1, 3)
    ticks = [m * 10.0**n for n in range(-9, 10) for m in factors]
    ticks = [value for value in ticks if abs(np.log10(value)) <= width]
    bar = {"tickvals": np.log10(ticks).tolist(), "ticktext": [f"{v:g}" for v in ticks]}
    colours = {"colorscale": DIVERGING, "zmin": -width, "zmax": width, "colorbar": bar}
    plot = _map(detector, z, title, colours)
    plot["data"][0]["text"] = finite(np.round(values, 3))
    plot["data"][0]["hovertemplate"] = "%{x:.0f}, %{y:.0f}: χ² = %{text}<extra></extra>"
    return plot


def plot_share_map(detector: Mapping[str, Any], name: str, title: str) -> Plot:
    """The share of a kind of outliers over the detector, per cent."""
    z = np.array(per_cent(detector, name), dtype=float)
    known = z[np.isfinite(z)]
    high = float(np.percentile(known, 99.5)) if len(known) else 0.0
    bar = {"title": {"text": "%"}}
    limits = {"zmin": 0, "zmax": high or float(known.max(initial=0)) or 1.0}
    return _map(
        detector, z, title, {"colorscale": "Viridis", "colorbar": bar, **limits}
    )


def _map(detector: Mapping[str, Any], z: np.ndarray, title: str, colours: Plot) -> Plot:
    """An image of the detector as seen along the beam."""
    colours["colorbar"]["thickness"] = 14
    horizontal, vertical = detector["labels"]
    layout = layout_of(title, horizontal, vertical)
    layout["xaxis"].update(constrain="domain", showgrid=False)
    layout["yaxis"].update(
        autorange="reversed", scaleanchor="x", constrain="domain", showgrid=False
    )
    image = {"x": detector["x"], "y": detector["y"], "z": finite(np.round(z, 4))}
    return {"data": [{**image, **colours, "type": "heatmap"}], "layout": layout}


def of_many(found: Mapping[str, Any], name: str) -> list:
    """Values, None where they are of few observations only."""
    n = np.array(found["n_observations"])
    return finite(np.where(n < FEW, np.nan, np.array(found[name], dtype=float)))


def per_cent(found: Mapping[str, Any], name: str) -> list:
    """Outliers of a kind, per cent of the observations of each cell; None of few."""
    n = np.array(found["n_observations"], dtype=float)
    return finite(100 * np.array(found[name]) / np.where(n < FEW, np.nan, n))


def plot_outliers(record: Mapping[str, Any]) -> dict[str, Plot]:
    """Share of outliers on the detector, along the images, against the resolution."""
    images, resolution = record["images"], record["resolution"]
    intensity, detector = record["intensity"], record["detector"]
    plots: dict[str, Plot] = {"outliers_images": {}}  # in the order of the page
    kinds = {"n_too_high": ("Too high", RED), "n_too_low": ("Too low", BLUE)}
    for name, (title, _) in kinds.items():
        title = f"Outliers: {title.lower()}"
        plots[f"outliers_{name[2:]}"] = plot_share_map(detector, name, title)
    label = "Outliers (% of the observations)"
    cases = {
        "images": (images, images["x"], "Outliers along the images", "markers"),
        "resolution": (
            resolution,
            resolution["s"],
            "Outliers against resolution",
            "lines+markers",
        ),
    }
    if intensity["limits"]:
        cases["intensity"] = (
            intensity,
            intensity["expected"],
            "Outliers against intensity",
            "lines+markers",
        )
    for name, (found, x, title, mode) in cases.items():
        data = [
            trace_of(x, per_cent(found, kind), text, colour, mode)
            for kind, (text, colour) in kinds.items()
        ]
        layout = layout_of(title, images["label"], label, yaxis={"rangemode": "tozero"})
        plots[f"outliers_{name}"] = {"data": data, "layout": layout}
    on_resolution(plots["outliers_resolution"])
    if "outliers_intensity" in plots:
        layout = plots["outliers_intensity"]["layout"]
        layout["xaxis"] = log_axis(COUNTS, intensity["expected"])
    return plots


def plot_normal_probability(model: Mapping[str, Any]) -> Plot | None:
    """Quantiles of the normalised deviations against those expected."""
    points = model["normal_probability"]
    x, y = points["expected"], points["observed"]
    if not x:
        return None
    ends = [min(x), max(x)]
    data = [
        trace_of(x, y, "Deviations", BLUE, "markers"),
        trace_of(ends, ends, "Normal distribution", GREY, "lines"),
    ]
    title = "Normal probability of the deviations"
    layout = layout_of(title, "Expected (σ)", "Observed (σ of the error model)")
    return {"data": data, "layout": layout}


def worst_experiments(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table: the experiments with the lowest correlation."""
    found = record["experiments"]
    rows = [
        {"number": i, **{name: column[i] for name, column in found.items()}}
        for i in range(len(found["scale"]))
    ]
    rows.sort(key=lambda row: 2.0 if row["cc"] is None else row["cc"])
    return rows[:WORST]


# Headings of the page, and how the names of the plots below them begin.
SECTIONS = (
    ("Scales", ("scale", "relative_b")),
    ("Agreement of the images", ("cc", "delta_cc")),
    ("Other terms", ("offset", "surface_")),
    ("χ² before and after", ("chi_square_",)),
    ("Outliers", ("outliers_",)),
    ("Error model", ("normal_probability",)),
)


def sections(plots: Mapping[str, Plot]) -> list[tuple[str, list[str]]]:
    """The names of the plots below each heading."""
    result = []
    for title, starts in SECTIONS:
        names = [name for name in plots if name.startswith(starts)]
        if names:
            result.append((title, names))
    return result


def render_page(record: Mapping[str, Any]) -> str:
    """The page as HTML; the script of plotly is in it if plotly is installed.

    Args:
        record: What is written as JSON too, of ``scaling_record``.
    """
    plots = make_plots(record)
    known = record["refined_against"] is not None
    return render_plots(
        "scaling.html",
        plots,
        **record,
        sections=sections(plots),
        worst=worst_experiments(record) if known else [],
    )
