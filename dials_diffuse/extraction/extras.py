"""What the pixel loop gets with each image besides counts: spots, lattices, background."""

from __future__ import annotations

import functools
from typing import Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList

import dials_diffuse_ext as ext
from dials_diffuse.background.model import (
    BackgroundAxes,
    ImageBackground,
    grid_at,
    profile_at,
)
from dials_diffuse.bragg.lattices import shared_images
from dials_diffuse.bragg.points import PointGrid
from dials_diffuse.extraction.blocks import Block
from dials_diffuse.extraction.loop import loop_frame
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.extraction.tables import PanelTable
from dials_diffuse.geometry.orientation import frame_model
from dials_diffuse.grid import Grid
from dials_diffuse.io.background import BackgroundFile

CACHED_BASES = 2


@functools.lru_cache(maxsize=1)
def _open_background(path: str) -> BackgroundFile:
    """The background, opened once in each process: HDF5 files do not bear a fork."""
    return BackgroundFile(path)


@functools.lru_cache(maxsize=CACHED_BASES)
def _base(path: str, number: int) -> list[tuple]:
    """Values and variances of a base for each panel, as flex arrays."""
    values, variances = _open_background(path).base(number)
    return [
        tuple(flumpy.from_numpy(a.ravel().astype(np.float32)) for a in pair)
        for pair in zip(values, np.nan_to_num(variances))
    ]


class ImageExtrasSource:
    """Makes the extras of images; empty where there are none.

    Args:
        experiments: The experiments.
        grid: The voxel grid.
        settings: The settings of extraction.
    """

    def __init__(
        self, experiments: ExperimentList, grid: Grid, settings: ExtractionSettings
    ) -> None:
        self.experiments, self.grid, self.settings = experiments, grid, settings
        self._half_points = PointGrid(grid).half_size
        self._partners = [[] for _ in experiments]
        if settings.bragg.exclusion in ("ellipsoid", "auto") and len(experiments) > 1:
            self._partners = shared_images(experiments)

    def any(self, number: int) -> bool:
        """Whether images of an experiment have extras at all."""
        settings = self.settings
        return bool(settings.background or settings.shoeboxes or self._partners[number])

    def of_block(self, block: Block) -> BlockExtras:
        """The extras of a block's images."""
        return BlockExtras(self, block)

    def background(self, number: int, array_index: int) -> ImageBackground:
        """The background of an image."""
        file = _open_background(self.settings.background)
        experiment = self.experiments[number]
        return file.of_image(experiment.identifier, array_index)

    @property
    def background_axes(self) -> BackgroundAxes:
        """Where the points of profiles and grids are."""
        return _open_background(self.settings.background).axes

    def others(self, number: int, array_index: int) -> list[ext.Frame]:
        """Frames of the other lattices of an image."""
        frames = []
        for partner in self._partners[number]:
            other = self.experiments[partner.experiment]
            model = frame_model(other, array_index + partner.shift)
            frames.append(loop_frame(model, other, self.grid, self.settings))
        return frames

    def rectangles(self, number: int, array_index: int, panel: int) -> np.ndarray:
        """Columns x0, x1, y0, y1, h, k, l of the spots of an image on a panel.

        The indices are beyond the grid: pixels of spots are dropped.
        """
        boxes = self.settings.shoeboxes.boxes_of_image(number, array_index)[panel]
        nowhere = np.full((len(boxes), 3), 2 * max(self._half_points) + 1)
        return np.concatenate([boxes, nowhere], axis=1).astype(np.int32)

    def image(
        self,
        number: int,
        array_index: int,
        panel: int,
        unit: float,
        terms: ImageBackground | None,
    ) -> ext.ImageExtras:
        """The extras of a panel of an image.

        Args:
            number: Number of the experiment.
            array_index: Array index of the image.
            panel: Number of the panel.
            unit: Photons per unit of intensity and weight.
            terms: The background of the image, or None.
        """
        extras = ext.ImageExtras()
        for frame in self.others(number, array_index):
            extras.add_other(frame)
        if self.settings.shoeboxes is not None:
            columns = self.rectangles(number, array_index, panel)
            extras.set_rectangles(flumpy.from_numpy(columns.ravel()), self._half_points)
        if terms is not None:
            self._set_background(extras, terms, panel, unit)
        return extras

    def _set_background(
        self, extras: ext.ImageExtras, terms: ImageBackground, panel: int, unit: float
    ) -> None:
        axes = self.background_axes
        extras.set_unit(unit)
        if terms.base_index is not None:
            base, variance = _base(self.settings.background, terms.base_index)[panel]
            extras.set_base(base, variance, terms.rate_scale)
        if terms.profile is not None:
            profile = np.ascontiguousarray(terms.profile, dtype=np.float32)
            if len(profile) == 1:
                profile = np.repeat(profile, 2)
            extras.set_profile(flumpy.from_numpy(profile), axes.s_start, axes.s_step)
        if terms.grids is not None:
            grid = np.ascontiguousarray(terms.grids[panel], dtype=np.float32)
            extras.set_grid(
                flumpy.from_numpy(grid.ravel()), *grid.shape[::-1], axes.spacing_px
            )


class BlockExtras:
    """The extras of the images of one block.

    Args:
        source: Where they come from.
        block: The block.
    """

    def __init__(self, source: ImageExtrasSource, block: Block) -> None:
        self.source, self.block = source, block
        self.terms: dict[int, ImageBackground] = {}
        if source.settings.background:
            self.terms = {
                i: source.background(block.experiment, i) for i in block.array_indices
            }

    def images(
        self,
        array_indices: Sequence[int],
        panel: int,
        table: PanelTable,
        exposure: float,
    ) -> list[ext.ImageExtras]:
        """The extras of a panel of some images."""
        return [
            self.source.image(
                self.block.experiment,
                i,
                panel,
                table.weight_unit * exposure,
                self.terms.get(i),
            )
            for i in array_indices
        ]

    def add_smooth_variance(self, rows: np.ndarray, s: np.ndarray) -> None:
        """Add the variance of profiles and grids to ``background_variance``.

        The pixels of a voxel share their error, and so do, in groups, the images of a
        block: the standard deviations are added, σ(B) = M σ, the upper limit. A base is
        shared by the images too: n images add n² times its variance.

        Args:
            rows: Sums of dtype ``extraction.loop.SUMS`` of the block.
            s: 1/d of each row, 1/Å.
        """
        if not self.terms:
            return
        rows["background_variance"] *= len(self.block)
        axes = self.source.background_axes
        x, y = (rows[axis] / rows["n_pixels"] for axis in "xy")
        deviation = np.zeros(len(rows))
        for terms in self.terms.values():
            variance = np.zeros(len(rows))
            if terms.profile is not None:
                variance += profile_at(s, terms.profile, terms.profile_variance, axes)[
                    1
                ]
            for panel, grid in enumerate(terms.grids or ()):
                at = rows["panel"] == panel
                variance[at] += grid_at(
                    x[at], y[at], grid, terms.grid_variances[panel], axes.spacing_px
                )[1]
            deviation += np.sqrt(variance)
        deviation /= len(self.terms)
        rows["background_variance"] += (deviation * rows["normalisation"]) ** 2
