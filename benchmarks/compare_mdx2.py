"""dials.diffuse_extract against mdx2: the same images to voxels, in one run.

mdx2 (Meisburger & Ando, 2024, doi:10.1107/S2059798324002705; MIT licence) reduces
rotation data of single-panel detectors by a chain of commands. Both get the images of
``extract.py``, the same models, three voxels per reciprocal lattice vector and one process
with one thread. mdx2 knows no resolution limit, so ours is set to the corners of the
detector. Both leave out the same ellipsoids about all Bragg positions: the images have no
peaks for mdx2.find_peaks to fit, so its result is written by hand and its time does not
count.

========================  ==============================  ===============================
step                      mdx2                            dials.diffuse_extract
========================  ==============================  ===============================
images                    import_data: copied to HDF5     read once, nothing copied
indices of a pixel        import_geometry: interpolated   interpolated within pixels of
                          in steps of 1° and 10 pixels    an image, no steps in angle
Bragg exclusion           mask_peaks: pixels whose        in the loop over the pixels:
                          middle is near a peak; the      those that come near a peak at
                          flags of all images in memory   any angle of their image
pixels to voxels          integrate                       in the same loop
observations              stacks of images (5°), modules  ranges of rotation (5° here)
polarization, solid       correct: at the mean position   summed over the pixels of each
angle, sensor, air        of the pixels of a voxel        voxel
map to asymmetric unit    correct                         by dials.diffuse_merge
Bragg intensities         no                              yes (bragg.refl)
background                neither in this run; mdx2 has that of images without the
                          crystal, ours is measured by ``extract.py --full``
mask of pixels            neither in this run, beyond gaps and untrusted values
========================  ==============================  ===============================

CPU time is user and system time of whole processes and their children. ``start-up`` is
what does not grow with the number of images: ours on one image; the imports of mdx2's
five commands and all of import_geometry. mdx2 is installed by pip into an environment of
its own; where that fails, our figures alone are shown.

    build/venv/bin/python benchmarks/compare_mdx2.py --images 20
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
from extract import NFAST, NSLOW, PIXELS, Usage, make_images, measure, python_command

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.io.observations import GROUP

MDX2 = "mdx2~=1.0.5"  # with the command line options used here
NDIV = 3
RADIUS = 0.25  # of the Bragg exclusion, in reciprocal lattice vectors
SIGMAS = 3  # mdx2.mask_peaks excludes so many standard deviations of its peaks
BOX = 4096  # more than the number of voxels along each axis
STACK = 5  # degrees; mdx2 stacks images up to this angle to make one observation
COMMANDS = ("import_geometry", "import_data", "mask_peaks", "integrate", "correct")
PEAKS = f"""
import numpy as np
from mdx2.data import Peaks
from mdx2.geometry import GaussianPeak
from mdx2.io import saveobj
model = GaussianPeak(np.zeros(3), np.eye(3) * {RADIUS / SIGMAS})
saveobj(model, "peaks.nxs", name="peak_model", append=False)
saveobj(Peaks(*np.zeros((3, 0))), "peaks.nxs", name="peaks", append=True)
"""
THREADS = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"
ONE_THREAD = dict.fromkeys(THREADS, "1")


def install_mdx2(venv: Path) -> str:
    """Make the environment unless it is there; returns why it cannot be made, or ''."""
    if (venv / "made").exists():
        return ""
    shutil.rmtree(venv, ignore_errors=True)
    make_venv = Path(__file__).resolve().parents[1] / ".ci" / "make-venv"
    interpreter = Path(sys.base_prefix) / "bin" / "python3"
    for command in (
        ["sh", make_venv, interpreter, venv],
        [venv / "bin" / "pip", "install", "-q", "--retries=1", "--timeout=30", MDX2],
        [venv / "bin" / "mdx2.version"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip() or "no message").splitlines()[-1]
    (venv / "made").touch()
    return ""


def run_mdx2(venv: Path, folder: Path, expt: Path) -> dict[str, Usage]:
    """Usage of each command, and under ``start-up`` what the images do not change."""
    shutil.rmtree(folder, ignore_errors=True)  # a copy of the images would be reused
    folder.mkdir()
    environment = {**os.environ, **ONE_THREAD}
    arguments = {
        "import_geometry": [str(expt)],
        "import_data": [str(expt)],
        "mask_peaks": ["geometry.nxs", "data.nxs", "peaks.nxs"]
        + ["--sigma_cutoff", str(SIGMAS)],
        "integrate": ["geometry.nxs", "data.nxs", "--mask", "mask.nxs"]
        + ["--subdivide", *[str(NDIV)] * 3],
        "correct": ["geometry.nxs", "integrated.nxs"],
    }
    subprocess.run([venv / "bin" / "python", "-c", PEAKS], cwd=folder, check=True)
    usage, imports = {}, []
    for name in COMMANDS:
        program = str(venv / "bin" / f"mdx2.{name}")
        usage[name] = measure(folder, [program, *arguments[name]], environment)
        if name == "import_geometry":
            imports.append(usage[name])
        else:
            imports.append(measure(folder, [program, "--help"], environment))
    return {**usage, "start-up": total(imports)}


def total(usage: list[Usage]) -> Usage:
    """Sum of the times of processes that ran in turn, and the largest memory."""
    return Usage(
        sum(use.cpu for use in usage),
        sum(use.wall for use in usage),
        max(use.memory for use in usage),
        "",
    )


def run_ours(folder: Path, expt: Path) -> Usage:
    """Usage of dials.diffuse_extract on all pixels that mdx2 uses."""
    folder.mkdir(exist_ok=True)
    experiment = ExperimentList.from_file(expt, check_format=False)[0]
    corners = experiment.detector.get_max_resolution(experiment.beam.get_s0())
    arguments = [
        str(expt),
        f"grid.ndiv={NDIV}",
        f"grid.d_min={corners + 1e-4}",
        f"bragg.semi_axes={RADIUS}",
        "bragg.absent=True",
        f"block_width={STACK}",
        "mp.nproc=1",
    ]
    command = python_command("diffuse_extract", arguments)
    return measure(folder, command, {**os.environ, **ONE_THREAD})


def read_ours(folder: Path) -> dict[str, np.ndarray]:
    """Voxel number, photons, pixels and normalisation of each observation."""
    with h5py.File(folder / "extracted.refl") as file:
        group = file[GROUP]
        return {
            "voxel": voxel_number(group["miller_index"][:]),
            "photons": group["counts"][:],
            "pixels": group["num_pixels.valid"][:],
            "normalisation": group["normalisation"][:],
        }


def read_mdx2(folder: Path) -> dict[str, np.ndarray]:
    """The same of mdx2; the rows of its two files stand in the same order.

    Its normalisation is photons by intensity, and nan where there are none.
    """
    with h5py.File(folder / "integrated.nxs") as file:
        table = file["entry/hkl_table"]
        hkl = np.stack([table[axis][:] for axis in "hkl"], axis=-1)
        photons, pixels = table["counts"][:], table["pixels"][:]
    with h5py.File(folder / "corrected.nxs") as file:
        intensity = file["entry/hkl_table/intensity"][:].astype(float)
    intensity[photons == 0] = np.nan
    return {
        "voxel": voxel_number(np.rint(hkl * NDIV).astype(int)),
        "photons": photons,
        "pixels": pixels,
        "normalisation": photons / intensity,
    }


def voxel_number(index: np.ndarray) -> np.ndarray:
    """One number for each row of voxel indices, shape (n, 3)."""
    return np.ravel_multi_index((index + BOX // 2).T, (BOX, BOX, BOX))


def touches_no_peak(voxels: np.ndarray) -> np.ndarray:
    """Whether voxels are those farthest from Bragg positions, h, k, l all fractional.

    With three voxels per reciprocal lattice vector their nearest corner is at
    sqrt(3)/6 = 0.29, beyond the exclusion.
    """
    index = np.array(np.unravel_index(voxels, (BOX, BOX, BOX))) - BOX // 2
    return (index % NDIV != 0).all(axis=0)


def sum_by_voxel(table: dict[str, np.ndarray], voxels: np.ndarray) -> np.ndarray:
    """Photons, pixels and normalisation of each of some voxels, shape (3, n_voxels)."""
    found = np.isin(table["voxel"], voxels)
    index = np.searchsorted(voxels, table["voxel"][found])
    columns = [table[name][found] for name in ("photons", "pixels", "normalisation")]
    return np.array([np.bincount(index, c, len(voxels)) for c in columns])


def show_agreement(ours: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Whether both did the same: voxels, pixels, photons and corrections."""
    for name, table in (("dials.diffuse_extract", ours), ("mdx2", other)):
        print(
            f"{name}: {len(np.unique(table['voxel']))} voxels, "
            f"{len(table['voxel'])} observations, {table['pixels'].sum()} pixels, "
            f"{table['photons'].sum():.0f} photons"
        )
    voxels = np.intersect1d(ours["voxel"], other["voxel"])
    voxels = voxels[touches_no_peak(voxels)]
    a, b = sum_by_voxel(ours, voxels), sum_by_voxel(other, voxels)
    ratio = (b[2] / b[1]) / (a[2] / a[1])
    low, median, high = np.nanpercentile(ratio, [1, 50, 99])
    print(
        f"{len(voxels)} voxels of both, away from Bragg positions, mdx2 over ours: "
        f"pixels {b[1].sum() / a[1].sum():.5f}, photons {b[0].sum() / a[0].sum():.5f} "
        f"(correlation of the voxels {np.corrcoef(a[0], b[0])[0, 1]:.4f}), corrections "
        f"{median:.4f} ({low:.4f} to {high:.4f} for 98 % of the voxels)"
    )


def show(name: str, use: Usage, start: Usage, mpixel: float) -> None:
    print(
        f"{name}: {use.cpu:.1f} CPU-s, {use.wall:.1f} s wall, "
        f"{mpixel / use.cpu:.1f} Mpixel per CPU-second "
        f"({mpixel / (use.cpu - start.cpu):.1f} without the start-up of "
        f"{start.cpu:.1f} CPU-s), peak memory {use.memory / 1e9:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="build/benchmark", type=Path)
    parser.add_argument("--venv", default="build/mdx2-venv", type=Path)
    parser.add_argument("--images", default=20, type=int)
    options = parser.parse_args()
    if options.images < 11:
        parser.error("mdx2 needs more than one degree, 11 images or more")
    options.folder.mkdir(parents=True, exist_ok=True)
    folder, venv = options.folder.resolve(), options.venv.resolve()
    expt, one = make_images(folder, options.images), make_images(folder, 1)
    mpixel = options.images * PIXELS / 1e6
    print(f"{options.images} images of {NFAST} x {NSLOW}: {mpixel:.0f} Mpixel")

    start = run_ours(folder / "ours", one)
    ours = run_ours(folder / "ours", expt)
    show("dials.diffuse_extract", ours, start, mpixel)
    reason = install_mdx2(venv)
    if reason:
        print(f"no figures of mdx2, it cannot be installed: {reason}")
        return
    usage = run_mdx2(venv, folder / "mdx2", expt)
    chain = total([usage[name] for name in COMMANDS])
    show("mdx2", chain, usage["start-up"], mpixel)
    for name in COMMANDS:
        use = usage[name]
        print(f"  {name}: {use.cpu:.1f} CPU-s, {use.memory / 1e9:.2f} GB")
    print(f"CPU time of mdx2 over ours: {chain.cpu / ours.cpu:.1f}")
    show_agreement(read_ours(folder / "ours"), read_mdx2(folder / "mdx2"))


if __name__ == "__main__":
    main()
