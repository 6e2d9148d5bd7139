from __future__ import annotations

from typing import Sequence

from scitbx.array_family import flex
from scitbx.matrix import col, sqr

class Panel:
    """Per-pixel arrays of a panel; directions are unit vectors from the sample."""

    def __init__(
        self,
        ex: flex.float,
        ey: flex.float,
        ez: flex.float,
        weight: flex.int,
        nfast: int,
        nslow: int,
        trusted_min: float,
        trusted_max: float,
    ) -> None: ...

class Frame:
    """Crystal and beam at one image; made by ``make_frame``."""

def make_frame(
    w: sqr | Sequence[float],
    s0: col | Sequence[float],
    wavelength: float,
    s_min: float,
    s_max: float,
    ndiv: Sequence[float],
    exclusion: Sequence[float] | None,
    z: float,
    growth: float = 0.0,
    sweep: sqr | Sequence[float] | None = None,
    spread: bool = False,
    growth_radial: float = 0.0,
    radial: float = 0.0,
) -> Frame: ...

class ImageExtras:
    """What else is known of an image of a panel: other lattices, spots, background."""

    def __init__(self) -> None: ...
    def add_other(self, frame: Frame) -> None: ...
    def set_rectangles(self, columns: flex.int, half_points: Sequence[int]) -> None:
        """Seven numbers for each rectangle: x0, x1, y0, y1, h, k, l."""

    def set_base(self, base: flex.float, variance: flex.float, rate: float) -> None: ...
    def set_profile(
        self, profile: flex.float, s_start: float, s_step: float
    ) -> None: ...
    def set_grid(
        self, grid: flex.float, nfast: int, nslow: int, spacing: float
    ) -> None: ...
    def set_unit(self, unit: float) -> None:
        """Photons per unit of intensity and weight."""

class Accumulator:
    """Sums per voxel over the images of one panel.

    With ``half_points`` pixels near lattice points are added up by themselves, under
    numbers that follow those of the voxels; ``absent`` has a flag for each of the points.
    """

    def __init__(
        self,
        half_size: Sequence[int],
        n_threads: int = 1,
        half_points: Sequence[int] | None = None,
        absent: flex.bool | None = None,
    ) -> None: ...
    def add_images(
        self,
        panel: Panel,
        frames: list[Frame],
        images: list[flex.int] | list[flex.double],
        extras: list[ImageExtras] | None = None,
    ) -> None: ...
    def finish(self) -> dict[str, flex.int | flex.double]:
        """voxel, n_pixels (int); value, weight, x, y, z, background, variance (double),
        sorted by voxel."""

class ScalingBlock:
    """Rows of observations, sorted by group, and the terms of a scaling model.

    A row has ``photons`` y and the ``normalisation`` m; the model expects m a (b I + c)
    photons, with the product a of the outer factors (role 1), b of the inner ones (role
    0) and the sum c of the offsets (role 2). See ``scaling_sums.h``.
    """

    n_groups: int
    n_rows: int

    def __init__(
        self, start: flex.int, photons: flex.float, normalisation: flex.float
    ) -> None: ...
    def add_term(self, role: int, cell: flex.int, n_cells: int) -> None: ...
    def set_weights(self, weight: flex.float) -> None: ...
    def set_reference(self, intensity: flex.float, weight: flex.float) -> None:
        """One more observation of I of each group, and its weight, 0 for none."""

    def evaluate(self, values: list[flex.double], curvatures: bool = True) -> float:
        """The weighted sum of squares for the value of each cell of each term."""

    def responses(self, values: list[flex.double]) -> tuple[flex.float, flex.float]:
        """x = m a b and o = m a c of each row."""

    def gradient(self, term: int) -> flex.double:
        """By the logarithm of the values of a factor, by the values of an offset."""

    def curvature(self, term: int) -> flex.double:
        """Of the last evaluation, which must have been with curvatures."""
    def intensities(self) -> flex.double: ...

def voxels(half_size: Sequence[int], panel: Panel, frame: Frame) -> flex.int: ...
def keep_freed_memory() -> None: ...
