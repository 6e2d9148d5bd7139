"""The pixels of one image that the Bragg exclusion of extraction leaves out.

The regions about the Bragg positions differ from image to image. They are no part of a
mask that all images share: extraction leaves them out image by image. To show them, one
image of each detector is put through the pixel loop of extraction, with the same
settings; what the loop adds to no voxel is the Bragg layer of this image, whatever kind
of exclusion made it and however many lattices the image has.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, Callable, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

import dials_diffuse_ext as ext
from dials.array_family import flex
from dials_diffuse.extraction.blocks import Block, image_number, images_of
from dials_diffuse.extraction.extras import ImageExtrasSource
from dials_diffuse.extraction.loop import loop_frame, new_accumulator
from dials_diffuse.extraction.prepare import Prepared, prepare
from dials_diffuse.extraction.reindexing import select_experiments
from dials_diffuse.extraction.settings import (
    BraggSettings,
    ExtractionSettings,
    IndexingSettings,
)
from dials_diffuse.extraction.tables import PanelTable, panel_arrays
from dials_diffuse.geometry.orientation import frame_model
from dials_diffuse.grid import Grid
from dials_diffuse.masks.series import Series

logger = logging.getLogger("dials.diffuse.mask")

BITS = 31  # of a positive number in an image

# What is not shown, and why.
NOT_SHOWN = {
    "none": "bragg.exclusion=none leaves no pixel out",
    "statistical": "bragg.exclusion=statistical is decided by the voxels of all images "
    "in dials.diffuse_extract",
}


@dataclasses.dataclass(frozen=True)
class BraggSample:
    """Of which image the Bragg layer is made, and how.

    Attributes:
        settings: Of extraction; only what concerns the Bragg positions matters.
        experiment: Number of the experiment whose image is shown; None for the first
            with a crystal of each detector.
        image: Number of the image, as in the scan; None for the first.
    """

    settings: ExtractionSettings = ExtractionSettings()
    experiment: int | None = None
    image: int | None = None

    @classmethod
    def from_phil(cls, params: Any, nproc: int) -> BraggSample:
        """The sample of the extracted parameters of ``phil/mask.phil``."""
        settings = ExtractionSettings(
            bragg=BraggSettings.from_phil(params.bragg),
            # which of several equivalent settings a crystal has does not matter here
            indexing=IndexingSettings(consistent="none"),
            gain=params.gain,
            trusted_range=(
                tuple(params.trusted_range) if params.trusted_range else None
            ),
            nproc=nproc,
        )
        return cls(settings, params.sample.experiment, params.sample.image)

    @property
    def why_not_shown(self) -> str | None:
        """Why there can be no Bragg layer, if so."""
        return NOT_SHOWN.get(self.settings.bragg.exclusion)


@dataclasses.dataclass(frozen=True)
class BraggLayer:
    """What the Bragg exclusion leaves out of one image.

    Attributes:
        panels: True for pixels near a Bragg position, (n_slow, n_fast) for each panel,
            whether they are masked besides or not.
        experiment: The experiment of the image.
        array_index: Array index of the image in its scan.
        exclusion: What is left out, in words.
        d_min: Resolution to which extraction goes, Å.
    """

    panels: tuple[np.ndarray, ...]
    experiment: Experiment
    array_index: int
    exclusion: str
    d_min: float

    @property
    def image(self) -> int:
        """Number of the image, as in the scan."""
        return self.array_index + 1

    @property
    def path(self) -> str:
        """The file of the image."""
        number = image_number(self.experiment, self.array_index)
        return self.experiment.imageset.get_path(number)

    def summary(self, good: Sequence[np.ndarray]) -> dict[str, Any]:
        """The figures of the layer beside a mask.

        Args:
            good: The pixels of each panel that the mask leaves.

        Returns:
            ``n_pixels`` of the layer, ``n_only`` of them that the mask leaves, and
            ``n_together`` that layer or mask take; what the layer is.
        """
        n_only = sum(np.count_nonzero(b & g) for b, g in zip(self.panels, good))
        n_masked = sum(np.count_nonzero(~g) for g in good)
        return {
            "name": "bragg",
            "experiment": self.experiment.identifier,
            "image": self.image,
            "file": self.path,
            "exclusion": self.exclusion,
            "d_min": self.d_min,
            "n_pixels": int(sum(map(np.count_nonzero, self.panels))),
            "n_only": int(n_only),
            "n_together": int(n_masked + n_only),
            "panels": [int(np.count_nonzero(panel)) for panel in self.panels],
        }


def describe_exclusion(bragg: BraggSettings) -> str:
    """What an exclusion leaves out, in words."""
    if bragg.exclusion == "auto":
        return "within the ellipsoids about the Bragg positions fitted to the spots"
    if bragg.exclusion == "shoebox":
        return "in the boxes of the predicted spots"
    unit = "1/Å" if bragg.unit == "inverse_angstrom" else "reciprocal cells"
    axes = ", ".join(f"{x:g}" for x in bragg.semi_axes)
    return f"within ellipsoids of {axes} {unit} about the Bragg positions"


def added_pixels(
    voxel: np.ndarray, add_image: Callable[[np.ndarray], dict[str, Any]]
) -> np.ndarray:
    """Which pixels the loop adds to their voxels.

    Each pixel of a voxel counts a power of two of its own, 31 pixels of each voxel at a
    time, while the others have a value that is not trusted: the bits of the sum that the
    loop makes for the voxel are the pixels that it has added.

    Args:
        voxel: Voxel of each pixel, flat; -1 for none.
        add_image: Puts an image, int32, flat, through the loop and returns its sums.
    """
    inside = np.flatnonzero(voxel >= 0)
    order = inside[np.argsort(voxel[inside], kind="stable")]
    _, start, n = np.unique(voxel[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(start, n)
    added = np.zeros(len(voxel), dtype=bool)
    for first in range(0, int(n.max(initial=0)), BITS):
        now = (rank >= first) & (rank < first + BITS)
        pixels, bit = order[now], rank[now] - first
        image = np.full(len(voxel), -1, dtype=np.int32)
        image[pixels] = 1 << bit
        sums = add_image(image)
        keys = flumpy.to_numpy(sums["voxel"])
        bits = np.append(flumpy.to_numpy(sums["value"]).astype(np.int64), 0)
        place = np.searchsorted(keys, voxel[pixels])
        known = np.append(keys, -1)[place] == voxel[pixels]
        added[pixels] = known & (bits[place] >> bit & 1 == 1)
    return added


def _unmasked_table(number: int, experiment: Experiment, n_threads: int) -> PanelTable:
    """A panel for the loop, with no pixel masked and all positive values trusted."""
    panel = experiment.detector[number]
    n_fast, n_slow = panel.get_image_size()
    good = np.ones((n_slow, n_fast), dtype=bool)
    corrections = ExtractionSettings().corrections
    arrays = panel_arrays(panel, experiment.beam, good, corrections, n_threads)
    # named, as in ``extraction.tables.detector_tables``
    e = [flumpy.from_numpy(component.ravel()) for component in arrays.e]
    weight = flumpy.from_numpy(np.maximum(arrays.weight, 1).ravel())
    loop_panel = ext.Panel(
        *e,
        weight=weight,
        nfast=n_fast,
        nslow=n_slow,
        trusted_min=0.0,
        trusted_max=float(2**BITS - 1),
    )
    return PanelTable(loop_panel, arrays, arrays.weight_unit, 1.0, 0.0)


def _loop_sums(
    accumulator: ext.Accumulator,
    table: PanelTable,
    frame: ext.Frame,
    extras: list[ext.ImageExtras] | None,
    values: np.ndarray,
) -> dict[str, Any]:
    """The sums of the loop over an image of a panel, int32, flat."""
    image = flumpy.from_numpy(values)
    accumulator.add_images(table.panel, [frame], [image], extras)
    return accumulator.finish()


def left_out(
    experiments: ExperimentList,
    number: int,
    array_index: int,
    grid: Grid,
    settings: ExtractionSettings,
) -> tuple[np.ndarray, ...]:
    """Pixels within the limits of the grid that the Bragg exclusion leaves out.

    Args:
        experiments: All experiments that are extracted, for the other lattices.
        number: That of the image.
        array_index: The image in its scan.
        grid: The voxel grid.
        settings: Of extraction, with what was found about the Bragg peaks.

    Returns:
        For each panel, True for pixels left out, (n_slow, n_fast).
    """
    settings = dataclasses.replace(settings, background=None)
    no_exclusion = dataclasses.replace(settings, bragg=BraggSettings(exclusion="none"))
    experiment = experiments[number]
    model = frame_model(experiment, array_index)
    frame = loop_frame(model, experiment, grid, settings)
    everywhere = loop_frame(model, experiment, grid, no_exclusion)
    accumulator = new_accumulator(grid, settings, settings.nproc)
    source = ImageExtrasSource(experiments, grid, settings)
    block = Block(number, range(array_index, array_index + 1), 1.0)
    extras = source.of_block(block) if source.any(number) else None
    result = []
    for i, panel in enumerate(experiment.detector):
        table = _unmasked_table(i, experiment, settings.nproc)
        more = extras.images(block.array_indices, i, table, 1.0) if extras else None

        places = ext.voxels(grid.half_size, table.panel, everywhere)
        voxel = flumpy.to_numpy(places)
        add_image = functools.partial(_loop_sums, accumulator, table, frame, more)
        dropped = (voxel >= 0) & ~added_pixels(voxel, add_image)
        result.append(dropped.reshape(panel.get_image_size()[::-1]))
    return tuple(result)


def array_index_of(experiment: Experiment, image: int | None) -> int:
    """Array index of an image by its number; of the first image if it is None.

    Raises:
        ValueError: The experiment does not have the image.
    """
    indices = images_of(experiment)
    index = indices.start if image is None else image - 1
    if index not in indices:
        raise ValueError(
            f"sample.image={image}: the experiment has the images {indices.start + 1} to "
            f"{indices.stop}"
        )
    return index


def sample_images(
    experiments: ExperimentList, series: Sequence[Series], sample: BraggSample
) -> list[tuple[int, int] | None]:
    """The image of each detector that shows the Bragg layer.

    Returns:
        Number of the experiment and array index, or None where no experiment of the
        detector has a crystal.

    Raises:
        ValueError: The user's experiment or image is not there, or has no crystal.
    """
    number = sample.experiment
    if number is not None and number >= len(experiments):
        raise ValueError(
            f"sample.experiment={number}: the list has {len(experiments)} experiments, "
            "the first is 0"
        )
    if number is not None and experiments[number].crystal is None:
        raise ValueError(f"sample.experiment={number} has no crystal: choose another")
    numbers = {e.identifier: i for i, e in enumerate(experiments)}
    result: list[tuple[int, int] | None] = []
    for own in series:
        found = [
            numbers[e.identifier] for e in own.experiments if e.crystal is not None
        ]
        if not found:
            result.append(None)
            continue
        chosen = number if number in found else found[0]
        image = sample.image if number in (None, chosen) else None
        result.append((chosen, array_index_of(experiments[chosen], image)))
    return result


def bragg_layers(
    experiments: ExperimentList,
    series: Sequence[Series],
    reflections: flex.reflection_table | None,
    masks: Sequence[Sequence[np.ndarray]],
    sample: BraggSample,
) -> list[BraggLayer | None]:
    """The Bragg layer of an image of each detector; None where there is none.

    What extraction would refuse leaves the mask as it is: there is a warning then.

    Args:
        experiments: All experiments.
        series: Those of each detector.
        reflections: Theirs, which exclusion=shoebox needs, or None.
        masks: The mask of each detector, True for good pixels.
        sample: The image, and the settings of extraction.

    Raises:
        ValueError: The sample is not there.
    """
    images = sample_images(experiments, series, sample)
    if sample.why_not_shown or not any(images):
        reason = sample.why_not_shown or "no experiment has a crystal"
        logger.info("There is no Bragg layer: %s", reason)
        return [None] * len(series)
    kept = [i for i, e in enumerate(experiments) if e.crystal is not None]
    by_identifier = {
        e.identifier: tuple(good)
        for own, good in zip(series, masks)
        for e in own.experiments
    }
    settings = dataclasses.replace(sample.settings, masks=by_identifier)
    needs_boxes = settings.bragg.exclusion == "shoebox" and reflections is not None
    own_reflections = select_experiments(reflections, kept) if needs_boxes else None
    crystals = ExperimentList([experiments[i] for i in kept])
    try:
        prepared = prepare(crystals, own_reflections, settings)
        grid = prepared.grid
        settings.bragg.check_coverage(grid.cell, grid.rotations)
    except ValueError as e:
        logger.warning("Warning: There is no Bragg layer: %s", e)
        return [None] * len(series)
    return [
        image and _layer(prepared, kept.index(image[0]), image[1]) for image in images
    ]


def _layer(prepared: Prepared, number: int, array_index: int) -> BraggLayer:
    """The Bragg layer of an image of an experiment that is ready for extraction."""
    settings, grid = prepared.settings, prepared.grid
    return BraggLayer(
        panels=left_out(prepared.experiments, number, array_index, grid, settings),
        experiment=prepared.experiments[number],
        array_index=array_index,
        exclusion=describe_exclusion(settings.bragg),
        d_min=grid.d_min,
    )
