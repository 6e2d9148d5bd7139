# LIBTBX_SET_DISPATCHER_NAME dials.diffuse_simulate
"""
Simulate diffraction images of a crystal whose diffuse scattering is known exactly.

The images are those of an analytic map: a cloudy part, liquid-like halos around the
Bragg positions, Bragg peaks of known intensity, solvent and Compton scattering, seen
with the polarization, solid angles, sensor, air, beam stop and noise of a real
experiment. DIALS imports and indexes them. truth.h5 holds the mean of the map over each
voxel of a grid, the scales of the images and the |F|^2, in electrons^2 per unit cell;
simulated.expt holds the true models.

Examples::

  dials.diffuse_simulate

  dials.diffuse_simulate mode=stills n_images=200 scan.orientations=random

  dials.diffuse_simulate crystal.structure=1stn.pdb detector.preset=pilatus6m \\
    detector.distance=250 scan.width=0.1 n_images=900

  dials.diffuse_simulate beam.flux=1e10 dry_run=True
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any, Sequence

import libtbx.phil

import dials.util
from dials.util.options import ArgumentParser
from dials_diffuse.io.inputs import write_mask
from dials_diffuse.io.truth import write_truth
from dials_diffuse.simulation.forecast import forecast
from dials_diffuse.simulation.models import needs_nexus
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.simulate import Simulation, log_simulation, write_images
from dials_diffuse.simulation.truth import (
    describe_simulation,
    true_map,
    truth_grid,
)
from dials_diffuse.util.command import (
    errors_in_one_line,
    load_phil,
    logged_work,
    parse_arguments,
)
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.simulate")

phil_scope = load_phil("simulate")


def check_output(params: Any) -> None:
    """Check the names of the output files, and make the folder for the images.

    Raises:
        ValueError: A folder is missing, or a name is not given, used twice or will not do.
    """
    output = params.output
    if not output.experiments:
        raise ValueError("Please give a name for the models: output.experiments")
    if os.path.splitext(output.experiments)[1] not in (".expt", ".json"):
        raise ValueError(
            f"output.experiments={output.experiments} must end in .expt or .json"
        )
    # dxtbx takes # for the digits of a template
    if not output.prefix or "/" in output.prefix or "#" in output.prefix:
        raise ValueError(
            f"output.prefix={output.prefix} must be the beginning of file names, without "
            "/ and #: use output.directory for the folder"
        )
    used = set()
    for option in ("experiments", "truth", "mask", "log"):
        name = getattr(output, option)
        if not name:
            continue
        folder, _ = os.path.split(os.path.realpath(name))
        if not os.path.isdir(folder):
            raise ValueError(f"output.{option}={name}: there is no folder {folder}")
        if os.path.realpath(name) in used:
            raise ValueError(f"output.{option}={name} is in use: give another name")
        used.add(os.path.realpath(name))
    if params.dry_run:
        return
    try:
        os.makedirs(output.directory, exist_ok=True)
    except OSError as e:
        raise ValueError(
            f"Cannot make output.directory={output.directory}: {e.strerror}"
        ) from None


def check_format(settings: SimulationSettings) -> None:
    """Check that there is a format for the images, before they are made.

    Raises:
        ValueError: There is none.
    """
    if needs_nexus(settings) and not settings.detector.thickness > 0:
        raise ValueError(
            "detector.thickness=0 goes with CBF only, for one panel at two_theta=0 and a "
            "rotation about x: dxtbx reads no NeXus file without a thickness"
        )


def write_true_map(simulation: Simulation, params: Any, phil: str) -> None:
    """Write the truth file."""
    experiments = simulation.series[0].experiments
    grid = truth_grid(simulation.settings, simulation.sample, experiments)
    index, parts, numbers = true_map(simulation.sample, grid)
    truth = describe_simulation(simulation, grid.d_min)
    with atomic_path(params.output.truth) as path:
        write_truth(path, grid, index, parts, numbers, truth, phil)
    logger.info(
        "True map of %d unique voxels to %.2f Å written to %s",
        len(index),
        grid.d_min,
        params.output.truth,
    )


def process(params: Any, phil: str) -> None:
    """Simulate and write the output, or say what it would be."""
    settings = SimulationSettings.from_phil(params)
    check_format(settings)
    simulation = Simulation(settings)
    log_simulation(simulation)
    if params.dry_run:
        forecast(simulation)
        return
    if params.output.truth:
        write_true_map(simulation, params, phil)
    if params.output.mask:
        with atomic_path(params.output.mask) as path:
            write_mask(path, simulation.good_pixels())
        logger.info("Mask of gaps and beam stop written to %s", params.output.mask)
    start = time.perf_counter()
    folder = Path(params.output.directory)
    experiments = write_images(simulation, folder, params.output.prefix)
    logger.info(
        "%d images written to %s in %.1f s",
        sum(series.n_images for series in simulation.series),
        folder.resolve(),
        time.perf_counter() - start,
    )
    with atomic_path(params.output.experiments) as path:
        experiments.as_file(path)
    logger.info("True models written to %s", params.output.experiments)


@dials.util.show_mail_handle_errors()
def run(
    args: Sequence[str] | None = None, phil: libtbx.phil.scope = phil_scope
) -> None:
    """Run dials.diffuse_simulate as from the command line."""
    parser = ArgumentParser(
        usage="dials.diffuse_simulate [options]", phil=phil, epilog=__doc__
    )
    with errors_in_one_line():
        params, options, files = parse_arguments(parser, args)
        if files:
            raise ValueError(f"{files[0]} is not a parameter: see the help (-h)")
        check_output(params)
        with logged_work(parser, params, options):
            process(params, parser.phil.as_str())


if __name__ == "__main__":
    run()
