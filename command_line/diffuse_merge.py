# LIBTBX_SET_DISPATCHER_NAME dials.diffuse_merge
"""
Merge voxel observations of diffuse scattering by Laue symmetry into one map.

The observations of symmetry-equivalent voxels are added up as sums: the intensity of a
voxel is the sum of its counts less that of its background, divided by the sum of its
normalisation. So it is unbiased however few the counts are. A seeded random half of the
observations, or of whole stills and sweeps (half_split), makes one half-map and the rest
the other; their correlation CC1/2 without the isotropic part, the completeness and the
multiplicity are given in resolution shells.

Observations of several runs of dials.diffuse_extract can be merged if their grids are
the same. The map is a NeXus file, which NeXpy, silx and h5web open; its layers hk0, h0l
and 0kl are drawn in a picture.

Examples::

  dials.diffuse_merge extracted.expt extracted.refl

  dials.diffuse_merge scaled.expt scaled.refl n_shells=10 output.map=crystal.h5

  dials.diffuse_merge 1.expt 1.refl 2.expt 2.refl
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from typing import Any, Sequence

import libtbx.phil
from dxtbx.model.experiment_list import ExperimentList

import dials.util
from dials.util.options import ArgumentParser, flatten_experiments
from dials_diffuse.io.inputs import check_identifiers
from dials_diffuse.io.maps import INTENSITY, MapFile, MapWriter
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.merge import MergingSettings, merge
from dials_diffuse.merging.observations import (
    ObservationTable,
    check_tables,
    experiment_numbers,
)
from dials_diffuse.merging.statistics import MergingStatistics
from dials_diffuse.report.slices import central_layers, plot_layers
from dials_diffuse.scaling.initial import put_on_one_scale
from dials_diffuse.util.command import (
    errors_in_one_line,
    load_phil,
    logged_work,
    parse_arguments,
)
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.merge")

phil_scope = load_phil("merge")


def check_experiments(
    experiments: ExperimentList, tables: Sequence[ObservationFile]
) -> None:
    """Check that the experiments are those of the observations.

    Raises:
        ValueError: Observations belong to an experiment that is not in the list.
    """
    experiment_numbers(experiments, tables)
    known = set(experiments.identifiers())
    used = {name for table in tables for name in table.identifiers.values()}
    if len(used) < len(known):
        logger.info(
            "%d of %d experiments have no observations",
            len(known) - len(used),
            len(known),
        )


def log_input(tables: Sequence[ObservationFile]) -> None:
    """Say what is merged, and on which grid."""
    for table in tables:
        logger.info(
            "%s: %d rows of %d experiments",
            table.path,
            table.n_rows,
            len(table.identifiers),
        )
    grid = tables[0].grid
    logger.info(
        "Grid: cell %s, Laue group %s, ndiv %s, %s voxels, d_min %g Å",
        " ".join(f"{x:.2f}" for x in grid.unit_cell),
        grid.laue_group.info(),
        ",".join(map(str, grid.ndiv)),
        " x ".join(map(str, grid.shape)),
        grid.d_min,
    )


def log_statistics(statistics: MergingStatistics, half_split: str) -> None:
    """The table of statistics, what is wrong with CC1/2, and the completeness."""
    logger.info("\nMerging statistics in resolution shells:")
    logger.info(statistics.as_table())
    overall = statistics.overall
    n_negative = sum(shell.is_anticorrelated for shell in statistics.shells)
    if n_negative:
        logger.warning(
            "Warning: CC1/2 of %d of %d shells is significantly negative: observations "
            "of one voxel disagree systematically, so scaling or a better background "
            "is needed%s",
            n_negative,
            len(statistics.shells),
            ""
            if half_split == "experiments"
            else ". half_split=experiments measures CC1/2 without what an experiment "
            "has too much in all voxels of a shell",
        )
    if half_split == "experiments" and overall.n_pairs == 0:
        logger.warning(
            "Warning: CC1/2 is not defined, as no voxel was seen by experiments of both "
            "halves: try another seed or half_split=observations"
        )
    logger.info(
        "Completeness to %.2f Å: %.2f%% (%d of %d unique voxels)\n",
        overall.d_min,
        100 * overall.completeness,
        overall.n_voxels,
        overall.n_possible,
    )


def input_files(params: Any, files: Sequence[str]) -> list[str]:
    """Names of the experiment lists and the observation files."""
    return [*(item.filename for item in params.input.experiments), *files]


def write_map(
    tables: Sequence[ObservationTable], params: Any, phil: str, files: Sequence[str]
) -> MergingStatistics:
    """Merge the observations into the output file."""
    inputs = input_files(params, files)
    identifiers = [name for table in tables for name in table.identifiers.values()]
    with atomic_path(params.output.map) as path:
        with MapWriter(path, tables[0].grid, identifiers, phil, inputs) as writer:
            return merge(tables, MergingSettings.from_phil(params), writer)


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write the statistics and the scales of the experiments."""
    with atomic_path(path) as temporary:
        text = json.dumps(content, indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_plot(path: str, map_path: str) -> None:
    """Draw the central layers of the map."""
    with MapFile(map_path) as handle:
        grid = handle.grid
        layers = central_layers(handle)
    title = (
        f"{os.path.basename(map_path)}: Laue group {grid.laue_group.info()}, cell "
        f"{' '.join(f'{x:.5g}' for x in grid.unit_cell)}, to {grid.d_min:.3g} Å"
    )
    figure = plot_layers(layers, grid.d_min, INTENSITY, title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


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
    if not params.output.map:
        errors.append("Please give a file name for the map: output.map")
    used = {os.path.realpath(path) for path in input_files(params, files)}
    for option in ("map", "plot", "json", "log"):
        name = getattr(params.output, option)
        if name:
            if os.path.realpath(name) in used:
                errors.append(f"output.{option}={name} is in use: give another name")
            used.add(os.path.realpath(name))
            folder = os.path.dirname(os.path.realpath(name))
            if not os.path.isdir(folder):
                errors.append(f"output.{option}={name}: there is no folder {folder}")
    if errors:
        raise ValueError("\n".join(errors))
    check_identifiers(params.input.experiments)


def process(params: Any, phil: str, files: Sequence[str]) -> dict[str, Any]:
    """Read the input, merge, write the output.

    Returns:
        The statistics and the scales of the experiments, as in the JSON file.
    """
    experiments = flatten_experiments(params.input.experiments)
    with contextlib.ExitStack() as stack:
        tables = [stack.enter_context(ObservationFile(path)) for path in files]
        log_input(tables)
        check_experiments(experiments, tables)
        check_tables(tables)
        scales: dict[str, float] = {}
        if params.scale_experiments:
            tables, scales = put_on_one_scale(tables)
        statistics = write_map(tables, params, phil, files)
    log_statistics(statistics, params.half_split)
    content = {**statistics.as_dict(), "scales": scales}
    logger.info("Map written to %s", params.output.map)
    if params.output.json:
        write_json(params.output.json, content)
        logger.info("Statistics written to %s", params.output.json)
    if params.output.plot:
        write_plot(params.output.plot, params.output.map)
        logger.info("Picture of the layers written to %s", params.output.plot)
    return content


def make_parser(phil: libtbx.phil.scope = phil_scope) -> ArgumentParser:
    """The parser of the command line."""
    return ArgumentParser(
        usage="dials.diffuse_merge [options] extracted.expt extracted.refl",
        phil=phil,
        read_experiments=True,
        check_format=False,
        epilog=__doc__,
    )


@dials.util.show_mail_handle_errors()
def run(
    args: Sequence[str] | None = None, phil: libtbx.phil.scope = phil_scope
) -> None:
    """Run dials.diffuse_merge as from the command line."""
    parser = make_parser(phil)
    with errors_in_one_line():
        params, options, files = parse_arguments(parser, args)
        check_arguments(params, files)
        with logged_work(parser, params, options):
            process(params, parser.phil.as_str(), files)


if __name__ == "__main__":
    run()
