"""Pictures of the layers of a mask, and the report of ``dials.diffuse_mask``.

Pixels are drawn where they are seen along the beam from the sample, on a plane that the
beam meets perpendicularly: any number of panels in any position makes one picture. The
mean image lies below in grey, what a layer masks above in red. A cell of a reduced picture
is red if any of its pixels is masked, paler for fewer of them, so that thin lines are
seen. Faulty pixels are marked by circles, as single ones would not be seen. The layer
bragg lies above the image that it belongs to, and lets its spots shine through.
"""

from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch
from scipy import ndimage

from dxtbx import flumpy

from dials_diffuse.extraction.loop import read_image
from dials_diffuse.masks.bragg import BraggLayer
from dials_diffuse.masks.make import LAYERS, MadeMask
from dials_diffuse.masks.series import flatten
from dials_diffuse.masks.settings import DYNAMIC_LAYERS
from dials_diffuse.masks.shadow import to_plane
from dials_diffuse.report.beam_view import (
    BeamView,
    resolution_circles,
    to_picture,
)
from dials_diffuse.report.embedding import embed, page_environment

MAX_EDGE = 720  # cells of a picture: each is a pixel of the screen at least
MASKED = "#d62728"
NO_PIXEL = "#cfe2f3"
BEAM = "#1f77b4"
PALE = 0.4  # opacity of a cell with few masked pixels
GLASS = 0.6  # of the layer above the spots of its image
MOST_HOLES = 1e-3  # of the cells, from which on the picture is too fine for the pixels
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


def cells_without_holes(
    made: MadeMask,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int], int]:
    """``picture_cells``, coarser where the pixels of tilted panels leave cells empty."""
    row, column, shape, size = picture_cells(made)
    there = np.isfinite(to_picture(np.ones(len(row)), row, column, shape))
    padded = np.pad(there, 2, mode="edge")
    closed = ndimage.binary_closing(padded, np.ones((3, 3)))[2:-2, 2:-2]
    if np.count_nonzero(closed & ~there) <= MOST_HOLES * there.sum():
        return row, column, shape, size
    shape = (shape[0] + 1) // 2, (shape[1] + 1) // 2
    return row // 2, column // 2, shape, 2 * size


def plot_layer(made: MadeMask, name: str, title: str) -> Figure:
    """A picture of a layer, or of all of them.

    Args:
        made: The mask.
        name: Name of the layer, ``bragg``, or ``total``.
        title: Title of the figure.
    """
    masked = flatten(_panels_of(made, name))
    values = flatten(made.mean if name != "bragg" else image_values(made.bragg))
    row, column, shape, size = cells_without_holes(made)
    extent = picture_extent(made, shape, size)
    figure = Figure(figsize=(8.6, 8.6 * aspect(shape) + 1.4), layout="constrained")
    ax = figure.subplots()
    _draw_image(ax, values, row, column, shape, extent)
    share = to_picture(masked.astype(float), row, column, shape)
    ax.imshow(
        masked_colours(share, GLASS if name == "bragg" else 1.0),
        extent=extent,
        interpolation="nearest",
    )
    circled = name in DYNAMIC_LAYERS and _mark_pixels(ax, made, masked)
    draw_rings(ax, made, extent)
    ax.plot(0, 0, "+", color=BEAM, ms=12, mew=1.5)
    ax.set_xlim(extent[:2])
    ax.set_ylim(extent[2:])
    ax.set_xlabel("pixels from the beam, along +x of the laboratory")
    ax.set_ylabel("pixels from the beam, along +y")
    ax.set_title(title, fontsize="medium")
    _draw_legend(ax, name, share, circled, bool(np.isnan(share).any()))
    return figure


def _panels_of(made: MadeMask, name: str) -> Sequence[np.ndarray]:
    """The masked pixels of a layer, ``bragg`` or ``total``, by panel."""
    if name == "total":
        return [~good for good in made.good]
    return made.bragg.panels if name == "bragg" else made.layers[name]


def image_values(layer: BraggLayer) -> list[np.ndarray]:
    """The raw values of the image of a layer by panel, NaN where they are negative."""
    panels = [
        flumpy.to_numpy(panel).astype(float)
        for panel in read_image(layer.experiment, layer.array_index)
    ]
    return [np.where(panel >= 0, panel, np.nan) for panel in panels]


def masked_colours(share: np.ndarray, opacity: float = 1.0) -> np.ndarray:
    """Red for cells with masked pixels, paler for fewer, else transparent.

    Args:
        share: Share of masked pixels in each cell, NaN without pixels, (n_rows, n_columns).
        opacity: Of a cell whose pixels are all masked.

    Returns:
        Colours and opacity, (n_rows, n_columns, 4).
    """
    share = np.nan_to_num(share)
    colours = np.empty((*share.shape, 4))
    colours[..., :3] = to_rgb(MASKED)
    colours[..., 3] = np.where(share > 0, PALE + (1 - PALE) * share, 0) * opacity
    return colours


def _draw_legend(
    ax: Axes, name: str, share: np.ndarray, circled: bool, has_empty: bool
) -> None:
    """What the colours mean, below the picture; only those that are there."""
    opacity = GLASS if name == "bragg" else 1.0
    image = "this image" if name == "bragg" else "mean image"
    masked = "left out of this image" if name == "bragg" else "masked"
    handles: list[Patch | Line2D] = [
        Patch(fc="0.5", label=f"{image}, dark: many photons"),
        Patch(fc="white", ec="0.6", label="no photons or never trusted"),
        Patch(fc=MASKED, alpha=opacity, label=masked),
    ]
    if np.any((share > 0) & (share < 1)):
        label = f"some pixels of the cell {masked.split()[0]}"
        handles.append(Patch(fc=MASKED, alpha=PALE * opacity, label=label))
    if circled:
        marks = {"mfc": "none", "mec": MASKED, "ls": ""}
        handles.append(Line2D([], [], marker="o", label="masked single pixel", **marks))
    if has_empty:
        handles.append(Patch(fc=NO_PIXEL, label="no panel here"))
    handles.append(Line2D([], [], marker="+", color=BEAM, ls="", label="beam"))
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.08),
        ncol=3,
        fontsize="small",
        frameon=False,
    )


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
    values: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    shape: tuple[int, int],
    extent: tuple[float, float, float, float],
) -> None:
    """An image in grey, dark for many photons; values are flat, NaN if not known."""
    there = to_picture(np.ones(len(values)), row, column, shape)
    image = to_picture(values, row, column, shape)
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


def _mark_pixels(ax: Axes, made: MadeMask, masked: np.ndarray) -> bool:
    """A circle around each masked pixel, unless they are too many; whether there are."""
    if not 0 < np.count_nonzero(masked) <= MAX_MARKS:
        return False
    u, v = made.rings.u[masked], made.rings.v[masked]
    ax.plot(u, v, "o", ms=4.5, mfc="none", mec=MASKED, mew=0.7)
    return True


def draw_rings(
    ax: Axes, made: MadeMask | BeamView, extent: tuple[float, float, float, float]
) -> None:
    """Circles of equal resolution, labelled with d in Å."""
    for d, radius in resolution_circles(made.beam, made.rings.step, extent):
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
    """``total``, the layers that mask pixels, and ``bragg`` if there is one."""
    used = [
        name for name, panels in made.layers.items() if any(p.any() for p in panels)
    ]
    return ["total", *used, *(["bragg"] if made.bragg else [])]


def picture_title(made: MadeMask, name: str) -> str:
    """What a picture shows, with the number of its pixels."""
    summary = made.summary()
    n_pixels = summary["n_pixels"]
    if name == "bragg":
        (layer,) = summary["image_layers"]
        return (
            f"bragg: {layer['exclusion']}\nof image {layer['image']} only, to "
            f"{layer['d_min']:.2f} Å; not in the mask\n{layer['n_pixels']} pixels (red), "
            f"{100 * layer['n_pixels'] / n_pixels:.3g}% of the detector, "
            f"{layer['n_only']} of them not masked"
        )
    n_masked, meaning = summary["n_masked"], "all layers"
    for layer in summary["layers"]:
        if layer["name"] == name:
            n_masked, meaning = layer["n_pixels"], f"{name}: {LAYERS[name]}"
    share = 100 * n_masked / n_pixels
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
        facts: ``title``, ``versions``, ``output`` (what was written), ``warnings``,
            ``json``, and ``no_bragg``: why there is no Bragg layer, or None.
    """
    environment = page_environment()
    images = [
        {name: embed(content, "png") for name, content in detector.items()}
        for detector in pictures
    ]
    return environment.get_template("mask.html").render(
        detectors=list(zip(summaries, images)), **facts
    )
