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
) -> Frame: ...

class Accumulator:
    """Sums per voxel over the images of one panel."""

    def __init__(self, half_size: Sequence[int], n_threads: int = 1) -> None: ...
    def add_images(
        self,
        panel: Panel,
        frames: list[Frame],
        images: list[flex.int] | list[flex.double],
    ) -> None: ...
    def finish(self) -> dict[str, flex.int | flex.double]:
        """voxel, n_pixels (int); value, weight, x, y, z (double), sorted by voxel."""

def voxels(half_size: Sequence[int], panel: Panel, frame: Frame) -> flex.int: ...
def keep_freed_memory() -> None: ...
