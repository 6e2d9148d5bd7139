# LIBTBX_SET_DISPATCHER_NAME dials.diffuse_background
"""
Measure the background of diffraction images, for dials.diffuse_extract to take off.

method=images adds up exposures without the crystal, pixel by pixel: blank or air images,
or a scan with the goniometer in the same position, of which each image of the data gets
the part at its own angle. It takes off what does not come from the crystal's own
scattering, and is the only method that leaves the isotropic part of that.

method=radial takes a robust azimuthal profile of each image (or group of images): the
quantile of the counts of all pixels of one resolution, Bragg positions left out, turned
into the mean of the Poisson distribution that has it. It takes off all that is the same
in all directions: air, solvent and Compton scattering, but also the isotropic part of
the crystal's own diffuse scattering.

method=modal adds to the profile a smooth correction over the detector, for a background
that is not round. It also takes off all structured diffuse scattering that is wider
than modal.spacing.

No count is changed by this: the background and its variance are taken off the sums of
extraction, and negative differences stay negative. The HTML page shows profiles, an
image, its background, and what is left.

Examples::

  dials.diffuse_background refined.expt

  dials.diffuse_background refined.expt method=images images.experiments=blank.expt

  dials.diffuse_background refined.expt method=modal modal.spacing=200 gain=1.7

  dials.diffuse_background refined.expt mask=diffuse_mask.h5

  dials.diffuse_extract refined.expt background=diffuse_background.h5
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from types import SimpleNamespace
from typing import Any, Sequence

import numpy as np

import libtbx.phil
from dxtbx.model.experiment_list import ExperimentList

import dials.util
import dials_diffuse
from dials.util.options import ArgumentParser
from dials.util.version import dials_version
from dials_diffuse.background.make import (
    Image,
    background_axes,
    image_list,
    make_background,
)
from dials_diffuse.background.sample import SampleImage, sample_image, shells
from dials_diffuse.background.settings import BackgroundSettings
from dials_diffuse.io.background import BackgroundFile, BackgroundWriter
from dials_diffuse.io.inputs import load_experiments, with_crystals
from dials_diffuse.io.masks import given_mask
from dials_diffuse.report.background import (
    plot_image,
    plot_profiles,
    plot_shells,
    render_page,
)
from dials_diffuse.util.command import (
    errors_in_one_line,
    load_phil,
    logged_work,
    parse_arguments,
    refuse_hdf5,
)
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.background")

phil_scope = load_phil("background")

REMOVES = {
    "images": "what images without the crystal show",
    "radial": "all that depends on resolution only, the isotropic part of the crystal's "
    "diffuse scattering included",
    "modal": "all that depends on resolution only or is wider than modal.spacing, such "
    "parts of the crystal's diffuse scattering included",
    "none": "nothing",
}


def input_names(params: Any) -> list[str]:
    """The names of all files that are read."""
    names = [item.filename for item in params.input.experiments]
    names += filter(None, params.images.experiments)
    return names + ([params.mask] if params.mask else [])


def check_output(params: Any) -> None:
    """Check the names of the output files.

    Raises:
        ValueError: A name is missing, is used twice, or its folder does not exist.
    """
    if not params.output.background:
        raise ValueError("Please give a name for the background: output.background")
    used = {os.path.realpath(name) for name in input_names(params)}
    for option in ("background", "html", "json", "log"):
        name = getattr(params.output, option)
        if not name:
            continue
        path = os.path.realpath(name)
        if path in used:
            raise ValueError(f"output.{option}={name} is in use: give another name")
        used.add(path)
        if not os.path.isdir(os.path.dirname(path)):
            raise ValueError(
                f"output.{option}={name}: there is no folder {os.path.dirname(path)}"
            )


def load_blanks(names: Sequence[str]) -> ExperimentList:
    """The experiments without a crystal of some experiment lists.

    Raises:
        ValueError: A list does not exist or cannot be read, or all experiments have a
            crystal.
    """
    for name in names:
        if not os.path.isfile(name):
            raise ValueError(f"images.experiments={name} does not exist")
    inputs = [SimpleNamespace(filename=n, data=_models(n)) for n in names]
    experiments = load_experiments(inputs)
    blanks = ExperimentList([e for e in experiments if e.crystal is None])
    if not blanks:
        raise ValueError(
            f"{', '.join(names)}: all experiments have a crystal. Give the experiment "
            "list of images without it (dials.import) as images.experiments"
        )
    if len(blanks) < len(experiments):
        logger.info(
            "%d of %d experiments of the background have a crystal and are left out",
            len(experiments) - len(blanks),
            len(experiments),
        )
    return blanks


def _models(name: str) -> ExperimentList:
    try:
        return ExperimentList.from_file(name, check_format=False)
    except Exception as e:  # json and dxtbx raise anything on a file of another kind
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(
            f"images.experiments={name} is not an experiment list ({reason})"
        ) from None


def load_data(params: Any) -> ExperimentList:
    """The experiments whose images need a background.

    Raises:
        ValueError: There are none.
    """
    experiments = load_experiments(params.input.experiments)
    if any(experiment.crystal is not None for experiment in experiments):
        names = [item.filename for item in params.input.experiments]
        experiments = with_crystals(experiments, names)
    return experiments


def take_sample(
    experiments: ExperimentList,
    image: Image,
    path: str,
    settings: BackgroundSettings,
) -> SampleImage:
    """An image with the background that was written for it."""
    experiment = experiments[image.experiment]
    with BackgroundFile(path) as handle:
        terms = handle.of_image(experiment.identifier, image.array_index)
        number = terms.base_index
        base = None if number is None else handle.base(number)
        axes = handle.axes
    return sample_image(
        experiment, image.array_index, image.exposure, terms, axes, settings, base
    )


def write_report(
    params: Any, experiments: ExperimentList, settings: BackgroundSettings
) -> dict[str, Any]:
    """Write the page and its numbers, log those of a sample image and return them."""
    images = image_list(experiments, settings)
    image = images[len(images) // 2]
    sample = take_sample(experiments, image, params.output.background, settings)
    rows = shells(sample)
    identifier = experiments[image.experiment].identifier
    name = f"Image {image.array_index + 1} of experiment {identifier}"
    with BackgroundFile(params.output.background) as handle:
        profiles = [handle.of_image(*key).profile for key in handle.images]
        axes, n_bases = handle.axes, handle.n_bases
    record = {
        "method": settings.method,
        "removes": REMOVES[settings.method],
        "n_images": len(images),
        "n_bases": n_bases,
        "inputs": [item.filename for item in params.input.experiments],
        "versions": {
            "dials": dials_version(),
            "dials_diffuse": dials_diffuse.__version__,
        },
        "sample": {"name": name, "shells": [dataclasses.asdict(row) for row in rows]},
    }
    if rows:
        logger.info(
            "%s: %.4g photons per pixel, of which %.4g background",
            name,
            sample.photons[~sample.near_bragg].mean(),
            sample.background[~sample.near_bragg].mean(),
        )
    else:
        logger.warning(
            "Warning: %s has no pixel away from Bragg positions to show: check "
            "bragg.semi_axes",
            name,
        )
    if params.output.json:
        with atomic_path(params.output.json) as path:
            text = json.dumps(record, indent=2, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
        logger.info("Numbers written to %s", params.output.json)
    if params.output.html:
        figures = []
        if rows:
            figures.append((name, plot_image(sample, "")))
            figures.append(("Profile of it", plot_shells(rows)))
        if profiles[0] is not None:
            s = axes.s_start + axes.s_step * np.arange(len(profiles[0]))
            figures.insert(0, ("Radial background", plot_profiles(s, profiles)))
        with atomic_path(params.output.html) as path:
            path.write_text(render_page(record, figures), encoding="utf-8")
        logger.info("Page with pictures written to %s", params.output.html)
    return record


def process(params: Any, phil: str) -> dict[str, Any]:
    """Read the input, make the background, write the output.

    Returns:
        The figures of the report.

    Raises:
        ValueError: The input or a parameter will not do.
    """
    blank_names = list(filter(None, params.images.experiments))
    check_output(params)
    settings = BackgroundSettings.from_phil(params)
    if blank_names and settings.method != "images":
        raise ValueError("images.experiments is used only with method=images")
    experiments = load_data(params)
    settings = dataclasses.replace(settings, **given_mask(params.mask, experiments))
    blanks = load_blanks(blank_names) if blank_names else None
    axes, _ = background_axes(experiments, settings)
    logger.info("method=%s takes off %s", settings.method, REMOVES[settings.method])
    with atomic_path(params.output.background) as path:
        with BackgroundWriter(
            path,
            settings.method,
            settings.corrections,
            axes,
            phil,
            input_names(params),
            {"gain": settings.gain, "trusted_range": settings.trusted_range},
        ) as writer:
            make_background(experiments, settings, writer, blanks)
    logger.info("Background written to %s", params.output.background)
    return write_report(params, experiments, settings)


def make_parser(phil: libtbx.phil.scope = phil_scope) -> ArgumentParser:
    """The parser of the command line."""
    return ArgumentParser(
        usage="dials.diffuse_background [options] refined.expt",
        phil=phil,
        read_experiments=True,
        check_format=False,
        epilog=__doc__,
    )


@dials.util.show_mail_handle_errors()
def run(
    args: Sequence[str] | None = None, phil: libtbx.phil.scope = phil_scope
) -> None:
    """Run dials.diffuse_background as from the command line."""
    parser = make_parser(phil)
    with errors_in_one_line():
        params, options, files = parse_arguments(parser, args)
        refuse_hdf5(files)
        check_output(params)  # before the log is begun, which might be an input
        with logged_work(parser, params, options):
            process(params, parser.phil.as_str())


if __name__ == "__main__":
    run()
