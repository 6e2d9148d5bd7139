"""Simulated data sets through extraction and merging, for the truth ladder.

The images stay in memory: expected photons as floating-point numbers, or Poisson counts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable

from simulate_images import memory_experiment

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import (
    BraggSettings,
    CorrectionSettings,
    ExtractionSettings,
)
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import MapFile, MapWriter
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.io.truth import write_truth
from dials_diffuse.merging.merge import MergingSettings, merge
from dials_diffuse.simulation.comparison import Comparison, compare
from dials_diffuse.simulation.settings import (
    BackgroundSettings,
    BraggPeakSettings,
    CrystalSettings,
    DetectorSettings,
    DiffuseSettings,
    ScanSettings,
    SimulationSettings,
    TruthGridSettings,
)
from dials_diffuse.simulation.simulate import Simulation
from dials_diffuse.simulation.truth import (
    describe_truth,
    series_truth,
    true_map,
    truth_grid,
)

# A small cell and wide pixels: a few million pixels sample every voxel many times.
SMALL = SimulationSettings(
    n_images=180,
    crystal=CrystalSettings(space_group="P 21 21 21", unit_cell=None),
    bragg=BraggPeakSettings(on=False),
    diffuse=DiffuseSettings(contrast=0.5, length=4.0, halo_length=8.0),
    background=BackgroundSettings(solvent=0.0, compton=False),
    detector=DetectorSettings(
        preset="given",
        size=(180, 180),
        pixel=0.5,
        distance=60.0,
        beamstop=0.0,
        beamstop_arm=0.0,
    ),
    scan=ScanSettings(width=1.0),
    grid=TruthGridSettings(ndiv=(2, 2, 2), d_min=1.9),
)


def vary(settings: SimulationSettings, **changes: Any) -> SimulationSettings:
    """Settings with some changed: ``detector=dict(distance=80)``, ``n_images=5``."""
    values = {}
    for name, change in changes.items():
        old = getattr(settings, name)
        is_scope = dataclasses.is_dataclass(old)
        values[name] = dataclasses.replace(old, **change) if is_scope else change
    return dataclasses.replace(settings, **values)


def simulated_experiments(
    simulation: Simulation, noise: bool = False
) -> ExperimentList:
    """The experiments with their images in memory: expected photons, or counts."""
    result = ExperimentList()
    image = simulation.image if noise else simulation.photons
    for series in simulation.series:
        images = [image(series, i) for i in range(series.n_images)]
        for number, e in enumerate(series.experiments):
            own = images if e.scan is not None else [images[number]]
            result.append(
                memory_experiment(
                    own,
                    e.detector,
                    e.crystal,
                    e.beam,
                    e.scan,
                    e.goniometer,
                    e.identifier,
                )
            )
    return result


def extraction_settings(
    simulation: Simulation, exclusion: BraggSettings, **corrections: Any
) -> ExtractionSettings:
    """Settings that fit a simulation; ``corrections`` override the right ones."""
    settings = simulation.settings
    right = {
        "path": settings.air.path,
        "temperature": settings.air.temperature,
        "pressure": settings.air.pressure,
    }
    return ExtractionSettings(
        ndiv=settings.grid.ndiv,
        d_min=settings.grid.d_min,
        bragg=exclusion,
        mask=tuple(simulation.good_pixels()),
        corrections=CorrectionSettings(**{**right, **corrections}),
    )


def merged_map(
    experiments: ExperimentList,
    settings: ExtractionSettings,
    folder: Path,
    n_shells: int = 20,
) -> Path:
    """Extraction and merging."""
    grid = make_grid(experiments, settings)
    refl, path = folder / "extracted.refl", folder / "merged.h5"
    extract(experiments, grid, settings, refl)
    with ObservationFile(refl) as table:
        with MapWriter(path, grid, list(table.identifiers.values())) as writer:
            merge([table], MergingSettings(n_shells=n_shells), writer)
    return path


def true_map_file(
    simulation: Simulation, folder: Path, grid: Grid | None = None
) -> Path:
    """The truth, on the grid of the settings or another."""
    path = folder / "truth.h5"
    grid = grid or truth_grid(
        simulation.settings, simulation.sample, simulation.series[0].experiments
    )
    index, parts, numbers = true_map(simulation.sample, grid)
    series = [
        series_truth(simulation.settings, s.number, list(s.experiments.identifiers()))
        for s in simulation.series
    ]
    truth = describe_truth(simulation.sample, grid.d_min, series)
    write_truth(path, grid, index, parts, numbers, truth)
    return path


def climb(
    settings: SimulationSettings,
    folder: Path,
    noise: bool = False,
    prepare: Callable[[Simulation], None] = lambda simulation: None,
    spoil: Callable[[ExperimentList], None] = lambda experiments: None,
    exclusion: BraggSettings = BraggSettings(exclusion="none"),
    corrections: dict[str, Any] | None = None,
    truth_on_grid_of_map: bool = False,
    **comparison: Any,
) -> Comparison:
    """Simulate, extract, merge, and compare with the truth.

    Args:
        settings: The simulation.
        folder: For the files.
        noise: Whether the images are counts.
        prepare: Changes the true models before the images are made.
        spoil: Changes the models that extraction gets.
        exclusion: Of Bragg peaks.
        corrections: What differs from the default corrections.
        truth_on_grid_of_map: Even if its symmetry is not that of the simulation.
        comparison: Options of ``compare``.
    """
    simulation = Simulation(settings)
    prepare(simulation)
    experiments = simulated_experiments(simulation, noise)
    spoil(experiments)
    extraction = extraction_settings(simulation, exclusion, **(corrections or {}))
    merged = merged_map(experiments, extraction, folder)
    comparison.setdefault("scale", "absolute")
    with MapFile(merged) as handle:
        grid = handle.grid if truth_on_grid_of_map else None
    return compare(merged, true_map_file(simulation, folder, grid), **comparison)
