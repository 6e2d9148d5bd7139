"""The corrections of each detector as plots of the page of ``dials.diffuse_extract``."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.blocks import images_of
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.report.beam_view import resolution_circles
from dials_diffuse.report.correction_view import CorrectionView, view_corrections
from dials_diffuse.report.corrections import Factor, detector_groups
from dials_diffuse.report.plotly_page import (
    BLUE,
    Plot,
    layout_of,
    resolved,
    significant,
    trace_of,
    whole_numbers,
)

MOST_DETECTORS = 4  # that are shown
PIXELS = 40_000  # of all detectors together that are looked at: a quarter of the cells
# without the dark end of the well-known scale, on which rings would not be seen
COLOURS = [[0, "#ffffcc"], [0.3, "#fed976"], [0.6, "#fd8d3c"], [1, "#e31a1c"]]
RING = "#333"
LABEL_ANGLES = (-0.7, 0.7, 2.4, -2.4, 1.6)  # of the labels of rings, radians from +x

# Pixels of the screen
WIDTH = 220  # of a picture on a page of full width
MARGIN = {"l": 48, "r": 76, "t": 36, "b": 40}


class DetectorPlots(NamedTuple):
    """What a detector is, how many images it has, and the names of its plots."""

    title: str
    n_images: int
    names: list[str]


def correction_plots(
    experiments: ExperimentList, settings: ExtractionSettings
) -> tuple[dict[str, Plot], list[DetectorPlots], int]:
    """The corrections of each distinct detector, in the beam of its first experiment.

    Args:
        experiments: The experiments.
        settings: The settings of extraction.

    Returns:
        The plots by name, those of each detector that is shown, and the number of
        detectors.
    """
    groups = detector_groups(experiments)
    shown = groups[:MOST_DETECTORS]
    plots: dict[str, Plot] = {}
    detectors = []
    for number, members in enumerate(shown):
        own = [experiments[i] for i in members]
        view = view_corrections(own, settings, PIXELS // len(shown))
        found = {
            f"correction_{number}_{i}": _picture(view, factor, picture)
            for i, (factor, picture) in enumerate(zip(view.factors, view.pictures))
        }
        if view.times is not None:
            height = _height(view) if view.pictures else 300
            found[f"correction_{number}_exposure"] = _exposure(view.times, height)
        plots.update(found)
        n_images = sum(len(images_of(e)) for e in own)
        detectors.append(DetectorPlots(view.title, n_images, list(found)))
    return plots, detectors, len(groups)


def _height(view: CorrectionView) -> int:
    """Height of the plot of a picture, so that its scales are equal without a gap."""
    left, right, bottom, top = view.extent
    aspect = min(max((top - bottom) / (right - left), 0.3), 1.6)
    return round(WIDTH * aspect) + MARGIN["t"] + MARGIN["b"]


def _picture(view: CorrectionView, factor: Factor, picture: np.ndarray) -> Plot:
    """A factor along the beam, with rings of equal resolution and the beam."""
    left, right, bottom, top = view.extent
    axis = {"constrain": "domain", "showgrid": False}
    layout = layout_of(
        factor.name.capitalize(),
        "",
        "",
        showlegend=False,
        margin=MARGIN,
        height=_height(view),
        xaxis={"range": [left, right], **axis},
        yaxis={"range": [bottom, top], "scaleanchor": "x", **axis},
    )
    layout["title"]["font"] = {"size": 13}
    cross = {"symbol": "cross-thin", "size": 12, "line": {"color": RING, "width": 1.5}}
    beam = {"type": "scatter", "x": [0], "y": [0], "mode": "markers", "marker": cross}
    beam["hovertemplate"] = "beam<extra></extra>"
    data = [_heatmap(view, factor, picture), beam]
    return {"data": data, "layout": {**layout, **_rings(view)}}


def _heatmap(view: CorrectionView, factor: Factor, picture: np.ndarray) -> Plot:
    left, _, bottom, _ = view.extent
    size = view.beam_view.size
    z = resolved(picture[::-1])  # plotly begins below
    bar = {
        "title": {"text": factor.symbol_and_unit, "side": "right"},
        "thickness": 10,
        "tickfont": {"size": 10},
    }
    if np.nanmin(picture) == np.nanmax(picture):
        bar["tickvals"] = [float(np.nanmin(picture))]
    hover = f"%{{x:.0f}}, %{{y:.0f}}: {factor.symbol} = %{{z}} {factor.unit}"
    return {
        "type": "heatmap",
        "z": z,
        **{"x0": round(left + size / 2, 2), "dx": size},
        **{"y0": round(bottom + size / 2, 2), "dy": size},
        "colorscale": COLOURS,
        "colorbar": bar,
        "hovertemplate": f"{hover}<extra></extra>",
    }


def _rings(view: CorrectionView) -> Plot:
    """Circles of equal resolution, labelled with d, for a layout."""
    left, right, bottom, top = view.extent
    line = {"color": RING, "width": 0.7, "dash": "dash"}
    shapes, labels = [], []
    seen = view.beam_view
    for d, radius in resolution_circles(seen.beam, seen.rings.step, view.extent):
        ends = {"x0": -radius, "x1": radius, "y0": -radius, "y1": radius}
        shapes.append({"type": "circle", "line": line, **ends})
        places = [(radius * math.cos(a), radius * math.sin(a)) for a in LABEL_ANGLES]
        inside = [(x, y) for x, y in places if left < x < right and bottom < y < top]
        for x, y in inside[:1]:
            text = {"text": f"{d:.3g} Å", "font": {"size": 9, "color": RING}}
            style = {"showarrow": False, "bgcolor": "rgba(255,255,255,0.7)"}
            labels.append({**text, **style, "x": x, "y": y, "borderpad": 0})
    return {"shapes": shapes, "annotations": labels}


def _exposure(times: np.ndarray, height: int) -> Plot:
    """Exposure time of the images, in their order; of equal ones the first and last."""
    changes = np.diff(times) != 0
    ends = np.append(True, changes) | np.append(changes, True)
    number = (np.flatnonzero(ends) + 1).tolist()
    mode = "lines+markers" if len(times) == len(number) < 100 else "lines"
    trace = trace_of(number, significant(times[ends]), "t", BLUE, mode)
    trace["type"] = "scatter"  # WebGL draws no steps
    trace["line"]["shape"] = "hvh"
    if len(times) == 1:
        trace["mode"] = "markers"
    layout = layout_of("Exposure", "Image", "t (s)", showlegend=False, margin=MARGIN)
    layout["xaxis"].update(whole_numbers(number))
    layout["yaxis"]["range"] = [0, 1.15 * float(times.max())]
    layout["title"]["font"] = {"size": 13}
    return {"data": [trace], "layout": {**layout, "height": height}}
