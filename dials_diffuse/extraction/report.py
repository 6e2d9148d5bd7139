"""What extraction tells the user: grid, crystals, rotation; then pixels and observations.

Of the pixels of all images, those that are masked or beyond the resolution limits are
counted from the models, those at Bragg positions and those in voxels from what was
extracted. The rest was dropped by its value, or by one of the exclusions that keep no
sums.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Mapping, Sequence

import numpy as np

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.blocks import Block
from dials_diffuse.extraction.reference import crystal_spread
from dials_diffuse.extraction.settings import BraggSettings, ExtractionSettings
from dials_diffuse.extraction.tables import (
    PixelCounts,
    TableKey,
    good_pixels,
    n_outside,
    table_keys,
)
from dials_diffuse.extraction.totals import ObservationTotals, PeakTotals
from dials_diffuse.grid import Grid

logger = logging.getLogger("dials.diffuse.extract")

# Crystals that differ by more than half a voxel blur each other's map.
MAX_SPREAD = 0.5

MOST_KEYS = 20  # of detector, beam and mask whose pixels are counted


def format_cell(unit_cell: Sequence[float]) -> str:
    """Cell parameters in Å and degrees, for the log."""
    return " ".join(f"{x:.2f}" for x in unit_cell)


def log_bragg(bragg: BraggSettings) -> None:
    """Log which pixels are left out around the Bragg positions."""
    if bragg.exclusion == "none":
        logger.info("Bragg exclusion: none, all pixels are kept")
        return
    if bragg.exclusion != "ellipsoid":
        return  # logged when it was found
    unit = "1/Å" if bragg.unit == "inverse_angstrom" else "reciprocal cells"
    logger.info("Bragg exclusion: ellipsoid of %g, %g, %g %s", *bragg.semi_axes, unit)


def log_grid(grid: Grid) -> None:
    """Log the voxel grid."""
    logger.info(
        "Grid: cell %s, Laue group %s, %d x %d x %d voxels per reciprocal cell, "
        "%.3f to %s Å, box of %d x %d x %d voxels",
        format_cell(grid.unit_cell),
        grid.laue_group.info(),
        *grid.ndiv,
        grid.d_min,
        f"{grid.d_max:.3f}" if grid.d_max else "infinity",
        *grid.shape,
    )


def log_crystals(experiments: ExperimentList, grid: Grid) -> None:
    """Log how far the crystals are from the reference cell; warn if it is too far."""
    spread = crystal_spread([e.crystal for e in experiments], grid)
    if len(experiments) == 1 and spread.rms.max() == 0:
        return
    voxels = spread.rms_voxels
    logger.info(
        "Cells against the reference cell at %.2f Å: rms difference in hkl %.4f (mean), "
        "%.4f (largest), that is %.2f and %.2f voxels",
        grid.d_min,
        spread.rms.mean(),
        spread.rms.max(),
        voxels.mean(),
        voxels.max(),
    )
    far = int(np.count_nonzero(voxels > MAX_SPREAD))
    if far:
        logger.warning(
            "Warning: the cells of %d of %d crystals differ from the reference cell by "
            "more than %.1f voxel at %.2f Å (largest: %.2f, experiment %d). Their voxels "
            "lie at other scattering vectors; leave them out, or use a larger d_min or a "
            "smaller ndiv",
            far,
            len(voxels),
            MAX_SPREAD,
            grid.d_min,
            voxels.max(),
            int(voxels.argmax()),
        )


def log_rotation(experiments: ExperimentList, grid: Grid) -> None:
    """Warn of images that sweep a voxel's width or more at the resolution limit."""
    width = max(
        (abs(e.scan.get_oscillation()[1]) for e in experiments if not e.is_still()),
        default=0.0,
    )
    # a rotation by dphi moves a point at s by up to s dphi
    lengths = np.array(grid.unit_cell[:3]) * grid.ndiv
    voxels = np.radians(width) / grid.d_min * lengths.max()
    if voxels > 1:
        logger.warning(
            "Warning: images of %g degrees sweep up to %.1f voxels at %.2f Å: the map is "
            "smeared along the rotation, whatever phi_sampling. Use finer images, a smaller "
            "ndiv or a larger d_min",
            width,
            voxels,
            grid.d_min,
        )


@dataclasses.dataclass(frozen=True)
class StaticPixels:
    """Pixels that no image can use, over all images.

    Attributes:
        total: Pixels of all images, once for each lattice on them.
        masked: Those that are masked.
        outside: Good ones beyond the resolution limits.
        is_estimate: Whether only some of many detectors, beams and masks were counted.
    """

    total: int
    masked: int
    outside: int
    is_estimate: bool


def count_static_pixels(
    experiments: ExperimentList,
    blocks: Sequence[Block],
    grid: Grid,
    settings: ExtractionSettings,
    known: Mapping[TableKey, PixelCounts] | None = None,
) -> StaticPixels:
    """Pixels of all images that are masked or beyond the resolution limits.

    Of many triples of detector, beam and mask ``MOST_KEYS`` are counted, evenly spread
    over the list, and stand for all.

    Args:
        experiments: The experiments.
        blocks: The images that are used.
        grid: The voxel grid, for its resolution limits.
        settings: The settings of extraction.
        known: The pixels of an image, of some triples, that need not be counted again.
    """
    keys = table_keys(experiments, settings.masks)
    n_images: dict[TableKey, int] = {}
    first: dict[TableKey, int] = {}
    total = 0
    for block in blocks:
        key = keys[block.experiment]
        n_images[key] = n_images.get(key, 0) + len(block)
        first.setdefault(key, block.experiment)
        detector = experiments[block.experiment].detector
        n_pixels = sum(int(np.prod(panel.get_image_size())) for panel in detector)
        total += n_pixels * len(block)
    names = list(first)
    places = np.rint(np.linspace(0, len(names) - 1, MOST_KEYS)).astype(int)
    chosen = [names[i] for i in np.unique(places)]
    counted = np.zeros(3)
    for key in chosen:
        pixels = (known or {}).get(key)
        if pixels is None:
            pixels = _static_pixels_of(experiments[first[key]], grid, settings)
        counted += n_images[key] * np.array(pixels)
    factor = total / counted[0]  # 1 if all were counted
    return StaticPixels(
        total=total,
        masked=round(factor * counted[1]),
        outside=round(factor * counted[2]),
        is_estimate=len(chosen) < len(names),
    )


def _static_pixels_of(
    experiment: Experiment, grid: Grid, settings: ExtractionSettings
) -> PixelCounts:
    """The pixels of an image."""
    total = masked = outside = 0
    mask = settings.mask_of(experiment)
    for number, panel in enumerate(experiment.detector):
        good = good_pixels(panel, number, experiment.imageset, mask)
        total += good.size
        masked += good.size - int(np.count_nonzero(good))
        outside += n_outside(panel, experiment.beam, good, grid)
    return PixelCounts(total, masked, outside)


def pixels_record(static: StaticPixels, n_bragg: int, n_used: int) -> dict[str, Any]:
    """What became of the pixels of all images.

    Args:
        static: Those that no image can use.
        n_bragg: Pixels in Bragg peaks that were added up.
        n_used: Pixels in voxels.
    """
    known = static.masked + static.outside + n_bragg + n_used
    return {
        "total": static.total,
        "masked": static.masked,
        "outside_resolution": static.outside,
        "bragg": n_bragg,
        # single precision moves some pixels across the resolution limits
        "dropped": max(static.total - known, 0),
        "used": n_used,
        "is_estimate": static.is_estimate,
    }


def blocks_record(
    totals: ObservationTotals, blocks: Sequence[Block]
) -> dict[str, list[Any]]:
    """The sums of each block of images as columns, for a JSON file."""
    return {
        "experiment": [block.experiment for block in blocks],
        "first_image": [block.array_indices.start + 1 for block in blocks],
        "n_images": [len(block) for block in blocks],
        "exposure": [block.exposure for block in blocks],
        **_numbers(totals.blocks),
    }


def shells_record(totals: ObservationTotals, peaks: PeakTotals) -> list[dict[str, Any]]:
    """The sums in each shell of resolution, and its Bragg peaks, for a JSON file.

    Peaks of sweeps that are not complete are left out.
    """
    columns = _numbers(totals.shells)
    records = []
    for i, (low, high) in enumerate(zip(totals.edges, totals.edges[1:])):
        sums = {name: float(values[i]) for name, values in peaks.shells.items()}
        records.append(
            {
                "d_max": 1 / low if low > 0 else None,
                "d_min": 1 / high,
                **{name: column[i] for name, column in columns.items()},
                "n_peaks": int(sums["n_peaks"]),
                "mean_peak": _ratio(sums["intensity"], sums["weight"]),
                "mean_peak_i_over_sigma": _ratio(sums["i_over_sigma"], sums["n_peaks"]),
            }
        )
    return records


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _numbers(sums: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    """Counts as integers; the mean intensity (N - B)/M and its parts besides."""
    counts = ("n_observations", "n_pixels")
    result: dict[str, list[Any]] = {name: list(map(int, sums[name])) for name in counts}
    photons, background = sums["photons"], sums["background"]
    for name, part, divisor in (
        ("photons_per_pixel", photons, sums["n_pixels"]),
        ("background_per_pixel", background, sums["n_pixels"]),
        ("intensity", photons - background, sums["normalisation"]),
    ):
        result[name] = [
            float(f"{x / y:.6g}") if y > 0 else None for x, y in zip(part, divisor)
        ]
    return result


def bragg_record(
    peaks: PeakTotals, experiments: ExperimentList, settings: ExtractionSettings
) -> dict[str, Any]:
    """Which pixels about the Bragg positions were left out, and their sums.

    Args:
        peaks: Their sums.
        experiments: The experiments.
        settings: The settings of extraction, with what was fitted.
    """
    bragg = settings.bragg
    fitted: dict[int, dict[str, Any]] = {}
    for number, experiment in enumerate(experiments):
        ellipsoid = (settings.ellipsoids or {}).get(experiment.identifier)
        if ellipsoid is not None:
            figures = {"experiments": [], **dataclasses.asdict(ellipsoid)}
            fitted.setdefault(id(ellipsoid), figures)["experiments"].append(number)
    is_ellipsoid = bragg.exclusion == "ellipsoid"
    return {
        "exclusion": bragg.exclusion,
        "semi_axes": list(bragg.semi_axes) if is_ellipsoid else None,
        "unit": bragg.unit if is_ellipsoid else None,
        "absent": bragg.absent,
        "fraction": bragg.fraction if bragg.exclusion == "auto" else None,
        "margin": bragg.margin if bragg.exclusion == "shoebox" else None,
        "ellipsoids": list(fitted.values()),
        "n_peaks": peaks.n_peaks,
        "n_complete": peaks.n_complete,
        "n_unique": peaks.n_unique,
    }
