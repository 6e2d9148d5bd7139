"""Speed and memory of dials.diffuse_scale on generated tables of observations.

Makes (once) tables of four sweeps of a tetragonal crystal with Poisson counts, known
scales, B factors and offsets, and runs the command on them as a user would: reading,
refinement of all terms, error model, outliers over the whole table, writing and report
included.

1. All rows of a table of ten million are refined against (refinement.max_rows=None).
2. The same table, a quarter of its rows, about as many as by default.
3. A table of many more rows, of which as many are refined: the memory must not grow.

A row takes 100 bytes on the disk, one of the output 116, and 40 more while outliers are
looked for: --rows 1e8 needs 26 GB.

    build/venv/bin/python benchmarks/scale.py
    build/venv/bin/python benchmarks/scale.py --rows 1e8
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from extract import NFAST, NSLOW, Usage, make_models, measure, python_command

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ROWS_PER_SLAB, ObservationWriter
from dials_diffuse.merging import sums
from dials_diffuse.util.files import atomic_path

GRID = Grid((57.5, 57.5, 149.7, 90.0, 90.0, 90.0), (3, 3, 3), " P 4w 2abw", 2.5)
N_SWEEPS = 4
N_IMAGES = 900  # of 0.1° each
ROWS_REFINED = 10_000_000
A_QUARTER = "refinement.max_rows=2600000"
EXPOSURE = 4.0  # photons of a voxel of the intensity 1


def voxels() -> np.ndarray:
    """All voxels of the sphere, in the order of the grid; shape (n, 3)."""
    parts = []
    n_plane = int(np.prod(GRID.shape[1:]))
    for h in range(GRID.shape[0]):
        index = GRID.index(np.arange(h * n_plane, (h + 1) * n_plane))
        parts.append(index[GRID.in_resolution_range(GRID.s(index))])
    return np.concatenate(parts)


def true_scale(sweep: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The scale of each observation."""
    phase = 2 * np.pi * frame / N_IMAGES + sweep
    return (0.7 + 0.2 * sweep) * np.exp(0.2 * np.sin(phase))


def make_rows(
    rng: np.random.Generator, index: np.ndarray, rate: float
) -> dict[str, np.ndarray]:
    """Rows of some voxels, ``rate`` of each on average."""
    s = GRID.s(index)
    unique = sums.pack(symmetry.map_to_asu(index, GRID.laue_group))
    # The same for all equivalents, between 0 and 1.
    number = sums.mix_bits(unique.view(np.uint64)) >> np.uint64(11)
    intensity = -np.log((number + 0.5) / 2.0**53) * np.exp(-4 * s**2) + 0.3
    place = np.repeat(np.arange(len(index)), rng.poisson(rate, len(index)))
    n = len(place)
    sweep = rng.integers(N_SWEEPS, size=n)
    place = place[np.lexsort((sweep, place))]
    frame = rng.uniform(0, N_IMAGES, n)
    norm = EXPOSURE * rng.uniform(0.3, 1.7, n)
    factor = true_scale(sweep, frame) * np.exp(-0.5 * sweep * s[place] ** 2)
    background = norm * np.exp(-s[place])
    x, y = rng.uniform(0, NFAST, n), rng.uniform(0, NSLOW, n)
    return {
        "miller_index": index[place],
        "id": sweep.astype(np.int32),
        "panel": np.zeros(n, dtype=np.uint64),
        "counts": rng.poisson(norm * factor * intensity[place] + background) * 1.0,
        "background.sum.value": background,
        "background.sum.variance": 1e-3 * background,
        "normalisation": norm,
        "num_pixels.valid": np.full(n, 40, dtype=np.int32),
        "xyzobs.px.value": np.stack([x, y, frame], axis=1),
        "d": 1 / s[place],
        "flags": np.zeros(n, dtype=np.uint64),
    }


def make_table(folder: Path, n_rows: int) -> tuple[Path, Path]:
    """Write about ``n_rows`` rows and their experiments, unless they are there."""
    expt, refl = folder / "scaling.expt", folder / f"scaling_{n_rows:.0e}.refl"
    names = [f"sweep {i}" for i in range(N_SWEEPS)]
    beam, detector, goniometer, scan, crystal = make_models(N_IMAGES)
    models = {"beam": beam, "detector": detector, "goniometer": goniometer}
    experiments = [
        Experiment(scan=scan, crystal=crystal, identifier=name, **models)
        for name in names
    ]
    ExperimentList(experiments).as_file(expt)
    if refl.exists():
        return expt, refl
    index = voxels()
    rate = n_rows / len(index)
    rng = np.random.default_rng(7)
    step = max(1, int(ROWS_PER_SLAB / rate))  # slabs as those of extraction
    with atomic_path(refl) as path:
        with ObservationWriter(path, GRID, dict(enumerate(names))) as writer:
            for start in range(0, len(index), step):
                writer.append(make_rows(rng, index[start : start + step], rate))
    return expt, refl


def run(folder: Path, files: tuple[Path, Path], *more: str) -> tuple[Usage, str]:
    """What a run took, and its log."""
    log = "output.log=scaling.log"
    command = python_command("diffuse_scale", [*map(str, files), log, *more])
    use = measure(folder, command)
    return use, (folder / "scaling.log").read_text()


def report(name: str, use: Usage, log: str) -> None:
    """Print a line for a run."""
    refined = re.search(r"(\d+) observations of (\d+) voxels", log)
    chi = re.search(
        r"χ² per degree of freedom: ([\d.]+) with scales .* ([\d.]+) with its error",
        log,
    )
    steps = sum(map(int, re.findall(r"after (\d+) steps", log)))
    print(
        f"{name}: {use.wall:.0f} s wall, {use.cpu:.0f} CPU-s, peak memory "
        f"{use.memory / 1e9:.2f} GB; {refined[1]} rows of {refined[2]} voxels refined "
        f"in {steps} steps, χ² {chi[1]} before, {chi[2]} after"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="build/benchmark", type=Path)
    parser.add_argument("--rows", default=3e7, type=float, help="of the large table")
    parser.add_argument(
        "--refined", default=ROWS_REFINED, type=float, help="rows of the small table"
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    small = make_table(folder, int(options.refined))
    everything = run(folder, small, "refinement.max_rows=None")
    report(f"{options.refined:.0e} rows, all refined", *everything)
    few = run(folder, small, A_QUARTER)
    report(f"{options.refined:.0e} rows, some refined", *few)
    large = make_table(folder, int(options.rows))
    many = run(folder, large, A_QUARTER)
    report(f"{options.rows:.0e} rows, some refined", *many)
    growth = (many[0].memory - few[0].memory) / (options.rows - options.refined)
    print(f"memory grows by {growth:.2f} bytes a row")


if __name__ == "__main__":
    main()
