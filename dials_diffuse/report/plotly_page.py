"""HTML pages whose plots plotly draws when the page is opened.

A page has the data of its plots as JSON and the script of plotly, and needs no other file.
That costs a command next to nothing: neither matplotlib nor the package plotly is
imported, only its script is read. Where plotly is not installed, the page loads the
script from the network.
"""

from __future__ import annotations

import base64
import importlib.util
import zlib
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from dials_diffuse.report.embedding import page_environment

PLOTLY_URL = "https://cdn.plot.ly/plotly-2.35.2.min.js"
IN_PACKAGE = "package_data/plotly.min.js"
OF_DEBIAN = "/usr/share/python3-plotly/plotly.js"  # which has no minified one
COMPRESSION = 1  # level of zlib: higher ones take longer than all plots

BLUE, RED, GREY, GREEN = "#1f4e79", "#c0392b", "#9aa5b1", "#2a8a57"
D_TICKS = (20, 10, 6, 4, 3, 2.5, 2, 1.8, 1.6, 1.4, 1.2, 1.1, 1, 0.9, 0.8, 0.7, 0.6)
MANY_POINTS = 3000  # from which on points are drawn by WebGL

Plot = dict[str, Any]


def plotly_file() -> Path | None:
    """The script of plotly, None if it is not installed."""
    spec = importlib.util.find_spec("plotly")
    folders = (spec and spec.submodule_search_locations) or []
    candidates = [*(Path(folder) / IN_PACKAGE for folder in folders), Path(OF_DEBIAN)]
    return next((path for path in candidates if path.is_file()), None)


def packed_plotly() -> str | None:
    """The script of plotly for a page, None if it is not installed.

    Compressed (zlib) and in base64: a third of the size, which browsers unpack.
    """
    path = plotly_file()
    if path is None:
        return None
    try:
        script = path.read_bytes()
    except OSError:
        return None
    return base64.b64encode(zlib.compress(script, COMPRESSION)).decode("ascii")


def render_plots(
    template: str,
    plots: Mapping[str, Plot],
    filters: Mapping[str, Callable[..., str]] | None = None,
    **facts: Any,
) -> str:
    """A page as HTML, from a template that extends ``plots.html``.

    Args:
        template: Name of the template.
        plots: The plots by the names of their places, for plotly. Numbers are finite,
            or None.
        filters: Of the template, besides those of ``page_environment``.
        facts: What else the template needs.
    """
    environment = page_environment()
    environment.filters.update(filters or {})
    return environment.get_template(template).render(
        **facts,
        plots=plots,
        plotly=packed_plotly() if plots else None,
        plotly_url=PLOTLY_URL,
    )


def significant(values: Any, digits: int = 4) -> list:
    """Numbers rounded to some significant digits, None for those that are not finite."""
    x = np.asarray(values, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.floor(np.log10(np.abs(x)))
    exponent = np.where(np.isfinite(exponent), exponent, 0)
    return _listed(_rounded(x, digits - 1 - exponent))


def resolved(values: Any, digits: int = 4) -> list:
    """Numbers rounded to some digits of their range, None for those not finite.

    A range of less than a millionth of the values is taken as noise.
    """
    x = np.asarray(values, dtype=float)
    known = x[np.isfinite(x)]
    width = float(np.ptp(known)) if len(known) else 0.0
    width = max(width, 1e-6 * float(np.abs(known).max(initial=0))) or 1.0
    return _listed(_rounded(x, digits - 1 - np.floor(np.log10(width))))


def _rounded(x: np.ndarray, decimals: np.ndarray) -> np.ndarray:
    # both powers are whole numbers: the nearest double to few digits is written by few
    up, down = 10.0 ** np.maximum(decimals, 0), 10.0 ** np.maximum(-decimals, 0)
    return np.rint(x * up / down) / up * down


def _listed(x: np.ndarray) -> list:
    finite = np.isfinite(x)
    return (x if finite.all() else np.where(finite, x, None)).tolist()


def layout_of(title: str, x: str, y: str, **more: Any) -> Plot:
    """A layout with a title and labels of the axes."""
    return {
        "title": {"text": title},
        "xaxis": {"title": {"text": x}, **more.pop("xaxis", {})},
        "yaxis": {"title": {"text": y}, **more.pop("yaxis", {})},
        **more,
    }


def trace_of(
    x: Sequence[Any], y: Sequence[Any], name: str, colour: str, mode: str
) -> Plot:
    """A line or points."""
    return {
        "x": list(x),
        "y": list(y),
        "name": name,
        "mode": mode,
        "type": "scattergl" if len(x) > MANY_POINTS else "scatter",
        "line": {"color": colour, "width": 1.5},
        "marker": {"color": colour, "size": 5 if len(x) <= 300 else 3},
    }


def with_steps(trace: Plot) -> Plot:
    """The same trace; an x of equal steps is given by its first value and the step."""
    x = np.asarray(trace["x"], dtype=float)
    if len(x) < 2 or not np.all(np.diff(x) == x[1] - x[0]):
        return trace
    rest = {key: value for key, value in trace.items() if key != "x"}
    return {**rest, "x0": float(x[0]), "dx": float(x[1] - x[0])}


def level_at(y: float, colour: str = GREY) -> Plot:
    """A dashed line across a plot."""
    line = {"color": colour, "width": 1, "dash": "dash"}
    ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    return {"type": "line", "line": line, **ends}


def log_axis(title: str, values: Sequence[float | None]) -> Plot:
    """A logarithmic axis with ticks at 1, 2 and 5, or powers of ten."""
    positive = [value for value in values if value is not None and value > 0]
    ticks = _log_ticks(min(positive, default=1.0), max(positive, default=1.0))
    text = [f"{value:,.10g}".replace(",", " ") for value in ticks]
    axis = {"title": {"text": title}, "type": "log"}
    return {**axis, "tickvals": ticks, "ticktext": text}


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover a range, about ten at the most."""
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) < 5 else (1,)
    return [float(f"{m}e{n:.0f}") for n in decades for m in factors]


def whole_numbers(x: Sequence[float]) -> Plot:
    """What an axis of few whole numbers needs to have no ticks between them."""
    return {"dtick": 1} if len(x) and np.ptp(x) < 10 else {}


def resolution_axis(low: float, high: float) -> Plot:
    """An axis of s = 1/d (Å⁻¹) between two values, labelled by d."""
    ticks: list[float] = []
    for d in D_TICKS:
        apart = not ticks or 1 / d - 1 / ticks[-1] > 0.07 * (high - low)
        if low <= 1 / d <= high and apart:
            ticks.append(d)
    return {
        "title": {"text": "d (Å), linear in 1/d"},
        "tickvals": [1 / d for d in ticks],
        "ticktext": [f"{d:g}" for d in ticks],
    }


def on_resolution(plot: Plot) -> Plot:
    """The same plot with an axis of s that is labelled by d."""
    x = [value for trace in plot["data"] for value in trace["x"]]
    plot["layout"]["xaxis"] = resolution_axis(min(x), max(x))
    return plot
