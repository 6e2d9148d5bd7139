# LIBTBX_SET_DISPATCHER_NAME dials.diffuse_extract
"""
Extract the diffuse scattering of images into voxels of reciprocal space.

Every pixel of every image is given the Miller indices of its scattering vector, from the
refined models of its own image, and its counts are added to the voxel it falls into. A
voxel seen by one still, or by one narrow range of rotation, is one observation: the sum
of its counts and the sum of what its pixels would count per unit of scattering
(exposure, polarization, solid angle, sensor efficiency, absorption by air). Pixels that
are masked, outside the trusted range, or near a Bragg position are left out.

The models may be of stills or of rotation data, of any number of crystals, sweeps and
detectors. Crystals in different indexing settings are brought into one. A reflection table
of the same experiments is optional; it serves to check the geometry of each image, and to
find the size of spots. The output is an experiment list and a reflection table in HDF5, for
dials.diffuse_merge, a table of the Bragg intensities that were left out, and a page with
the figures of all images.

Examples::

  dials.diffuse_extract refined.expt

  dials.diffuse_extract refined.expt refined.refl grid.ndiv=4 grid.d_min=1.6

  dials.diffuse_extract integrated.expt mask=pixels.mask bragg.semi_axes=0.2 mp.nproc=4

  dials.diffuse_extract refined.expt mask=diffuse_mask.h5 background=diffuse_background.h5
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from typing import Any, Sequence

import libtbx.phil
from dxtbx.model.experiment_list import ExperimentList

import dials.util
from dials.array_family import flex
from dials.util.options import ArgumentParser
from dials_diffuse.bragg.ellipsoid import warn_of_unequal_axes
from dials_diffuse.extraction.extract import Extracted, extract
from dials_diffuse.extraction.prepare import Prepared, prepare
from dials_diffuse.extraction.reindexing import select_experiments
from dials_diffuse.extraction.report import (
    log_bragg,
    log_crystals,
    log_grid,
    log_rotation,
)
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.io.background import BackgroundFile, check_images
from dials_diffuse.io.bragg import bragg_table
from dials_diffuse.io.inputs import (
    load_experiments,
    load_reflections,
    with_crystals,
)
from dials_diffuse.io.masks import given_mask
from dials_diffuse.report.corrections import CorrectionSummary, log_corrections
from dials_diffuse.report.extraction_record import extraction_record
from dials_diffuse.util.command import (
    collect_warnings,
    errors_in_one_line,
    load_phil,
    logged_work,
    parse_arguments,
    refuse_hdf5,
)
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.extract")

phil_scope = load_phil("extract")


def input_names(params: Any) -> list[str]:
    """The names of all files that are read."""
    names = [item.filename for item in params.input.experiments]
    names += [item.filename for item in params.input.reflections]
    return names + [name for name in (params.mask, params.background) if name]


def check_output(params: Any) -> None:
    """Check the names of the output files.

    Raises:
        ValueError: A name is missing, is used twice, or will not do.
    """
    output = params.output
    if not (output.experiments and output.reflections):
        raise ValueError("output.experiments and output.reflections must be names")
    if os.path.splitext(output.experiments)[1] not in (".expt", ".json"):
        raise ValueError(
            f"output.experiments={output.experiments} must end in .expt or .json"
        )
    used = {os.path.realpath(name) for name in input_names(params)}
    options = ("experiments", "reflections", "bragg", "corrections", "html", "json")
    for option in (*options, "log"):
        name = getattr(output, option)
        if not name:
            continue
        if os.path.realpath(name) in used:
            raise ValueError(f"output.{option}={name} is in use: give another name")
        used.add(os.path.realpath(name))
        folder = os.path.dirname(name)
        if folder and not os.path.isdir(folder):
            # now, and not after hours
            file = f"the log file {name}" if option == "log" else name
            raise ValueError(f"Cannot write {file}: there is no folder {folder}")


def write_output(
    params: Any,
    phil: str,
    prepared: Prepared,
) -> tuple[Extracted, list[CorrectionSummary]]:
    """Extract, and write the table and its experiment list once both are complete.

    Returns:
        What was extracted, and the ranges of the corrections.
    """
    expt_name, refl_name = params.output.experiments, params.output.reflections
    experiments, grid = prepared.experiments, prepared.grid
    settings = prepared.settings
    settings.bragg.check_coverage(grid.cell, grid.rotations)
    log_grid(grid)
    log_bragg(settings.bragg)
    warn_of_unequal_axes(settings.bragg, grid.rotations)
    log_crystals(experiments, grid)
    log_rotation(experiments, grid)
    summaries = log_corrections(experiments, settings)
    if params.output.corrections:
        # here, as matplotlib takes its time
        from dials_diffuse.report.correction_pictures import draw_corrections

        for name in draw_corrections(params.output.corrections, experiments, settings):
            logger.info("Wrote the pictures of the corrections to %s", name)
    with contextlib.ExitStack() as stack:
        table, expt = map(stack.enter_context, map(atomic_path, (refl_name, expt_name)))
        experiments.as_file(expt)  # first: a name that will not do shows at once
        take_peaks = None
        if params.output.bragg:
            bragg = bragg_table(params.output.bragg, experiments)
            take_peaks = stack.enter_context(bragg)
        found = extract(
            experiments,
            grid,
            settings,
            table,
            phil,
            input_names(params),
            prepared.rejected,
            take_peaks,
        )
    if take_peaks is not None and take_peaks.is_full:
        params.output.bragg = None  # nor is it in the report
    logger.info("Wrote the experiments to %s", expt_name)
    logger.info("Wrote the observations to %s", refl_name)
    if params.output.bragg and found.peaks.n_peaks:
        logger.info(
            "Wrote the intensities of %d Bragg peaks to %s",
            found.peaks.n_peaks,
            params.output.bragg,
        )
    return found, summaries


def write_report(params: Any, record: dict[str, Any], prepared: Prepared) -> None:
    """Write the record as JSON and as a page, as far as they have names."""
    if params.output.json:
        with atomic_path(params.output.json) as path:
            text = json.dumps(record, indent=1, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
        logger.info("Wrote the figures to %s", params.output.json)
    if params.output.html:
        # here, as not every run needs it
        from dials_diffuse.report.extraction import render_page

        with atomic_path(params.output.html) as path:
            path.write_text(render_page(record, prepared), encoding="utf-8")
        logger.info("Wrote the report to %s", params.output.html)


def with_files(
    settings: ExtractionSettings, params: Any, experiments: ExperimentList
) -> ExtractionSettings:
    """The settings with the mask and the background, checked against the experiments.

    Raises:
        ValueError: A file cannot be read, or belongs to other images.
    """
    if params.background is not None:
        with BackgroundFile(params.background) as background:
            background.check_corrections(settings.corrections)
            background.check_counting(settings.gain, settings.trusted_range)
            check_images(background, experiments)
    return dataclasses.replace(settings, **given_mask(params.mask, experiments))


def load_input(
    params: Any,
) -> tuple[ExperimentList, flex.reflection_table | None, ExtractionSettings]:
    """The experiments with crystals, their reflections, and the settings.

    Raises:
        ValueError: A file cannot be read, or the files do not go together.
    """
    names = [item.filename for item in params.input.experiments]
    all_experiments = load_experiments(params.input.experiments)
    reflections = load_reflections(params.input.reflections, all_experiments)
    experiments = with_crystals(all_experiments, names)
    settings = ExtractionSettings.from_phil(params)
    settings = with_files(settings, params, experiments)
    if reflections is not None:
        kept = [i for i, e in enumerate(all_experiments) if e.crystal is not None]
        reflections = select_experiments(reflections, kept)
    return experiments, reflections, settings


def process(params: Any, phil: str) -> dict[str, Any] | None:
    """Read the input, extract, write the output.

    Returns:
        The figures of the report, as in the JSON file; None if no file is to have them.

    Raises:
        ValueError: The input or a parameter will not do, or no pixel is left.
    """
    check_output(params)
    warnings: list[str] = []
    with collect_warnings(warnings):
        experiments, reflections, settings = load_input(params)
        prepared = prepare(experiments, reflections, settings)
        found, summaries = write_output(params, phil, prepared)
    if not (params.output.html or params.output.json):
        return None
    names = ("experiments", "reflections", "bragg", "json")
    record = {
        "inputs": input_names(params),
        "output": {name: getattr(params.output, name) for name in names},
        "warnings": warnings,
        **extraction_record(experiments, prepared, found, summaries),
    }
    write_report(params, record, prepared)
    return record


def make_parser(phil: libtbx.phil.scope = phil_scope) -> ArgumentParser:
    """The parser of the command line."""
    return ArgumentParser(
        usage="dials.diffuse_extract [options] refined.expt [refined.refl]",
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
    """Run dials.diffuse_extract as from the command line.

    Args:
        args: The arguments, or None for those of the process.
        phil: The PHIL scope.
    """
    parser = make_parser(phil)
    with errors_in_one_line():
        params, options, files = parse_arguments(parser, args)
        refuse_hdf5(files)
        check_output(params)  # before the log is begun, which might replace a file
        with logged_work(parser, params, options):
            process(params, parser.phil.as_str())


if __name__ == "__main__":
    run()
