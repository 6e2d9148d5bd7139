"""What is settled before the images are extracted: indexing setting, images in order.

1. Crystals are brought into one indexing setting (``reindexing``).
2. The grid is made, from the cells as they are now.
3. Each image's spots are compared with its model (``geometry.validation``), and images
   far off are left out on request.
4. The pixels of Bragg peaks are found (``bragg.ellipsoid``, ``bragg.shoeboxes``).
"""

from __future__ import annotations

import dataclasses
import logging

from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.bragg.ellipsoid import FitSettings, fit_data_sets
from dials_diffuse.bragg.shoeboxes import Shoeboxes, predicted_boxes, spot_size
from dials_diffuse.extraction.blocks import images_of
from dials_diffuse.extraction.geometry_report import log_images
from dials_diffuse.extraction.indexing_report import log_indexing
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.reindexing import (
    Indexing,
    apply_to_experiments,
    apply_to_reflections,
    find_indexing,
)
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.geometry.validation import (
    ImageResiduals,
    automatic_tolerance,
    image_residuals,
    images_to_reject,
)
from dials_diffuse.grid import Grid

logger = logging.getLogger("dials.diffuse.extract")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Experiments that are ready for extraction.

    Attributes:
        experiments: In one indexing setting, each with images left.
        reflections: Those of the experiments, in the same setting, or None.
        grid: The voxel grid.
        settings: Of extraction, with what was found about Bragg peaks.
        rejected: Experiment and array index of each image to leave out.
        indexing: How the setting was found; None if there was no choice.
        images: Where the spots of each image fall; None without reflections.
        tolerance: Largest mean distance of an image in order, Å⁻¹; None likewise.
    """

    experiments: ExperimentList
    reflections: flex.reflection_table | None
    grid: Grid
    settings: ExtractionSettings
    rejected: frozenset[tuple[int, int]] = frozenset()
    indexing: Indexing | None = None
    images: ImageResiduals | None = None
    tolerance: float | None = None


def prepare(
    experiments: ExperimentList,
    reflections: flex.reflection_table | None,
    settings: ExtractionSettings,
) -> Prepared:
    """Bring experiments into one setting and find the images that are in order.

    Args:
        experiments: Experiments with crystals.
        reflections: Indexed reflections, ``id`` counting these experiments, or None.
        settings: The settings of extraction.

    Raises:
        ValueError: No image is left, or what is needed to find Bragg peaks is missing.
    """
    _check_reflections(reflections, settings)  # before images are read
    indexing = None
    if settings.indexing.consistent == "auto":
        indexing = _find_indexing(experiments, settings)
    if indexing is not None:
        experiments = apply_to_experiments(experiments, indexing)
        if reflections is not None:
            reflections = apply_to_reflections(reflections, indexing)
    grid = make_grid(experiments, settings)
    images, tolerance, rejected = None, None, frozenset()
    if reflections is not None:
        images = image_residuals(experiments, reflections)
        tolerance = settings.geometry.tolerance
        if tolerance is None:
            tolerance = automatic_tolerance(images, grid.cell, grid.ndiv)
        rejected = _images_out_of_order(experiments, images, tolerance, settings)
    settings = _with_peaks(experiments, reflections, grid, settings, rejected)
    return Prepared(
        experiments,
        reflections,
        grid,
        settings,
        rejected,
        indexing,
        images,
        tolerance,
    )


def _check_reflections(
    reflections: flex.reflection_table | None, settings: ExtractionSettings
) -> None:
    if reflections is None and settings.geometry.reject_images:
        raise ValueError(
            "geometry.reject_images=True needs the reflection table of the experiments: "
            "give the .refl of dials.index or dials.refine"
        )
    if settings.bragg.exclusion != "shoebox":
        return
    if reflections is None or "bbox" not in reflections:
        raise ValueError(
            "bragg.exclusion=shoebox needs the reflection table of the experiments with "
            "the bounding boxes of spots: give the .refl of dials.index or dials.refine"
        )


def _images_out_of_order(
    experiments: ExperimentList,
    images: ImageResiduals,
    tolerance: float,
    settings: ExtractionSettings,
) -> frozenset[tuple[int, int]]:
    """Experiment and array index of the images to leave out."""
    reject = settings.geometry.reject_images
    log_images(images, tolerance, reject)
    rejected = images_to_reject(images, tolerance) if reject else frozenset()
    if rejected and not any(
        (number, i) not in rejected
        for number, experiment in enumerate(experiments)
        for i in images_of(experiment)
    ):
        raise ValueError(
            f"The spots of all images are farther than geometry.tolerance={tolerance:g} "
            "1/Å from their Bragg positions: refine the models or use a larger tolerance"
        )
    return rejected


def _with_peaks(
    experiments: ExperimentList,
    reflections: flex.reflection_table | None,
    grid: Grid,
    settings: ExtractionSettings,
    rejected: frozenset[tuple[int, int]],
) -> ExtractionSettings:
    """The settings with the pixels of Bragg peaks."""
    if settings.bragg.exclusion == "auto":
        fit = FitSettings(
            fraction=settings.bragg.fraction,
            d_min=grid.d_min,
            gain=settings.gain,
            trusted_range=settings.trusted_range,
            mask=settings.mask,
            masks=settings.masks,
            rejected=rejected,
        )
        fitted = fit_data_sets(experiments, grid.rotations, fit)
        names = [e.identifier for e in experiments]
        return dataclasses.replace(settings, ellipsoids=dict(zip(names, fitted)))
    if settings.bragg.exclusion != "shoebox":
        return settings
    size = spot_size(reflections, experiments)
    boxes = predicted_boxes(experiments, grid.d_min, size, settings.bragg.absent)
    logger.info(
        "Bragg exclusion: boxes of %.1f x %.1f pixels and %.2f degrees about %d "
        "predicted reflections",
        2 * size.fast,
        2 * size.slow,
        2 * size.angle,
        len(boxes.box),
    )
    shoeboxes = Shoeboxes(experiments, boxes, settings.bragg.margin)
    return dataclasses.replace(settings, shoeboxes=shoeboxes)


def _find_indexing(
    experiments: ExperimentList, settings: ExtractionSettings
) -> Indexing | None:
    """The setting of each crystal that agrees with the others, if there is a choice."""
    grid = make_grid(experiments, settings)
    indexing = find_indexing(experiments, grid, settings, settings.indexing.in_doubt)
    if indexing is not None:
        log_indexing(indexing)
    return indexing
