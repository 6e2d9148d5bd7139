"""Speed and memory of dials.diffuse_extract on images of 2463 x 2527 pixels.

Makes (once) a sweep of byte-offset CBF images with Poisson counts, gaps between the
modules and parallax, and runs the command on them as a user would: reading, geometry, all
corrections, Bragg exclusion, sorting and writing included. The figures are of whole
processes and their children, from the operating system's own accounting, the median of
some runs.

``start-up`` is the same command on one image: interpreter, imports of DIALS, arrays of
the detector. ``reading`` is what dxtbx takes for the images alone, in the same run, as a
measure of the machine.

``--full`` adds runs with everything on: also the mask of dials.diffuse_mask and the radial
background of dials.diffuse_background, one profile for each image. Both are made from the
same images beforehand, which takes some seconds an image, and kept in the folder.

    make benchmark
    build/venv/bin/python benchmarks/extract.py --images 100 --ndiv 3 --full
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Mapping, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.format.FormatCBFMini import FormatCBFMini
from dxtbx.imageset import ImageSetFactory
from dxtbx.model import (
    Beam,
    Crystal,
    Detector,
    Experiment,
    GoniometerFactory,
    ParallaxCorrectedPxMmStrategy,
    ScanFactory,
)
from dxtbx.model.experiment_list import ExperimentList

NFAST, NSLOW = 2463, 2527
WIDTH = 0.1  # degrees
PIXELS = NFAST * NSLOW


def make_models(n_images: int) -> tuple:
    """A Pilatus 6M at 350 mm, a beam of 0.9686 Å and a tetragonal protein crystal."""
    beam = Beam(direction=(0, 0, 1), wavelength=0.9686)
    beam.set_polarization_fraction(0.99)
    detector = Detector()
    panel = detector.add_panel()
    panel.set_name("Panel")
    panel.set_type("SENSOR_PAD")
    panel.set_local_frame((1, 0, 0), (0, -1, 0), (-211.8, 217.3, -350.0))
    panel.set_pixel_size((0.172, 0.172))
    panel.set_image_size((NFAST, NSLOW))
    panel.set_trusted_range((-1, 100000))
    panel.set_material("Si")
    panel.set_thickness(0.45)
    panel.set_mu(3.83)
    panel.set_px_mm_strategy(ParallaxCorrectedPxMmStrategy(3.83, 0.45))
    goniometer = GoniometerFactory.known_axis((1, 0, 0))
    scan = ScanFactory.make_scan(
        (1, n_images),
        [0.1] * n_images,
        (0, WIDTH),
        dict.fromkeys(range(1, n_images + 1), 0.0),
    )
    crystal = Crystal((57.5, 0, 0), (0, 57.5, 0), (0, 0, 149.7), "P 41 21 2")
    crystal.rotate_around_origin((0.36, 0.48, 0.8), 33.0)
    return beam, detector, goniometer, scan, crystal


def make_images(folder: Path, n_images: int) -> Path:
    """Write images and experiment list; returns the latter."""
    beam, detector, goniometer, scan, crystal = make_models(n_images)
    rng = np.random.default_rng(7)
    fast, slow = np.meshgrid(np.arange(NFAST), np.arange(NSLOW))
    mean = 3.0 * np.exp(-((fast - 1231) ** 2 + (slow - 1263) ** 2) / 9e5)
    gaps = (fast % 494 >= 487) | (slow % 212 >= 195)
    paths = [folder / f"bench_{i + 1:05d}.cbf" for i in range(n_images)]
    for i, path in enumerate(paths):
        if path.exists():
            continue
        counts = np.where(gaps, -1, rng.poisson(mean)).astype(np.int32)
        data = flumpy.from_numpy(counts)
        part = path.with_name("part.cbf")
        FormatCBFMini.as_file(detector, beam, goniometer, scan[i : i + 1], data, part)
        part.rename(path)
    sequence = ImageSetFactory.make_sequence(
        str(folder / "bench_#####.cbf"),
        list(range(1, n_images + 1)),
        beam=beam,
        detector=detector,
        goniometer=goniometer,
        scan=scan,
    )
    experiment = Experiment(
        beam=beam,
        detector=detector,
        goniometer=goniometer,
        scan=scan,
        crystal=crystal,
        imageset=sequence,
        identifier="benchmark",
    )
    expt = folder / f"benchmark_{n_images}.expt"
    ExperimentList([experiment]).as_file(expt)
    return expt


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a command and its children took, by the operating system's own accounting."""

    cpu: float  # seconds, user and system
    wall: float  # seconds
    memory: float  # bytes, of the largest process
    messages: str  # standard error


MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
wall = time.perf_counter() - start
messages = done.stderr.decode(errors="replace")
if done.returncode:
    sys.exit(messages)
use = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu, memory = use.ru_utime + use.ru_stime, use.ru_maxrss * 1024
print(json.dumps(dict(cpu=cpu, wall=wall, memory=memory, messages=messages)))
"""


def measure(
    folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Usage:
    """Run a command in a folder, as the only child of a process of its own.

    Raises:
        SystemExit: The command failed; its messages are shown.
    """
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    if result.returncode:
        raise SystemExit(result.returncode)
    return Usage(**json.loads(result.stdout))


def python_command(module: str, arguments: Sequence[str]) -> list[str]:
    """One of our commands, which tells the seconds after its imports on the last line."""
    code = (
        "import sys, time\n"
        f"from dials_diffuse.command_line.{module} import run\n"
        "start = time.perf_counter()\n"
        "run(sys.argv[1:])\n"
        "print(time.perf_counter() - start, file=sys.stderr)\n"
    )
    return [sys.executable, "-c", code, *arguments]


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to run dials.diffuse_extract."""

    expt: Path
    nproc: int
    ndiv: int
    more: tuple[str, ...] = ()  # further parameters


def run(folder: Path, case: Case) -> tuple[float, ...]:
    """CPU and wall seconds, those after the imports, and peak memory of a run.

    The memory is that of the largest process, in bytes.
    """
    arguments = [str(case.expt), f"grid.ndiv={case.ndiv}", f"mp.nproc={case.nproc}"]
    command = python_command("diffuse_extract", [*arguments, *case.more])
    use = measure(folder, command)
    return use.cpu, use.wall, float(use.messages.split()[-1]), use.memory


def make_mask_and_background(expt: Path) -> tuple[str, ...]:
    """Make both from the images, once; returns the parameters that use them."""
    layers = expt.with_name(expt.stem + "_mask.h5")
    mask = layers.with_suffix(".mask")
    background = expt.with_name(expt.stem + "_background.h5")
    commands = {
        layers: (
            "diffuse_mask",
            f"output.layers={layers}",
            f"output.mask={mask}",
            "output.plots=None",
        ),
        background: (
            "diffuse_background",
            f"output.background={background}",
            "method=radial",
            f"mask={mask}",
        ),
    }
    for path, (module, *arguments) in commands.items():
        if not path.exists():
            arguments += [str(expt), "output.html=None", "output.json=None"]
            measure(expt.parent, python_command(module, arguments))
    return f"mask={layers}", f"background={background}"


def reading(expt: Path) -> float:
    """CPU seconds that dxtbx takes to read all images."""
    imageset = ExperimentList.from_file(expt)[0].imageset
    start = time.process_time()
    for i in range(len(imageset)):
        imageset.get_raw_data(i)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="build/benchmark", type=Path)
    parser.add_argument("--images", default=100, type=int)
    parser.add_argument("--ndiv", default=3, type=int, help="for the speed")
    parser.add_argument("--large-ndiv", default=6, type=int, help="for the memory")
    parser.add_argument("--repeat", default=5, type=int, help="the median is shown")
    parser.add_argument(
        "--full", action="store_true", help="with a mask and a background too"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    expt = make_images(folder, options.images)
    one = make_images(folder, 1)
    mpixel = options.images * PIXELS / 1e6

    print(f"{options.images} images of {NFAST} x {NSLOW}: {mpixel:.0f} Mpixel")
    print(
        f"reading alone, by dxtbx: {mpixel / reading(expt):.0f} Mpixel per CPU-second"
    )
    cases = {
        "start-up": Case(one, 1, options.ndiv),
        "one process": Case(expt, 1, options.ndiv),
        "two processes": Case(expt, 2, options.ndiv),
        "two processes, large grid": Case(expt, 2, options.large_ndiv),
    }
    if options.full:
        more = make_mask_and_background(expt)
        cases["one process, everything on"] = Case(expt, 1, options.ndiv, more)
        cases["two processes, everything on"] = Case(expt, 2, options.ndiv, more)
    # in turn, so that a change of the machine's speed hits all alike
    runs = np.array(
        [[run(folder, case) for case in cases.values()] for _ in range(options.repeat)]
    )
    cpu, wall, work, memory = np.moveaxis(np.median(runs, axis=0), -1, 0)
    for i, (name, case) in enumerate(cases.items()):
        text = f"{name}: {cpu[i]:.1f} CPU-s, {wall[i]:.1f} s wall"
        if i:
            text += (
                f", {mpixel / cpu[i]:.0f} Mpixel per CPU-second "
                f"({mpixel / (cpu[i] - cpu[0]):.0f} without start-up), ndiv={case.ndiv}, "
                f"peak memory {memory[i] / 1e9:.2f} GB per process"
            )
        print(text)
    (single, single_work), (double, double_work) = (runs[:, i, 1:3].T for i in (1, 2))
    print(
        f"two processes against one: {np.median(single / double):.2f} times as fast, "
        f"{np.median(single_work / double_work):.2f} times after the imports "
        f"({work[1]:.1f} s against {work[2]:.1f} s)"
    )


if __name__ == "__main__":
    main()
