# LIBTBX_SET_DISPATCHER_NAME dials.diffuse_export
"""
Export a merged map of diffuse scattering to the formats of other programs.

A CCP4/MRC map shows reciprocal space in a viewer for electron density, such as Coot,
ChimeraX or PyMOL: the origin of reciprocal space is at the origin of the coordinates, and
1/Angstrom is drawn as ccp4.scale Angstrom. A numpy archive (npz) has all arrays of the
map and its axes.

format=pixels exports no map but the pixels of one image, with their scattering vectors,
Miller indices, photons and normalisation, as dials.diffuse_extract sees them; it takes a
refined experiment list.

format=dials exports the observations of dials.diffuse_extract as integrated reflections
(diffuse.expt and diffuse.refl) for dials.show, dials.scale and dials.merge. The voxels are
the Miller indices of a crystal whose cell edges are ndiv times as long, with the Laue
group as its space group. Sigmas come from expected counts, not from the counts
themselves. Of large tables it exports a part, see dials.max_rows.

Examples::

  dials.diffuse_export merged.h5

  dials.diffuse_export merged.h5 format=ccp4+npz what=anisotropic output.prefix=crystal

  dials.diffuse_export refined.expt format=pixels pixels.image=10 pixels.file=csv

  dials.diffuse_export extracted.expt extracted.refl format=dials
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np

import libtbx.phil
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

import dials.util
from dials.util.options import ArgumentParser, flatten_experiments
from dials_diffuse.export.ccp4 import map_cell, write_ccp4
from dials_diffuse.export.npz import write_npz
from dials_diffuse.export.pixels import image_pixels, pixel_arrays, write_csv
from dials_diffuse.export.reflections import Reflections, export_reflections
from dials_diffuse.export.settings import full_parameters
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.io.inputs import (
    check_identifiers,
    load_experiments,
    with_crystals,
)
from dials_diffuse.io.maps import MapFile
from dials_diffuse.io.masks import given_mask
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.estimate import interpolate_shells
from dials_diffuse.merging.expansion import expand_to_p1
from dials_diffuse.util.command import (
    errors_in_one_line,
    load_phil,
    logged_work,
    parse_arguments,
)
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.export")

phil_scope = load_phil("export")

# Our name of each quantity and the dense array that has it.
BOXES = {
    "map": "map/intensity",
    "sigma": "map/intensity_errors",
    "n_obs": "map/n_obs",
    "half_1": "half_1/intensity",
    "half_2": "half_2/intensity",
}


def anisotropic_box(handle: MapFile) -> np.ndarray:
    """The intensity less its mean in shells of 0.01 Å⁻¹, axes h, k, l."""
    isotropic = handle.table("isotropic")

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for block in handle.blocks(["index", "intensity"]):
            s = handle.grid.s(block["index"])
            mean = interpolate_shells(s, isotropic["s"], isotropic["intensity"])
            yield block["index"], block["intensity"] - mean

    return expand_to_p1(handle.grid, blocks())


def export_ccp4(handle: MapFile, what: str, params: Any, prefix: str) -> None:
    """Write a quantity as a CCP4 map."""
    grid = handle.grid
    box = anisotropic_box(handle) if what == "anisotropic" else handle.box(BOXES[what])
    missing = ~np.isfinite(box) if what != "n_obs" else box == 0
    n_missing = int(np.count_nonzero(missing))
    if what != "n_obs":
        box[missing] = params.ccp4.fill
    del missing
    path = f"{prefix}.ccp4" if what == "map" else f"{prefix}_{what}.ccp4"
    labels = [
        f"dials.diffuse_export: {what} of {Path(handle.path).name}",
        f"Reciprocal space, 1/Angstrom = {params.ccp4.scale:g} Angstrom",
        "Cell " + " ".join(f"{x:.4f}" for x in grid.unit_cell),
        f"Voxels per reciprocal cell {' '.join(map(str, grid.ndiv))}",
        f"Laue group {grid.laue_group.info()}, d_min {grid.d_min:g}",
        f"{n_missing} voxels not observed, set to {params.ccp4.fill:g}",
    ]
    with atomic_path(path) as temporary:
        write_ccp4(temporary, grid, box, params.ccp4.scale, labels)
    logger.info(
        "%s written to %s: cell %s; %d of %d voxels were not observed "
        "and are set to %g",
        what,
        path,
        " ".join(f"{x:.2f}" for x in map_cell(grid, params.ccp4.scale)),
        n_missing,
        math.prod(grid.shape),
        0 if what == "n_obs" else params.ccp4.fill,
    )


def npz_arrays(handle: MapFile) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of the arrays of the archive, one after the other."""
    grid = handle.grid
    yield from zip("hkl", grid.axes())
    yield "unit_cell", np.array(grid.unit_cell)
    yield "ndiv", np.array(grid.ndiv)
    yield "space_group", np.array(grid.space_group)
    for what, name in BOXES.items():
        yield ("intensity" if what == "map" else what), handle.box(name)


def export_npz(handle: MapFile, prefix: str) -> None:
    """Write all arrays as a numpy archive."""
    path = f"{prefix}.npz"
    with atomic_path(path) as temporary:
        write_npz(temporary, npz_arrays(handle))
    logger.info("All arrays written to %s", path)


def array_index_of(experiment: Experiment, image: int | None) -> int:
    """Array index of an image's number; of the first image if it is None.

    Raises:
        ValueError: The experiment does not have the image.
    """
    if experiment.scan is None:
        if image not in (None, 0, 1):
            raise ValueError(
                f"pixels.image={image}: the experiment is a still of one image, choose "
                "it by pixels.experiment"
            )
        return 0
    first, last = experiment.scan.get_image_range()
    if image is not None and not first <= image <= last:
        raise ValueError(
            f"pixels.image={image}: the experiment has the images {first} to {last}"
        )
    # the array index is the image number less one, whatever the scan begins with
    return (first if image is None else image) - 1


def export_pixels(params: Any) -> None:
    """Write the pixels of an image.

    Raises:
        ValueError: The experiment or the image is not there, or no pixel is left.
    """
    names = [item.filename for item in params.input.experiments]
    experiments = with_crystals(load_experiments(params.input.experiments), names)
    number = params.pixels.experiment
    if number >= len(experiments):
        raise ValueError(
            f"pixels.experiment={number}: the list has {len(experiments)} experiments "
            "with a crystal, the first is 0"
        )
    experiment = experiments[number]
    extraction = full_parameters(params.pixels.extraction)
    settings = dataclasses.replace(
        ExtractionSettings.from_phil(extraction),
        **given_mask(extraction.mask, ExperimentList([experiment])),
    )
    array_index = array_index_of(experiment, params.pixels.image)
    pixels = image_pixels(
        experiment, array_index, make_grid(experiments, settings), settings
    )
    stem = params.output.prefix or f"pixels_{number}_{array_index + 1}"
    path = f"{stem}.{params.pixels.file}"
    with atomic_path(path) as temporary:
        if params.pixels.file == "csv":
            write_csv(temporary, pixels)
        else:
            write_npz(temporary, pixel_arrays(pixels).items())
    logger.info(
        "%d pixels with %.0f photons of experiment %d, image %d written to %s",
        len(pixels),
        pixels["counts"].sum(),
        number,
        array_index + 1,
        path,
    )


def export_observations(params: Any, files: Sequence[str]) -> None:
    """Write observations as integrated reflections of DIALS.

    Raises:
        ValueError: The files will not do, or would be overwritten.
    """
    prefix = params.output.prefix or "diffuse"
    expt_name, refl_name = f"{prefix}.expt", f"{prefix}.refl"
    inputs = [*(item.filename for item in params.input.experiments), *files]
    used = set(map(os.path.realpath, inputs))
    if used.intersection(map(os.path.realpath, (expt_name, refl_name))):
        raise ValueError(
            f"output.prefix={prefix} would overwrite the input: give another"
        )
    check_identifiers(params.input.experiments)
    experiments = flatten_experiments(params.input.experiments)
    with contextlib.ExitStack() as stack:
        tables = [stack.enter_context(ObservationFile(name)) for name in files]
        grid = tables[0].grid
        found = export_reflections(tables, experiments, params.dials.max_rows)
        refl, expt = map(stack.enter_context, map(atomic_path, (refl_name, expt_name)))
        found.table.as_file(os.fspath(refl))
        found.experiments.as_file(expt)
    log_choice(found, len(experiments), params.dials.max_rows)
    logger.info(
        "Cell %s (%s voxels along each reciprocal axis), space group %s",
        " ".join(f"{n * x:.2f}" for n, x in zip(grid.ndiv, grid.unit_cell)),
        ", ".join(map(str, grid.ndiv)),
        grid.laue_group.info(),
    )
    logger.info("Wrote the experiments to %s", expt_name)
    logger.info("Wrote the reflections to %s", refl_name)


def log_choice(found: Reflections, n_experiments: int, max_rows: int | None) -> None:
    """Say what was exported, of how much, and what was left out."""
    counted, n = found.counted, len(found.table)
    if counted.n_usable < counted.n_rows:
        logger.info(
            "%d of %d observations left out: outliers, without pixels or at the origin",
            counted.n_rows - counted.n_usable,
            counted.n_rows,
        )
    logger.info(
        "%d of %d observations exported, of %d experiments",
        n,
        counted.n_usable,
        len(found.experiments),
    )
    if n < counted.n_usable:
        logger.info(
            "These are all observations of %.3g%% of the symmetry-unique voxels, chosen "
            "by a hash of their indices, as dials.max_rows=%d asks; dials.max_rows=None "
            "exports all",
            100 * found.fraction,
            max_rows,
        )
    if len(found.experiments) < n_experiments:
        logger.warning(
            "Warning: %d of %d experiments have no observations here and are left out",
            n_experiments - len(found.experiments),
            n_experiments,
        )


def check_arguments(params: Any, files: Sequence[str]) -> None:
    """Check that one map and something to do with it were given.

    With format=pixels that is an experiment list, with format=dials an experiment list
    and observations.

    Raises:
        ValueError: They were not.
    """
    errors = []
    if "pixels" in params.format:
        if len(params.format) > 1 or files or not params.input.experiments:
            raise ValueError(
                "Please give format=pixels alone, and a refined experiment list (.expt) "
                "instead of a map"
            )
        return
    if "dials" in params.format:
        if len(params.format) > 1 or not (files and params.input.experiments):
            raise ValueError(
                "Please give format=dials alone, and the .expt and .refl of "
                "dials.diffuse_extract instead of a map"
            )
        return
    if params.input.experiments:
        raise ValueError(
            "An experiment list is exported by format=pixels or, with its observations, "
            "by format=dials: give one of them, or a map"
        )
    if len(files) != 1:
        errors.append(
            f"Please give one map (.h5 of dials.diffuse_merge), not {len(files)}"
        )
    if not params.format:
        errors.append("Please give a format: format=ccp4, npz or ccp4+npz")
    if "ccp4" in params.format and not params.what:
        errors.append("Please say what to write as CCP4 maps, for example what=map")
    if not math.isfinite(params.ccp4.fill):
        errors.append("ccp4.fill must be a finite number: viewers cannot read others")
    if errors:
        raise ValueError("\n".join(errors))


def process(params: Any, files: Sequence[str]) -> None:
    """Export what was asked for.

    Raises:
        ValueError: The input or a parameter will not do.
    """
    if "pixels" in params.format:
        export_pixels(params)
        return
    if "dials" in params.format:
        export_observations(params, files)
        return
    with MapFile(files[0]) as handle:
        prefix = params.output.prefix or Path(files[0]).stem
        if "ccp4" in params.format:
            for what in params.what:
                export_ccp4(handle, what, params, prefix)
        if "npz" in params.format:
            export_npz(handle, prefix)


@dials.util.show_mail_handle_errors()
def run(
    args: Sequence[str] | None = None, phil: libtbx.phil.scope = phil_scope
) -> None:
    """Run dials.diffuse_export as from the command line."""
    usage = (
        "dials.diffuse_export [options] merged.h5 | refined.expt format=pixels | "
        "extracted.expt extracted.refl format=dials"
    )
    parser = ArgumentParser(
        usage=usage,
        phil=phil,
        read_experiments=True,
        check_format=False,
        epilog=__doc__,
    )
    with errors_in_one_line():
        params, options, files = parse_arguments(parser, args)
        check_arguments(params, files)
        with logged_work(parser, params, options):
            process(params, files)


if __name__ == "__main__":
    run()
