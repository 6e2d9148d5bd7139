"""Pictures of the layers of a mask, and the report of ``dials.diffuse_mask``.

Pixels are drawn where they are seen along the beam from the sample, on a plane that the
beam meets perpendicularly: any number of panels in any position makes one picture. The
mean image lies below in grey, what a layer masks above in red. Faulty pixels are marked
by circles, as single ones would not be seen.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from dials_diffuse.masks.make import LAYERS, MadeMask
from dials_diffuse.masks.series import flatten
from dials_diffuse.masks.settings import DYNAMIC_LAYERS
from dials_diffuse.masks.shadow import to_plane
from dials_diffuse.report.embedding import embed, page_environment
from dials_diffuse.report.slices import circle_resolutions

MAX_EDGE = 1100  # cells of a picture
MASKED = "#d62728"
NO_PIXEL = "#cfe2f3"
MAX_MARKS = 3000  # more marks than these would cover the picture


def picture_cells(
    made: MadeMask,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int], int]:
    """Where the pixels are in a picture of moderate size.

    Returns:
        Row and column of each pixel, flat, -1 for those that are not in it; its shape; the
        number of pixels along the edge of a cell.
    """
    cell, known, shape, size = to_plane(made.rings)
    binning = max(1, math.ceil(max(shape) / MAX_EDGE))
    row, column = (x // binning for x in np.divmod(cell, shape[1]))
    row[~known] = column[~known] = -1
    small = (shape[0] - 1) // binning + 1, (shape[1] - 1) // binning + 1
    return row, column, small, binning * size


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


def plot_layer(made: MadeMask, name: str, title: str) -> Figure:
    """A picture of a layer, or of all of them.

    Args:
        made: The mask.
        name: Name of the layer, or ``total``.
        title: Title of the figure.
    """
    masked = flatten(made.layers[name] if name != "total" else [~g for g in made.good])
    row, column, shape, size = picture_cells(made)
    extent = picture_extent(made, shape, size)
    figure = Figure(figsize=(8.6, 8.6 * aspect(shape) + 0.9), layout="constrained")
    ax = figure.subplots()
    _draw_image(ax, made, row, column, shape, extent)
    share = to_picture(masked.astype(float), row, column, shape)
    ax.imshow(
        np.ma.masked_where(~(share > 0.5), share),
        cmap=ListedColormap([MASKED]),
        extent=extent,
        interpolation="nearest",
    )
    if name in DYNAMIC_LAYERS:
        _mark_pixels(ax, made, masked)
    draw_rings(ax, made, extent)
    ax.plot(0, 0, "+", color="#1f77b4", ms=12, mew=1.5)
    ax.set_xlim(extent[:2])
    ax.set_ylim(extent[2:])
    ax.set_xlabel("pixels from the beam, along +x of the laboratory")
    ax.set_ylabel("pixels from the beam, along +y")
    ax.set_title(title, fontsize="medium")
    return figure


def aspect(shape: tuple[int, int]) -> float:
    return min(max(shape[0] / shape[1], 0.3), 1.6)


def picture_extent(
    made: MadeMask, shape: tuple[int, int], size: float
) -> tuple[float, float, float, float]:
    """Limits of a picture in pixels from the beam: left, right, bottom, top."""
    left = float(np.nanmin(made.rings.u)) - 0.5
    top = float(np.nanmax(made.rings.v)) + 0.5
    return left, left + shape[1] * size, top - shape[0] * size, top


def _draw_image(
    ax: Axes,
    made: MadeMask,
    row: np.ndarray,
    column: np.ndarray,
    shape: tuple[int, int],
    extent: tuple[float, float, float, float],
) -> None:
    """The mean image in grey, dark for many photons."""
    mean = flatten(made.mean)
    there = to_picture(np.ones(len(mean)), row, column, shape)
    image = to_picture(mean, row, column, shape)
    seen = image[np.isfinite(image)]
    low, high = np.percentile(seen, (1, 99)) if len(seen) else (0.0, 1.0)
    # pixels that no image trusts are white, as those without photons
    image = np.where(np.isfinite(there), np.nan_to_num(image), np.nan)
    colours = matplotlib.colormaps["Greys"].copy()
    colours.set_bad(NO_PIXEL)
    ax.imshow(
        np.ma.masked_invalid(np.sqrt(np.clip(image, 0, None))),
        cmap=colours,
        vmin=np.sqrt(max(low, 0)) * 0.7,
        vmax=np.sqrt(max(high, 0)) * 1.3 + 1e-6,
        extent=extent,
        interpolation="nearest",
    )


def _mark_pixels(ax: Axes, made: MadeMask, masked: np.ndarray) -> None:
    """A circle around each masked pixel, if they are not too many."""
    if 0 < np.count_nonzero(masked) <= MAX_MARKS:
        ax.plot(
            made.rings.u[masked],
            made.rings.v[masked],
            "o",
            ms=4.5,
            mfc="none",
            mec=MASKED,
            mew=0.7,
        )


def draw_rings(
    ax: Axes, made: MadeMask, extent: tuple[float, float, float, float]
) -> None:
    """Circles of equal resolution, labelled with d in Å."""
    beam = made.beam
    wavelength = beam.get_wavelength()
    farthest = max(map(abs, extent))
    d_min = wavelength / (2 * math.sin(math.atan(farthest * made.rings.step) / 2))
    for d in circle_resolutions(d_min):
        two_theta = 2 * math.asin(wavelength / (2 * d))
        radius = math.tan(two_theta) / made.rings.step
        ax.add_patch(
            Circle((0, 0), radius, fill=False, lw=0.5, ls="--", color="#1f77b4")
        )
        ax.annotate(
            f"{d:.3g} Å",
            (radius * math.cos(-0.7), radius * math.sin(-0.7)),
            fontsize="x-small",
            color="#1f77b4",
            ha="center",
            va="center",
            annotation_clip=True,
            bbox={
                "boxstyle": "round,pad=0.1",
                "fc": "white",
                "ec": "none",
                "alpha": 0.7,
            },
        )


def layers_to_draw(made: MadeMask) -> list[str]:
    """The layers that mask pixels, and ``total``."""
    used = [
        name for name, panels in made.layers.items() if any(p.any() for p in panels)
    ]
    return [*used, "total"]


def picture_title(made: MadeMask, name: str) -> str:
    """What a picture shows, with the number of its pixels."""
    summary = made.summary()
    n_masked = summary["n_masked"]
    meaning = "all layers"
    for layer in summary["layers"]:
        if layer["name"] == name:
            n_masked, meaning = layer["n_pixels"], f"{name}: {LAYERS[name]}"
    share = 100 * n_masked / summary["n_pixels"]
    return f"{meaning}\n{n_masked} pixels masked (red), {share:.3g}% of the detector"


def render_page(
    summaries: Sequence[Mapping[str, Any]],
    pictures: Sequence[Mapping[str, bytes]],
    facts: Mapping[str, Any],
) -> str:
    """The report as one HTML page that is readable offline.

    Args:
        summaries: Of the mask of each detector.
        pictures: PNG of each layer, for each detector.
        facts: ``title``, ``versions``, ``output`` (what was written), ``warnings`` and
            ``json``.
    """
    environment = page_environment()
    images = [
        {name: embed(content, "png") for name, content in detector.items()}
        for detector in pictures
    ]
    return environment.get_template("mask.html").render(
        detectors=list(zip(summaries, images)), **facts
    )
