"""Pictures of a background: profiles, an image with and without it, what is left."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dials_diffuse.background.sample import SampleImage, Shell
from dials_diffuse.report.embedding import draw, embed, page_environment

MOST_CURVES = 40
PICTURE_DPI = 110
N_BLOCKS = 256  # of the picture along its longer edge, at most
BLOCK_COUNTS = 30.0  # that a block of pixels should have
LEAST_BLOCK = 5  # pixels along an edge
D_TICKS = (20, 10, 5, 3, 2.5, 2, 1.7, 1.5, 1.3, 1.2, 1.1, 1, 0.9, 0.8, 0.7)


def plot_profiles(s: np.ndarray, profiles: Sequence[np.ndarray]) -> Figure:
    """Intensity of the background against s, for some images.

    Args:
        s: 1/Å, shape (n_s,).
        profiles: photons/(s sr), each of shape (n_s,), in the order of the images.
    """
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    ax = figure.subplots()
    step = max(1, -(-len(profiles) // MOST_CURVES))
    shown = profiles[::step]
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for values, colour in zip(shown, colours):
        ax.plot(s, values, lw=0.9, color=colour)
    ax.set_title(f"Radial background of {len(shown)} of {len(profiles)} images")
    if len(shown) > 1:
        ax.text(
            0.98,
            0.95,
            "first: dark, last: light",
            transform=ax.transAxes,
            ha="right",
            va="top",
        )
    ax.set_ylabel("Intensity (photons s⁻¹ sr⁻¹)")
    ax.set_ylim(bottom=min(0, min(float(np.min(p)) for p in shown)))
    _resolution_axes(ax, s[-1])
    return figure


def _resolution_axes(ax: Axes, s_max: float) -> None:
    """s below, d above."""
    ax.set_xlim(0, s_max)
    ax.set_xlabel("s = 1/d (Å⁻¹)")
    ax.grid(alpha=0.3)
    top = ax.secondary_xaxis("top")
    ticks = [d for d in D_TICKS if 1 / d <= s_max]
    kept: list[float] = []
    for d in ticks:
        if not kept or 1 / d - 1 / kept[-1] > 0.06 * s_max:
            kept.append(d)
    top.set_xticks([1 / d for d in kept], [f"{d:g}" for d in kept])
    top.set_xlabel("d (Å)")


def plot_shells(shells: Sequence[Shell]) -> Figure:
    """Mean counts of an image and of its background, and their difference."""
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    s = [shell.s for shell in shells]
    upper.plot(s, [shell.measured for shell in shells], "o-", ms=4, label="measured")
    upper.plot(s, [shell.background for shell in shells], "--", label="background")
    upper.set_ylabel("Photons per pixel")
    upper.set_ylim(bottom=0)
    upper.legend()
    lower.errorbar(
        s,
        [shell.residual for shell in shells],
        [shell.sigma for shell in shells],
        fmt="o",
        ms=4,
        color="k",
    )
    lower.axhline(0, lw=0.8, color="0.5")
    lower.set_ylabel("Difference")
    _resolution_axes(upper, s[-1] * 1.03)
    upper.set_xlabel("")
    lower.set_xlabel("s = 1/d (Å⁻¹)")
    lower.grid(alpha=0.3)
    return figure


def block_size(image: SampleImage) -> float:
    """Edge of the blocks of pixels of a picture, in units of its plane.

    So large that a block has ``BLOCK_COUNTS`` photons on the average.
    """
    x, y = np.ptp(image.x), np.ptp(image.y)
    per_area = max(image.photons.sum(), 1.0) / (x * y)
    pixel = np.sqrt(x * y / len(image.x))
    return max(
        LEAST_BLOCK * pixel, np.sqrt(BLOCK_COUNTS / per_area), max(x, y) / N_BLOCKS
    )


def block_means(
    image: SampleImage, size: float
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float, float]]:
    """Measured and background photons per pixel in blocks; NaN without pixels.

    Returns:
        Arrays of shape (n_y, n_x), and the extent of the picture.
    """
    keep = ~image.near_bragg
    edges = [
        np.arange(values.min(), values.max() + size, size)
        for values in (image.y, image.x)
    ]
    places = (image.y[keep], image.x[keep])
    n, _, _ = np.histogram2d(*places, bins=edges)
    with np.errstate(invalid="ignore"):
        measured, background = (
            np.histogram2d(*places, bins=edges, weights=values[keep])[0] / n
            for values in (image.photons, image.background)
        )
    extent = (edges[1][0], edges[1][-1], edges[0][0], edges[0][-1])
    return measured, background, extent


def plot_image(image: SampleImage, title: str) -> Figure:
    """An image without its Bragg positions, its background, and their difference."""
    measured, background, extent = block_means(image, block_size(image))
    figure = Figure(figsize=(14, 4.9), layout="constrained")
    axes = figure.subplots(1, 3)
    high = np.nanpercentile(measured, 99.5)
    rest = measured - background
    limit = np.nanpercentile(np.abs(rest), 98) or 1.0
    for ax, values, name, style in zip(
        axes,
        (measured, background, rest),
        ("Measured", "Background", "Difference"),
        (
            {"cmap": "viridis", "vmin": 0, "vmax": high},
            {"cmap": "viridis", "vmin": 0, "vmax": high},
            {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit},
        ),
    ):
        ax.set_facecolor("0.8")
        picture = ax.imshow(values, origin="lower", extent=extent, **style)
        ax.set_title(name)
        ax.set_xlabel("x / distance")
        figure.colorbar(picture, ax=ax, label="photons per pixel", shrink=0.85)
    axes[0].set_ylabel("y / distance")
    if title:
        figure.suptitle(title)
    return figure


def render_page(
    record: Mapping[str, Any], figures: Sequence[tuple[str, Figure]]
) -> str:
    """The page as HTML, pictures embedded.

    Args:
        record: What is written as JSON too.
        figures: Captions and figures.
    """
    environment = page_environment()
    pictures = [
        (caption, embed(draw(figure, "png", PICTURE_DPI), "png"))
        for caption, figure in figures
    ]
    return environment.get_template("background.html").render(
        **record, pictures=pictures
    )
