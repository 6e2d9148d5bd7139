"""What an experiment would give, without making its images.

Empty images of the same size go through extraction and merging, so that pixels, voxels
and their normalisation are those of the real thing: which voxels are seen, how often, by
how many pixels. With the true map this gives the counts to expect, and the correlation of
half-maps

    CC1/2 = S / √((S + N1)(S + N2)),   N_h = ⟨I/M_h⟩

with the variance S of the anisotropic part of the map in a shell and the mean variance
N of the voxels of either half, from the counts alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Iterator

import numpy as np

from dxtbx.imageset import ImageSequence, ImageSet, ImageSetData, MemReader
from dxtbx.model import Detector, Experiment
from dxtbx.model.experiment_list import ExperimentList
from scitbx.array_family import flex

from dials.util import tabulate
from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.settings import (
    BraggSettings,
    CorrectionSettings,
    ExclusionRegion,
    ExtractionSettings,
)
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import MapWriter, read_map
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.merge import MergingSettings, merge
from dials_diffuse.merging.statistics import IsotropicMean, shell_edges, shell_number
from dials_diffuse.simulation.comparison import is_cut
from dials_diffuse.simulation.exposure import air_rate
from dials_diffuse.simulation.sample import Sample
from dials_diffuse.simulation.simulate import Simulation
from dials_diffuse.simulation.truth import true_voxels, truth_grid

logger = logging.getLogger("dials.diffuse.simulate")

CUT_POINTS = 6  # along each edge of a voxel that the Bragg exclusion cuts
CUT_BLOCK = 2000  # such voxels at a time

COLUMNS = (
    "index",
    "d",
    "n_obs",
    "n_pixels",
    "normalisation",
    "half_1/normalisation",
    "half_2/normalisation",
)


class EmptyImage:
    """An image without photons, as dxtbx' ``MemReader`` takes it."""

    def __init__(self, detector: Detector) -> None:
        self._data = tuple(
            flex.int(flex.grid(*panel.get_image_size()[::-1]), 0) for panel in detector
        )

    def get_raw_data(self) -> tuple:
        return self._data


def with_empty_images(simulation: Simulation) -> ExperimentList:
    """The experiments of all crystals, with images that are empty."""
    result = ExperimentList()
    for series in simulation.series:
        for experiment in series.experiments:
            if experiment.crystal is not None:
                result.append(_with_empty_images(experiment))
    return result


def _with_empty_images(experiment: Experiment) -> Experiment:
    beam, detector = experiment.beam, experiment.detector
    scan, goniometer = experiment.scan, experiment.goniometer
    n_images = 1 if scan is None else scan.get_num_images()
    data = ImageSetData(MemReader([EmptyImage(detector)] * n_images), None)
    if scan is None:
        imageset = ImageSet(data)
    else:
        imageset = ImageSequence(data, beam, detector, goniometer, scan)
    return Experiment(
        identifier=experiment.identifier,
        beam=beam,
        detector=detector,
        goniometer=goniometer,
        scan=scan,
        crystal=experiment.crystal,
        imageset=imageset,
    )


@contextlib.contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Without the reports of other stages."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [item.level for item in loggers]
    for item in loggers:
        item.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for item, level in zip(loggers, levels):
            item.setLevel(level)


def coverage(simulation: Simulation, grid: Grid) -> dict[str, np.ndarray]:
    """Columns ``COLUMNS`` of the voxels that the images would see.

    Raises:
        ValueError: No voxel is seen.
    """
    settings = simulation.settings
    air = settings.air
    good = simulation.good_pixels()
    if not any(mask.any() for mask in good):
        raise ValueError(
            f"The beam stop, {settings.detector.beamstop:g} mm in radius, hides the whole "
            "detector: use a smaller detector.beamstop"
        )
    extraction = ExtractionSettings(
        ndiv=grid.ndiv,
        d_min=grid.d_min,
        mask=tuple(good),
        corrections=CorrectionSettings(
            path=air.path, temperature=air.temperature, pressure=air.pressure
        ),
        nproc=settings.nproc,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        _silent("dials.diffuse.extract", "dials.diffuse.merge"),
    ):
        refl, path = Path(folder) / "extracted.refl", Path(folder) / "merged.h5"
        extract(with_empty_images(simulation), grid, extraction, refl)
        with ObservationFile(refl) as table:
            with MapWriter(path, grid, list(table.identifiers.values())) as writer:
                merge([table], MergingSettings(), writer)
        return dict(read_map(path, COLUMNS).columns)


def expected_means(sample: Sample, grid: Grid, index: np.ndarray) -> np.ndarray:
    """What voxels will hold, electrons² per cell, shape (n,).

    The mean over the whole voxel, or over what the Bragg exclusion leaves of it.

    Args:
        sample: What scatters.
        grid: The grid.
        index: Voxel indices, shape (n, 3).
    """
    result = true_voxels(sample, grid, index)["intensity"]
    metric = BraggSettings().metric(grid.cell, grid.rotations)
    region = ExclusionRegion(metric)
    cut = np.flatnonzero(is_cut(grid, index, metric))
    across = (np.arange(CUT_POINTS) + 0.5) / CUT_POINTS - 0.5
    points = np.stack(np.meshgrid(across, across, across), axis=-1).reshape(-1, 3)
    for block in np.array_split(cut, 1 + len(cut) // CUT_BLOCK):
        hkl = (index[block, None, :] + points) / np.array(grid.ndiv)
        left = ~region.is_inside(hkl, np.zeros(hkl.shape[:-1]))
        values = sample.diffuse(hkl.reshape(-1, 3).T).reshape(left.shape)
        isotropic = sample.isotropic(grid.s(index[block]))
        total = np.sum(values * left, axis=1)
        n_left = left.sum(axis=1)
        seen = n_left > 0
        result[block[seen]] = total[seen] / n_left[seen] + isotropic[seen]
    return result


@dataclasses.dataclass(frozen=True)
class ShellForecast:
    """What to expect in a resolution shell.

    Attributes:
        d_max, d_min: Limits, Å.
        n_voxels, n_possible: Unique voxels that are seen, and all.
        counts: Photons per unique voxel.
        counts_per_pixel: Photons per pixel.
        multiplicity: Observations per unique voxel.
        cc_half: CC1/2 of the anisotropic part, None where no voxel is in both halves.
    """

    d_max: float
    d_min: float
    n_voxels: int
    n_possible: int
    counts: float
    counts_per_pixel: float
    multiplicity: float
    cc_half: float | None

    @property
    def completeness(self) -> float:
        return self.n_voxels / self.n_possible if self.n_possible else 0.0


def forecast_shells(simulation: Simulation, n_shells: int = 10) -> list[ShellForecast]:
    """What to expect in resolution shells.

    Args:
        simulation: The simulation; scales and absorption are taken as one.
        n_shells: Number of shells, equal in volume.
    """
    grid = truth_grid(
        simulation.settings, simulation.sample, simulation.series[0].experiments
    )
    voxels = coverage(simulation, grid)
    index = voxels["index"]
    s = grid.s(index)
    signal = simulation.sample.power * expected_means(simulation.sample, grid, index)
    wavelength = simulation.settings.beam.wavelength
    two_theta = 2 * np.arcsin(np.minimum(s * wavelength / 2, 1.0))
    intensity = signal + air_rate(simulation.settings, two_theta)
    isotropic = IsotropicMean(float(s.max()), ("signal",))
    isotropic.add(s, {"signal": signal})
    variation = signal - isotropic.isotropic("signal", s)

    possible = grid.s(grid.asu_indices())
    edges = shell_edges(possible.min(), possible.max(), n_shells)
    possible_shell = shell_number(possible, edges)
    shell = np.where(grid.in_resolution_range(s), shell_number(s, edges), -1)
    return [
        _shell(
            edges[i : i + 2],
            int(np.sum(possible_shell == i)),
            {name: values[shell == i] for name, values in voxels.items()},
            intensity[shell == i],
            variation[shell == i],
        )
        for i in range(n_shells)
    ]


def _shell(
    edges: np.ndarray,
    n_possible: int,
    voxels: dict[str, np.ndarray],
    intensity: np.ndarray,
    variation: np.ndarray,
) -> ShellForecast:
    n_voxels = len(intensity)
    counts = intensity * voxels["normalisation"]
    halves = [voxels[f"half_{half}/normalisation"] for half in (1, 2)]
    both = (halves[0] > 0) & (halves[1] > 0)
    cc_half = None
    if both.sum() > 1:
        signal = float(np.var(variation[both]))
        noise = [float(np.mean(intensity[both] / half[both])) for half in halves]
        cc_half = signal / np.sqrt((signal + noise[0]) * (signal + noise[1]))
    return ShellForecast(
        d_max=1 / edges[0],
        d_min=1 / edges[1],
        n_voxels=n_voxels,
        n_possible=n_possible,
        counts=float(counts.mean()) if n_voxels else 0.0,
        counts_per_pixel=float(counts.sum() / max(voxels["n_pixels"].sum(), 1)),
        multiplicity=float(voxels["n_obs"].mean()) if n_voxels else 0.0,
        cc_half=cc_half,
    )


def forecast(simulation: Simulation) -> list[ShellForecast]:
    """Log what to expect in resolution shells."""
    shells = forecast_shells(simulation)
    rows = [
        [
            f"{shell.d_max:.2f} - {shell.d_min:.2f}",
            f"{100 * shell.completeness:.1f}",
            f"{shell.multiplicity:.1f}",
            f"{shell.counts_per_pixel:.3g}",
            f"{shell.counts:.4g}",
            "" if shell.cc_half is None else f"{shell.cc_half:.3f}",
        ]
        for shell in shells
    ]
    header = [
        "d (Å)",
        "complete (%)",
        "multiplicity",
        "counts/pixel",
        "counts/voxel",
        "CC1/2",
    ]
    logger.info(
        "\nForecast from the true map and the geometry, by counting noise alone:"
    )
    logger.info(tabulate(rows, header))
    return shells
