"""What the pixel loop gets with each image besides counts: spots, lattices, background."""

from __future__ import annotations

import functools
import os
from typing import Any, Callable, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList

import dials_diffuse_ext as ext
from dials_diffuse.background.model import (
    BackgroundAxes,
    GridPlaces,
    ImageBackground,
    ProfilePlaces,
)
from dials_diffuse.bragg.lattices import shared_images
from dials_diffuse.bragg.points import PointGrid
from dials_diffuse.extraction.blocks import Block, images_of
from dials_diffuse.extraction.loop import loop_frame
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.extraction.tables import PanelTable
from dials_diffuse.geometry.orientation import frame_model
from dials_diffuse.grid import Grid
from dials_diffuse.io.background import BackgroundFile

CACHED_BASES = 2


def _as_flex(array: np.ndarray) -> Any:
    """A flex array of its own, of one dimension.

    One that shares numpy's memory ends the process if it is freed while an exception is
    on its way (flumpy of dxtbx 3.11).
    """
    return flumpy.from_numpy(np.ascontiguousarray(array).ravel()).deep_copy()


class SharedBackground:
    """A background that each process opens for itself: HDF5 files do not bear a fork.

    It is opened when first needed, and its latest bases are kept.

    Args:
        path: The output of dials.diffuse_background.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._process = 0
        self._file: BackgroundFile | None = None
        self._bases: dict[int, list[tuple]] = {}

    @property
    def file(self) -> BackgroundFile:
        """The file, as this process has opened it."""
        if self._process != os.getpid():
            self._file, self._process = BackgroundFile(self._path), os.getpid()
        return self._file

    def base(self, number: int) -> list[tuple]:
        """Values and variances of a base for each panel, as flex arrays."""
        if number not in self._bases:
            while len(self._bases) >= CACHED_BASES:
                del self._bases[next(iter(self._bases))]
            values, variances = self.file.base(number)
            self._bases[number] = [
                tuple(_as_flex(a.astype(np.float32)) for a in pair)
                for pair in zip(values, np.nan_to_num(variances))
            ]
        return self._bases[number]


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
        self._base_of_image: dict[int, dict[int, int | None]] = {}
        self._background = None
        if settings.background:
            self._background = SharedBackground(settings.background)
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
        identifier = self.experiments[number].identifier
        return self._background.file.of_image(identifier, array_index)

    @property
    def background_axes(self) -> BackgroundAxes:
        """Where the points of profiles and grids are."""
        return self._background.file.axes

    def sharing(self, number: int, array_index: int) -> int:
        """How many images of an experiment have the same base as one of them."""
        if number not in self._base_of_image:
            experiment = self.experiments[number]
            # images with a base have no other terms that would have to be read
            self._base_of_image[number] = {
                i: self.background(number, i).base_index for i in images_of(experiment)
            }
        bases = self._base_of_image[number]
        return list(bases.values()).count(bases[array_index])

    def others(self, number: int, array_index: int) -> list[ext.Frame]:
        """Frames of the other lattices of an image.

        A lattice that is known only in some of the images is not looked for in the rest.
        """
        frames = []
        for partner in self._partners[number]:
            other = self.experiments[partner.experiment]
            index = array_index + partner.shift
            if index not in images_of(other):
                continue
            model = frame_model(other, index)
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
            extras.set_rectangles(_as_flex(columns), self._half_points)
        if terms is not None:
            self._set_background(extras, terms, panel, unit)
        return extras

    def _set_background(
        self, extras: ext.ImageExtras, terms: ImageBackground, panel: int, unit: float
    ) -> None:
        axes = self.background_axes
        extras.set_unit(unit)
        if terms.base_index is not None:
            base, variance = self._background.base(terms.base_index)[panel]
            extras.set_base(base, variance, terms.rate_scale)
        if terms.profile is not None:
            profile = terms.profile.astype(np.float32)
            if len(profile) == 1:
                profile = np.repeat(profile, 2)
            extras.set_profile(_as_flex(profile), axes.s_start, axes.s_step)
        if terms.grids is not None:
            grid = terms.grids[panel].astype(np.float32)
            extras.set_grid(_as_flex(grid), *grid.shape[::-1], axes.spacing_px)


def _hkl_of_rows(points: PointGrid, key: np.ndarray) -> np.ndarray:
    """Fractional Miller indices of voxel centres and points, shape (n, 3)."""
    is_point = key >= points.n_voxels
    hkl = np.empty((len(key), 3))
    hkl[is_point] = points.hkl(key[is_point])
    hkl[~is_point] = points.grid.index(key[~is_point]) / np.array(points.grid.ndiv)
    return hkl


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

    def images_in_voxel(self, rows: np.ndarray) -> np.ndarray:
        """Images of a sweep in which a pixel stays in a voxel, shape (n,), at least 1.

            K = 1 / |diag(ndiv) d(S R F A)⁻¹ s|

        with d the change over an image: the way through the unit cube, on the average
        over its pixels, is about as long as its edge. No more than there are images of
        the same base.

        Args:
            rows: Sums of dtype ``extraction.loop.SUMS`` of the block.
        """
        number, grid = self.block.experiment, self.source.grid
        middle = self.block.array_indices[len(self.block) // 2]
        model = frame_model(self.source.experiments[number], middle)
        hkl = _hkl_of_rows(PointGrid(grid), rows["key"])
        motion = (hkl @ (model.sweep() @ model.setting).T) * np.array(grid.ndiv)
        speed = np.linalg.norm(motion, axis=1)
        shared = self.source.sharing(number, middle)
        return np.clip(1 / np.maximum(speed, 1e-6), 1, shared)

    def add_smooth_variance(self, rows: np.ndarray, s: np.ndarray) -> None:
        """Make the variance that of all images together, with profiles and grids.

        The pixels of a voxel share their error in a profile or grid, and so do, in
        groups, the images of a block: the standard deviations are added, σ(B) = M σ, the
        upper limit. A base has errors of its own in each pixel, but a pixel that stays in
        a voxel for K images (``images_in_voxel``) has the same error in each: its
        variance is K² times that of one image, K times the sum over the images. It counts
        so in each block, so that the sum over the blocks of a voxel is right. Bases that
        are smoothed have neighbours that err together, which is not contained.

        Args:
            rows: Sums of dtype ``extraction.loop.SUMS`` of the block.
            s: 1/d of each row, 1/Å.
        """
        if not self.terms:
            return
        if any(terms.base_index is not None for terms in self.terms.values()):
            rows["background_variance"] *= self.images_in_voxel(rows)
        deviation = np.zeros(len(rows))
        variances = self._variances(rows, s)
        for terms in self.terms.values():
            deviation += np.sqrt(variances(terms))
        deviation /= len(self.terms)
        rows["background_variance"] += (deviation * rows["normalisation"]) ** 2

    def _variances(
        self, rows: np.ndarray, s: np.ndarray
    ) -> Callable[[ImageBackground], np.ndarray]:
        """Function for the variance of an image's profile and grids in each row.

        Where the rows lie among their points is the same for all images.
        """
        axes = self.source.background_axes

        @functools.lru_cache(maxsize=None)
        def on_profile(n: int) -> ProfilePlaces:
            return ProfilePlaces.of(s, n, axes)

        @functools.lru_cache(maxsize=None)
        def on_grid(
            panel: int, shape: tuple[int, int]
        ) -> tuple[np.ndarray, GridPlaces]:
            at = np.flatnonzero(rows["panel"] == panel)
            x, y = (rows[axis][at] / rows["n_pixels"][at] for axis in "xy")
            return at, GridPlaces.of(x, y, shape, axes.spacing_px)

        def variance_of(terms: ImageBackground) -> np.ndarray:
            variance = np.zeros(len(rows))
            if terms.profile is not None:
                places = on_profile(len(terms.profile))
                variance += places.variance(terms.profile_variance)
            for panel, nodes in enumerate(terms.grid_variances if terms.grids else ()):
                at, grid = on_grid(panel, nodes.shape)
                variance[at] += grid.variance(nodes)
            return variance

        return variance_of
