"""The whole of it: experiments in, the background of each of their images out."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Iterator, Protocol, Sequence

import numpy as np

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.background.images import (
    CountSums,
    PhiBin,
    base_of_image,
    blank_images,
    check_same_detector,
    known_exposure,
    make_base,
    phi_bins,
    sum_images,
)
from dials_diffuse.background.modal import Windows, make_windows, smooth_correction
from dials_diffuse.background.model import (
    BackgroundAxes,
    ImageBackground,
    n_nodes,
    profile_at,
)
from dials_diffuse.background.pixels import (
    Pixels,
    make_pixels,
    near_bragg,
    read_photons,
)
from dials_diffuse.background.radial import Profile, radial_profile
from dials_diffuse.background.settings import BackgroundSettings
from dials_diffuse.extraction.blocks import exposure_times, images_of
from dials_diffuse.extraction.tables import TableKey, table_keys
from dials_diffuse.geometry.orientation import frame_model
from dials_diffuse.util.parallel import forked_results
from dials_diffuse.util.signals import progress_bar

logger = logging.getLogger("dials.diffuse.background")

# Images that a process adds up at a time; not by the number of processes, as the order
# of adding moves the last digits.
CHUNK_IMAGES = 16
CACHED_PIXELS = 2  # 150 MB each for 6 million pixels


class Writer(Protocol):
    """Takes the background as it is made; see ``dials_diffuse.io.background``."""

    def add_base(
        self,
        rates: Sequence[np.ndarray],
        variances: Sequence[np.ndarray],
        phi: float | None,
        n_images: int,
    ) -> None: ...

    def add_image(
        self, identifier: str, array_index: int, terms: ImageBackground
    ) -> None: ...


@dataclasses.dataclass(frozen=True)
class Image:
    """An image of the data.

    Attributes:
        experiment: Number of its experiment.
        array_index: In the scan; 0 for a still without.
        exposure: As in extraction, s; 1 where it is not known or not corrected for.
    """

    experiment: int
    array_index: int
    exposure: float


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker needs; handed over by fork, never pickled."""

    experiments: ExperimentList
    keys: tuple[TableKey, ...]
    settings: BackgroundSettings
    axes: BackgroundAxes
    n_points: int


_job: Job | None = None


def background_axes(
    experiments: ExperimentList, settings: BackgroundSettings
) -> tuple[BackgroundAxes, int]:
    """Where the points of profiles and grids are, and the number of those of profiles."""
    p = settings.profile
    s_max = max(1 / e.detector.get_max_resolution(e.beam.get_s0()) for e in experiments)
    return BackgroundAxes(0.0, p.step, p.spacing or 0), n_nodes(s_max, p.step)


def image_list(
    experiments: ExperimentList, settings: BackgroundSettings
) -> list[Image]:
    """The images of all experiments, in their order."""
    result = []
    for number, experiment in enumerate(experiments):
        times = exposure_times(experiment)
        if not settings.corrections.exposure:
            times = [1.0] * len(times)
        for i, time in zip(images_of(experiment), times):
            result.append(Image(number, i, time))
    return result


def image_groups(
    images: Sequence[Image], keys: Sequence[TableKey], size: int
) -> list[tuple[Image, ...]]:
    """Up to ``size`` consecutive images of the same detector each."""
    groups: list[list[Image]] = []
    for image in images:
        key = keys[image.experiment]
        if groups and len(groups[-1]) < size and keys[groups[-1][0].experiment] == key:
            groups[-1].append(image)
        else:
            groups.append([image])
    return [tuple(group) for group in groups]


@functools.lru_cache(maxsize=CACHED_PIXELS)
def _pixels(key: TableKey) -> Pixels:
    number = _job.keys.index(key)
    return make_pixels(_job.experiments[number], _job.settings)


@functools.lru_cache(maxsize=CACHED_PIXELS)
def _windows(key: TableKey) -> Windows:
    return make_windows(_pixels(key), _job.settings.profile.spacing)


def _usable(image: Image, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Photons of ``pixels``, and which of them a profile may be made from."""
    experiment = _job.experiments[image.experiment]
    photons, trusted = read_photons(experiment, image.array_index, _job.settings)
    photons, used = photons[pixels.flat], trusted[pixels.flat]
    if experiment.crystal is not None:
        model = frame_model(experiment, image.array_index)
        used &= ~near_bragg(pixels.e, model, experiment, _job.settings)
    if not used.any():
        raise ValueError(
            f"No pixel of image {image.array_index + 1} of experiment "
            f"{experiment.identifier} is left: check the mask, the trusted range and "
            "bragg.semi_axes"
        )
    return photons, used


def _group_profiles(group: Sequence[Image]) -> list[ImageBackground]:
    """The terms of the images of a group, by their profiles."""
    key = _job.keys[group[0].experiment]
    pixels, settings = _pixels(key), _job.settings.profile
    counts, weights = np.zeros(len(pixels.s)), np.zeros(len(pixels.s))
    levels = []
    for image in group:
        photons, used = _usable(image, pixels)
        m = pixels.normalisation * image.exposure
        own, used = radial_profile(photons, m, used, pixels, _job.n_points, settings)
        if len(group) == 1:
            return [_terms(own, image, photons, used)]
        # mean intensity of the image: its scale among those of the group
        levels.append(_mean_intensity(own, pixels))
        counts[used] += photons[used]
        weights[used] += levels[-1] * m[used]
    if not max(levels) > 0:
        raise ValueError(
            f"There are no counts in {len(group)} images: use a larger radial.group or "
            "leave them out"
        )
    unsorted = dataclasses.replace(settings, spot_margin=-1)
    shape, _ = radial_profile(
        counts, weights, weights > 0, pixels, _job.n_points, unsorted
    )
    return [
        _terms(Profile(level * shape.value, level**2 * shape.variance), image)
        for level, image in zip(levels, group)
    ]


def _mean_intensity(profile: Profile, pixels: Pixels) -> float:
    value, _ = profile_at(pixels.s, profile.value, profile.variance, _job.axes)
    return float(value @ pixels.normalisation / pixels.normalisation.sum())


def _terms(
    profile: Profile,
    image: Image,
    photons: np.ndarray | None = None,
    used: np.ndarray | None = None,
) -> ImageBackground:
    """The profile, and the grids if they are asked for."""
    if _job.axes.spacing_px == 0:
        return ImageBackground(profile=profile.value, profile_variance=profile.variance)
    key = _job.keys[image.experiment]
    pixels = _pixels(key)
    if photons is None:
        photons, used = _usable(image, pixels)
    value, _ = profile_at(pixels.s[used], profile.value, profile.variance, _job.axes)
    m = pixels.normalisation[used] * image.exposure
    grids, variances = smooth_correction(
        photons[used], m, value * m, used, pixels, _windows(key), _job.settings.profile
    )
    # The windows fix the level: the error of the profile under them goes into the grid
    # with the opposite sign.
    nothing = np.zeros_like(profile.variance)
    return ImageBackground(None, 0.0, profile.value, nothing, grids, variances)


def _sums(blanks: ExperimentList, phi_bin: PhiBin, good: np.ndarray) -> CountSums:
    return sum_images(blanks, phi_bin.images, good, _job.settings)


def _base_pixels() -> Pixels:
    """The pixels that the mask of any experiment leaves, on the first one's detector."""
    settings = _job.settings
    if settings.masks is None:
        return _pixels(_job.keys[0])
    every = (settings.masks[e.identifier] for e in _job.experiments)
    masks = {id(mask): mask for mask in every}.values()  # mostly shared
    good = tuple(np.logical_or.reduce(panels) for panels in zip(*masks))
    settings = dataclasses.replace(settings, mask=good, masks=None)
    return make_pixels(_job.experiments[0], settings)


def _make_bases(blanks: ExperimentList, bins: Sequence[PhiBin], writer: Writer) -> None:
    """Add up the images of the background, on the pixels of the data."""
    pixels = _base_pixels()
    good = np.zeros(sum(n * m for n, m in pixels.shapes), dtype=bool)
    good[pixels.flat] = True
    tasks, owner = [], []
    for number, b in enumerate(bins):
        for start in range(0, len(b.images), CHUNK_IMAGES):
            part = PhiBin(b.phi, b.images[start : start + CHUNK_IMAGES])
            tasks.append((blanks, part, good))
            owner.append(number)
    total = [0, None]
    nproc = min(_job.settings.nproc, len(tasks))
    n_images = sum(len(b.images) for b in bins)
    with (
        progress_bar(total=n_images, desc="Adding up", unit=" images") as bar,
        forked_results(_sums, tasks, nproc, n_ahead=nproc) as results,
    ):
        for i, sums in enumerate(results):
            bar.update(len(tasks[i][1].images))
            if total[1] is None:
                total = [sums.photons, sums.exposure]
            else:
                total = [total[0] + sums.photons, total[1] + sums.exposure]
            number = owner[i]
            if i + 1 == len(owner) or owner[i + 1] != number:
                smoothing = _job.settings.images.smoothing
                rates, variances = make_base(CountSums(*total), pixels, smoothing)
                b = bins[number]
                writer.add_base(rates, variances, b.phi, len(b.images))
                total = [0, None]


def _from_images(
    images: Sequence[Image], blanks: ExperimentList, writer: Writer
) -> None:
    """Bases from images without the crystal, and which of them goes with each image."""
    settings = _job.settings
    for experiment in _one_per_key(_job.experiments, _job.keys):
        for blank in _one_per_key(blanks, table_keys(blanks)):
            check_same_detector(experiment, blank)
    found = blank_images(blanks, settings)
    width = settings.images.phi_width
    bins = phi_bins(blanks, found, width)
    terms = []
    for image in images:
        experiment = _job.experiments[image.experiment]
        ratio = settings.images.exposure_ratio
        if ratio is None:
            ratio = known_exposure(experiment, image.array_index, "data")
        base = base_of_image(experiment, image.array_index, bins, width)
        terms.append(ImageBackground(base, ratio * settings.images.scale))
    logger.info(
        "Background of %d images without the crystal, in %d ranges of rotation",
        len(found),
        len(bins),
    )
    _make_bases(blanks, bins, writer)
    for image, t in zip(images, terms):
        identifier = _job.experiments[image.experiment].identifier
        writer.add_image(identifier, image.array_index, t)


def _one_per_key(
    experiments: ExperimentList, keys: Sequence[TableKey]
) -> Iterator[Experiment]:
    for key in dict.fromkeys(keys):
        yield experiments[keys.index(key)]


def _from_profiles(images: Sequence[Image], writer: Writer) -> None:
    """Profiles, and grids if they are asked for, of the images themselves."""
    settings = _job.settings
    groups = image_groups(images, _job.keys, settings.profile.group)
    n_bare = sum(_job.experiments[image.experiment].crystal is None for image in images)
    if n_bare:
        logger.warning(
            "Warning: %d of %d images have no crystal: their Bragg spots are not left "
            "out of the profiles",
            n_bare,
            len(images),
        )
    nproc = min(settings.nproc, len(groups))
    _pixels(_job.keys[groups[0][0].experiment])  # made once, before the fork
    with (
        progress_bar(total=len(images), desc="Measuring", unit=" images") as bar,
        forked_results(_group_profiles, [(g,) for g in groups], nproc) as results,
    ):
        for group, all_terms in zip(groups, results):
            for image, terms in zip(group, all_terms):
                identifier = _job.experiments[image.experiment].identifier
                writer.add_image(identifier, image.array_index, terms)
            bar.update(len(group))


def make_background(
    experiments: ExperimentList,
    settings: BackgroundSettings,
    writer: Writer,
    blanks: ExperimentList | None = None,
) -> None:
    """Make the background of all images of some experiments.

    Args:
        experiments: The data.
        settings: The settings.
        writer: Takes bases first, then the terms of each image in the order of the list.
        blanks: Experiments of images without the crystal, for method ``images``.

    Raises:
        ValueError: An image cannot be read, too few pixels are left, or the images
            without the crystal do not go with the data.
    """
    global _job
    axes, n_points = background_axes(experiments, settings)
    keys = table_keys(experiments, settings.masks)
    _job = Job(experiments, keys, settings, axes, n_points)
    _clear_caches()
    try:
        images = image_list(experiments, settings)
        if settings.method == "images":
            if not blanks:
                raise ValueError(
                    "method=images needs images without the crystal: give their "
                    "experiment list as images.experiments=blank.expt"
                )
            _from_images(images, blanks, writer)
        elif settings.method == "none":
            for image in images:
                identifier = experiments[image.experiment].identifier
                writer.add_image(identifier, image.array_index, ImageBackground())
        else:
            _from_profiles(images, writer)
    finally:
        _job = None
        _clear_caches()


def _clear_caches() -> None:
    _pixels.cache_clear()
    _windows.cache_clear()
