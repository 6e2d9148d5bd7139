# LIBTBX_SET_DISPATCHER_NAME dials.diffuse_mask
"""
Make a pixel mask in named layers from images and their models.

Masked are pixels that the models, files or the user exclude (untrusted rectangles, masks,
the shapes, resolution ranges and ice rings of dials.generate_mask, with the same
parameters), gaps between modules, the shadow of the goniometer where it is the same in
all images, the shadow of a beam stop and its holder, which is looked for in the mean
image, and faulty pixels. These are told by what they do in the series of images, each
compared with its surroundings and resolution ring in the same image: hot, dead,
flickering and unstable pixels. Bragg peaks and diffuse features move and do not matter,
nor do the scales of the images.

What is left out about Bragg positions differs from image to image and is no part of the
mask. If there are crystals, the layer bragg shows it for one image of each detector, with
the settings bragg.* of dials.diffuse_extract.

The experiments may be imported, indexed, refined or integrated; a reflection table is
not needed (but for bragg.exclusion=shoebox). For each detector there is a mask for the programs of DIALS and for
dials.diffuse_extract; one file holds the layers. Look at their pictures in the report,
that of the beam stop above all.

Examples::

  dials.diffuse_mask refined.expt

  dials.diffuse_mask imported.expt d_max=40 ice_rings.filter=True

  dials.diffuse_mask refined.expt beamstop.automatic=False \\
    untrusted.polygon=510,473,556,473,556,517,510,517

  dials.diffuse_mask refined.expt bragg.semi_axes=0.15 sample.image=20

  dials.diffuse_extract refined.expt refined.refl mask=diffuse.mask
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from typing import Any, Sequence

import h5py

import libtbx.phil

import dials.util
import dials_diffuse
from dials.util.options import ArgumentParser
from dials.util.version import dials_version
from dials_diffuse.extraction.tables import check_masks
from dials_diffuse.io.inputs import (
    load_experiments,
    load_reflections,
    read_mask,
    write_mask,
)
from dials_diffuse.io.masks import DetectorMask, ImageLayer, check_kind, write_masks
from dials_diffuse.masks.bragg import BraggSample, bragg_layers, sample_images
from dials_diffuse.masks.make import LAYERS, MadeMask, log_mask, make_mask
from dials_diffuse.masks.series import Series, make_series
from dials_diffuse.masks.settings import MaskSettings
from dials_diffuse.report.embedding import draw
from dials_diffuse.report.masks import (
    layers_to_draw,
    picture_title,
    plot_layer,
    render_page,
)
from dials_diffuse.util.command import (
    collect_warnings,
    errors_in_one_line,
    load_phil,
    logged_work,
    parse_arguments,
    refuse_hdf5,
)
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.mask")

phil_scope = load_phil("mask")


def numbered(name: str, number: int) -> str:
    """The name of a file for a detector: ``x.mask``, ``x_2.mask``, ``x_3.mask``."""
    stem, suffix = os.path.splitext(name)
    return name if number == 1 else f"{stem}_{number}{suffix}"


def check_output(params: Any, inputs: Sequence[str]) -> None:
    """Check the names of the output files.

    Raises:
        ValueError: A name is missing, is used twice, or will not do.
    """
    output = params.output
    if not (output.mask and output.layers):
        raise ValueError("output.mask and output.layers must be names")
    used = {os.path.realpath(name) for name in inputs}
    for option in ("mask", "layers", "html", "json", "plots", "log"):
        name = getattr(output, option)
        if not name:
            continue
        folder = os.path.dirname(os.path.realpath(name))
        if not os.path.isdir(folder):
            raise ValueError(f"output.{option}={name}: there is no folder {folder}")
        if os.path.realpath(name) in used:
            raise ValueError(f"output.{option}={name} is in use: give another name")
        used.add(os.path.realpath(name))


def masks_of_files(params: Any, series: Sequence[Series]) -> list[list]:
    """The masks of the files given with ``mask=`` that fit each detector.

    Raises:
        ValueError: A file cannot be read, or fits no detector.
    """
    result: list[list] = [[] for _ in series]
    for name in filter(None, params.mask):
        check_kind(name)
        if h5py.is_hdf5(name):
            raise ValueError(
                f"The mask {name} has layers, which are of no use here: give the .mask "
                "that was written with it"
            )
        masks = read_mask(name)
        refusals = []
        for own, target in zip(series, result):
            try:
                check_masks(own.detector, masks, name)
                target.append(masks)
            except ValueError as e:
                refusals.append(e)
        if len(refusals) == len(series):
            raise refusals[0]
    return result


def draw_layer(made: MadeMask, name: str) -> bytes:
    """PNG of a layer of a mask, or of all."""
    return draw(plot_layer(made, name, picture_title(made, name)), "png", dpi=100)


def write_pictures(masks: Sequence[MadeMask], plots: str | None) -> list[dict]:
    """Draw all layers, and write the pictures if they have a name.

    Returns:
        For each detector the PNG of each layer, and of the total first.
    """
    result = []
    for number, made in enumerate(masks, 1):
        names = layers_to_draw(made)
        pictures = {name: draw_layer(made, name) for name in names}
        if plots:
            for name, content in pictures.items():
                path = f"{numbered(plots, number)}_{name}.png"
                with atomic_path(path) as temporary:
                    temporary.write_bytes(content)
        result.append(pictures)
    if plots:
        logger.info("Pictures of the layers written to %s_*.png", plots)
    return result


def write_text(path: str, text: str) -> None:
    """Write a text file."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_report(
    params: Any,
    masks: Sequence[MadeMask],
    inputs: Sequence[str],
    written: list[str],
    warnings: Sequence[str],
) -> list[dict[str, Any]]:
    """Write pictures, JSON and the HTML report, as far as they have names.

    Returns:
        The figures of the mask of each detector, with the name of its file.
    """
    output = params.output
    summaries = [{**made.summary(), "mask": name} for made, name in zip(masks, written)]
    if output.json:
        content = {"inputs": list(inputs), "detectors": summaries}
        write_text(output.json, json.dumps(content, indent=2, allow_nan=False) + "\n")
        logger.info("Numbers written to %s", output.json)
    if not (output.html or output.plots):
        return summaries
    pictures = write_pictures(masks, output.plots)
    if output.html:
        facts = {
            "title": ", ".join(map(os.path.basename, inputs)),
            "versions": f"{dials_version()}, dials_diffuse {dials_diffuse.__version__}",
            "output": [*written, output.layers],
            "warnings": list(warnings),
            "json": output.json,
            "no_bragg": BraggSample.from_phil(params, 1).why_not_shown,
        }
        write_text(output.html, render_page(summaries, pictures, facts))
        logger.info("Report written to %s", output.html)
    return summaries


def image_layers(made: MadeMask) -> dict[str, ImageLayer]:
    """The layers of single images, as the file has them."""
    bragg = made.bragg
    if bragg is None:
        return {}
    layer = ImageLayer(
        panels=bragg.panels,
        identifier=bragg.experiment.identifier,
        image=bragg.image,
        file=bragg.path,
        meaning=bragg.exclusion,
    )
    return {"bragg": layer}


def write_output(
    params: Any,
    masks: Sequence[MadeMask],
    phil: str,
    inputs: Sequence[str],
    warnings: Sequence[str],
) -> list[dict[str, Any]]:
    """Write the masks and the report; returns the figures of ``write_report``."""
    written = []
    for number, made in enumerate(masks, 1):
        name = numbered(params.output.mask, number)
        with atomic_path(name) as path:
            write_mask(path, made.good)
        logger.info("Mask of detector %d written to %s", number, name)
        written.append(name)
    detectors = [
        DetectorMask(m.identifiers, m.layers, LAYERS, image_layers(m)) for m in masks
    ]
    with atomic_path(params.output.layers) as path:
        write_masks(path, detectors, phil, inputs)
    logger.info("Layers written to %s", params.output.layers)
    return write_report(params, masks, inputs, written, warnings)


def process(params: Any, scope: libtbx.phil.scope) -> list[dict[str, Any]]:
    """Read the input, make the masks, write the output.

    Returns:
        The figures of the mask of each detector.

    Raises:
        ValueError: The input or a parameter will not do, or no pixel is left.
    """
    names = [item.filename for item in params.input.experiments]
    inputs = [*names, *(item.filename for item in params.input.reflections)]
    check_output(params, [*inputs, *filter(None, params.mask)])
    settings = MaskSettings.from_phil(params, scope)
    sample = BraggSample.from_phil(params, settings.nproc)
    warnings: list[str] = []
    with collect_warnings(warnings):
        experiments = load_experiments(params.input.experiments)
        reflections = load_reflections(params.input.reflections, experiments)
        series = make_series(experiments)
        sample_images(experiments, series, sample)  # refused before images are read
        given = masks_of_files(params, series)
        masks = [make_mask(own, settings, files) for own, files in zip(series, given)]
        good = [made.good for made in masks]
        if not any(panel.any() for panels in good for panel in panels):
            raise ValueError(
                "No pixel is left: check the shapes, the resolution limits, the trusted "
                "range and the mask files"
            )
        layers = bragg_layers(experiments, series, reflections, good, sample)
        masks = [dataclasses.replace(m, bragg=x) for m, x in zip(masks, layers)]
        for number, made in enumerate(masks, 1):
            log_mask(made, number)
        return write_output(params, masks, scope.as_str(), inputs, warnings)


def make_parser(phil: libtbx.phil.scope = phil_scope) -> ArgumentParser:
    """The parser of the command line."""
    return ArgumentParser(
        usage="dials.diffuse_mask [options] models.expt [reflections.refl]",
        phil=phil,
        read_experiments=True,
        read_reflections=True,
        check_format=False,
        epilog=__doc__,
    )


@dials.util.show_mail_handle_errors()
def run(
    args: Sequence[str] | None = None, phil: libtbx.phil.scope = phil_scope
) -> None:
    """Run dials.diffuse_mask as from the command line.

    Args:
        args: The arguments, or None for those of the process.
        phil: The PHIL scope.
    """
    parser = make_parser(phil)
    with errors_in_one_line():
        params, options, files = parse_arguments(parser, args)
        refuse_hdf5(files)
        with logged_work(parser, params, options):
            process(params, parser.phil)


if __name__ == "__main__":
    run()
