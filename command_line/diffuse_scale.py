# LIBTBX_SET_DISPATCHER_NAME dials.diffuse_scale
"""
Put observations of diffuse scattering on one relative scale.

The model has factors and an offset: a scale for each still, smooth along a sweep; a
relative B factor; absorption by the sample; the sensitivity of the detector; and
scattering that the background correction has left. They are refined against observations
of symmetry-equivalent voxels, by the machinery of dials.scale, with weights from expected
counts. Terms that the observations cannot determine are switched off, with a warning.
Observations that disagree with the others of their voxel, too high or too low, are
flagged, and an error model is refined.

The output is one table for dials.diffuse_merge, the experiments with their scaling
models, and a report.

Examples::

  dials.diffuse_scale extracted.expt extracted.refl

  dials.diffuse_scale 1.expt 1.refl 2.expt 2.refl model.absorption.use=no

  dials.diffuse_scale new.expt new.refl reference=merged.h5

  dials.diffuse_scale extracted.expt extracted.refl exclude_images=12 min_cc=0.3
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

import libtbx.phil
from dxtbx.model.experiment_list import ExperimentList

import dials.util
from dials.util import tabulate
from dials.util.options import ArgumentParser, flatten_experiments
from dials_diffuse.io.inputs import check_identifiers
from dials_diffuse.io.observations import (
    SCALED_COLUMNS,
    ObservationFile,
    ObservationWriter,
    program_of,
)
from dials_diffuse.merging.observations import check_tables, experiment_numbers
from dials_diffuse.report.scaling import scaling_record
from dials_diffuse.report.scaling_plots import render_page
from dials_diffuse.scaling.apply import all_outliers, count, scaled_rows
from dials_diffuse.scaling.block import ImageRange, RowReader
from dials_diffuse.scaling.excluded import parse_excluded, read_blocks
from dials_diffuse.scaling.models import scaling_models
from dials_diffuse.scaling.reference import read_reference
from dials_diffuse.scaling.result import Scaling
from dials_diffuse.scaling.scale import scale
from dials_diffuse.scaling.selection import MIN_PAIRS, Gain, agreement, gains
from dials_diffuse.util.command import (
    collect_warnings,
    errors_in_one_line,
    load_phil,
    logged_work,
    parse_arguments,
)
from dials_diffuse.util.files import atomic_path, temporary_folder
from dials_diffuse.util.memory import return_large_arrays

logger = logging.getLogger("dials.diffuse.scale")

phil_scope = load_phil("scale")


def given(values: Sequence[str | None]) -> list[str]:
    """The values of a parameter that may be given several times."""
    return [value for value in values if value]


def check_arguments(params: Any, files: Sequence[str]) -> None:
    """Check that experiments and observations were given, and names for the output.

    Raises:
        ValueError: Something is missing, or an output file would replace another.
    """
    errors = []
    if not params.input.experiments:
        errors.append("Please give an experiment list (.expt)")
    if not files:
        errors.append(
            "Please give an observation file (.refl of dials.diffuse_extract)"
        )
    inputs = [item.filename for item in params.input.experiments]
    inputs += [*files, *([params.reference] if params.reference else [])]
    inputs += given(params.bragg_reference)
    used = {os.path.realpath(path) for path in inputs}
    for option in ("experiments", "reflections", "html", "json", "log"):
        name = getattr(params.output, option)
        if not name:
            if option in ("experiments", "reflections"):
                errors.append(f"Please give a file name: output.{option}")
            continue
        if os.path.realpath(name) in used:
            errors.append(f"output.{option}={name} is in use: give another name")
        used.add(os.path.realpath(name))
        folder = os.path.dirname(os.path.realpath(name))
        if not os.path.isdir(folder):
            errors.append(f"output.{option}={name}: there is no folder {folder}")
    if errors:
        raise ValueError("\n".join(errors))
    check_identifiers(params.input.experiments)
    spare_other_models(params.output)


def spare_other_models(output: Any) -> None:
    """Refuse to write over the results of dials.scale, which have the same names.

    Raises:
        ValueError: A file of that name is not one of ours.
    """
    reflections, experiments = Path(output.reflections), Path(output.experiments)
    ours = reflections.exists() and program_of(reflections) == "dials.diffuse_scale"
    if reflections.exists() and not ours:
        raise ValueError(
            f"output.reflections={reflections} exists and is not of dials.diffuse_scale, "
            "perhaps of dials.scale: give another name"
        )
    if experiments.exists() and not ours:
        raise ValueError(
            f"output.experiments={experiments} exists, without observations of "
            "dials.diffuse_scale beside it: give another name"
        )


def scale_experiments(
    experiments: ExperimentList, tables: Sequence[ObservationFile], params: Any
) -> tuple[Scaling, RowReader]:
    """Scale, and once more without the experiments that do not agree with the rest."""
    numbers = experiment_numbers(experiments, tables)
    excluded = parse_excluded(
        given(params.exclude_images), experiments, read_blocks(tables, numbers)
    )
    reference = None
    if params.reference:
        reference = read_reference(params.reference, tables[0].grid, tables[0].path)
    while True:
        result, reader = scale(
            experiments, tables, numbers, params, excluded, reference
        )
        if params.min_cc is None or result.refiner is None:
            return result, reader
        found = agreement(result.refiner, len(experiments))
        bad = np.flatnonzero(found.cc < params.min_cc)
        n_unknown = np.count_nonzero((found.n_pairs > 0) & ~np.isfinite(found.cc))
        if n_unknown:
            logger.info(
                "%d experiments share less than %d voxels with others among the "
                "observations refined against: min_cc does not judge them",
                n_unknown,
                MIN_PAIRS,
            )
        if len(bad) == 0:
            if np.isfinite(found.cc).any():
                logger.info(
                    "min_cc=%g leaves out nothing: the lowest correlation with the rest "
                    "is %.3f",
                    params.min_cc,
                    np.nanmin(found.cc),
                )
            return result, reader
        if len(bad) == np.count_nonzero(np.isfinite(found.cc)):
            raise ValueError(
                f"min_cc={params.min_cc:g}: no experiment agrees with the rest that well, "
                f"the best has a correlation of {np.nanmax(found.cc):.3f}"
            )
        logger.info(
            "Left out, as their correlation with the rest is below %g: %s",
            params.min_cc,
            ", ".join(f"{i} ({found.cc[i]:.3f})" for i in bad),
        )
        n_known = np.count_nonzero(np.isfinite(found.cc))
        if 2 * len(bad) > n_known:
            logger.warning(
                "Warning: min_cc=%g leaves out %d of %d experiments; their median "
                "correlation with the rest is %.3f",
                params.min_cc,
                len(bad),
                n_known,
                np.nanmedian(found.cc),
            )
        excluded += [ImageRange(int(i)) for i in bad]


def contributions_of(scaling: Scaling) -> dict[str, Gain]:
    """What each term contributes, nothing if there was nothing to refine."""
    if scaling.refiner is None:
        return {}
    return gains(scaling.refiner, len(scaling.extents))


def log_result(scaling: Scaling, contributions: Mapping[str, Gain]) -> None:
    """Scales and correlations of the experiments, terms that were switched off."""
    scales = scaling.experiment_scales()
    if len(scales) > 1:
        logger.info(
            "Mean scales of %d experiments: %.3f to %.3f, rms deviation from 1 %.3f",
            len(scales),
            scales.min(),
            scales.max(),
            np.sqrt(np.mean((scales - 1) ** 2)),
        )
    if contributions:
        rows = [
            (
                f"without {name}" if name else "all terms",
                f"{g.chi_square:.3f}",
                f"{g.cc:.3f}" if np.isfinite(g.cc) else "–",
            )
            for name, g in contributions.items()
        ]
        header = ["", "χ² per degree\nof freedom", "mean CC\nwith the rest"]
        logger.info(
            "\nWhat each term contributes, the others as refined:\n%s",
            tabulate(rows, header),
        )
    for name, reason in scaling.dropped.items():
        logger.info("Without the term %s: %s", name, reason)


def write_output(
    experiments: ExperimentList,
    reader: RowReader,
    scaling: Scaling,
    params: Any,
    phil: str,
    inputs: Sequence[str],
) -> None:
    """Write scaled observations and the experiments with their models."""
    identifiers = dict(enumerate(experiments.identifiers()))
    with contextlib.ExitStack() as stack:
        outliers = None
        if params.outliers.reject and scaling.refiner is not None:
            folder = temporary_folder(params.output.reflections, "rows")
            threshold = params.outliers.threshold
            outliers = all_outliers(
                reader, scaling, threshold, stack.enter_context(folder)
            )
        path = stack.enter_context(atomic_path(params.output.reflections))
        writer = stack.enter_context(
            ObservationWriter(
                path,
                reader.tables[0].grid,
                identifiers,
                phil,
                list(inputs),
                SCALED_COLUMNS,
                "dials.diffuse_scale",
            )
        )
        blocks = read_blocks(reader.tables, reader.numbers)
        if blocks is not None:
            writer.write_blocks(blocks)
        writer.error_model = tuple(scaling.error_model.parameters)
        rows = scaled_rows(reader, scaling, outliers)
        count(rows, writer.append, len(experiments)).log()
    for experiment, model in zip(experiments, scaling_models(scaling)):
        experiment.scaling_model = model
    with atomic_path(params.output.experiments) as path:
        experiments.as_file(path)
    logger.info(
        "Scaled observations written to %s, models to %s",
        params.output.reflections,
        params.output.experiments,
    )


def write_report(params: Any, record: Mapping[str, Any]) -> None:
    """Write the figures as JSON and as a page, as far as they have names."""
    if params.output.json:
        with atomic_path(params.output.json) as path:
            text = json.dumps(record, indent=1, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
        logger.info("Wrote the figures to %s", params.output.json)
    if params.output.html:
        with atomic_path(params.output.html) as path:
            path.write_text(render_page(record), encoding="utf-8")
        logger.info("Wrote the report to %s", params.output.html)


def process(params: Any, phil: str, files: Sequence[str]) -> Scaling:
    """Read the input, scale, write the output."""
    return_large_arrays()
    experiments = flatten_experiments(params.input.experiments)
    inputs = [*(item.filename for item in params.input.experiments), *files]
    with contextlib.ExitStack() as stack:
        warnings: list[str] = []
        stack.enter_context(collect_warnings(warnings))
        tables = [stack.enter_context(ObservationFile(path)) for path in files]
        check_tables(tables)
        scaling, reader = scale_experiments(experiments, tables, params)
        contributions = contributions_of(scaling)
        log_result(scaling, contributions)
        write_output(experiments, reader, scaling, params, phil, inputs)
        if params.output.json or params.output.html:
            record = scaling_record(
                experiments, reader, scaling, warnings, inputs, contributions
            )
            write_report(params, record)
    return scaling


def make_parser(phil: libtbx.phil.scope = phil_scope) -> ArgumentParser:
    """The parser of the command line."""
    return ArgumentParser(
        usage="dials.diffuse_scale [options] extracted.expt extracted.refl",
        phil=phil,
        read_experiments=True,
        check_format=False,
        epilog=__doc__,
    )


@dials.util.show_mail_handle_errors()
def run(
    args: Sequence[str] | None = None, phil: libtbx.phil.scope = phil_scope
) -> None:
    """Run dials.diffuse_scale as from the command line."""
    parser = make_parser(phil)
    with errors_in_one_line():
        params, options, files = parse_arguments(parser, args)
        check_arguments(params, files)
        with logged_work(parser, params, options):
            process(params, parser.phil.as_str(), files)


if __name__ == "__main__":
    run()
