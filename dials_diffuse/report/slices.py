"""Pictures of the central layers hk0, h0l and 0kl of a map, in their true geometry.

The axes are in Å⁻¹: the first reciprocal axis of a layer runs to the right, the second
at their true angle. The upper row is the intensity; the lower row is its anisotropic
part, what is left when the mean in shells of 0.01 Å⁻¹ is taken off. Voxels that were not
observed are grey.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Mapping, Sequence

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.transforms import Affine2D

from dials_diffuse.grid import Grid
from dials_diffuse.merging.estimate import interpolate_shells
from dials_diffuse.report.beam_view import circle_resolutions

if TYPE_CHECKING:
    from dials_diffuse.io.maps import MapFile

NOT_OBSERVED = "0.8"
# Share of the voxels at each end whose colour is cut off, in percent.
CUT_OFF = 0.5


@dataclasses.dataclass(frozen=True)
class Layer:
    """A central layer of a map.

    Args:
        normal: The index, 0, 1 or 2 for h, k, l, that is zero in it.
        intensity: Intensity, shape (n_u, n_v), axes in the order h, k, l; NaN where not
            observed.
        anisotropic: Intensity without its isotropic part, same shape.
        extent: Limits of the layer along u and v in fractional Miller indices.
        basis: The reciprocal axes u, v in the columns, x along u, Å⁻¹, shape (2, 2).
    """

    normal: int
    intensity: np.ndarray
    anisotropic: np.ndarray
    extent: tuple[float, float, float, float]
    basis: np.ndarray

    @property
    def name(self) -> str:
        """hk0, h0l or 0kl."""
        return "".join("0" if i == self.normal else "hkl"[i] for i in range(3))

    @property
    def axis_names(self) -> tuple[str, str]:
        """Names of the two reciprocal axes."""
        u, v = (i for i in range(3) if i != self.normal)
        return f"{'abc'[u]}*", f"{'abc'[v]}*"


def layer_basis(grid: Grid, normal: int) -> np.ndarray:
    """The two reciprocal axes of a layer in the columns, Å⁻¹, the first along x."""
    cell = grid.cell.reciprocal().parameters()
    u, v = (i for i in range(3) if i != normal)
    angle = math.radians(cell[3 + normal])
    return np.array(
        [[cell[u], cell[v] * math.cos(angle)], [0.0, cell[v] * math.sin(angle)]]
    )


def layer_indices(grid: Grid, normal: int) -> np.ndarray:
    """Voxel indices of a central layer, shape (n_u * n_v, 3), in C order."""
    ranges = [np.arange(-n, n + 1) for n in grid.half_size]
    ranges[normal] = np.zeros(1, dtype=int)
    return np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3)


def cut_layer(
    grid: Grid,
    normal: int,
    intensity: np.ndarray,
    isotropic: Mapping[str, np.ndarray],
) -> Layer:
    """A layer from its intensities.

    Args:
        grid: The grid of the map.
        normal: The index that is zero, 0, 1 or 2 for h, k, l.
        intensity: Intensity of the layer, shape (n_u, n_v).
        isotropic: The table ``isotropic`` of the map: mean intensity in thin shells.
    """
    s = grid.s(layer_indices(grid, normal)).reshape(intensity.shape)
    u, v = (i for i in range(3) if i != normal)
    ends = [(grid.half_size[i] + 0.5) / grid.ndiv[i] for i in (u, v)]
    return Layer(
        normal=normal,
        intensity=intensity,
        anisotropic=intensity
        - interpolate_shells(s, isotropic["s"], isotropic["intensity"]),
        extent=(-ends[0], ends[0], -ends[1], ends[1]),
        basis=layer_basis(grid, normal),
    )


def central_layers(handle: MapFile) -> list[Layer]:
    """The layers hk0, h0l and 0kl of a map."""
    isotropic = handle.table("isotropic")
    return [
        cut_layer(handle.grid, normal, handle.layer("map/intensity", normal), isotropic)
        for normal in (2, 1, 0)
    ]


def plot_layers(
    layers: Sequence[Layer], d_min: float, units: str, title: str
) -> Figure:
    """A figure of layers: their intensity above, their anisotropic part below.

    Args:
        layers: The layers, one for each column of the figure.
        d_min: Resolution limit, Å; nothing is drawn beyond.
        units: Unit of the intensity.
        title: Title of the figure.
    """
    figure = Figure(figsize=(4.6 * len(layers) + 1.2, 9.9), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1, hspace=0.05)
    axes = figure.subplots(2, len(layers), squeeze=False)
    intensity = colour_limits([layer.intensity for layer in layers])
    largest = max(map(abs, colour_limits([layer.anisotropic for layer in layers])))
    for row, attribute, colours, limits, label in (
        (0, "intensity", "viridis", intensity, "Intensity"),
        (1, "anisotropic", "RdBu_r", (-largest, largest), "Intensity less shell mean"),
    ):
        for ax, layer in zip(axes[row], layers):
            image = draw_layer(
                ax, layer, getattr(layer, attribute), colours, limits, d_min
            )
            ax.set_title(layer.name if row == 0 else f"{layer.name}, anisotropic part")
        bar = figure.colorbar(image, ax=axes[row], shrink=0.85, pad=0.01, extend="both")
        bar.set_label(f"{label} ({units})")
        bar.formatter.set_powerlimits((-3, 4))
    for ax in axes[1]:
        ax.set_xlabel("Å⁻¹")
    figure.suptitle(title)
    figure.supxlabel("Grey: not observed. Circles: resolution in Å.", fontsize="small")
    return figure


def colour_limits(images: Sequence[np.ndarray]) -> tuple[float, float]:
    """Limits of the colours, without the most extreme of the observed voxels."""
    values = np.concatenate([image[np.isfinite(image)] for image in images])
    if len(values) == 0:
        return 0.0, 1.0
    low, high = np.percentile(values, [CUT_OFF, 100 - CUT_OFF])
    return (float(low), float(high)) if high > low else (low - 0.5, low + 0.5)


def draw_layer(
    ax: Axes,
    layer: Layer,
    values: np.ndarray,
    colours: str,
    limits: tuple[float, float],
    d_min: float,
) -> matplotlib.image.AxesImage:
    """Draw a layer, with its reciprocal axes and resolution circles."""
    colour_map = matplotlib.colormaps[colours].copy()
    colour_map.set_bad(NOT_OBSERVED)
    image = ax.imshow(
        np.ma.masked_invalid(values.T),
        origin="lower",
        extent=layer.extent,
        interpolation="nearest",
        cmap=colour_map,
        vmin=limits[0],
        vmax=limits[1],
    )
    shear = np.eye(3)
    shear[:2, :2] = layer.basis
    image.set_transform(Affine2D(shear) + ax.transData)
    image.set_clip_path(Circle((0, 0), 1 / d_min, transform=ax.transData))
    _draw_circles(ax, d_min)
    _draw_axes(ax, layer, d_min)
    ax.set_aspect("equal")
    ax.set_xlim(-1.2 / d_min, 1.2 / d_min)
    ax.set_ylim(-1.2 / d_min, 1.2 / d_min)
    ax.set_ylabel("Å⁻¹")
    return image


def _draw_circles(ax: Axes, d_min: float) -> None:
    """Circles of equal resolution, labelled with d in Å."""
    for d in circle_resolutions(d_min):
        ax.add_patch(Circle((0, 0), 1 / d, fill=False, lw=0.5, ls="--", color="k"))
        ax.annotate(
            f"{d:.3g}",
            (math.cos(-0.7) / d, math.sin(-0.7) / d),
            fontsize="x-small",
            ha="center",
            va="center",
            bbox={
                "boxstyle": "round,pad=0.15",
                "fc": "white",
                "ec": "none",
                "alpha": 0.8,
            },
        )


def _draw_axes(ax: Axes, layer: Layer, d_min: float) -> None:
    """The two reciprocal axes through the origin, with their names."""
    for direction, name in zip(layer.basis.T, layer.axis_names):
        end = direction / np.linalg.norm(direction) / d_min
        ax.plot([-end[0], end[0]], [-end[1], end[1]], lw=0.5, color="k")
        ax.annotate(name, 1.1 * end, ha="center", va="center", style="italic")
