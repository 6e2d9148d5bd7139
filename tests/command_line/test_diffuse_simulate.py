from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import dxtbx
from dxtbx.model.experiment_list import ExperimentListFactory
from libtbx.utils import Sorry

from dials_diffuse.command_line import diffuse_extract, diffuse_simulate
from dials_diffuse.io.inputs import read_mask
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.io.truth import PARTS, TruthFile
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.simulate import Simulation
from dials_diffuse.util.command import load_phil

LOG = "dials.diffuse_simulate.log"
COMMAND = [sys.executable, "-m", "dials_diffuse.command_line.diffuse_simulate"]
SMALL = """
    n_images=3 mp.nproc=1 grid.d_min=3 bragg.sigma=0.004
    crystal.unit_cell=20,21,22,90,90,90 detector.preset=given detector.size=60,50
    detector.pixel=0.5 detector.distance=30
""".split()
MODELS = {"simulated.expt", "truth.h5", "simulated.mask"}
PDB = """\
CRYST1   20.000   21.000   22.000  90.00  90.00  90.00 P 21 21 21
ATOM      1  N   GLY A   1       1.000   2.000   3.000  1.00 10.00           N
ATOM      2  CA  GLY A   1       2.100   2.700   3.500  1.00 10.00           C
ATOM      3  S   MET A   2       6.000   5.000   7.000  1.00 12.00           S
END
"""

# Runs each list of arguments in a copy of itself, which ends as the command would.
RUNNER = """
import gc, os, sys
from dials_diffuse.command_line import diffuse_simulate
gc.freeze()  # what is shared needs no clean-up in each copy
for i, line in enumerate(sys.stdin.read().splitlines()):
    pid = os.fork()
    if pid == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{i}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        break
    _, status = os.waitpid(pid, 0)
    print(i, os.WEXITSTATUS(status), flush=True)
else:
    os._exit(0)
diffuse_simulate.run(line.split("|"))
"""


def images(name: str = "1", n: int = 3) -> set[str]:
    return {f"sim_{name}_{i:05d}.cbf" for i in range(1, n + 1)}


def files(folder: str | Path = ".") -> set[str]:
    return {p.name for p in Path(folder).iterdir()} - {LOG}


def run(*args: str) -> str:
    """Run the command on the small case; returns its log."""
    diffuse_simulate.run([*SMALL, *args])
    return Path(LOG).read_text()


def simulation(*args: str) -> Simulation:
    """The same without the command."""
    scope = load_phil("simulate")
    interpreter = scope.command_line_argument_interpreter()
    sources = [interpreter.process_arg(arg) for arg in (*SMALL, *args)]
    params = scope.fetch(sources=sources).extract()
    return Simulation(SimulationSettings.from_phil(params))


def assert_images_are(experiments, expected: Simulation) -> None:
    """All images of an experiment list, panel by panel."""
    number = 0
    for series in expected.series:
        for i in range(series.n_images):
            sweep = not series.is_stills
            e = experiments[number if sweep else number + i]
            raw = e.imageset.get_raw_data(i if sweep else 0)
            counts = expected.image(series, i)
            assert len(raw) == len(counts)
            for found, true in zip(raw, counts):
                np.testing.assert_array_equal(found.as_numpy_array(), true)
        number += len(series.experiments)
    assert number == len(experiments)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def refused(match: str):
    """The error is one line; no file is left but the log."""
    before = files()
    with pytest.raises((Sorry, SystemExit), match=match) as error:
        yield
    lines = str(error.value).strip().splitlines()
    assert len(lines) == 1, lines
    assert files() == before


# Normal runs


def test_sweep():
    log = run()
    assert files() == images() | MODELS
    (e,) = experiments = ExperimentListFactory.from_json_file("simulated.expt")
    expected = simulation()
    (true,) = expected.series[0].experiments
    assert e.identifier == true.identifier == "sim-42-1"
    assert e.crystal == true.crystal
    assert e.beam == true.beam and e.goniometer == true.goniometer
    assert e.beam.get_polarization_fraction() == 0.999
    assert e.detector == true.detector
    assert e.scan.get_image_range() == (1, 3)
    assert e.scan.get_oscillation() == pytest.approx((0, 0.5))
    assert len(e.imageset) == 3
    assert_images_are(experiments, expected)
    for text in (
        "1 series of 3 images of a sweep",
        "True map of 1994 unique voxels to 3.00 Å written to truth.h5",
        "Mask of gaps and beam stop written to simulated.mask",
        f"3 images written to {Path.cwd()}",
        "True models written to simulated.expt",
        "n_images = 3",
    ):
        assert text in log
    assert "Warning" not in log


def test_headers_of_a_sweep():
    """What dials.import would see, without the true models."""
    run("scan.start=10", "scan.width=0.25")
    for i in range(3):
        image = dxtbx.load(f"sim_1_{i + 1:05d}.cbf")
        start, width = image.get_scan().get_oscillation()
        assert (start, width) == pytest.approx((10 + 0.25 * i, 0.25))
        assert image.get_scan().get_exposure_times()[0] == pytest.approx(0.1)
        panel = image.get_detector()[0]
        assert panel.get_origin() == pytest.approx((-15, 12.5, -30))
        assert image.get_beam().get_wavelength() == pytest.approx(0.9795)


def test_stills():
    log = run("mode=stills", "scan.width=2")
    assert "1 series of 3 stills" in log
    assert files() == images() | MODELS
    experiments = ExperimentListFactory.from_json_file("simulated.expt")
    names = [f"sim-42-1-{i:05d}" for i in (1, 2, 3)]
    assert list(experiments.identifiers()) == names
    assert all(e.scan is None and e.goniometer is None for e in experiments)
    assert_images_are(experiments, simulation("mode=stills", "scan.width=2"))
    for i in (1, 2, 3):
        header = Path(f"sim_1_{i:05d}.cbf").read_bytes()[:1500]
        assert b"# Angle_increment 0.0 deg." in header
        assert b"# Start_angle 0.0 deg." in header
    u = [np.array(e.crystal.get_U()).reshape(3, 3) for e in experiments]
    turn = u[1] @ u[0].T
    assert np.degrees(np.arccos((np.trace(turn) - 1) / 2)) == pytest.approx(2)
    np.testing.assert_allclose(u[2] @ u[1].T, turn, atol=1e-9)
    np.testing.assert_allclose(turn @ [1, 0, 0], [1, 0, 0], atol=1e-9)


def test_stills_at_random():
    run("mode=stills", "scan.orientations=random")
    experiments = ExperimentListFactory.from_json_file("simulated.expt")
    u = [np.array(e.crystal.get_U()).reshape(3, 3) for e in experiments]
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert np.trace(u[i] @ u[j].T) < 2.9


def test_truth():
    run("n_crystals=2", "background.n_images=4", "scale.variation=0.3")
    experiments = ExperimentListFactory.from_json_file("simulated.expt")
    expected = simulation("n_crystals=2", "scale.variation=0.3")
    with TruthFile("truth.h5") as truth:
        assert truth.grid.d_min == 3
        assert truth.grid.unit_cell == pytest.approx((20, 21, 22, 90, 90, 90))
        columns = truth.columns(list(PARTS))
        total = sum(columns[name] for name in PARTS if name != "intensity")
        np.testing.assert_allclose(columns["intensity"], total)
        assert all(values.max() > 0 for values in columns.values())
        assert truth.scattering_power == pytest.approx(expected.sample.power)
        index, f_squared = truth.bragg()
        np.testing.assert_allclose(f_squared, expected.sample.bragg.at(*index.T))
        series = truth.series()
    assert [len(s.scale) for s in series] == [3, 3, 4]
    names = [name for s in series for name in s.identifiers]
    assert (
        names == list(experiments.identifiers()) == [f"sim-42-{i}" for i in (1, 2, 3)]
    )
    for s, true in zip(series, expected.series):
        scales = [expected.exposure(true, i).scale for i in range(3)]
        np.testing.assert_allclose(s.scale[:3], scales)
    np.testing.assert_array_equal(series[2].scale, 1)


def test_mask_is_taken_by_extraction():
    gaps = ["detector.modules=3,1", "detector.gap=5,0"]
    run(*gaps)
    (good,) = read_mask("simulated.mask")
    (expected,) = simulation(*gaps).good_pixels()
    np.testing.assert_array_equal(good, expected)
    n_pixels = {}
    for mask in ("simulated.mask", "None"):
        arguments = f"simulated.expt mask={mask} mp.nproc=1 bragg.exclusion=none"
        diffuse_extract.run(arguments.split())
        with ObservationFile("extracted.refl") as f:
            counts = f.read(0, f.n_rows, ["num_pixels.valid"])
        n_pixels[mask] = counts["num_pixels.valid"].sum()
    # Gaps are untrusted anyway. The beam stop hides 28 pixels and its arm 2 x 22 more, but
    # the voxel of the origin is left out.
    assert 3 * 40 < n_pixels["None"] - n_pixels["simulated.mask"] < 3 * 80


def truth_values() -> dict[str, np.ndarray]:
    """All that truth.h5 holds but the date and the parameters."""
    values = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and name.split("/")[-1] not in (
            "date",
            "phil",
        ):
            values[name] = item[()]

    with h5py.File("truth.h5") as f:
        f.visititems(visit)
    return values


def contents() -> dict[str, object]:
    """Images, models and mask."""
    found = {name: Path(name).read_bytes() for name in files() - {"truth.h5"}}
    models = json.loads(found.pop("simulated.expt"))
    models.pop("history", None)  # with the time; dxtbx 3.11 writes none
    return {**found, "simulated.expt": models}


@pytest.mark.parametrize("mode", ["rotation", "stills"])
def test_output_depends_on_nothing_but_the_parameters(mode):
    """Neither on the number of processes nor on what was there; but on the seed."""
    args = [f"mode={mode}", "n_crystals=2", "background.n_images=2"]
    args += ["scale.variation=0.2", "detector.hot_fraction=0.01", "background.air=50"]
    run(*args)
    first, truth = contents(), truth_values()
    assert len(first) == 3 + 3 + 2 + 2
    for again in ("mp.nproc=1", "mp.nproc=2"):
        run(*args, again)
        assert contents() == first, again
        repeated = truth_values()
        assert repeated.keys() == truth.keys()
        for name, value in truth.items():
            np.testing.assert_array_equal(repeated[name], value, err_msg=name)
    run(*args, "seed=7")
    other = contents()
    assert {n for n in first if other[n] == first[n]} == {"simulated.mask"}
    name = "entry/asu/cloud"
    assert not np.allclose(truth_values()[name], truth[name])


def test_images_of_an_earlier_run_are_replaced():
    """Whole: whoever has the old file open still sees the old image."""
    run()
    os.link("sim_1_00001.cbf", "old")
    old = Path("old").read_bytes()
    log = run("seed=3", "n_images=2")
    assert Path("old").read_bytes() == old
    assert Path("sim_1_00001.cbf").read_bytes() != old
    assert files() == images() | MODELS | {"old"}
    assert "Warning: 1 images of another simulation" in log
    assert "sim_1_00003.cbf" in log


@pytest.mark.parametrize("mode", ["rotation", "stills"])
@pytest.mark.parametrize(
    "args",
    [["detector.panels=2,1", "detector.panel_tilt=20"], ["detector.two_theta=20"]],
)
def test_nexus(mode, args):
    args = [*args, f"mode={mode}"]
    run(*args)
    assert files() == {"sim_1.nxs"} | MODELS
    experiments = ExperimentListFactory.from_json_file("simulated.expt")
    assert_images_are(experiments, simulation(*args))
    found = dxtbx.load("sim_1.nxs").get_detector()
    for panel, true in zip(found, experiments[0].detector):
        for method in ("get_origin", "get_fast_axis", "get_slow_axis"):
            assert getattr(panel, method)() == pytest.approx(
                getattr(true, method)(), abs=1e-6
            )


@pytest.mark.parametrize("mode", ["rotation", "stills"])
def test_images_without_crystal(mode):
    """More of them than of the crystal, which has the larger scale."""
    args = [f"mode={mode}", "background.n_images=5", "background.air=100"]
    run(*args)
    assert files() == images() | images("background", 5) | MODELS
    experiments = ExperimentListFactory.from_json_file("simulated.expt")
    assert_images_are(experiments, simulation(*args))
    n = 1 if mode == "rotation" else 5
    empty = [e for e in experiments if e.crystal is None]
    assert len(empty) == n and experiments[-1].crystal is None
    counts = experiments[-1].imageset.get_raw_data(0)[0].as_numpy_array()
    crystal = experiments[0].imageset.get_raw_data(0)[0].as_numpy_array()
    assert 0 < counts.mean() < crystal.mean()


def test_two_crystals():
    log = run("n_crystals=2", "crystal.cell_spread=0.02")
    assert "2 series of 3 images" in log and "6 images written" in log
    assert files() == images("1") | images("2") | MODELS
    first, second = ExperimentListFactory.from_json_file("simulated.expt")
    assert [first.identifier, second.identifier] == ["sim-42-1", "sim-42-2"]
    u, v = (np.array(e.crystal.get_U()).reshape(3, 3) for e in (first, second))
    assert np.trace(u @ v.T) < 2.9
    a, b = (e.crystal.get_unit_cell().parameters() for e in (first, second))
    assert a != pytest.approx(b, rel=1e-4) and a == pytest.approx(b, rel=0.15)


def test_structure_from_a_file():
    Path("small.pdb").write_text(PDB)
    args = [arg for arg in SMALL if not arg.startswith("crystal.unit_cell")]
    diffuse_simulate.run([*args, "crystal.structure=small.pdb"])
    (e,) = ExperimentListFactory.from_json_file("simulated.expt")
    assert e.crystal.get_unit_cell().parameters() == pytest.approx(
        (20, 21, 22, 90, 90, 90)
    )
    assert e.crystal.get_space_group().type().lookup_symbol() == "P 21 21 21"
    with TruthFile("truth.h5") as truth:
        assert truth.composition["S"] == 4 and truth.composition["N"] == 4
        assert truth.composition["H"] == 2 * truth.composition["O"] > 100  # water


@pytest.mark.parametrize("noise", ["none", "None"])
def test_no_noise(noise):
    run(f"noise={noise}")
    (e,) = ExperimentListFactory.from_json_file("simulated.expt")
    expected = simulation("noise=none")
    (photons,) = expected.photons(expected.series[0], 1)
    counts = e.imageset.get_raw_data(1)[0].as_numpy_array()
    np.testing.assert_array_equal(counts, np.rint(photons))


def test_fewer_files():
    run("output.truth=None", "output.mask=None", "output.experiments=true.expt")
    assert files() == images() | {"true.expt"}


def test_names_and_folders():
    Path("models").mkdir()
    log = run(
        "output.directory=new/images",
        "output.prefix=my [x]",
        "output.experiments=models/a.expt",
        "output.truth=models/a.h5",
        "output.mask=models/a.mask",
    )
    assert files("new/images") == {f"my [x]_1_{i:05d}.cbf" for i in (1, 2, 3)}
    assert files("models") == {"a.expt", "a.h5", "a.mask"}
    assert str(Path("new/images").resolve()) in log
    experiments = ExperimentListFactory.from_json_file("models/a.expt")
    assert_images_are(experiments, simulation())


@pytest.mark.parametrize("mode", ["rotation", "stills"])
def test_dry_run(mode):
    args = ["n_images=40", f"mode={mode}", "scan.width=2", "output.directory=new"]
    log = run("dry_run=True", *args, "mp.nproc=2")
    assert files() == set()
    (header,) = [line for line in log.splitlines() if "CC1/2" in line]
    assert "complete (%)" in header and "counts/voxel" in header
    rows = [line for line in log.splitlines() if " - " in line and "|" in line]
    rows = [[x.strip() for x in row.strip("| ").split("|")] for row in rows]
    assert len(rows) == 10
    assert all(0 < float(row[1]) <= 100 and float(row[4]) > 0 for row in rows)
    assert rows[-1][0].endswith("3.00")


def test_without_xraylib(monkeypatch):
    monkeypatch.setitem(sys.modules, "xraylib", None)
    with refused("Compton scattering needs the Python package xraylib: install"):
        run()
    run("background.compton=False")
    assert files() == images() | MODELS


# Wrong input, each in a process of its own

WRONG = {
    "beam.flux=-1": "beam.flux=-1 must be positive",
    "detector.distance=-30": "puts the detector behind the source",
    "crystal.space_group=P 41": "does not have the symmetry of the space group P 41",
    "crystal.space_group=P 5": "P 5 is not the symbol of a space group",
    "crystal.structure=nowhere.pdb": "cannot read the structure nowhere.pdb",
    "crystal.structure=.": "cannot read the structure .",
    "crystal.structure=text": "cannot read the structure text",
    "output.truth=nowhere/t.h5": "output.truth=nowhere/t.h5: there is no folder",
    "output.mask=nowhere/m": "output.mask=nowhere/m: there is no folder",
    "output.experiments=nowhere/a.expt": "a.expt: there is no folder",
    "output.log=nowhere/log": "output.log=nowhere/log: there is no folder",
    "output.experiments=a.txt": "a.txt must end in .expt or .json",
    "output.experiments=None": "Please give a name for the models",
    "output.truth=simulated.mask": "output.mask=simulated.mask is in use",
    "output.truth=./simulated.expt": "output.truth=./simulated.expt is in use",
    "output.truth=.": "Cannot write .: it is a folder",
    "output.prefix=None": "output.prefix=None must be the beginning of file names",
    "output.prefix=a/b": "output.prefix=a/b must be the beginning of file names",
    "output.prefix=a#": "output.prefix=a# must be the beginning of file names, without",
    "output.directory=text": "Cannot make output.directory=text: File exists",
    "output.directory=text/x": "Cannot make output.directory=text/x: Not a directory",
    "n_imagse=3": "n_imagse",
    "n_images=0": "n_images",
    "mode=movie": "mode",
    "text": "text is empty, damaged or of a kind that this command does not read",
    "nowhere.expt": "nowhere.expt does not exist",
    "file.h5": "file.h5 is not a parameter: see the help",
    "grid.d_min=0.05": "grid.d_min",
    "grid.d_min=0.48": "grid.d_min=0.48 is less than half the wavelength",
    "grid.d_min=500": "No voxel lies within grid.d_min=500",
    "grid.ndiv=5000": "is too large (more than 2147483647): use a smaller ndiv",
    "grid.ndiv=2,3": "grid.ndiv takes one number or three",
    "detector.panels=2,1|detector.thickness=0": "detector.thickness=0 goes with CBF",
    "detector.panels=5,1|detector.panel_tilt=-60": "do not all face the sample",
    "dry_run=True|detector.beamstop=99": "hides the whole detector",
    "dry_run=True|grid.d_min=500": "No pixel is left",
    "mode=stills|scan.orientations=random|crystal.orientation=1,2,3": "leave one of them",
    "diffuse.n_terms=999": "diffuse.n_terms=999 is too large",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[int, str, set[str]]]:
    """Exit status, standard error and new files of each wrong command line.

    One interpreter is started for all, since that takes longer than to refuse.
    """
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text").write_text("some text\n")
    with h5py.File(folder / "file.h5", "w") as f:
        f["x"] = 1
    common = [*SMALL, "output.log=None"]
    lines = []
    for arg in WRONG:
        own = arg.split("|")
        lines.append("|".join([*(common if "output.log" not in arg else SMALL), *own]))
    result = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    codes = dict(map(int, line.split()) for line in result.stdout.splitlines())
    errors = [(folder / f"{i}.err").read_text() for i in range(len(lines))]
    own = {f"{i}.{name}" for i in range(len(lines)) for name in ("out", "err")}
    left = files(folder) - own - {"text", "file.h5"}
    return {arg: (codes[i], errors[i], left) for i, arg in enumerate(WRONG)}


@pytest.mark.parametrize("arg", list(WRONG))
def test_wrong_input_gives_one_line(outcomes, arg):
    code, error, left = outcomes[arg]
    assert code == 1, error
    assert "Traceback" not in error
    (line,) = error.strip().splitlines()
    assert WRONG[arg] in line
    assert left == set()


# In a process of its own


def command(*args: str, limit_bytes: int | None = None) -> subprocess.CompletedProcess:
    def limit():
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run(
        [*COMMAND, *args],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=120,
    )


def assert_one_line(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    (line,) = result.stderr.strip().splitlines()
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "args, text",
    [
        (["-h"], "diffuse scattering is known exactly"),
        (["-c", "-e2", "-a2"], "Thickness of the silicon sensor in mm."),
    ],
)
def test_help(args, text):
    result = command(*args)
    assert result.returncode == 0
    assert text in " ".join(result.stdout.replace('"', "").split())
    assert files() == set()


@pytest.mark.parametrize("kib, name", [(40, "truth.h5"), (2, "simulated.mask")])
@pytest.mark.slow
def test_disk_full(kib, name):
    args = ["output.log=None"] + ["output.truth=None"] * (name != "truth.h5")
    result = command(*SMALL, *args, limit_bytes=kib * 1024)
    assert_one_line(result, f"Cannot write {name}", "no space left")
    assert files() == set()


@pytest.mark.parametrize(
    "args, n_bytes",
    [
        ([], 5000),
        (["noise=none", "beam.flux=1e9"], 4000),  # only the end of the file is missing
        (["detector.panels=2,1"], 5000),
    ],
)
@pytest.mark.slow
def test_disk_full_of_images(args, n_bytes):
    common = ["output.log=None", "output.truth=None", "output.mask=None"]
    result = command(*SMALL, *common, *args, limit_bytes=n_bytes)
    assert_one_line(result, "Cannot write", "sim_1", "no space left")
    assert files() == set()


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.slow
def test_end_by_signal(nproc):
    """Images that are there are whole, and one line says what happened."""
    args = [*SMALL, "n_images=4000", f"mp.nproc={nproc}", "output.truth=None"]
    process = subprocess.Popen(
        [*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while not Path("sim_1_00005.cbf").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in out + err
    assert out.strip().endswith("Ended by SIGTERM: nothing unfinished was kept")
    assert err.strip() == ""
    left = files() - {"simulated.mask"}
    assert left == images("1", len(left)) and 5 <= len(left) < 4000
    expected = simulation()
    for i in (1, len(left)):
        (data,) = [dxtbx.load(f"sim_1_{i:05d}.cbf").get_raw_data()]
        data = data[0] if isinstance(data, tuple) else data
        assert data.as_numpy_array().shape == (50, 60)
    (true,) = expected.image(expected.series[0], 0)
    raw = dxtbx.load("sim_1_00001.cbf").get_raw_data()
    raw = raw[0] if isinstance(raw, tuple) else raw
    np.testing.assert_array_equal(raw.as_numpy_array(), true)


@pytest.mark.slow
def test_killed_worker():
    """As by the kernel when memory runs out."""
    code = (
        "import os, sys, signal\n"
        "from dials_diffuse.command_line import diffuse_simulate\n"
        "from dials_diffuse.simulation.simulate import Simulation\n"
        "parent, image = os.getpid(), Simulation.image\n"
        "def killed(self, series, i):\n"
        "    assert os.getpid() != parent\n"
        "    if i == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return image(self, series, i)\n"
        "Simulation.image = killed\n"
        "diffuse_simulate.run(sys.argv[1:])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *SMALL, "mp.nproc=2", "output.truth=None"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_one_line(result, "worker process was ended", "mp.nproc")
    assert files() <= {"simulated.mask"} | images("1", 2)
