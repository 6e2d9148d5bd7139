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
detectors. A reflection table of the same experiments is optional; it serves to check the
geometry. The output is an experiment list and a reflection table in HDF5, for
dials.diffuse_merge.

Examples::

  dials.diffuse_extract refined.expt

  dials.diffuse_extract refined.expt refined.refl grid.ndiv=4 grid.d_min=1.6

  dials.diffuse_extract integrated.expt mask=pixels.mask bragg.semi_axes=0.2 mp.nproc=4
"""

from __future__ import annotations

import logging
import os
import pickle
from typing import Any, Sequence

import numpy as np

import dxtbx
import libtbx.phil
from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory
from libtbx.utils import Sorry

import dials.util
from dials.array_family import flex
from dials.util.multi_dataset_handling import generate_experiment_identifiers
from dials.util.options import ArgumentParser, flatten_experiments, flatten_reflections
from dials_diffuse.extraction.blocks import missing_images
from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.report import log_crystals, log_geometry, log_grid
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.extraction.tables import check_masks
from dials_diffuse.util.command import (
    load_phil,
    parse_arguments,
    report_changes,
    start_log,
)
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.extract")

phil_scope = load_phil("extract")


def read_mask(path: str) -> tuple[np.ndarray, ...]:
    """The mask of each panel in a file of dials.generate_mask.

    Raises:
        ValueError: The file cannot be read as a mask.
    """
    try:
        with open(path, "rb") as handle:
            masks = pickle.load(handle)
        masks = masks if isinstance(masks, (tuple, list)) else (masks,)
        if not masks or not all(isinstance(mask, flex.bool) for mask in masks):
            raise ValueError("it holds something else")
        return tuple(flumpy.to_numpy(mask) for mask in masks)
    except OSError as e:
        reason = e.strerror
    except Exception as e:  # unpickling a file of another kind raises anything
        reason = " ".join(str(e).split()) or type(e).__name__
    raise ValueError(
        f"Cannot read the mask {path} ({reason}): give a file of dials.generate_mask"
    )


def check_identifiers(params: Any) -> None:
    """Check that no experiment is given twice.

    Raises:
        ValueError: Two experiments have the same identifier.
    """
    seen = {}
    for item in params.input.experiments:
        for identifier in filter(None, item.data.identifiers()):
            if identifier in seen:
                raise ValueError(
                    f"{seen[identifier]} and {item.filename} hold the same experiment "
                    f"(identifier {identifier}): give each only once"
                )
            seen[identifier] = item.filename


def open_images(name: str) -> ExperimentList:
    """The experiments of a file with their images opened.

    Raises:
        ValueError: The first image of an image set cannot be opened.
    """
    try:
        return ExperimentListFactory.from_json_file(name)
    except Exception as e:  # formats raise whatever their file reader raises
        reason = " ".join(str(e).split()) or type(e).__name__
        models = ExperimentListFactory.from_json_file(name, check_format=False)
        firsts = {imageset.get_path(0) for imageset in models.imagesets()}
        damaged = ", ".join(sorted(filter(is_damaged, firsts))) or "no image by itself"
        raise ValueError(
            f"Cannot open the images of {name} ({reason}; damaged: {damaged}): restore "
            "them or leave them out"
        ) from e


def is_damaged(path: str) -> bool:
    """Whether dxtbx cannot make out the detector of an image."""
    try:
        dxtbx.load(path).get_detector()
    except Exception:  # as above
        return True
    return False


def load_experiments(params: Any) -> ExperimentList:
    """The experiments of the command line with their images, those without a crystal
    left out.

    Raises:
        ValueError: No experiments, missing images, or no crystal.
    """
    if not params.input.experiments:
        raise ValueError("Please give an experiment list (.expt) with refined models")
    names = [item.filename for item in params.input.experiments]
    check_identifiers(params)
    models = flatten_experiments(params.input.experiments)
    if any(experiment.imageset is None for experiment in models):
        raise ValueError(f"{', '.join(names)}: experiments without images")
    missing = missing_images(models)
    if missing:
        raise ValueError(
            f"{len(missing)} image(s) of {', '.join(names)} are missing, the first is "
            f"{missing[0]}: restore them, or import them again at their new place"
        )
    experiments = ExperimentList()
    for name in names:
        experiments.extend(open_images(name))
    with_crystal = ExperimentList([e for e in experiments if e.crystal is not None])
    if not with_crystal:
        raise ValueError(
            f"{', '.join(names)}: no experiment has a crystal. Index the images first "
            "(dials.index or dials.stills_process)"
        )
    if len(with_crystal) < len(experiments):
        logger.info(
            "%d of %d experiments have no crystal and are left out",
            len(experiments) - len(with_crystal),
            len(experiments),
        )
    if any(not experiment.identifier for experiment in with_crystal):
        generate_experiment_identifiers(with_crystal)
    return with_crystal


def matching_reflections(
    params: Any, experiments: ExperimentList
) -> flex.reflection_table | None:
    """The indexed reflections of the experiments, their ``id`` made to fit the list.

    Raises:
        ValueError: A table is empty, or belongs to other experiments.
    """
    if not params.input.reflections:
        return None
    number = {experiment.identifier: i for i, experiment in enumerate(experiments)}
    result = flex.reflection_table()
    for item, table in zip(
        params.input.reflections, flatten_reflections(params.input.reflections)
    ):
        if len(table) == 0:
            raise ValueError(
                f"{item.filename} has no reflections: leave it out or give another"
            )
        identifiers = dict(table.experiment_identifiers())
        if identifiers and not set(identifiers.values()) & set(number):
            raise ValueError(
                f"{item.filename} belongs to other experiments than the experiment "
                "list (no identifier in common): give the pair of one program run"
            )
        indexed = table.select(
            table.get_flags(table.flags.indexed, all=False) & (table["id"] >= 0)
        )
        ids = flumpy.to_numpy(indexed["id"])
        renumbered = np.array(
            [number.get(identifiers.get(i), -1) if identifiers else i for i in ids],
            dtype=np.int32,
        )
        if not identifiers and ids.size and ids.max() >= len(experiments):
            raise ValueError(
                f"{item.filename} refers to {ids.max() + 1} experiments, the list has "
                f"{len(experiments)}: give the pair of one program run"
            )
        selected = indexed.select(flumpy.from_numpy(renumbered >= 0))
        columns = flex.reflection_table()
        for name in ("miller_index", "xyzobs.px.value", "panel"):
            if name not in selected:
                raise ValueError(f"{item.filename} has no column {name}: index first")
            columns[name] = selected[name]
        columns["id"] = flumpy.from_numpy(renumbered[renumbered >= 0])
        result.extend(columns)
    return result


def write_output(
    params: Any,
    phil: str,
    experiments: ExperimentList,
    settings: ExtractionSettings,
    inputs: list[str],
) -> None:
    """Extract, and write the table and its experiment list, both or none.

    Raises:
        ValueError: An output name will not do, or something went wrong on the way.
    """
    expt_name, refl_name = params.output.experiments, params.output.reflections
    if not (expt_name and refl_name):
        raise ValueError("output.experiments and output.reflections must be names")
    if os.path.splitext(expt_name)[1] not in (".expt", ".json"):
        raise ValueError(f"output.experiments={expt_name} must end in .expt or .json")
    if os.path.realpath(expt_name) == os.path.realpath(refl_name):
        raise ValueError(
            f"output.experiments and output.reflections are both {expt_name}: give two "
            "names"
        )
    grid = make_grid(experiments, settings)
    log_grid(grid)
    log_crystals(experiments, grid)
    with atomic_path(refl_name) as table, atomic_path(expt_name) as expt:
        experiments.as_file(expt)  # first: a name that will not do shows at once
        extract(experiments, grid, settings, table, phil=phil, inputs=inputs)
    logger.info("Wrote the experiments to %s", expt_name)
    logger.info("Wrote the observations to %s", refl_name)


@dials.util.show_mail_handle_errors()
def run(
    args: Sequence[str] | None = None, phil: libtbx.phil.scope = phil_scope
) -> None:
    """Run dials.diffuse_extract as from the command line.

    Args:
        args: The arguments, or None for those of the process.
        phil: The PHIL scope.
    """
    parser = ArgumentParser(
        usage="dials.diffuse_extract [options] refined.expt [refined.refl]",
        phil=phil,
        read_experiments=True,
        read_reflections=True,
        check_format=False,
        epilog=__doc__,
    )
    try:
        params, options, files = parse_arguments(parser, args)
        start_log(params, options)
        report_changes(parser)
        if files:
            raise ValueError(f"{files[0]} is an HDF5 file, which is not used here")
        experiments = load_experiments(params)
        mask = None
        if params.mask is not None:
            mask = read_mask(params.mask)
            for detector in experiments.detectors():
                check_masks(detector, mask, params.mask)
        settings = ExtractionSettings.from_phil(params, mask)
        reflections = matching_reflections(params, experiments)
        if reflections is not None:
            log_geometry(experiments, reflections)
        inputs = [
            item.filename
            for item in params.input.experiments + params.input.reflections
        ]
        write_output(params, parser.phil.as_str(), experiments, settings, inputs)
    except ValueError as e:
        raise Sorry(e) from None


if __name__ == "__main__":
    run()
