"""Background from images without the crystal: count rate and its variance per pixel.

Counts N and exposure T of all images of a range of rotation are added up, for each pixel
over a square of pixels about it:

    rate = R · Σ N / Σ T R,    var = R² Σ N / (Σ T R)²

The reference R, normalisation times azimuthal mean, has the shape of the background
within a square, so that adding pixels does not flatten it. Untrusted pixels add nothing
to either sum. Var N = N on the average; sums of N are without bias however small.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Sequence

import numpy as np
from scipy import ndimage

from dxtbx.imageset import ImageSet
from dxtbx.model import Detector, Experiment, Panel, Scan
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.background.model import linear_weights
from dials_diffuse.background.pixels import Pixels, read_photons
from dials_diffuse.background.settings import BackgroundSettings
from dials_diffuse.extraction.blocks import image_number, images_of
from dials_diffuse.util.compat import oscillation_width

REFERENCE_STEP = 0.005  # 1/Å, of the azimuthal mean
LARGEST_SHIFT = 0.05  # of a panel, relative to its distance
LARGEST_WAVELENGTH_CHANGE = 0.01


@dataclasses.dataclass(frozen=True)
class BlankImage:
    """An image without the crystal.

    Attributes:
        experiment: Number of its experiment in the list of the background.
        array_index: In the scan; 0 for a still without.
        exposure: s, or 1 where only a ratio is known.
    """

    experiment: int
    array_index: int
    exposure: float


@dataclasses.dataclass(frozen=True)
class PhiBin:
    """The images that make one base.

    Attributes:
        phi: Middle of their range of rotation in degrees, None for blank images.
        images: The images.
    """

    phi: float | None
    images: tuple[BlankImage, ...]


def is_scan(experiment: Experiment) -> bool:
    """Whether an experiment rotates."""
    return bool(oscillation_width(experiment.scan)) and not experiment.is_still()


def phi_of_image(experiment: Experiment, array_index: int) -> float:
    """Angle at the middle of an image of a scan, degrees."""
    return experiment.scan.get_angle_from_array_index(array_index + 0.5, deg=True)


def exposure_time(experiment: Experiment, array_index: int) -> float | None:
    """Exposure time of an image in s, by its scan or its header; None if not known."""
    scan, i = experiment.scan, 0
    if scan is None:
        scan = _scan_of_header(
            experiment.imageset, image_number(experiment, array_index)
        )
    else:
        i = array_index - scan.get_array_range()[0]
    times = [] if scan is None else list(scan.get_exposure_times())
    return times[i] if i < len(times) and times[i] > 0 else None


def _scan_of_header(imageset: ImageSet, number: int) -> Scan | None:
    """The scan that the header of an image tells, which stills are imported without."""
    format_class = imageset.get_format_class()
    if format_class is None:  # images that are not files
        return None
    try:
        return format_class.get_instance(imageset.get_path(number)).get_scan()
    except Exception:  # formats raise anything where a header lacks the time
        return None


def blank_images(
    experiments: ExperimentList, settings: BackgroundSettings
) -> list[BlankImage]:
    """All images of the background.

    Raises:
        ValueError: The exposure time of one is not known, and no ratio is given.
    """
    result = []
    for number, experiment in enumerate(experiments):
        for array_index in images_of(experiment):
            time = 1.0
            if settings.images.exposure_ratio is None:
                time = known_exposure(experiment, array_index, "background")
            result.append(BlankImage(number, array_index, time))
    return result


def known_exposure(experiment: Experiment, array_index: int, kind: str) -> float:
    """Exposure time of an image in s.

    Raises:
        ValueError: It is not known.
    """
    time = exposure_time(experiment, array_index)
    if time is None:
        path = experiment.imageset.get_path(image_number(experiment, array_index))
        raise ValueError(
            f"The exposure time of the {kind} image {path} is unknown: give "
            "images.exposure_ratio, that of the data over that of the background"
        )
    return time


def phi_bins(
    experiments: ExperimentList, images: Sequence[BlankImage], width: float
) -> list[PhiBin]:
    """Images sorted into ranges of rotation modulo 360°; one for all without rotation.

    Args:
        experiments: Those of the background.
        images: Their images.
        width: Width of a range, degrees; rounded to a whole number of them in 360°.
    """
    if not all(is_scan(experiments[image.experiment]) for image in images):
        return [PhiBin(None, tuple(images))]
    n_bins = max(1, round(360 / width))
    found: dict[int, list[BlankImage]] = {}
    for image in images:
        phi = phi_of_image(experiments[image.experiment], image.array_index)
        found.setdefault(bin_of_phi(phi, n_bins), []).append(image)
    return [
        PhiBin((number + 0.5) * 360 / n_bins, tuple(found[number]))
        for number in sorted(found)
    ]


def bin_of_phi(phi: float, n_bins: int) -> int:
    """Which of the ranges of 360°/n_bins an angle (degrees) is in."""
    return math.floor(phi * n_bins / 360) % n_bins


def base_of_image(
    experiment: Experiment, array_index: int, bins: Sequence[PhiBin], width: float
) -> int:
    """The base that fits an image of the data.

    Raises:
        ValueError: No background was measured at its angle, within a range's width.
    """
    if bins[0].phi is None or (len(bins) == 1 and not is_scan(experiment)):
        return 0
    if not is_scan(experiment):
        raise ValueError(
            "The background is a scan of more than one range of rotation, but the data "
            "do not rotate: give blank images, or images.phi_width=360"
        )
    phi = phi_of_image(experiment, array_index)
    away = [abs((b.phi - phi + 180) % 360 - 180) for b in bins]
    nearest = int(np.argmin(away))
    if away[nearest] > 1.5 * max(width, 360 / max(1, round(360 / width))):
        raise ValueError(
            f"The background scan does not reach the angle {phi:.2f}° of image "
            f"{array_index + 1} of the data, the nearest is {bins[nearest].phi:.2f}°: "
            "give a scan that does, or a larger images.phi_width"
        )
    return nearest


def check_same_detector(data: Experiment, blank: Experiment) -> None:
    """Check that background and data were taken with the same detector and wavelength.

    Refinement may have moved that of the data a little.

    Raises:
        ValueError: Panels differ, have moved, or the wavelength differs.
    """
    sizes = [
        [(p.get_image_size(), tuple(np.round(p.get_pixel_size(), 4))) for p in detector]
        for detector in (data.detector, blank.detector)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The background was taken with another detector: {_describe(blank.detector)},"
            f" not {_describe(data.detector)}"
        )
    shift = max(_shift(a, b) for a, b in zip(data.detector, blank.detector))
    if shift > LARGEST_SHIFT:
        raise ValueError(
            "The detector of the background stands elsewhere than that of the data, by "
            f"{100 * shift:.0f} % of its distance: give a background of the same position"
        )
    a, b = data.beam.get_wavelength(), blank.beam.get_wavelength()
    if abs(a / b - 1) > LARGEST_WAVELENGTH_CHANGE:
        raise ValueError(
            f"The background was taken at a wavelength of {b:.4f} Å, the data at "
            f"{a:.4f} Å: give a background of the same wavelength"
        )


def _describe(detector: Detector) -> str:
    return f"{len(detector)} panel(s) of {detector[0].get_image_size()} pixels"


def _shift(a: Panel, b: Panel) -> float:
    """Distance of the middles of two panels, relative to that from the sample."""
    middle = [
        np.array(p.get_pixel_lab_coord([n / 2 for n in p.get_image_size()]))
        for p in (a, b)
    ]
    return float(np.linalg.norm(middle[0] - middle[1]) / np.linalg.norm(middle[0]))


@dataclasses.dataclass(frozen=True)
class CountSums:
    """Counts of some images, pixel by pixel, all panels one after the other.

    Attributes:
        photons: N, shape (n,).
        exposure: T, over the images in which the pixel was trusted, s.
    """

    photons: np.ndarray
    exposure: np.ndarray


def sum_images(
    experiments: ExperimentList,
    images: Sequence[BlankImage],
    good: np.ndarray,
    settings: BackgroundSettings,
) -> CountSums:
    """The sums of some images.

    Args:
        experiments: Those of the background.
        images: Which images.
        good: False for masked pixels, of the whole detector, flat.
        settings: Gain and trusted range.
    """
    photons, exposure = np.zeros(len(good)), np.zeros(len(good))
    for image in images:
        counts, trusted = read_photons(
            experiments[image.experiment], image.array_index, settings
        )
        used = trusted & good
        photons[used] += counts[used]
        exposure[used] += image.exposure
    return CountSums(photons, exposure)


def reference_shape(sums: CountSums, pixels: Pixels) -> np.ndarray:
    """Normalisation times azimuthal mean of the sums, for ``pixels``.

    Bins of ``REFERENCE_STEP``, linear between their middles; bins without counts have a
    thousandth of the mean, so that no pixel is without a reference.
    """
    n, t = sums.photons[pixels.flat], sums.exposure[pixels.flat]
    bins = np.floor(pixels.s / REFERENCE_STEP + 0.5).astype(np.intp)
    weight = np.bincount(bins, t * pixels.normalisation)
    counts = np.bincount(bins, n)
    seen = weight > 0
    if not seen.any():
        return pixels.normalisation
    least = max(1e-3 * counts.sum() / weight.sum(), 1e-300)
    mean = np.maximum(counts[seen] / weight[seen], least)
    profile = np.interp(np.arange(len(weight)), np.flatnonzero(seen), mean)
    k, u = linear_weights(pixels.s, 0.0, REFERENCE_STEP, len(profile))
    following = np.minimum(k + 1, len(profile) - 1)
    return pixels.normalisation * ((1 - u) * profile[k] + u * profile[following])


def make_base(
    sums: CountSums, pixels: Pixels, smoothing: int
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Rate of each panel's pixels and its variance, (n_slow, n_fast).

    Args:
        sums: Counts and exposures.
        pixels: The pixels that are not masked.
        smoothing: Edge of the square about each pixel, odd.

    Returns:
        Photons per second and their variance; NaN where nothing was measured.
    """
    reference = np.zeros(len(sums.photons))
    reference[pixels.flat] = reference_shape(sums, pixels)
    rates, variances, first = [], [], 0
    for shape in pixels.shapes:
        part = slice(first, first + shape[0] * shape[1])
        first = part.stop
        r = reference[part].reshape(shape)
        n, t = (x[part].reshape(shape) for x in (sums.photons, sums.exposure))
        counts, weight = _square_sum(n, smoothing), _square_sum(t * r, smoothing)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = np.where((r > 0) & (weight > 0), r / weight, np.nan)
        rates.append(factor * counts)
        variances.append(factor**2 * counts)
    return tuple(rates), tuple(variances)


def _square_sum(values: np.ndarray, size: int) -> np.ndarray:
    """Sum over the square of ``size`` pixels about each, within the panel."""
    if size == 1:
        return values
    kernel = np.ones(size)
    # not ndimage.uniform_filter: its running sums leave rounding errors behind
    for axis in (0, 1):
        values = ndimage.convolve1d(values, kernel, axis=axis, mode="constant")
    return values
