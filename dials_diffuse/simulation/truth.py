"""The true map of a simulation: means over the voxels of a grid."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from cctbx import miller
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.reference import detector_limits
from dials_diffuse.grid import Grid
from dials_diffuse.io.truth import SeriesTruth, Truth
from dials_diffuse.merging.sums import number_voxels, unique_voxels, unpack
from dials_diffuse.simulation.exposure import air_rate
from dials_diffuse.simulation.noise import Defects
from dials_diffuse.simulation.sample import S_STEP, Sample
from dials_diffuse.simulation.scales import Absorption
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.simulate import Simulation, series_scales
from dials_diffuse.util.compat import miller_index_to_numpy


def truth_grid(
    settings: SimulationSettings, sample: Sample, experiments: ExperimentList
) -> Grid:
    """The grid that the settings ask for.

    Raises:
        ValueError: The grid breaks the symmetry or is too large.
    """
    d_min = settings.grid.d_min
    if d_min is None:
        d_min = max(detector_limits(experiment)[0] for experiment in experiments[:1])
    contents = sample.contents
    return Grid(
        unit_cell=contents.unit_cell.parameters(),
        ndiv=settings.grid.ndiv,
        space_group=contents.space_group.type().hall_symbol(),
        d_min=d_min,
    )


def true_voxels(sample: Sample, grid: Grid, index: np.ndarray) -> dict[str, np.ndarray]:
    """Means over voxels of all that is not Bragg scattering.

    They are averaged over the equivalent voxels too, which merging adds up: in trigonal
    and hexagonal groups these have different shapes. (Merging weighs them by what was
    measured of each, which may differ from equal weights.)

    Args:
        sample: What scatters.
        grid: The grid.
        index: Voxel indices, shape (n, 3).

    Returns:
        ``dials_diffuse.io.truth.PARTS``, electrons² per unit cell, shape (n,).
    """
    parts = dict(sample.map.merged_voxel_means(grid, index))
    for name, function in (("solvent", sample.solvent), ("compton", sample.compton)):
        parts[name] = sample.map.merged_isotropic_means(function, grid, index)
    parts["intensity"] = sum(parts.values())
    return parts


def true_map(
    sample: Sample, grid: Grid
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """The unique voxels of a grid, their true parts, and who has which in the box.

    Raises:
        ValueError: The grid has no voxel within its resolution limit.
    """
    packed = unique_voxels(grid)
    index = unpack(packed)
    if not grid.in_resolution_range(grid.s(index)).any():
        raise ValueError(
            f"No voxel lies within grid.d_min={grid.d_min:g}: use a smaller d_min or a "
            "larger grid.ndiv"
        )
    return index, true_voxels(sample, grid, index), number_voxels(grid, packed)


def describe_simulation(simulation: Simulation, d_min: float) -> Truth:
    """All of the truth of a simulation but the voxels, reflections to d_min."""
    series = [
        series_truth(simulation.settings, s.number, list(s.experiments.identifiers()))
        for s in simulation.series
    ]
    return describe_truth(simulation.sample, d_min, series, simulation.defects)


def series_truth(
    settings: SimulationSettings, number: int, identifiers: list[str]
) -> SeriesTruth:
    """What is known of the images of a series."""
    absorption = Absorption(settings, number)
    return SeriesTruth(
        identifiers=identifiers,
        scale=series_scales(settings, number),
        absorption=absorption.strength,
        way_out=absorption.u,
        way_in=absorption.v,
    )


def describe_truth(
    sample: Sample,
    d_min: float,
    series: list[SeriesTruth],
    defects: Sequence[Defects],
) -> Truth:
    """The same, from the parts of a simulation."""
    two_theta = np.radians(np.arange(0.0, 90.5, 0.5))
    contents = sample.contents
    s = np.arange(0, 1 / d_min, S_STEP)
    index = miller_index_to_numpy(
        miller.build_set(
            contents.structure.crystal_symmetry(), anomalous_flag=False, d_min=d_min
        ).indices()
    )
    return Truth(
        composition=contents.composition,
        scattering_power=sample.power,
        isotropic={"s": s, "solvent": sample.solvent(s), "compton": sample.compton(s)},
        miller_index=index,
        f_squared=sample.bragg.at(*index.T),
        air={
            "two_theta": np.degrees(two_theta),
            "rate": air_rate(sample.settings, two_theta),
        },
        defects=[dataclasses.asdict(item) for item in defects],
        series=series,
    )
