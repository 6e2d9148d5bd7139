"""Speed and memory of dials.diffuse_extract on images of 2463 x 2527 pixels.

Makes (once) a sweep of byte-offset CBF images with Poisson counts, gaps between the
modules and parallax, and runs the command on them as a user would: reading, geometry, all
corrections, Bragg exclusion, sorting and writing included. The figures are of whole
processes and their children, from the operating system's own accounting, the median of
some runs.

``start-up`` is the same command on one image: interpreter, imports of DIALS, arrays of
the detector. ``reading`` is what dxtbx takes for the images alone, in the same run, as a
measure of the machine.

    make benchmark
    build/venv/bin/python benchmarks/extract.py --images 100 --ndiv 3
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

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


def run(folder: Path, expt: Path, nproc: int, ndiv: int) -> tuple[float, ...]:
    """CPU and wall seconds, those after the imports, and peak memory of a run.

    The memory is that of the largest process, in bytes.
    """
    command = (
        "import sys, time\n"
        "from dials_diffuse.command_line.diffuse_extract import run\n"
        "start = time.perf_counter()\n"
        "run(sys.argv[1:])\n"
        "print(time.perf_counter() - start, file=sys.stderr)\n"
    )
    measure = (
        "import resource, subprocess, sys, time\n"
        "start = time.perf_counter()\n"
        "run = [sys.executable, '-c', *sys.argv[1:]]\n"
        "work = subprocess.run(run, check=True, capture_output=True).stderr\n"
        "wall = time.perf_counter() - start\n"
        "use = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "cpu = use.ru_utime + use.ru_stime\n"
        "print(cpu, wall, float(work.split()[-1]), use.ru_maxrss * 1024)\n"
    )
    arguments = [str(expt), f"grid.ndiv={ndiv}", f"mp.nproc={nproc}"]
    result = subprocess.run(
        [sys.executable, "-c", measure, command, *arguments],
        check=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    return tuple(map(float, result.stdout.split()))


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
        "start-up": (one, 1, options.ndiv),
        "one process": (expt, 1, options.ndiv),
        "two processes": (expt, 2, options.ndiv),
        "two processes, large grid": (expt, 2, options.large_ndiv),
    }
    # in turn, so that a change of the machine's speed hits all alike
    runs = np.array(
        [[run(folder, *case) for case in cases.values()] for _ in range(options.repeat)]
    )
    cpu, wall, work, memory = np.moveaxis(np.median(runs, axis=0), -1, 0)
    for i, (name, (_, _, ndiv)) in enumerate(cases.items()):
        text = f"{name}: {cpu[i]:.1f} CPU-s, {wall[i]:.1f} s wall"
        if i:
            text += (
                f", {mpixel / cpu[i]:.0f} Mpixel per CPU-second "
                f"({mpixel / (cpu[i] - cpu[0]):.0f} without start-up), ndiv={ndiv}, "
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
