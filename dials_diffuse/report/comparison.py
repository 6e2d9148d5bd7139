"""Picture and page section of the comparison of a map with the truth of a simulation.

Above: the map against the truth, how they agree in resolution shells, and the deviations
in standard errors (pulls), which are normally distributed for correct data of many
counts, and skew for few. Below, for the layers hk0, h0l and 0kl: truth, map and pulls. All is shown on the
scale of the map; only voxels that were compared are shown.
"""

from __future__ import annotations

import html
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullLocator

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import INTENSITY
from dials_diffuse.report.beam_view import circle_resolutions
from dials_diffuse.report.embedding import draw, embed
from dials_diffuse.report.slices import (
    Layer,
    colour_limits,
    cut_layer,
    draw_layer,
    layer_indices,
)
from dials_diffuse.simulation.comparison import HEADER, Comparison, find_voxels

TITLE = "Comparison with the truth of the simulation"
NORMALS = (2, 1, 0)  # hk0, h0l, 0kl

NOISE_ALONE = "counting noise alone"
N_BINS = 120  # of the map against the truth, on each axis
LOG_FROM = 30.0  # ratio of intensities beyond which their axes are logarithmic
MAX_PULL = 6.0  # of the histogram
PULL_COLOURS = 4.0  # limits of the colours
# A layer of which only the frame is used needs no isotropic part.
NO_ISOTROPIC = {"s": np.empty(0), "intensity": np.empty(0)}

LEGEND = (
    "&lt;map&gt;/&lt;truth&gt;: ratio of the sums, weighted by counts. CC: correlation "
    "of the map with the truth; CC aniso: without the mean of each in shells of 0.01 "
    "Å<sup>-1</sup>; expected: what it would be with counting noise alone. Rms dev.: "
    "relative deviation from the truth; beyond noise: the part of it that is not "
    "counting noise, from chi2. Sigma ratio: standard error in the map over the expected "
    "one. Chi2 and pulls take the standard error from the expected counts; correct data "
    "have chi2 = 1 and mean pull = 0."
)


def layer_values(
    grid: Grid, normal: int, index: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """The values of unique voxels in a central layer.

    Args:
        grid: The grid.
        normal: The index that is zero in the layer, 0, 1 or 2 for h, k, l.
        index: The voxels, in the asymmetric unit, shape (n, 3).
        values: Their values, shape (n,).

    Returns:
        Shape (n_u, n_v), NaN for voxels that are not among them.
    """
    wanted = layer_indices(grid, normal)
    place = find_voxels(symmetry.map_to_asu(wanted, grid.laue_group), index)
    shape = [n for i, n in enumerate(grid.shape) if i != normal]
    return np.append(values, np.nan)[place].reshape(shape)


def plot_comparison(
    comparison: Comparison, title: str = "", units: str = INTENSITY
) -> Figure:
    """The figure of a comparison.

    Args:
        comparison: The comparison.
        title: Title of the figure, such as the names of the files.
        units: Unit of the intensity.
    """
    figure = Figure(figsize=(15.0, 20.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 2.9))
    left, middle, right = above.subfigures(1, 3)
    plot_scatter(left.subplots(), comparison, units)
    plot_shells(middle, comparison)
    plot_pulls(right.subplots(), comparison)
    plot_truth_layers(below, comparison, units)
    figure.suptitle(title or TITLE)
    return figure


def plot_scatter(ax: Axes, comparison: Comparison, units: str) -> None:
    """Numbers of voxels by their intensity in truth and map."""
    truth, observed = comparison.expected, comparison.voxels.intensity
    low, high = np.percentile(truth, [0.05, 99.95])
    is_log = high > LOG_FROM * low
    # Room for the noise at the ends of the range
    noise = 4 * float(np.sqrt(np.median(comparison.variance)))
    if is_log:
        low, high = low / 2, high * 2
        edges = np.geomspace(low, high, N_BINS + 1)
        ax.set_xscale("log")
        ax.set_yscale("log")
    else:
        low, high = low - noise, high + noise
        edges = np.linspace(low, high, N_BINS + 1)
    numbers, _, _ = np.histogram2d(truth, observed, [edges, edges])
    image = ax.pcolormesh(
        edges,
        edges,
        np.ma.masked_equal(numbers.T, 0),
        norm=LogNorm(1, max(numbers.max(), 2)),
        cmap="viridis",
        rasterized=True,
    )
    ax.figure.colorbar(image, ax=ax, label="Voxels", pad=0.02)
    ax.plot([low, high], [low, high], lw=0.8, color="tab:red", label="map = truth")
    ax.set_xlabel(f"Truth × scale ({units})")
    ax.set_ylabel(f"Map ({units})")
    ax.set_title(f"{len(truth)} unique voxels")
    n_outside = len(truth) - int(numbers.sum())
    if n_outside:
        ax.text(0.98, 0.02, f"{n_outside} outside", transform=ax.transAxes, ha="right")
    if not is_log:
        ax.ticklabel_format(scilimits=(-3, 4))
    ax.legend(loc="upper left", fontsize="small")


def plot_shells(figure: SubFigure, comparison: Comparison) -> None:
    """CC, ratio and χ² of the resolution shells against 1/d."""
    shells = [shell for shell in comparison.shells if shell.n_voxels]
    s = np.array([(1 / shell.d_max + 1 / shell.d_min) / 2 for shell in shells])
    axes = figure.subplots(3, 1, sharex=True)

    def values(name: str) -> np.ndarray:
        return np.array([getattr(shell, name) for shell in shells], dtype=float)

    axes[0].plot(s, values("cc_expected"), "k--", lw=0.8, label=NOISE_ALONE)
    axes[0].plot(s, values("cc_anisotropic"), "o", ms=4, label="map")
    axes[0].set_ylabel("CC anisotropic")
    axes[0].set_ylim(min(0, axes[0].get_ylim()[0]), 1.05)
    axes[0].legend(fontsize="small", loc="lower left")
    for ax, name, label in (
        (axes[1], "ratio", "<map>/<truth>"),
        (axes[2], "chi2", "χ²"),
    ):
        error = values(f"{name}_error")
        ax.errorbar(s, values(name), error, fmt="o", ms=4, lw=1, capsize=2)
        ax.axhline(1, color="k", ls="--", lw=0.8)
        ax.set_ylabel(label)
        ax.ticklabel_format(axis="y", useOffset=False)
    axes[2].set_xlim(0, None)
    axes[2].set_xlabel("1/d (Å⁻¹)")
    top = axes[0].secondary_xaxis("top")
    resolutions = circle_resolutions(shells[-1].d_min)
    top.set_xticks([1 / d for d in resolutions], [f"{d:.3g}" for d in resolutions])
    top.xaxis.set_minor_locator(NullLocator())
    top.set_xlabel("d (Å)")


def noise_pulls(comparison: Comparison) -> np.ndarray:
    """Pulls of the same voxels by counting noise alone, from a fixed seed.

    Poisson counts are skew where they are few, so the pulls even of correct data are not
    normally distributed.
    """
    rng = np.random.default_rng(7)
    voxels = comparison.voxels
    counts = voxels.expected_counts(comparison.scale)
    background = rng.normal(0, np.sqrt(voxels.background_variance))
    deviation = rng.poisson(counts) - counts - background
    return deviation / np.sqrt(counts + voxels.background_variance)


def plot_pulls(ax: Axes, comparison: Comparison) -> None:
    """Histogram of the pulls, what it should be, and the normal distribution."""
    pull = comparison.pull
    edges = np.linspace(-MAX_PULL, MAX_PULL, 61)

    def density(values: np.ndarray) -> np.ndarray:
        # The outermost bins hold all that is beyond.
        numbers, _ = np.histogram(values.clip(-MAX_PULL, MAX_PULL), edges)
        return numbers / (len(values) * (edges[1] - edges[0]))

    ax.stairs(density(pull), edges, fill=True, alpha=0.6, label="map")
    ax.stairs(density(noise_pulls(comparison)), edges, color="k", label=NOISE_ALONE)
    x = np.linspace(-MAX_PULL, MAX_PULL, 241)
    normal = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    ax.plot(x, normal, "--", color="tab:red", lw=1, label="N(0, 1)")
    ax.set_yscale("log")
    ax.set_ylim(min(1e-5, 0.3 / len(pull)), 1)
    ax.set_xlim(-MAX_PULL, MAX_PULL)
    ax.set_xlabel("(map - truth × scale) / expected σ")
    ax.set_ylabel("Probability density")
    ax.set_title(f"Pulls: mean {pull.mean():+.3f}, standard deviation {pull.std():.3f}")
    ax.legend(fontsize="small", loc="upper left")


def plot_truth_layers(figure: SubFigure, comparison: Comparison, units: str) -> None:
    """Three central layers: the truth, the map, and the pulls."""
    grid, index = comparison.voxels.grid, comparison.voxels.index
    names = ("truth", "map", "(map - truth)/σ")
    parts = (comparison.expected, comparison.voxels.intensity, comparison.pull)
    layers: list[list[np.ndarray]] = [
        [layer_values(grid, normal, index, values) for normal in NORMALS]
        for values in parts
    ]
    frames: list[Layer] = [
        cut_layer(grid, normal, values, NO_ISOTROPIC)
        for normal, values in zip(NORMALS, layers[0])
    ]
    intensity = colour_limits([*layers[0], *layers[1]])
    pulls = (-PULL_COLOURS, PULL_COLOURS)
    axes = figure.subplots(3, 3)
    for row, name, values in zip(axes, names, layers):
        is_pull = values is layers[2]
        colours, limits = ("RdBu_r", pulls) if is_pull else ("viridis", intensity)
        for ax, frame, layer in zip(row, frames, values):
            image = draw_layer(ax, frame, layer, colours, limits, grid.d_min)
            ax.set_title(f"{frame.name}, {name}")
        bar = figure.colorbar(image, ax=row, shrink=0.85, pad=0.01, extend="both")
        bar.set_label("Expected standard errors" if is_pull else f"Intensity ({units})")
        if not is_pull:
            bar.formatter.set_powerlimits((-3, 4))
    for ax in axes[-1]:
        ax.set_xlabel("Å⁻¹")
    figure.supxlabel("Grey: not compared. Circles: resolution in Å.", fontsize="small")


def comparison_section(
    comparison: Comparison, figure: Figure, dpi: int = 80
) -> tuple[str, str]:
    """Title and HTML of a comparison, for a page that needs no other files.

    Args:
        comparison: The comparison.
        figure: From ``plot_comparison``.
        dpi: Dots per inch of the picture.
    """
    picture = embed(draw(figure, "png", dpi), "png")
    lines = [
        "<table>",
        *(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
            for name, text in comparison.summary()
        ),
        "</table>",
        "<table>",
        _table_line(HEADER, "th"),
        *(_table_line(row, "td") for row in comparison.rows()),
        "</table>",
        f"<p>{LEGEND}</p>",
        f'<img alt="{TITLE}" style="max-width: 100%" src="{picture}">',
    ]
    return TITLE, "\n".join(lines)


def _table_line(cells: list[str] | tuple[str, ...], tag: str) -> str:
    inside = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in cells)
    return f"<tr>{inside}</tr>"
