"""Check of the geometry: where indexed spots fall in the frame of the pixel loop.

For each indexed reflection, the scattering vector of its observed pixel, s1 - s0, is
compared with that of its Miller index, S R F A h, both from the models of its own image:
a still, or the image that holds the centroid of a spot of rotation data. Each image then
has a mean and a largest distance; the mean vector, in which the spots' own errors cancel,
shows a detector or a beam that is out of place. An image is out of order if its mean is
beyond a tolerance, and above that of most images by more than its standard error explains.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.geometry.directions import pixel_to_millimeter
from dials_diffuse.geometry.orientation import frame_model, inverse
from dials_diffuse.util.compat import miller_index_to_numpy

# Tolerance of images, where none is given: the median of their means and this many
# standard deviations, by the median deviation,
DEVIATIONS = 5.0
# but no less than so many times the median; more where the images are too few to say
# how their means scatter,
TIMES_MEDIAN, TIMES_MEDIAN_OF_FEW, FEW = 1.5, 3.0, 10
# no less than this part of the shortest edge of a voxel, which harms no map,
HARMLESS = 0.1
# and no more than this part of the shortest reciprocal axis, where an indexed spot is not
# the spot of that index.
MAX_RESIDUAL = 0.3

# An image beyond the tolerance must also be so many standard errors of its mean above the
# median of the images: the mean of a few spots says little.
SIGNIFICANT = 3.0
# Standard deviation over mean of the length of a vector with normal components in two
# directions (Rayleigh distribution), sqrt(4/pi - 1): spots of a usual mean scatter by as
# much, also if the few of an image agree by chance.
LEAST_SCATTER = 0.5227


@dataclasses.dataclass(frozen=True)
class SpotResiduals:
    """Where indexed spots are, against where their indices should be.

    Attributes:
        array_index: Image of each spot, shape (n,).
        hkl: (S R F A)⁻¹ (s1 - s0) - h, shape (n, 3).
        rlp: (s1 - s0) - S R F A h, Å⁻¹, laboratory frame, shape (n, 3).
    """

    array_index: np.ndarray
    hkl: np.ndarray
    rlp: np.ndarray


def spot_directions(
    experiment: Experiment, reflections: flex.reflection_table
) -> np.ndarray:
    """Unit vectors from the sample to the observed spots, shape (n, 3)."""
    xyz = flumpy.to_numpy(reflections["xyzobs.px.value"]).reshape(-1, 3)
    panel = flumpy.to_numpy(reflections["panel"])
    e = np.empty((len(xyz), 3))
    for number in np.unique(panel):
        rows = panel == number
        model = experiment.detector[int(number)]
        mm = pixel_to_millimeter(model, xyz[rows, :2])
        d = np.array(model.get_d_matrix()).reshape(3, 3)
        e[rows] = np.c_[mm, np.ones(len(mm))] @ d.T
    return e / np.linalg.norm(e, axis=1)[:, None]


def spot_images(
    experiment: Experiment, reflections: flex.reflection_table
) -> np.ndarray:
    """Array index of the image that holds each spot's centroid; 0 for a still without."""
    z = flumpy.to_numpy(reflections["xyzobs.px.value"]).reshape(-1, 3)[:, 2]
    if experiment.scan is None:
        return np.zeros(len(z), dtype=int)
    first, last = experiment.scan.get_array_range()
    return np.clip(np.floor(z).astype(int), first, last - 1)


def spot_residuals(
    experiment: Experiment, reflections: flex.reflection_table
) -> SpotResiduals:
    """Distance of observed spots from where their indices should be.

    Args:
        experiment: The experiment.
        reflections: Its indexed reflections, with ``xyzobs.px.value``.
    """
    e = spot_directions(experiment, reflections)
    image = spot_images(experiment, reflections)
    index = miller_index_to_numpy(reflections["miller_index"])
    hkl, rlp = np.empty((len(e), 3)), np.empty((len(e), 3))
    for array_index in np.unique(image):
        rows = image == array_index
        frame = frame_model(experiment, int(array_index))
        observed = e[rows] * np.linalg.norm(frame.s0) - frame.s0
        hkl[rows] = observed @ inverse(frame.setting).T - index[rows]
        rlp[rows] = observed - index[rows] @ frame.setting.T
    return SpotResiduals(image, hkl, rlp)


def index_residuals(
    experiment: Experiment, reflections: flex.reflection_table
) -> np.ndarray:
    """(S R F A)⁻¹ (s1 - s0) - h of observed spots, shape (n, 3)."""
    return spot_residuals(experiment, reflections).hkl


@dataclasses.dataclass(frozen=True)
class ImageResiduals:
    """Distance of the spots of each image from where their indices should be.

    All arrays have an element per image with indexed spots.

    Attributes:
        experiment: Number of the experiment.
        array_index: Image; 0 for a still without a scan.
        n_spots: Number of indexed spots.
        mean, largest: Of |Δrlp|, Å⁻¹.
        shift: |mean of Δrlp|, Å⁻¹.
        rms_hkl: Root mean square of |Δhkl|.
        mean_error: Standard error of ``mean``, Å⁻¹; 0 for a single spot.
    """

    experiment: np.ndarray
    array_index: np.ndarray
    n_spots: np.ndarray
    mean: np.ndarray
    largest: np.ndarray
    shift: np.ndarray
    rms_hkl: np.ndarray
    mean_error: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.mean_error is None:
            object.__setattr__(self, "mean_error", np.zeros(len(self.mean)))

    def __len__(self) -> int:
        return len(self.experiment)

    def is_beyond(self, tolerance: float) -> np.ndarray:
        """Which images have a mean distance that is larger, and surely so, shape (n,).

            mean > tolerance  and  mean - SIGNIFICANT · error > typical

        The median of the images is typical, or the tolerance if that is less; the error
        is ``mean_error``, at least that of so many spots of an image that is typical.
        """
        if len(self) == 0:
            return np.zeros(0, dtype=bool)
        typical = min(float(np.median(self.mean)), tolerance)
        usual = LEAST_SCATTER * typical / np.sqrt(self.n_spots)
        error = np.maximum(self.mean_error, usual)
        is_sure = self.mean - SIGNIFICANT * error > typical
        return (self.mean > tolerance) & is_sure

    def as_dict(self) -> dict[str, Any]:
        """The figures as lists, for a JSON file."""
        columns = dataclasses.asdict(self)
        return {
            name: [float(f"{x:.4g}") for x in column]
            if column.dtype.kind == "f"
            else column.tolist()
            for name, column in columns.items()
        }


def whole_spots(
    experiment: Experiment, reflections: flex.reflection_table
) -> flex.reflection_table:
    """The spots that no end of a scan cuts: the others' centroids are not theirs.

    All of them if none is whole, or the table has no ``bbox`` to tell.
    """
    if experiment.is_still() or "bbox" not in reflections:
        return reflections
    z0, z1 = (flumpy.to_numpy(z) for z in reflections["bbox"].parts()[4:])
    first, last = experiment.scan.get_array_range()
    whole = (z0 > first) & (z1 < last)
    if not whole.any():
        return reflections
    return reflections.select(flumpy.from_numpy(whole))


def image_residuals(
    experiments: ExperimentList, reflections: flex.reflection_table
) -> ImageResiduals:
    """The distances of indexed spots, image by image; see ``whole_spots``.

    Args:
        experiments: The experiments.
        reflections: Their indexed reflections, with the number of the experiment in
            ``id``.
    """
    ids = flumpy.to_numpy(reflections["id"])
    order = np.argsort(ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(len(experiments) + 1))
    parts = [np.empty((0, 8))]
    for number, experiment in enumerate(experiments):
        rows = order[starts[number] : starts[number + 1]].astype(np.uint64)
        if len(rows) and experiment.crystal is not None:
            selected = reflections.select(flumpy.from_numpy(rows))
            selected = whole_spots(experiment, selected)
            parts.append(_per_image(number, spot_residuals(experiment, selected)))
    number, image, n_spots, *figures = np.concatenate(parts).T
    return ImageResiduals(*(x.astype(int) for x in (number, image, n_spots)), *figures)


def _per_image(number: int, residuals: SpotResiduals) -> np.ndarray:
    """A row of the attributes of ``ImageResiduals`` for each image, in their order."""
    images, of_spot, n = np.unique(
        residuals.array_index, return_inverse=True, return_counts=True
    )
    of_spot = of_spot.ravel()
    distance = np.linalg.norm(residuals.rlp, axis=1)
    largest = np.zeros(len(images))
    np.maximum.at(largest, of_spot, distance)
    mean = np.bincount(of_spot, distance) / n
    vectors = [np.bincount(of_spot, component) / n for component in residuals.rlp.T]
    hkl2 = np.bincount(of_spot, np.sum(residuals.hkl**2, axis=1)) / n
    return np.stack(
        [
            np.full(len(images), number),
            images,
            n,
            mean,
            largest,
            np.linalg.norm(vectors, axis=0),
            np.sqrt(hkl2),
            _error_of_mean(distance, of_spot, mean, n),
        ],
        axis=-1,
    )


def _error_of_mean(
    distance: np.ndarray, of_spot: np.ndarray, mean: np.ndarray, n: np.ndarray
) -> np.ndarray:
    """Standard error of the mean distance of each image, s/√n; 0 for a single spot."""
    squares = np.bincount(of_spot, (distance - mean[of_spot]) ** 2)
    return np.sqrt(squares / np.maximum(n - 1, 1) / n)


def automatic_tolerance(
    images: ImageResiduals, unit_cell: Any, ndiv: tuple[int, int, int] = (1, 1, 1)
) -> float:
    """The largest mean distance of the spots of an image that is in order, Å⁻¹.

    The median m of all images and five standard deviations, estimated by 1.48 times the
    median of |mean - m|; but at least 1.5 m (3 m for fewer than ten images) and a tenth of a
    voxel's shortest edge, and at most 0.3 of the shortest reciprocal axis.

    Args:
        images: The distances.
        unit_cell: The reference cell, ``cctbx.uctbx.unit_cell``.
        ndiv: Voxels per reciprocal lattice vector.
    """
    axes = np.array(unit_cell.reciprocal().parameters()[:3])
    harmless = HARMLESS * float(np.min(axes / ndiv))
    tolerance = harmless
    if len(images):
        median = float(np.median(images.mean))
        sigma = 1.4826 * float(np.median(np.abs(images.mean - median)))
        times = TIMES_MEDIAN if len(images) >= FEW else TIMES_MEDIAN_OF_FEW
        tolerance = max(median + DEVIATIONS * sigma, times * median, harmless)
    return min(tolerance, MAX_RESIDUAL * float(axes.min()))


def images_to_reject(
    images: ImageResiduals, tolerance: float
) -> frozenset[tuple[int, int]]:
    """(experiment, array index) of the images with a surely larger mean distance.

    Images without indexed spots, or with too few to be sure (``ImageResiduals.is_beyond``),
    cannot be judged and are not among them.
    """
    bad = images.is_beyond(tolerance)
    return frozenset(
        zip(images.experiment[bad].tolist(), images.array_index[bad].tolist())
    )
