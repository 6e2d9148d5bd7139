"""Smooth corrections of a radial profile over the detector, as grids of nodes.

For a background that is not round: air scattered off the axis of the beam, the shadow of
a nozzle. The pixels nearest to a node are its window; the quantile of their counts,
with the profile as the known part, gives the intensity that the profile lacks. As for
the profile, a second pass corrects for the change within a window.

Whatever is wider than a window is taken for background, structured diffuse scattering of
the crystal too.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dials_diffuse.background.model import grid_at, n_nodes
from dials_diffuse.background.pixels import Pixels
from dials_diffuse.background.quantile import solve_bins
from dials_diffuse.background.radial import filled, is_measured, smoothed
from dials_diffuse.background.settings import ProfileSettings


@dataclasses.dataclass(frozen=True)
class Windows:
    """The node that each pixel is nearest to.

    Attributes:
        shapes: Nodes of each panel, (n_slow, n_fast).
        node: Number of the node, panel after panel, shape (n_pixels,).
        spacing: Distance of the nodes, px.
    """

    shapes: tuple[tuple[int, int], ...]
    node: np.ndarray
    spacing: int

    @property
    def n_nodes(self) -> int:
        return sum(n * m for n, m in self.shapes)

    def by_panel(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of all nodes as an array for each panel."""
        ends = np.cumsum([n * m for n, m in self.shapes])
        parts = np.split(values, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes)]


def make_windows(pixels: Pixels, spacing: int) -> Windows:
    """The windows of a detector."""
    shapes, nodes, first = [], [], 0
    for number, (n_slow, n_fast) in enumerate(pixels.shapes):
        shape = (n_nodes(n_slow, spacing), n_nodes(n_fast, spacing))
        fast, slow = pixels.places(number)
        i, j = (np.floor(x / spacing + 0.5).astype(np.intp) for x in (slow, fast))
        nodes.append(first + i * shape[1] + j)
        shapes.append(shape)
        first += shape[0] * shape[1]
    return Windows(tuple(shapes), np.concatenate(nodes), spacing)


def smooth_correction(
    photons: np.ndarray,
    m: np.ndarray,
    known: np.ndarray,
    used: np.ndarray,
    pixels: Pixels,
    windows: Windows,
    settings: ProfileSettings,
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """The intensity at the nodes that the known part of an image lacks.

    Args:
        photons: Photons of the usable pixels, shape (n,).
        m: Their normalisation with the exposure time, s sr.
        known: The expected photons that are known.
        used: Which of ``pixels`` these are, shape (n,).
        pixels: The pixels of the detector.
        windows: Their windows.
        settings: The quantile.

    Returns:
        Values and variances at the nodes of each panel.
    """
    node, q, n = windows.node[used], settings.quantile, windows.n_nodes
    first = solve_bins(node, photons, m, n, q, known)
    measured = windows.by_panel(is_measured(first))
    shape = [
        filled(smoothed(value, good))
        for value, good in zip(windows.by_panel(first.value), measured)
    ]
    between = np.concatenate(
        [
            grid_at(
                *pixels.places(number), values, np.zeros_like(values), windows.spacing
            )[0]
            for number, values in enumerate(shape)
        ]
    )[used]
    second = solve_bins(node, photons, m, n, q, known + between * m)
    values, variances = [], []
    for start, change, variance, good in zip(
        shape,
        windows.by_panel(second.value),
        windows.by_panel(second.variance),
        windows.by_panel(is_measured(second)),
    ):
        values.append(filled(np.where(good, start + change, np.nan)))
        variances.append(filled(np.where(good, variance, np.nan)))
    return tuple(values), tuple(variances)
