"""Experiments with images for the tests, made of ordinary dxtbx models.

Images are held in memory (any detector, integers or floating point), or written as
Pilatus-like CBF files and imported (one panel, integers).
"""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from cctbx import uctbx
from dxtbx import flumpy
from dxtbx.format.FormatCBFMini import FormatCBFMini
from dxtbx.imageset import ImageSequence, ImageSet, ImageSetData, MemReader
from dxtbx.model import (
    Beam,
    BeamFactory,
    Crystal,
    Detector,
    DetectorFactory,
    Experiment,
    Goniometer,
    GoniometerFactory,
    ParallaxCorrectedPxMmStrategy,
    Scan,
    ScanFactory,
)
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory
from scitbx.array_family import flex

from dials_diffuse.io.images import write_nexus as write_nxmx

CELLS = {
    "P 1": (23.0, 27.0, 31.0, 82.0, 97.0, 104.0),
    "P 1 2 1": (24.0, 31.0, 28.0, 90.0, 106.0, 90.0),
    "P 21 21 21": (26.0, 31.0, 22.0, 90.0, 90.0, 90.0),
    "P 41 21 2": (25.0, 25.0, 34.0, 90.0, 90.0, 90.0),
    "P 61": (24.0, 24.0, 33.0, 90.0, 90.0, 120.0),
}
SILICON_MU = 3.92  # 1/mm, at 1 Angstrom about
MAX_COUNT = 1e6  # trusted


def make_beam(wavelength: float = 1.0) -> Beam:
    return BeamFactory.make_polarized_beam(
        sample_to_source=(0.01, -0.02, 1.0),
        wavelength=wavelength,
        polarization=(0, 1, 0),
        polarization_fraction=0.95,
    )


def make_detector(
    n_panels: int = 1,
    size: tuple[int, int] = (70, 60),
    distance: float = 20.0,
    tilt: float = 0.0,
    parallax: bool = False,
    pixel: tuple[float, float] = (0.3, 0.25),
) -> Detector:
    """Panels side by side about the beam, each turned by ``tilt`` degrees more.

    The sensor is of silicon, 0.45 mm thick; ``parallax`` makes its pixel to millimetre
    strategy take that into account.
    """
    detector = Detector()
    width, height = size[0] * pixel[0], size[1] * pixel[1]
    for i in range(n_panels):
        panel = detector.add_panel()
        panel.set_name(f"panel{i}")
        panel.set_type("SENSOR_PAD")
        panel.set_image_size(size)
        panel.set_pixel_size(pixel)
        panel.set_trusted_range((-1, MAX_COUNT))
        panel.set_material("Si")
        panel.set_thickness(0.45)
        panel.set_mu(SILICON_MU)
        turn = Rotation.from_euler(
            "xyz", np.array([1.0, 0.7, 0.4]) * (i + 1) * tilt, True
        )
        corner = np.array([(i - n_panels / 2) * width * 1.05, height / 2, -distance])
        panel.set_frame(
            turn.apply([1, 0, 0]), turn.apply([0, -1, 0]), turn.apply(corner)
        )
        if parallax:
            panel.set_px_mm_strategy(ParallaxCorrectedPxMmStrategy(SILICON_MU, 0.45))
    return detector


def make_crystal(
    space_group: str = "P 1", seed: int = 7, cell: Sequence[float] | None = None
) -> Crystal:
    """A crystal in a random orientation."""
    unit_cell = uctbx.unit_cell(tuple(cell or CELLS[space_group]))
    b = np.array(unit_cell.fractionalization_matrix()).reshape(3, 3).T
    u = Rotation.random(random_state=seed).as_matrix()
    real = np.linalg.inv(u @ b)
    return Crystal(*(tuple(row) for row in real), space_group_symbol=space_group)


def make_goniometer(kind: str = "single") -> Goniometer:
    """A goniometer: ``single`` axis, ``fixed`` and ``setting`` rotations, ``kappa``."""
    if kind == "kappa":
        return GoniometerFactory.make_kappa_goniometer(
            alpha=50.0,
            omega=10.0,
            kappa=-25.0,
            phi=40.0,
            direction="+y",
            scan_axis="phi",
        )
    if kind == "multi":
        return GoniometerFactory.multi_axis(
            flex.vec3_double([(0, 1, 0), (0.6, 0, 0.8), (0.8, 0.6, 0)]),
            flex.double([20, -35, 50]),
            flex.std_string(["phi", "chi", "omega"]),
            1,
        )
    goniometer = GoniometerFactory.make_goniometer(
        (0.98, 0.1, -0.05), (1, 0, 0, 0, 1, 0, 0, 0, 1)
    )
    if kind == "general":
        goniometer.set_fixed_rotation(
            Rotation.from_euler("xyz", [10, -40, 65], True).as_matrix().ravel()
        )
        goniometer.set_setting_rotation(
            Rotation.from_euler("xyz", [-25, 15, 30], True).as_matrix().ravel()
        )
    return goniometer


def make_scan(
    n_images: int, width: float = 0.5, first: int = 1, exposure: float = 1.0
) -> Scan:
    return ScanFactory.make_scan(
        (first, first + n_images - 1),
        exposure,
        (12.0, width),
        {i: float(i) for i in range(first, first + n_images)},
    )


class Image:
    """What ``MemReader`` asks for an image."""

    def __init__(self, panels: Sequence[np.ndarray]) -> None:
        # copies: arrays that share numpy's memory end the process when they are freed
        # while an exception is on its way (flumpy)
        self.data = tuple(
            flumpy.from_numpy(np.ascontiguousarray(p)).deep_copy() for p in panels
        )

    def get_raw_data(self) -> tuple:
        return self.data


def memory_experiment(
    images: Sequence[Sequence[np.ndarray]],
    detector: Detector,
    crystal: Crystal,
    beam: Beam | None = None,
    scan: Scan | None = None,
    goniometer: Goniometer | None = None,
    identifier: str = "0",
) -> Experiment:
    """An experiment whose images are arrays: a list of panels for each image.

    Without a scan it is a still.
    """
    beam = beam or make_beam()
    data = ImageSetData(MemReader([Image(panels) for panels in images]), None)
    if scan is None:
        imageset = ImageSet(data)
    else:
        goniometer = goniometer or make_goniometer()
        imageset = ImageSequence(data, beam, detector, goniometer, scan)
    return Experiment(
        identifier=identifier,
        beam=beam,
        detector=detector,
        goniometer=goniometer,
        scan=scan,
        crystal=crystal,
        imageset=imageset,
    )


def with_images(e: Experiment, images: Sequence[Sequence[np.ndarray]]) -> Experiment:
    """The models of an experiment, with arrays as ``memory_experiment`` takes them."""
    return memory_experiment(
        images, e.detector, e.crystal, e.beam, e.scan, e.goniometer, e.identifier
    )


def random_images(
    n_images: int, detector: Detector, seed: int = 7, mean: float = 3.0
) -> list[list[np.ndarray]]:
    """Poisson counts: for each image, an int32 array for each panel."""
    rng = np.random.default_rng(seed)
    return [
        [rng.poisson(mean, p.get_image_size()[::-1]).astype(np.int32) for p in detector]
        for _ in range(n_images)
    ]


def cbf_models(size: tuple[int, int] = (60, 50)) -> tuple[Detector, Beam]:
    """A detector and a beam of which a Pilatus CBF header can tell everything."""
    beam = BeamFactory.simple(1.0)
    detector = DetectorFactory.simple(
        "SENSOR_PAD",
        20.0,
        (size[0] * 0.15, size[1] * 0.15),
        "+x",
        "-y",
        (0.3, 0.3),
        size,
        (-1, MAX_COUNT),
    )
    return detector, beam


def write_images(
    folder: Path,
    images: Sequence[np.ndarray],
    width: float = 0.0,
    prefix: str = "image",
    exposure: float = 1.0,
) -> list[Path]:
    """Write int32 arrays as CBF files ``prefix_0001.cbf``...; width 0 makes stills."""
    detector, beam = cbf_models(images[0].shape[::-1])
    paths = []
    for i, data in enumerate(images):
        scan = ScanFactory.make_scan(
            (i + 1, i + 1), exposure, (12.0 + i * width, width), {i + 1: 0.0}
        )
        path = folder / f"{prefix}_{i + 1:04d}.cbf"
        flex_data = flumpy.from_numpy(np.ascontiguousarray(data, dtype=np.int32))
        FormatCBFMini.as_file(
            detector, beam, GoniometerFactory.single_axis(), scan, flex_data, str(path)
        )
        paths.append(path)
    return paths


def import_images(
    paths: Sequence[Path],
    crystal: Callable[[int], Crystal | None] = lambda i: make_crystal(),
) -> ExperimentList:
    """Experiments as dials.import makes them, with crystal(i) and identifiers."""
    experiments = ExperimentListFactory.from_filenames([str(p) for p in paths])
    for i, experiment in enumerate(experiments):
        experiment.crystal = crystal(i)
        experiment.identifier = (
            f"{Path(paths[0]).parent.name}-{Path(paths[0]).stem}-{i}"
        )
    return experiments


def count_images(n_images: int, size: tuple[int, int] = (60, 50)) -> list[np.ndarray]:
    """Poisson counts for CBF files; the mean differs from image to image."""
    rng = np.random.default_rng(11)
    return [rng.poisson(2.0 + i, size[::-1]).astype(np.int32) for i in range(n_images)]


def write_nexus(
    path: Path, images: Sequence[np.ndarray], bad: np.ndarray, width: float = 0.5
) -> Path:
    """Write a sweep as one NXmx file; ``bad`` marks the pixels of its pixel mask."""
    detector, beam = cbf_models(images[0].shape[::-1])
    detector[0].set_material("Si")
    detector[0].set_thickness(0.45)
    experiment = Experiment(
        beam=beam,
        detector=detector,
        goniometer=GoniometerFactory.single_axis(),
        scan=make_scan(len(images), width),
    )
    write_nxmx(path, experiment, [[i] for i in images], 0.1, [~bad])
    return path


def pixels_in_boxes(boxes, shape: tuple[int, int]) -> np.ndarray:
    """Pixels in any of the boxes x0, x1, y0, y1, shape (n_slow, n_fast)."""
    result = np.zeros(shape, dtype=bool)
    for x0, x1, y0, y1 in boxes:
        result[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return result
