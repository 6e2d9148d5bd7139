"""The reference cell of the grid, and how far the crystals are from it."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from cctbx import sgtbx, uctbx
from dxtbx.model import Crystal, Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse import symmetry
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.extraction.tables import detector_numbers
from dials_diffuse.grid import Grid

# A beam in the middle of a square detector has a ratio of about sqrt(2).
MAX_CIRCLE = 3.0  # d-spacing of the largest whole circle over that of the corners


def common_space_group(crystals: Sequence[Crystal]) -> sgtbx.space_group:
    """The space group of the first crystal, if all have the same Laue group.

    Raises:
        ValueError: Crystals have different Laue groups, or settings of it.
    """
    groups = {}
    for crystal in crystals:
        laue = symmetry.laue_group(crystal.get_space_group())
        groups.setdefault(laue.type().hall_symbol(), crystal.get_space_group())
    if len(groups) > 1:
        names = ", ".join(str(group.info()) for group in groups.values())
        raise ValueError(
            f"The crystals have different Laue symmetry ({names}): reindex them in one "
            "space group and setting first"
        )
    return next(iter(groups.values()))


def mean_cell(cells: Sequence[uctbx.unit_cell]) -> uctbx.unit_cell:
    """The cell whose metric tensor is the mean of those of the cells."""
    metric = np.mean([cell.metrical_matrix() for cell in cells], axis=0)
    return uctbx.unit_cell(metrical_matrix=tuple(metric))


def reference_cell(
    crystals: Sequence[Crystal], group: sgtbx.space_group, settings: ExtractionSettings
) -> uctbx.unit_cell:
    """The reference cell that the settings ask for, obeying the space group.

    Raises:
        ValueError: A given cell breaks the symmetry.
    """
    if settings.reference_cell == "given":
        cell = uctbx.unit_cell(settings.unit_cell)
        if not group.is_compatible_unit_cell(cell):
            raise ValueError(
                f"grid.unit_cell={format_parameters(cell)} does not obey the space group {group.info()}"
            )
        return group.average_unit_cell(cell)
    if settings.reference_cell == "first":
        crystals = crystals[:1]
    cell = mean_cell([crystal.get_unit_cell() for crystal in crystals])
    return group.average_unit_cell(cell)


def format_parameters(cell: uctbx.unit_cell) -> str:
    """Cell parameters as PHIL takes them."""
    return ",".join(f"{x:g}" for x in cell.parameters())


def detector_limits(experiment: Experiment) -> tuple[float, float]:
    """d-spacings at the largest whole circle on the detector and at its corners, Å.

    Where the beam is so near an edge, or the detector so tilted, that whole circles are
    no measure of what it sees, the first is that of the corners as well.
    """
    s0 = experiment.beam.get_s0()
    corner = experiment.detector.get_max_resolution(s0)
    try:
        circle = experiment.detector.get_max_inscribed_resolution(s0)
    except RuntimeError:  # the beam misses the detector: there is no whole circle
        circle = corner
    if circle > MAX_CIRCLE * corner:
        circle = corner
    return max(circle, corner), corner


def make_grid(experiments: ExperimentList, settings: ExtractionSettings) -> Grid:
    """The voxel grid of a set of experiments.

    Raises:
        ValueError: The crystals do not go together, the resolution limits lie beyond
            the detector, or the grid breaks the symmetry.
    """
    crystals = [experiment.crystal for experiment in experiments]
    group = common_space_group(crystals)
    limits = [detector_limits(e) for e in _one_per_detector(experiments)]
    corner = min(corner for _, corner in limits)
    d_min = settings.d_min
    if d_min is None:
        d_min = min(circle for circle, _ in limits)
    elif d_min < corner - 1e-6:
        raise ValueError(
            f"d_min={d_min:g} is beyond the detector, whose corners reach "
            f"{corner:.3f} Å: use d_min={corner:.2f} or more"
        )
    return Grid(
        unit_cell=reference_cell(crystals, group, settings).parameters(),
        ndiv=settings.ndiv,
        space_group=group.type().hall_symbol(),
        d_min=d_min,
        d_max=settings.d_max,
    )


def _one_per_detector(experiments: ExperimentList) -> list[Experiment]:
    """An experiment for each pair of detector and wavelength."""
    pairs = {}
    for number, e in zip(detector_numbers(experiments), experiments):
        pairs.setdefault((number, round(e.beam.get_wavelength(), 4)), e)
    return list(pairs.values())


@dataclasses.dataclass(frozen=True)
class Spread:
    """Distance of each crystal from the reference cell at the high resolution limit.

    Attributes:
        rms: Root mean square of |Δhkl|, per crystal.
        rms_voxels: The same with each index in voxels.
    """

    rms: np.ndarray
    rms_voxels: np.ndarray


def crystal_spread(crystals: Sequence[Crystal], grid: Grid) -> Spread:
    """How much the voxels of each crystal differ from those of the reference cell.

    A voxel has the same hkl in all crystals. At the scattering vector of h in the
    reference cell, a crystal with another B matrix has h' = B⁻¹ B_ref h; Δhkl = h' - h,
    averaged over the directions of the sphere of radius 1/d_min.
    """
    directions = np.random.default_rng(7).normal(size=(500, 3))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    rlp = directions / grid.d_min
    h = rlp @ _to_fractional(grid.cell).T
    rms = np.empty((2, len(crystals)))
    for i, crystal in enumerate(crystals):
        delta = rlp @ _to_fractional(crystal.get_unit_cell()).T - h
        for j, scale in enumerate((1, grid.ndiv)):
            rms[j, i] = np.sqrt(np.mean(np.sum((delta * scale) ** 2, axis=1)))
    return Spread(*rms)


def _to_fractional(cell: uctbx.unit_cell) -> np.ndarray:
    """B⁻¹, which takes rlp in the crystal's Cartesian frame to hkl, shape (3, 3)."""
    return np.array(cell.orthogonalization_matrix()).reshape(3, 3).T
