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


def run(folder: Path, expt: Path, nproc: int, ndiv: int) -> tuple[float, float, int]:
    """CPU seconds, wall seconds and peak memory (bytes, largest process) of a run."""
    command = Path(sys.executable).with_name("dials.diffuse_extract")
    code = (
        "import resource, subprocess, sys, time\n"
        "start = time.perf_counter()\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "wall = time.perf_counter() - start\n"
        "use = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(use.ru_utime + use.ru_stime, wall, use.ru_maxrss * 1024)\n"
    )
    arguments = [str(command), str(expt), f"grid.ndiv={ndiv}", f"mp.nproc={nproc}"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    cpu, wall, memory = result.stdout.split()
    return float(cpu), float(wall), int(memory)


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
    parser.add_argument("--repeat", default=3, type=int, help="the median is shown")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    expt = make_images(folder, options.images)
    one = make_images(folder, 1)
    mpixel = options.images * PIXELS / 1e6

    def median(expt: Path, nproc: int, ndiv: int) -> tuple[float, float, float]:
        runs = [run(folder, expt, nproc, ndiv) for _ in range(options.repeat)]
        return tuple(np.median(runs, axis=0))

    print(f"{options.images} images of {NFAST} x {NSLOW}: {mpixel:.0f} Mpixel")
    print(
        f"reading alone, by dxtbx: {mpixel / reading(expt):.0f} Mpixel per CPU-second"
    )
    start_cpu, start_wall, _ = median(one, 1, options.ndiv)
    print(f"start-up: {start_cpu:.1f} CPU-s, {start_wall:.1f} s wall")
    wall = {}
    cases = [(1, options.ndiv), (2, options.ndiv), (2, options.large_ndiv)]
    for nproc, ndiv in cases:
        cpu, wall[nproc, ndiv], memory = median(expt, nproc, ndiv)
        print(
            f"nproc={nproc} ndiv={ndiv}: {cpu:.1f} CPU-s, {wall[nproc, ndiv]:.1f} s "
            f"wall, {mpixel / cpu:.0f} Mpixel per CPU-second "
            f"({mpixel / (cpu - start_cpu):.0f} without start-up), "
            f"peak memory {memory / 1e9:.2f} GB per process"
        )
    one_process, two_processes = (wall[n, options.ndiv] for n in (1, 2))
    print(
        f"two processes against one: {one_process / two_processes:.2f} times as fast, "
        f"{(one_process - start_wall) / (two_processes - start_wall):.2f} times without "
        "start-up"
    )


if __name__ == "__main__":
    main()
