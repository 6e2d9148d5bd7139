"""What extraction tells the user before it starts: grid, crystals, rotation."""

from __future__ import annotations

import logging
from typing import Sequence

import numpy as np

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.reference import crystal_spread
from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.grid import Grid

logger = logging.getLogger("dials.diffuse.extract")

# Crystals that differ by more than half a voxel blur each other's map.
MAX_SPREAD = 0.5


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
