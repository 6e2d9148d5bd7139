# LIBTBX_SET_DISPATCHER_NAME dials.diffuse_process
"""
Process diffraction images of crystals to a merged map of their diffuse scattering.

The image headers tell stills from rotation data, unless mode says which. Rotation data
are imported, spots found, all sweeps indexed together and refined by the programs of
DIALS. Of stills each is indexed by itself (dials.stills_process), then all are refined
together. A mask of faulty and shadowed pixels is made by dials.diffuse_mask and, if
background.method or images without the crystal are given, a background by
dials.diffuse_background. With them the diffuse scattering is extracted and merged by
dials.diffuse_extract, scaled by dials.diffuse_scale and merged by dials.diffuse_merge.

Parameters of DIALS' programs are passed on as find_spots.options="name=value ...", or
in a file find_spots.phil=name.phil; likewise import, index, stills_process,
combine_experiments, refine and integrate. Those of our stages are mask.*, background.*,
extract.* and merge.*.

Everything is written to output.directory, with the log of each program. diffuse.html is
a page with what is to be known of the run, diffuse.json has the same figures. If a
program fails, what was finished before remains.

Examples::

  dials.diffuse_process /data/crystal_1/*.cbf space_group=P41 extract.grid.d_min=1.6

  dials.diffuse_process image_####.cbf input.reference_geometry=refined.expt

  dials.diffuse_process stills/ unit_cell=48.4,48.4,63.4,90,90,90 space_group=P41 \\
    stills_process.options="spotfinder.filter.min_spot_size=3"

  dials.diffuse_process imported.expt input.mask=pixels.mask output.directory=map

  dials.diffuse_process image_####.cbf background.images.experiments=blank.expt
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Sequence

import h5py

import libtbx.phil
from dxtbx.model.experiment_list import ExperimentList

import dials.util
import dials_diffuse
from dials.array_family import flex
from dials.util.options import ArgumentParser
from dials.util.version import dials_version
from dials_diffuse import symmetry
from dials_diffuse.background.settings import BackgroundSettings
from dials_diffuse.command_line import (
    diffuse_background,
    diffuse_extract,
    diffuse_mask,
    diffuse_merge,
    diffuse_scale,
)
from dials_diffuse.extraction.settings import (
    BraggSettings,
    ExclusionRegion,
    ExtractionSettings,
)
from dials_diffuse.geometry.validation import automatic_tolerance, image_residuals
from dials_diffuse.grid import Grid
from dials_diffuse.io.inputs import load_reflections, read_mask
from dials_diffuse.io.maps import MapFile
from dials_diffuse.io.masks import given_mask, read_masks
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.io.truth import TruthFile
from dials_diffuse.masks.settings import MaskSettings
from dials_diffuse.merging.merge import MergingSettings
from dials_diffuse.process.mode import (
    Series,
    decide_mode,
    image_series,
    read_headers,
)
from dials_diffuse.process.page import Page
from dials_diffuse.process.programs import find_program
from dials_diffuse.process.settings import (
    ProcessSettings,
    existing,
    split_arguments,
)
from dials_diffuse.process.stages import (
    IMPORTED,
    Stage,
    StageResult,
    import_stages,
    rotation_stages,
    run_stages,
    stills_stages,
)
from dials_diffuse.process.summary import (
    crystal_summary,
    extraction_summary,
    geometry_summary,
    indexing_summary,
    mask_summary,
    refinement_summary,
    spots_summary,
)
from dials_diffuse.report.comparison import comparison_section, plot_comparison
from dials_diffuse.simulation.comparison import LEAVE_VOXELS_WHOLE, compare
from dials_diffuse.util.command import (
    collect_warnings,
    errors_in_one_line,
    load_phil,
    logged_work,
    parse_arguments,
)
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.process")

phil_scope = load_phil("process")

OWN = "dials.diffuse_"
UNTRUSTED = "untrusted.phil"


def new_record(params: Any) -> dict[str, Any]:
    """The record of a run, before anything is known; ``diffuse.json`` when it ends."""
    return {
        "versions": {
            "dials": dials_version(),
            "dials_diffuse": dials_diffuse.__version__,
        },
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "data": "images",
        "json": params.output.json,
        "error": None,
        "warnings": [],
        "stages": [],
        **dict.fromkeys(("mode", "reason", "n_images")),
        **dict.fromkeys(("spots", "refinement", "crystal", "mask", "background")),
        **dict.fromkeys(("indexing", "geometry", "extraction", "scaling", "merging")),
        "truth": None,
    }


@contextlib.contextmanager
def working_directory(path: str) -> Iterator[None]:
    """Within it the current folder is ``path``, which is made if need be.

    Raises:
        ValueError: It cannot be made.
    """
    try:
        os.makedirs(path, exist_ok=True)
        before = os.getcwd()
        os.chdir(path)
    except OSError as e:
        raise ValueError(f"output.directory={path}: {e.strerror}") from None
    try:
        yield
    finally:
        os.chdir(before)


def changed_parameters(phil: libtbx.phil.scope, scope: str) -> list[str]:
    """The parameters of a scope that differ from their defaults, as arguments."""
    return [
        f"{item.path[len(scope) + 1 :]}={' '.join(map(str, item.object.words))}"
        for item in phil.all_definitions()
        if item.path.startswith(f"{scope}.")
    ]


def quoted(path: str) -> str:
    """A path as a PHIL value."""
    return f'"{path}"' if " " in path else path


def taken_over(arguments: Sequence[str], *names: str) -> list[str]:
    """The arguments with some parameters, or scopes if the name ends with a dot."""
    return [
        argument
        for argument in arguments
        if any(
            argument.startswith(name if name.endswith(".") else f"{name}=")
            for name in names
        )
    ]


def without(arguments: Sequence[str], *names: str) -> list[str]:
    """The arguments but for some parameters or scopes."""
    left_out = taken_over(arguments, *names)
    return [argument for argument in arguments if argument not in left_out]


def nproc_argument(params: Any, settings: ProcessSettings) -> list[str]:
    """The number of processes for a stage that was given none."""
    if isinstance(params.mp.nproc, int):
        return []
    return [f"mp.nproc={settings.nproc}"]


def makes_mask(params: Any) -> bool:
    """Whether dials.diffuse_mask is run."""
    return params.mask.make and not params.extract.mask


def mask_arguments(
    params: Any, settings: ProcessSettings, changes: libtbx.phil.scope
) -> list[str]:
    """The parameters of dials.diffuse_mask, but for untrusted regions."""
    own = changed_parameters(changes, "mask")
    files = [settings.mask, *filter(None, params.mask.mask)]
    extract = changed_parameters(changes, "extract")
    return [
        *(f"mask={quoted(name)}" for name in files if name),
        # first, so that those of the mask itself override them
        *taken_over(extract, "gain", "trusted_range", "bragg."),
        *without(own, "make", "mask", "untrusted."),
        *nproc_argument(params.mask, settings),
    ]


def untrusted_regions(changes: libtbx.phil.scope) -> str:
    """The untrusted regions of the mask as PHIL.

    On a command line the parameters of one region would become several.
    """
    return "".join(
        region.as_str()
        for scope in changes.get("mask").objects
        if scope.name == "mask"
        for region in getattr(scope, "objects", ())
        if region.name == "untrusted"
    )


def mask_stage(
    params: Any,
    settings: ProcessSettings,
    changes: libtbx.phil.scope,
    record: dict[str, Any],
) -> Stage:
    """The mask of the images, by the refined models; its figures go to the record."""
    arguments = ["refined.expt", *mask_arguments(params, settings, changes)]
    regions = untrusted_regions(changes)
    if regions:
        arguments.append(UNTRUSTED)

    def make(name: str, arguments: list[str], log: str, outputs: Any) -> None:
        if regions:
            with atomic_path(UNTRUSTED) as path:
                path.write_text(regions, encoding="utf-8")
        parser = diffuse_mask.make_parser()
        mask_params, _, _ = parse_arguments(parser, arguments)
        record["mask"] = mask_summary(diffuse_mask.process(mask_params, parser.phil))

    return Stage(
        name="dials.diffuse_mask",
        arguments=lambda: arguments,
        outputs=(params.mask.output.mask, params.mask.output.layers),
        log=params.output.log,
        execute=make,
    )


def background_method(params: Any) -> str | None:
    """images, radial or modal; None for no background.

    Raises:
        ValueError: The parameters contradict each other.
    """
    method = params.background.method
    if method == "none":  # or None, as PHIL reads method=none
        method = None
    if not any(params.background.images.experiments):
        if method == "images":
            raise ValueError(
                "background.method=images needs images without the crystal: "
                "background.images.experiments=blank.expt"
            )
    elif method is None:
        method = "images"
    if method and params.extract.background:
        raise ValueError(
            f"extract.background={params.extract.background} is a background already: "
            "leave out background.method and background.images.experiments"
        )
    return method


def background_arguments(
    params: Any, settings: ProcessSettings, changes: libtbx.phil.scope
) -> list[str]:
    """The parameters of dials.diffuse_background, but for the mask."""
    own = changed_parameters(changes, "background")
    extract = changed_parameters(changes, "extract")
    blanks = filter(None, params.background.images.experiments)
    return [
        f"method={background_method(params)}",
        *(f"images.experiments={quoted(name)}" for name in blanks),
        *without(own, "method", "images.experiments"),
        # extraction refuses a background that was made with other corrections
        *taken_over(extract, "corrections.", "gain", "trusted_range"),
        f"mp.nproc={settings.nproc}",
    ]


def background_stage(
    params: Any,
    settings: ProcessSettings,
    changes: libtbx.phil.scope,
    record: dict[str, Any],
) -> Stage:
    """The background of the images; its figures go to the record."""
    mask = params.extract.mask or settings.mask
    if makes_mask(params):
        mask = params.mask.output.layers
    arguments = ["refined.expt", *background_arguments(params, settings, changes)]
    arguments += [f"mask={quoted(mask)}"] if mask else []

    def make(name: str, arguments: list[str], log: str, outputs: Any) -> None:
        parser = diffuse_background.make_parser()
        background_params, _, _ = parse_arguments(parser, arguments)
        phil = parser.phil.as_str()
        record["background"] = diffuse_background.process(background_params, phil)

    return Stage(
        name="dials.diffuse_background",
        arguments=lambda: arguments,
        outputs=(params.background.output.background,),
        log=params.output.log,
        execute=make,
    )


def extract_stage(
    params: Any, settings: ProcessSettings, changes: libtbx.phil.scope
) -> Stage:
    """Extraction from the refined models, with mask and background."""
    mask = params.extract.mask or settings.mask
    if makes_mask(params):
        mask = params.mask.output.layers
    background = params.extract.background
    if background_method(params):
        background = params.background.output.background
    own = without(changed_parameters(changes, "extract"), "mask", "background")
    arguments = ["refined.expt", "refined.refl", *own]
    arguments += [f"mask={quoted(mask)}"] if mask else []
    arguments += [f"background={quoted(background)}"] if background else []
    arguments += nproc_argument(params.extract, settings)
    return Stage(
        name="dials.diffuse_extract",
        arguments=lambda: arguments,
        outputs=(params.extract.output.experiments, params.extract.output.reflections),
        log=params.output.log,
        execute=_extract,
    )


def _extract(name: str, arguments: list[str], log: str, outputs: Any) -> None:
    parser = diffuse_extract.make_parser()
    params, _, _ = parse_arguments(parser, arguments)
    diffuse_extract.process(params, parser.phil.as_str())


def scale_stage(
    params: Any, changes: libtbx.phil.scope, record: dict[str, Any]
) -> Stage:
    """Scaling; what came of it goes to the record."""
    output = params.extract.output
    arguments = [output.experiments, output.reflections]
    arguments += without(changed_parameters(changes, "scale"), "make")

    def scale(name: str, arguments: list[str], log: str, outputs: Any) -> None:
        parser = diffuse_scale.make_parser()
        scale_params, _, files = parse_arguments(parser, arguments)
        diffuse_scale.check_arguments(scale_params, files)
        found = diffuse_scale.process(scale_params, parser.phil.as_str(), files)
        record["scaling"] = found.summary()

    own = params.scale.output
    return Stage(
        name="dials.diffuse_scale",
        arguments=lambda: arguments,
        outputs=(own.experiments, own.reflections),
        log=params.output.log,
        execute=scale,
    )


def merge_stage(
    params: Any, changes: libtbx.phil.scope, record: dict[str, Any]
) -> Stage:
    """Merging; the statistics go to the record."""
    output = params.scale.output if params.scale.make else params.extract.output
    arguments = [output.experiments, output.reflections]
    arguments += changed_parameters(changes, "merge")

    def merge(name: str, arguments: list[str], log: str, outputs: Any) -> None:
        parser = diffuse_merge.make_parser()
        merge_params, _, files = parse_arguments(parser, arguments)
        diffuse_merge.check_arguments(merge_params, files)
        phil = parser.phil.as_str()
        record["merging"] = diffuse_merge.process(merge_params, phil, files)

    return Stage(
        name="dials.diffuse_merge",
        arguments=lambda: arguments,
        outputs=(params.merge.output.map,),
        log=params.output.log,
        execute=merge,
    )


def load_imported(path: str) -> ExperimentList:
    """The models of an imported experiment list, without its images.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return ExperimentList.from_file(path, check_format=False)
    except Exception as e:  # whatever a damaged file brings about
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"Cannot read {path} ({reason})") from None


def find_mode(settings: ProcessSettings) -> tuple[str, str]:
    """stills or rotation, and the reason.

    Raises:
        ValueError: The headers say both, or they cannot be read.
    """
    if settings.mode != "auto":
        mode, reason = settings.mode, f"as mode={settings.mode} says"
    elif settings.experiments:
        mode, reason = decide_mode(image_series(load_imported(settings.experiments)))
    else:
        headers = read_headers(settings.files, settings.templates)
        mode, reason = decide_mode(image_series(headers))
    if mode == "stills" and settings.integrate:
        raise ValueError(f"integrate=True is for rotation data, not stills ({reason})")
    return mode, reason


def check_imported(settings: ProcessSettings, mode: str) -> list[Series]:
    """The series of the images that were imported.

    Raises:
        ValueError: They are stills, but are to be processed as rotation data, or the mask
            is of another detector.
    """
    imported = load_imported(settings.experiments or IMPORTED)
    given_mask(settings.mask, imported)
    series = image_series(imported)
    stills = [s for s in series if s.is_still]
    if mode == "rotation" and stills:
        raise ValueError(
            f"mode=rotation, but {len(stills)} image(s) have no rotation (as "
            f"{stills[0].path}): give it by "
            'import.options="geometry.scan.oscillation=start,width '
            'convert_stills_to_sequences=True"'
        )
    return series


def run_all(
    params: Any,
    settings: ProcessSettings,
    changes: libtbx.phil.scope,
    record: dict[str, Any],
    results: list[StageResult],
) -> None:
    """Run all stages; what is known goes to the record and the results."""
    logger.info("Reading the image headers")
    mode, reason = find_mode(settings)
    record.update(mode=mode, reason=reason)
    logger.info("%s: %s", mode.capitalize(), reason)

    first = import_stages(settings, mode)
    stages = (stills_stages if mode == "stills" else rotation_stages)(settings)
    if makes_mask(params):
        stages.append(mask_stage(params, settings, changes, record))
    if background_method(params):
        stages.append(background_stage(params, settings, changes, record))
    stages += [
        extract_stage(params, settings, changes),
        *([scale_stage(params, changes, record)] if params.scale.make else []),
        merge_stage(params, changes, record),
    ]
    for stage in (*first, *stages):
        if not stage.name.startswith(OWN):
            find_program(stage.name)  # now, and not after hours

    run_stages(first, results)
    series = check_imported(settings, mode)
    n_images = sum(s.n_images for s in series)
    record.update(n_images=n_images, data=series[0].path)
    run_stages(stages, results)


def complete_record(
    params: Any, record: dict[str, Any], results: Sequence[StageResult]
) -> None:
    """Add the figures of all stages that have come to an end."""
    record["stages"] = [dataclasses.asdict(result) for result in results]
    done = {result.name for result in results if result.state == "done"}
    folder = Path.cwd()
    if done & {"dials.find_spots", "dials.stills_process"}:
        record["spots"] = spots_summary(record["mode"], folder, record["n_images"])
    if "dials.refine" in done:
        experiments = load_imported("refined.expt")
        reflections = flex.reflection_table.from_file("refined.refl")
        record["refinement"] = refinement_summary(experiments, reflections)
        record["crystal"] = crystal_summary(experiments)
    if "dials.diffuse_extract" in done:
        table = params.extract.output.reflections
        record["extraction"] = extraction_summary(table)
        after = load_imported(params.extract.output.experiments)
        record["indexing"] = indexing_summary(experiments, after)
        record["geometry"] = spots_and_models(params, experiments, reflections)


def spots_and_models(
    params: Any, experiments: ExperimentList, reflections: flex.reflection_table
) -> dict[str, Any] | None:
    """How far the spots are from the models, by the tolerance of the extraction."""
    table = SimpleNamespace(filename="refined.refl", data=reflections)
    images = image_residuals(experiments, load_reflections([table], experiments))
    settings = ExtractionSettings.from_phil(params.extract).geometry
    tolerance = settings.tolerance
    if tolerance is None:
        with ObservationFile(params.extract.output.reflections) as handle:
            grid = handle.grid
        tolerance = automatic_tolerance(images, grid.cell, grid.ndiv)
    return geometry_summary(images, tolerance, settings.reject_images)


def log_record(record: dict[str, Any]) -> None:
    """The figures of indexing and refinement, for the log."""
    spots, refinement = record["spots"], record["refinement"]
    if spots:
        logger.info(
            "\n%d spots found, %d indexed (%.1f%%)",
            spots["n_found"],
            spots["n_indexed"],
            100 * spots["fraction_indexed"],
        )
        if "n_images_indexed" in spots:
            n_indexed, n_images = spots["n_images_indexed"], spots["n_images"]
            logger.info("%d of %d stills indexed", n_indexed, n_images)
    if refinement and refinement["n_reflections"]:
        logger.info(
            "RMSD %.2f px (x), %.2f px (y), %.3f degrees of %d reflections",
            refinement["rmsd_x_px"],
            refinement["rmsd_y_px"],
            refinement["rmsd_angle_deg"],
            refinement["n_reflections"],
        )
        crystal = record["crystal"]
        cell = " ".join(f"{x:.2f}" for x in crystal["unit_cell"])
        logger.info("Unit cell %s, space group %s", cell, crystal["space_group"])


def known_exclusion(
    bragg: BraggSettings, grid: Grid, observations: str | os.PathLike
) -> list[ExclusionRegion]:
    """The regions about Bragg positions that cut voxels; warns if they are not known.

    Args:
        bragg: The settings of extraction.
        grid: The voxel grid.
        observations: The table of extraction, which has what was fitted.

    Raises:
        ValueError: The table cannot be read.
    """
    metric = bragg.metric(grid.cell, grid.rotations)
    if metric is not None:
        return [ExclusionRegion(metric)]
    if bragg.exclusion == "auto":
        with ObservationFile(observations) as table:
            if len(table.bragg_regions):
                return list(map(ExclusionRegion.from_numbers, table.bragg_regions))
    if bragg.exclusion not in LEAVE_VOXELS_WHOLE:
        logger.warning(
            "Warning: voxels that bragg.exclusion=%s cuts are not known here and are "
            "compared as if they were whole",
            bragg.exclusion,
        )
    return []


def compare_with_truth(params: Any, record: dict[str, Any]) -> tuple[str, str]:
    """Compare the map with the truth of a simulation.

    Args:
        params: The PHIL parameters.
        record: Gets the figures.

    Returns:
        Title and HTML of a section of the page.

    Raises:
        ValueError: The map is on another grid than the truth.
    """
    logger.info("\n== Comparison with %s", params.truth)
    with MapFile(params.merge.output.map) as merged, TruthFile(params.truth) as truth:
        bragg = ExtractionSettings.from_phil(params.extract).bragg
        observations = params.extract.output.reflections
        exclusion = known_exclusion(bragg, merged.grid, observations)
        comparison = compare(merged, truth, exclusion=exclusion)
    for name, text in comparison.summary():
        logger.info("%s: %s", name, text)
    logger.info(comparison.as_table())
    record["truth"] = comparison.as_dict()
    title = f"{params.merge.output.map} against {os.path.basename(params.truth)}"
    figure = plot_comparison(comparison, title)
    if params.output.comparison:
        with atomic_path(params.output.comparison) as path:
            figure.savefig(path, format="png", dpi=100)
        logger.info("Picture of the comparison: %s", params.output.comparison)
    return comparison_section(comparison, figure)


def write_summary(
    params: Any,
    record: dict[str, Any],
    sections: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the record as JSON and as a page.

    Args:
        params: The PHIL parameters.
        record: The record of the run.
        sections: Titles and HTML fragments of further sections of the page.
    """
    writers: list[tuple[str | None, Callable[[], str]]] = [
        (
            params.output.json,
            lambda: json.dumps(record, indent=2, allow_nan=False) + "\n",
        ),
        (params.output.html, functools.partial(render, params, record, sections)),
    ]
    for name, content in writers:
        if name:
            with atomic_path(name) as path:
                path.write_text(content(), encoding="utf-8")
            logger.info("Summary written to %s", name)


def render(
    params: Any, record: dict[str, Any], sections: Sequence[tuple[str, str]]
) -> str:
    """The page in HTML."""
    plot = params.merge.output.plot
    picture = Path(plot) if plot and record["merging"] else None
    page = Page(record, picture, mask_pictures(params, record))
    for title, html in sections:
        page.add_section(title, html)
    return page.render()


def mask_pictures(params: Any, record: dict[str, Any]) -> list[Path]:
    """The pictures of the masks that were made, one for each detector."""
    plots, n_detectors = params.mask.output.plots, len(record["mask"] or ())
    if not plots:
        return []
    return [
        Path(f"{diffuse_mask.numbered(plots, number)}_total.png")
        for number in range(1, n_detectors + 1)
    ]


def check_mask_file(path: str) -> None:
    """Check that a mask can be read, that of dials.generate_mask or one in layers.

    Raises:
        ValueError: It cannot.
    """
    if os.path.isfile(path) and h5py.is_hdf5(path):
        read_masks(path)
    else:
        read_mask(path)


def check_mask_and_background(
    params: Any, settings: ProcessSettings, changes: libtbx.phil.scope
) -> None:
    """Check the parameters of mask and background.

    Raises:
        ValueError: A parameter will not do, or a file does not exist.
    """
    if makes_mask(params):
        for name in filter(None, (settings.mask, *params.mask.mask)):
            read_mask(name)
        parser = diffuse_mask.make_parser()
        arguments = mask_arguments(params, settings, changes)
        mask_params, _, _ = parse_arguments(parser, arguments)
        regions = libtbx.phil.parse(untrusted_regions(changes))
        MaskSettings.from_phil(mask_params, parser.phil.fetch(source=regions))
        if not (params.mask.output.mask and params.mask.output.layers):
            raise ValueError("mask.output.mask and mask.output.layers must be names")
    if background_method(params):
        for name in filter(None, params.background.images.experiments):
            existing(name, "background.images.experiments")
        parser = diffuse_background.make_parser()
        arguments = background_arguments(params, settings, changes)
        background_params, _, _ = parse_arguments(parser, arguments)
        BackgroundSettings.from_phil(background_params)
        if not params.background.output.background:
            raise ValueError("background.output.background must be a name")


def check_parameters(
    params: Any, settings: ProcessSettings, changes: libtbx.phil.scope
) -> None:
    """Check what our own stages will be given, before the programs of DIALS run.

    Raises:
        ValueError: A parameter of one of them, or a mask, will not do.
    """
    mask = params.extract.mask or settings.mask
    if mask:
        check_mask_file(mask)
    check_mask_and_background(params, settings, changes)
    ExtractionSettings.from_phil(params.extract)
    MergingSettings.from_phil(params.merge)
    if not params.merge.output.map:
        raise ValueError("Please give a file name for the map: merge.output.map")
    if params.truth:
        check_truth(params)


def check_truth(params: Any) -> None:
    """Check that the map will be on the grid of the truth.

    Raises:
        ValueError: The voxels or the Laue groups differ, or the file is another.
    """
    with TruthFile(params.truth) as truth:
        grid = truth.grid
    ndiv = ExtractionSettings.from_phil(params.extract).ndiv
    if ndiv != grid.ndiv:
        raise ValueError(
            f"{params.truth} has {','.join(map(str, grid.ndiv))} voxels per reciprocal "
            f"cell, extract.grid.ndiv is {','.join(map(str, ndiv))}: give it the same"
        )
    if params.space_group:
        laue = symmetry.laue_group(params.space_group.group())
        if laue != grid.laue_group:
            raise ValueError(
                f"space_group={params.space_group} has the Laue group {laue.info()}, "
                f"{params.truth} {grid.laue_group.info()}: give the space group of the "
                "simulation"
            )


def make_paths_absolute(params: Any) -> None:
    """Make the paths of input files absolute, as the current folder will change."""
    for scope, name in (
        (params.extract, "mask"),
        (params.extract, "background"),
        (params.scale, "reference"),
        (params, "truth"),
    ):
        if getattr(scope, name):
            setattr(scope, name, os.path.abspath(getattr(scope, name)))
    for scope, name in (
        (params.mask, "mask"),
        (params.background.images, "experiments"),
        (params.scale, "bragg_reference"),
    ):
        paths = map(os.path.abspath, filter(None, getattr(scope, name)))
        setattr(scope, name, list(paths))


def process(
    params: Any, settings: ProcessSettings, changes: libtbx.phil.scope
) -> dict[str, Any]:
    """From images to the summary, in the current folder.

    Args:
        params: The PHIL parameters.
        settings: The same, checked.
        changes: The parameters that differ from their defaults.

    Returns:
        The record of the run.

    Raises:
        ValueError: A stage failed. The summary of what was done has been written.
    """
    record = new_record(params)
    results: list[StageResult] = []
    sections: list[tuple[str, str]] = []
    try:
        with collect_warnings(record["warnings"]):
            run_all(params, settings, changes, record, results)
            if params.truth:
                sections.append(compare_with_truth(params, record))
    except ValueError as e:
        record["error"] = str(e)
        raise
    finally:
        if record["error"] or record["merging"]:
            complete_record(params, record, results)
            log_record(record)
            write_summary(params, record, sections)
    return record


@dials.util.show_mail_handle_errors()
def run(
    args: Sequence[str] | None = None, phil: libtbx.phil.scope = phil_scope
) -> None:
    """Run dials.diffuse_process as from the command line.

    Args:
        args: The arguments, or None for those of the process.
        phil: The PHIL scope.
    """
    parser = ArgumentParser(
        usage="dials.diffuse_process [options] images...", phil=phil, epilog=__doc__
    )
    args = sys.argv[1:] if args is None else list(map(os.fspath, args))
    with errors_in_one_line():
        inputs, rest = split_arguments(args)
        params, options, _ = parse_arguments(parser, rest)
        settings = ProcessSettings.from_phil(params, inputs)
        make_paths_absolute(params)
        check_parameters(params, settings, parser.diff_phil)
        with working_directory(params.output.directory):
            with logged_work(parser, params, options):
                process(params, settings, parser.diff_phil)


if __name__ == "__main__":
    run()
