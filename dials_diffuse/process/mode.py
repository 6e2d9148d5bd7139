"""Whether images are stills or rotation data, by their headers.

dxtbx reads the header of every image, as dials.import does; neighbouring images that
continue each other's rotation make one series. No scan, or a rotation of zero degrees
during the exposure, is a still.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory

from dials_diffuse.util.compat import oscillation_width


class Series(NamedTuple):
    """Images with one rotation width.

    Attributes:
        n_images: Their number.
        width: Rotation during each image in degrees; None where there is no scan.
        path: The first image.
    """

    n_images: int
    width: float | None
    path: str

    @property
    def is_still(self) -> bool:
        """Whether nothing rotates."""
        return not self.width


def read_headers(files: Sequence[str], templates: Sequence[str]) -> ExperimentList:
    """The models in the headers of images.

    Args:
        files: Image files and folders.
        templates: Templates of image files.

    Raises:
        ValueError: There are no images, or a header cannot be read.
    """
    experiments = ExperimentList()
    try:
        if files:
            experiments.extend(ExperimentListFactory.from_filenames(list(files)))
        if templates:
            experiments.extend(ExperimentListFactory.from_templates(list(templates)))
    except Exception as e:  # formats raise whatever their file reader raises
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"Cannot read the image headers ({reason})") from e
    if len(experiments) == 0:
        raise ValueError(
            f"None of the files is an image that dxtbx can read: "
            f"{', '.join([*files, *templates][:3])}"
        )
    return experiments


def image_series(experiments: ExperimentList) -> list[Series]:
    """The series of images of an imported experiment list."""
    result = []
    for experiment in experiments:
        imageset, scan = experiment.imageset, experiment.scan
        n_images, number = 1, 0
        if scan is not None:
            n_images = scan.get_num_images()
            # stills with a common template share one sequence of all images
            number = scan.get_array_range()[0] - imageset.get_array_range()[0]
        path = imageset.get_path(number)
        result.append(Series(n_images, oscillation_width(scan), path))
    return result


def decide_mode(series: Sequence[Series]) -> tuple[str, str]:
    """``stills`` or ``rotation``, and the reason.

    Raises:
        ValueError: Some images are stills and others are not.
    """
    stills = [s for s in series if s.is_still]
    rotation = [s for s in series if not s.is_still]
    if stills and rotation:
        raise ValueError(
            f"The images are of two kinds: {_count(rotation)} of rotation data (as "
            f"{rotation[0].path}) and {_count(stills)} still(s) (as {stills[0].path}). "
            "Process them one kind at a time, or set mode"
        )
    if rotation:
        return "rotation", describe_rotation(rotation)
    return "stills", _describe_stills(stills)


def _count(series: Sequence[Series]) -> int:
    return sum(s.n_images for s in series)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_rotation(series: Sequence[Series]) -> str:
    """For example: 60 images of 0.5 degrees in 1 sweep."""
    widths = sorted({round(abs(s.width), 6) for s in series})
    width = f"{widths[0]:g}"
    if len(widths) > 1:
        width += f" to {widths[-1]:g}"
    images = _plural(_count(series), "image")
    return f"{images} of {width} degrees in {_plural(len(series), 'sweep')}"


def _describe_stills(series: Sequence[Series]) -> str:
    """For example: angle increment 0 in all 96 headers."""
    zero = _count([s for s in series if s.width is not None])
    without = _count([s for s in series if s.width is None])
    if zero and without:
        return f"angle increment 0 in {zero} headers, no scan in {without}"
    if zero:
        return f"angle increment 0 in all {_plural(zero, 'header')}"
    return f"no scan in any of {_plural(without, 'header')}"
