"""The whole of a simulation: settings in, images and their models out."""

from __future__ import annotations

import contextlib
import glob
import logging
from pathlib import Path
from typing import Iterator

import numpy as np

from dxtbx.model.experiment_list import ExperimentList

from dials.util import progress
from dials_diffuse.io.images import write_cbf, write_nexus
from dials_diffuse.simulation.exposure import Detector, Exposure, ImageModel
from dials_diffuse.simulation.models import (
    Series,
    attach_images,
    image_paths,
    make_series,
    needs_nexus,
)
from dials_diffuse.simulation.noise import (
    Defects,
    detect,
    image_generator,
    make_defects,
)
from dials_diffuse.simulation.sample import Sample
from dials_diffuse.simulation.scales import Absorption, image_scales
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.shadows import gap_mask, shadow
from dials_diffuse.simulation.structure import make_contents
from dials_diffuse.util.parallel import forked_results
from dials_diffuse.util.signals import progress_bar

logger = logging.getLogger("dials.diffuse.simulate")

# Enough to saturate any detector, and not too many for numpy's Poisson deviates.
MOST_PHOTONS = 1e18
OVERLAP = 3.0  # standard deviations of a peak that a reciprocal cell must hold


def series_scales(settings: SimulationSettings, number: int) -> np.ndarray:
    """Relative scales of the images of a series: all 1 for those without crystal."""
    if number > settings.n_crystals:
        return np.ones(settings.background.n_images)
    return image_scales(settings, number)


def _s_max_of_truth(settings: SimulationSettings) -> float:
    """Largest s = 1/d that is asked for in the true map, 0 if none is.

    Raises:
        ValueError: No detector sees so far.
    """
    d_min, wavelength = settings.grid.d_min, settings.beam.wavelength
    if d_min is None:
        return 0.0
    if d_min < wavelength / 2:
        raise ValueError(
            f"grid.d_min={d_min:g} is less than half the wavelength, {wavelength / 2:g} Å: "
            "no detector sees so far"
        )
    return 1 / d_min


class Simulation:
    """A crystal, its experiments, and the images that a detector takes of it.

    Args:
        settings: The settings.

    Raises:
        ValueError: Structure, cell and space group do not go together, or the true map
            goes beyond what can be seen at the wavelength.
    """

    def __init__(self, settings: SimulationSettings) -> None:
        self.settings = settings
        contents = make_contents(settings)
        self.series = make_series(settings, contents.unit_cell, contents.space_group)
        first = self.series[0].experiments[0]
        self.detector = Detector(first, settings, shadow(settings, first.detector))
        self.active = [mask.ravel() for mask in gap_mask(settings)]
        s_max = _s_max_of_truth(settings)  # the true map may reach beyond the detector
        s_max = max(self.detector.s_max, s_max)
        self.sample = Sample(settings, contents, s_max)
        self.model = ImageModel(self.sample, settings, self.detector)
        self.defects: list[Defects] = [
            make_defects(settings, number, len(active))
            for number, active in enumerate(self.active)
        ]

    def good_pixels(self) -> list[np.ndarray]:
        """Pixels neither between the modules nor behind the beam stop, for each panel."""
        return [
            (active & (shadow > 0.5)).reshape(pixels.shape)
            for active, shadow, pixels in zip(
                self.active, self.detector.shadows, self.detector.panels
            )
        ]

    def exposure(self, series: Series, i: int) -> Exposure:
        """Image i of a series."""
        settings = self.settings
        experiments = series.experiments
        is_sweep = experiments[0].scan is not None
        return Exposure(
            experiment=experiments[0 if is_sweep else i],
            index=i if is_sweep else 0,
            scale=float(series_scales(settings, series.number)[i]),
            time=settings.scan.exposure,
            absorption=Absorption(settings, series.number),
        )

    def photons(self, series: Series, i: int) -> list[np.ndarray]:
        """Expected photons of image i of a series: (n_slow, n_fast) for each panel."""
        panels = self.model.photons(self.exposure(series, i))
        return [
            photons.reshape(pixels.shape)
            for photons, pixels in zip(panels, self.detector.panels)
        ]

    def image(self, series: Series, i: int) -> list[np.ndarray]:
        """What the detector stores: int32, (n_slow, n_fast) for each panel."""
        return [
            detect(
                np.minimum(photons.ravel(), MOST_PHOTONS),
                self.active[number],
                self.defects[number],
                self.settings,
                image_generator(self.settings, series.number, i, number),
            ).reshape(photons.shape)
            for number, photons in enumerate(self.photons(series, i))
        ]


_simulation: Simulation | None = None


def _make_image(number: int, i: int) -> list[np.ndarray]:
    return _simulation.image(_simulation.series[number], i)


@contextlib.contextmanager
def _images(
    simulation: Simulation, number: int
) -> Iterator[Iterator[list[np.ndarray]]]:
    """The images of a series in their order, by as many processes as are asked for."""
    global _simulation
    _simulation = simulation
    n_images = simulation.series[number].n_images
    nproc = min(simulation.settings.nproc, n_images)
    tasks = [(number, i) for i in range(n_images)]
    try:
        # no more images at a time than there are processes: they may be large
        with forked_results(_make_image, tasks, nproc, n_ahead=nproc) as images:
            yield images
    finally:
        _simulation = None


def write_images(simulation: Simulation, folder: Path, prefix: str) -> ExperimentList:
    """Simulate all images and write them.

    Args:
        simulation: The simulation.
        folder: Where to write.
        prefix: Beginning of the file names.

    Returns:
        The experiments with their images; those without crystal come last.

    Raises:
        ValueError: A file cannot be written.
    """
    total = sum(series.n_images for series in simulation.series)
    result = ExperimentList()
    with progress_bar(total=total, desc="Simulating", unit=" images") as bar:
        for number, series in enumerate(simulation.series):
            with _images(simulation, number) as images:
                counted = _counted(images, bar)
                paths = _write_series(simulation, series, folder, prefix, counted)
            result.extend(attach_images(series, paths))
    return result


def _write_series(
    simulation: Simulation,
    series: Series,
    folder: Path,
    prefix: str,
    images: Iterator[list[np.ndarray]],
) -> list[Path]:
    """Write the images of a series: one CBF file each, or one NeXus file."""
    settings = simulation.settings
    nexus = needs_nexus(settings)
    paths = image_paths(series, folder, prefix, nexus)
    first = series.experiments[0]
    if nexus:
        shapes = [pixels.shape for pixels in simulation.detector.panels]
        active = [a.reshape(shape) for a, shape in zip(simulation.active, shapes)]
        write_nexus(paths[0], first, images, settings.scan.exposure, active)
        return paths
    _warn_of_earlier_images(paths)
    for i, (path, panels) in enumerate(zip(paths, images)):
        write_cbf(
            path,
            panels[0],
            first,
            settings.scan.exposure,
            start=settings.scan.start + i * settings.scan.width,
            width=series.width,
        )
    return paths


def _warn_of_earlier_images(paths: list[Path]) -> None:
    """Warn of files that a template would take for more images of a series."""
    start, _ = paths[0].name.rsplit("_", 1)
    found = paths[0].parent.glob(f"{glob.escape(start)}_*.cbf")
    others = sorted(
        path
        for path in set(found) - set(paths)
        if path.stem[len(start) + 1 :].isdecimal()
    )
    if others:
        logger.warning(
            "Warning: %d images of another simulation are in the same folder, the first "
            "is %s. dials.import may take them for images of this one",
            len(others),
            others[0],
        )


def _counted(images: Iterator, bar: progress) -> Iterator:
    for image in images:
        yield image
        bar.update(1)


def log_simulation(simulation: Simulation) -> None:
    """Say what is simulated."""
    settings, sample = simulation.settings, simulation.sample
    contents = sample.contents
    logger.info(
        "%d series of %d %s, %.4g photons/s, scattering power %.4g photons/(s sr e²)",
        settings.n_crystals,
        settings.n_images,
        "stills" if settings.is_stills else "images of a sweep",
        settings.beam.flux,
        sample.power,
    )
    logger.info(
        "Unit cell %s, space group %s, %s per cell, %.1f electrons²/cell at 3.5 Å",
        " ".join(f"{x:.2f}" for x in contents.unit_cell.parameters()),
        contents.space_group.type().lookup_symbol(),
        " ".join(f"{name}{n:.0f}" for name, n in sorted(contents.composition.items())),
        float(sample.map.isotropic(np.array([1 / 3.5]))[0]),
    )
    shape = sample.peak_shape
    if settings.bragg.on:
        logger.info(
            "Bragg peaks: standard deviation %.2e 1/Å, mosaicity %.3g degrees",
            shape.sigma,
            np.degrees(shape.mosaicity),
        )
        half = 0.5 / max(contents.unit_cell.parameters()[:3])
        widest = float(shape.across(simulation.detector.s_max))
        if OVERLAP * widest > half:
            logger.warning(
                "Warning: Bragg peaks of standard deviation %.2e 1/Å overlap and are cut "
                "off at %.2e 1/Å, half-way to the next: use a smaller bragg.sigma, "
                "bragg.mosaicity or crystal.unit_cell",
                widest,
                half,
            )
