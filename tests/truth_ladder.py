"""Simulated data sets through extraction and merging, for the truth ladder.

The images stay in memory: expected photons as floating-point numbers, or Poisson counts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import numpy as np
import pytest
from simulate_images import with_images

from cctbx import uctbx
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
from dials_diffuse.simulation.models import Series
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
    describe_simulation,
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

MARGIN = 1.3  # what a map may have of the deviations that were found


class Agreement(NamedTuple):
    """What was found for a map without noise and faults.

    Attributes:
        rms: Root mean square of (I - E)/E in each shell, per cent.
        lost_cc: 1 - CC aniso, per cent.
        ratio: Limit of the ratio of the sums of each shell, less one.
    """

    rms: Sequence[float]
    lost_cc: float
    ratio: float = 1e-3


def disagreements(comparison: Comparison, found: Agreement) -> list[str]:
    """What tells a map from the truth; nothing if it is as near as was found."""
    result = []
    assert len(comparison.shells) == len(found.rms)
    for number, (shell, rms) in enumerate(zip(comparison.shells, found.rms)):
        if shell.n_voxels <= 20:
            result.append(f"shell {number}: {shell.n_voxels} voxels")
        if abs(shell.ratio - 1) > found.ratio:
            result.append(f"shell {number}: ratio {shell.ratio:.5f}")
        if 100 * shell.rms_deviation > MARGIN * rms:
            result.append(f"shell {number}: rms deviation {shell.rms_deviation:.3%}")
    lost_cc = 1 - comparison.overall.cc_anisotropic
    if 100 * lost_cc > MARGIN * found.lost_cc:
        result.append(f"CC aniso {1 - lost_cc:.6f}")
    return result


def assert_is_truth(comparison: Comparison, found: Agreement) -> None:
    assert not disagreements(comparison, found)


def report(rung: str, **figures: float | str) -> None:
    """One line with the figures of a rung: ``pytest -k truth -rP`` shows it."""
    text = (
        f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in figures.items()
    )
    print(f"ladder: {rung}: {', '.join(text)}")


def report_agreement(rung: str, comparison: Comparison) -> None:
    """The figures that ``assert_is_truth`` looks at."""
    report(
        rung,
        worst_ratio=f"{max(abs(s.ratio - 1) for s in comparison.shells):.3%}",
        cc_aniso=f"{comparison.overall.cc_anisotropic:.6f}",
        rms=f"{comparison.overall.rms_deviation:.3%}",
        rms_of_shells=" ".join(f"{s.rms_deviation:.3%}" for s in comparison.shells),
    )


def vary(settings: SimulationSettings, **changes: Any) -> SimulationSettings:
    """Settings with some changed: ``detector=dict(distance=80)``, ``n_images=5``."""
    values = {}
    for name, change in changes.items():
        old = getattr(settings, name)
        is_scope = dataclasses.is_dataclass(old)
        values[name] = dataclasses.replace(old, **change) if is_scope else change
    return dataclasses.replace(settings, **values)


# Voxels of a quarter of a reciprocal cell: small beside the features of the map.
QUARTERS = vary(
    SMALL,
    crystal={"unit_cell": uctbx.unit_cell((15, 18, 21, 90, 90, 90))},
    grid={"ndiv": (4, 4, 4)},
)


def cases_with_fast(cases: Iterable[str], *fast: str) -> list:
    """Parameters of a test, all but some marked as slow."""
    assert set(fast) <= set(cases)
    return [
        name if name in fast else pytest.param(name, marks=pytest.mark.slow)
        for name in cases
    ]


ImageMaker = Callable[[Series, int], list[np.ndarray]]


def pixel_averages(settings: SimulationSettings, n: int) -> ImageMaker:
    """Expected photons of pixels as the sum over n x n parts of each."""
    detector = settings.detector
    centre = detector.beam_centre or np.array(detector.panels) * detector.size // 2
    fine = vary(
        settings,
        detector={
            "size": tuple(n * x for x in detector.size),
            "pixel": detector.pixel / n,
            "beam_centre": tuple(n * x for x in centre),
        },
    )
    parts, whole = Simulation(fine), Simulation(settings)
    for a, b in zip(*(s.series[0].experiments[0].detector for s in (parts, whole))):
        np.testing.assert_allclose(a.get_origin(), b.get_origin())

    def sums(series: Series, i: int) -> list[np.ndarray]:
        return [
            panel.reshape(len(panel) // n, n, -1, n).sum(axis=(1, 3))
            for panel in parts.photons(series, i)
        ]

    return sums


def simulated_experiments(
    simulation: Simulation, noise: bool = False, image: ImageMaker | None = None
) -> ExperimentList:
    """The experiments with their images in memory: expected photons, or counts."""
    result = ExperimentList()
    image = image or (simulation.image if noise else simulation.photons)
    for series in simulation.series:
        images = [image(series, i) for i in range(series.n_images)]
        for number, e in enumerate(series.experiments):
            own = images if e.scan is not None else [images[number]]
            result.append(with_images(e, own))
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
    truth = describe_simulation(simulation, grid.d_min)
    write_truth(path, grid, *true_map(simulation.sample, grid), truth)
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
    parts_of_pixel: int = 1,
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
        parts_of_pixel: Along each edge, for images that are means over the pixels.
        comparison: Options of ``compare``.
    """
    simulation = Simulation(settings)
    prepare(simulation)
    image = pixel_averages(settings, parts_of_pixel) if parts_of_pixel > 1 else None
    experiments = simulated_experiments(simulation, noise, image)
    spoil(experiments)
    extraction = extraction_settings(simulation, exclusion, **(corrections or {}))
    merged = merged_map(experiments, extraction, folder)
    comparison.setdefault("scale", "absolute")
    with MapFile(merged) as handle:
        grid = handle.grid if truth_on_grid_of_map else None
    return compare(merged, true_map_file(simulation, folder, grid), **comparison)
