"""Experiments in which voxels are the Miller indices of a larger unit cell.

The edges of the cell are ndiv times those of the crystal, A' = A diag(1/ndiv), so that
the voxel h·ndiv has the scattering vector of h. The space group is the Laue group without
centring: intensities between the Bragg peaks have no absences. Programs for Bragg
intensities then see a crystal like any other.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from dxtbx.imageset import ImageSequence, ImageSet
from dxtbx.model import Crystal, Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.blocks import image_number, images_of
from dials_diffuse.extraction.tables import detector_numbers
from dials_diffuse.geometry.directions import pixel_to_millimeter
from dials_diffuse.geometry.orientation import inverse
from dials_diffuse.grid import Grid


def voxel_crystal(crystal: Crystal, grid: Grid) -> Crystal:
    """The crystal whose Miller indices are the voxels of a grid.

    Its orientation is that of the crystal, at all scan points. Standard deviations of
    the cell and other properties are not taken over.
    """
    ndiv = np.array(grid.ndiv, dtype=float)
    a = np.array(crystal.get_A()).reshape(3, 3)
    edges = ndiv[:, None] * inverse(a)  # real axes as rows, Å
    result = Crystal(*map(tuple, edges), grid.laue_group)
    if crystal.num_scan_points:
        matrices = [
            np.array(crystal.get_A_at_scan_point(i)).reshape(3, 3) / ndiv
            for i in range(crystal.num_scan_points)
        ]
        result.set_A_at_scan_points([tuple(m.ravel()) for m in matrices])
    return result


def own_imageset(still: Experiment) -> ImageSet | None:
    """The one image of a still, without goniometer and scan."""
    imageset = still.imageset
    if not isinstance(imageset, ImageSequence):
        return imageset
    number = image_number(still, images_of(still)[0])
    image = imageset.as_imageset()[number : number + 1]
    image.set_scan(None, 0)
    image.set_goniometer(None, 0)
    return image


def voxel_experiments(experiments: Sequence[Experiment], grid: Grid) -> ExperimentList:
    """The experiments with a crystal of voxels each, without scaling and profile models.

    Stills lose goniometer and scan, which programs would take for those of a sweep.

    Raises:
        ValueError: An experiment has no detector.
    """
    result = ExperimentList()
    for e in experiments:
        if e.detector is None or e.crystal is None:
            raise ValueError(
                f"Experiment {e.identifier} has no detector or no crystal: give the "
                "experiment list of dials.diffuse_extract"
            )
        still = e.is_still()
        result.append(
            Experiment(
                identifier=e.identifier,
                beam=e.beam,
                detector=e.detector,
                goniometer=None if still else e.goniometer,
                scan=None if still else e.scan,
                crystal=voxel_crystal(e.crystal, grid),
                imageset=own_imageset(e) if still else e.imageset,
            )
        )
    return result


def imageset_numbers(experiments: ExperimentList) -> list[int]:
    """Number of each experiment's image set among those that experiments share."""
    numbers: dict[ImageSet | None, int] = {}
    return [numbers.setdefault(e.imageset, len(numbers)) for e in experiments]


def centroids(
    experiments: ExperimentList, id: np.ndarray, panel: np.ndarray, px: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places of observations in mm and radians, and their scattered beams.

    Args:
        experiments: The experiments.
        id: Number of the experiment of each observation, shape (n,).
        panel: Number of its panel, shape (n,).
        px: x, y and frame in pixels and images, shape (n, 3).

    Returns:
        mm: x and y in mm by the panel's strategy and rotation angle in rad, 0 for
            stills, shape (n, 3).
        s1: Scattered beam, Å⁻¹, laboratory frame, shape (n, 3).
    """
    mm, s1 = np.empty((len(id), 3)), np.empty((len(id), 3))
    scans = np.array([_scan_line(e) for e in experiments])
    start, width, first = scans[id].T
    mm[:, 2] = np.radians(start + width * (px[:, 2] - first))
    detectors = experiments.detectors()
    key = np.array(detector_numbers(experiments))[id] << 32 | panel.astype(np.int64)
    order = np.argsort(key, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        detector, number = divmod(int(key[rows[0]]), 1 << 32)
        one = detectors[detector][number]
        mm[rows, :2] = pixel_to_millimeter(one, px[rows, :2])
        d = np.array(one.get_d_matrix()).reshape(3, 3)
        s1[rows] = mm[rows, :2] @ d[:, :2].T + d[:, 2]
    wavelength = np.array([e.beam.get_wavelength() for e in experiments])
    s1 /= (np.linalg.norm(s1, axis=1) * wavelength[id])[:, None]
    return mm, s1


def _scan_line(experiment: Experiment) -> tuple[float, float, float]:
    """Rotation angle at the start, that of an image, degrees, and the first frame."""
    if experiment.is_still():
        return 0.0, 0.0, 0.0
    return (
        *experiment.scan.get_oscillation(),
        experiment.scan.get_array_range()[0],
    )
