from __future__ import annotations

import contextlib
import json
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from simulate_images import (
    count_images,
    import_images,
    make_crystal,
    write_images,
)

from dxtbx import flumpy
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory
from libtbx.utils import Sorry

from dials.array_family import flex
from dials_diffuse.command_line import diffuse_extract
from dials_diffuse.io import bragg
from dials_diffuse.io.observations import COLUMNS, ObservationFile

LOG = "dials.diffuse_extract.log"
COMMAND = [sys.executable, "-m", "dials_diffuse.command_line.diffuse_extract"]


def write_stills(folder: Path, name="stills", n_images=3, crystal=None) -> Path:
    """Images, and ``name``.expt as dials.stills_process leaves it."""
    folder.mkdir(exist_ok=True)
    paths = write_images(folder, count_images(n_images), prefix=name)
    crystal = crystal or (lambda i: make_crystal("P 21 21 21", seed=i))
    experiments = import_images(paths, crystal)
    for i, e in enumerate(experiments):
        e.identifier = f"{name}-{i}"
    path = folder / f"{name}.expt"
    experiments.as_file(path)
    return path


def write_sweep(folder: Path, name="sweep", n_images=4, width=0.5) -> Path:
    paths = write_images(folder, count_images(n_images), width, prefix=name)
    experiments = import_images(paths, lambda i: make_crystal("P 21 21 21"))
    experiments[0].identifier = name
    path = folder / f"{name}.expt"
    experiments.as_file(path)
    return path


def write_reflections(expt: Path, identifiers: bool = True) -> Path:
    """Predicted spots as if they had been observed and indexed."""
    result = flex.reflection_table()
    for i, e in enumerate(ExperimentListFactory.from_json_file(expt)):
        if e.is_still():  # by its models alone: a sequence would be taken for a scan
            e = Experiment(
                beam=e.beam,
                detector=e.detector,
                crystal=e.crystal,
                identifier=e.identifier,
            )
        table = flex.reflection_table.from_predictions(e, dmin=2.5)
        if e.scan is not None:
            inside = table["xyzcal.px"].parts()[2] < e.scan.get_array_range()[1]
            table = table.select(inside)
        table["xyzobs.px.value"] = table["xyzcal.px"]
        table["id"] = flex.int(len(table), i)
        table.set_flags(flex.bool(len(table), True), table.flags.indexed)
        if identifiers:
            table.experiment_identifiers()[i] = e.identifier
        result.extend(table)
    path = expt.with_suffix(".refl")
    result.as_file(path)
    return path


def write_mask(path: Path, good: np.ndarray) -> Path:
    """A mask file as dials.generate_mask writes it."""
    with open(path, "wb") as handle:
        mask = flumpy.from_numpy(np.ascontiguousarray(good)).deep_copy()
        pickle.dump((mask,), handle, pickle.HIGHEST_PROTOCOL)
    return path


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {LOG}


@pytest.fixture
def stills(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_stills(tmp_path)


def read_table(path="extracted.refl") -> dict[str, np.ndarray]:
    with ObservationFile(path) as f:
        return f.read(0, f.n_rows, list(COLUMNS))


def run(*args) -> str:
    """Run the command, without a page unless one is named; returns its log."""
    diffuse_extract.run(["output.html=None", *map(str, args)])
    return Path(LOG).read_text()


@contextlib.contextmanager
def refused(match: str):
    """The error is one line; no file is left but the log."""
    before = files(Path.cwd())
    with pytest.raises((Sorry, SystemExit), match=match) as error:
        yield
    lines = str(error.value).strip().splitlines()
    assert len(lines) == 1, lines
    assert files(Path.cwd()) == before


# Normal runs


def test_stills(stills):
    log = run(stills, "mp.nproc=1")
    table = read_table()
    assert set(table["id"]) == {0, 1, 2}
    assert "3 images in 3 blocks" in log
    assert f"{len(table['id'])} observations" in log
    experiments = ExperimentListFactory.from_json_file("extracted.expt")
    with ObservationFile("extracted.refl") as f:
        assert f.identifiers == {i: e.identifier for i, e in enumerate(experiments)}
    # image i has a mean of 2 + i counts
    for i in range(3):
        rows = table["id"] == i
        mean = table["counts"][rows].sum() / table["num_pixels.valid"][rows].sum()
        assert mean == pytest.approx(2 + i, abs=0.15)
    assert files(Path.cwd()) >= {"extracted.expt", "extracted.refl"}
    assert not [p for p in Path.cwd().iterdir() if "part" in p.name]


@pytest.mark.parametrize("identifiers", [True, False])
@pytest.mark.parametrize("kind", ["stills", "sweep"])
def test_reflections_check_the_geometry(tmp_path, monkeypatch, kind, identifiers):
    monkeypatch.chdir(tmp_path)
    expt = write_stills(tmp_path) if kind == "stills" else write_sweep(tmp_path)
    refl = write_reflections(expt, identifiers)
    n_spots = len(flex.reflection_table.from_file(refl))
    log = run(expt, refl, "mp.nproc=1")
    assert f"against their Bragg positions: {n_spots} spots of" in log
    assert "Warning" not in log
    one = read_table()
    log = run(expt, "mp.nproc=2")
    assert "Bragg positions" not in log
    two = read_table()
    for name in one:
        np.testing.assert_array_equal(two[name], one[name])


def test_spots_that_do_not_fit_the_models(stills):
    refl = write_reflections(stills)
    table = flex.reflection_table.from_file(refl)
    x, y, z = table["xyzobs.px.value"].parts()
    table["xyzobs.px.value"] = flex.vec3_double(60.0 - x, y, z)
    table.as_file(refl)
    log = run(stills, refl, "mp.nproc=1")
    assert "Warning: the spots of 3 of 3 images are on average farther" in log
    assert "geometry.reject_images=True leaves them out" in log


def test_images_that_do_not_fit_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expt = write_sweep(tmp_path)
    refl = write_reflections(expt)
    table = flex.reflection_table.from_file(refl)
    x, y, z = table["xyzobs.px.value"].parts()
    first = flumpy.to_numpy(z).min()
    spoiled = flumpy.to_numpy(z) < np.floor(first) + 1
    x = x + flumpy.from_numpy(np.where(spoiled, 9.0, 0.0))
    table["xyzobs.px.value"] = flex.vec3_double(x, y, z)
    table.as_file(refl)
    n_images = ExperimentList.from_file(expt, check_format=False)[0].scan
    n_images = n_images.get_num_images()
    log = run(expt, refl, "mp.nproc=1", "geometry.reject_images=True")
    assert f"{n_images - 1} images in" in log
    with pytest.raises(Sorry, match="needs the reflection table"):
        run(expt, "geometry.reject_images=True")
    table["xyzobs.px.value"] = flex.vec3_double(x + 9.0, y, z)
    table.as_file(refl)
    with pytest.raises(Sorry, match="all images are farther"):
        run(expt, refl, "geometry.reject_images=True", "geometry.tolerance=1e-3")


def test_several_experiment_lists(stills, tmp_path):
    sweep = write_sweep(tmp_path)
    log = run(stills, sweep, write_reflections(stills), write_reflections(sweep))
    assert "7 images in" in log
    assert set(read_table()["id"]) == {0, 1, 2, 3}
    with ObservationFile("extracted.refl") as f:
        assert list(f.identifiers.values()) == [
            "stills-0",
            "stills-1",
            "stills-2",
            "sweep",
        ]
    # only the reflections of the second list
    log = run(sweep, stills, write_reflections(stills))
    assert "Warning" not in log


def test_mask_file(stills):
    good = np.random.default_rng(3).random((50, 60)) < 0.5
    run(stills, "mp.nproc=1", "bragg.exclusion=none")
    everything = read_table()["num_pixels.valid"].sum()
    run(
        stills,
        f"mask={write_mask(Path('pixels.mask'), good)}",
        "mp.nproc=1",
        "bragg.exclusion=none",
    )
    masked = read_table()["num_pixels.valid"].sum()
    assert 0.4 < masked / everything < 0.6
    # the complement gives the rest: no pixel counts twice
    write_mask(Path("pixels.mask"), ~good)
    run(stills, "mask=pixels.mask", "mp.nproc=1", "bragg.exclusion=none")
    assert read_table()["num_pixels.valid"].sum() + masked == everything


def test_images_without_a_crystal_are_counted_and_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expt = write_stills(
        tmp_path, crystal=lambda i: None if i == 1 else make_crystal(seed=i)
    )
    log = run(expt, "mp.nproc=1", "bragg.exclusion=none")
    assert "1 of 3 experiments have no crystal and are left out" in log
    table = read_table()
    assert set(table["id"]) == {0, 1}
    rows = table["id"] == 1  # the third image
    mean = table["counts"][rows].sum() / table["num_pixels.valid"][rows].sum()
    assert mean == pytest.approx(4, abs=0.2)


def test_experiments_without_identifiers_get_some(stills):
    experiments = ExperimentListFactory.from_json_file(stills, check_format=False)
    for e in experiments:
        e.identifier = ""
    experiments.as_file(stills)
    run(stills, "mp.nproc=1")
    with ObservationFile("extracted.refl") as f:
        assert len(set(f.identifiers.values()) - {""}) == 3
        expected = ExperimentListFactory.from_json_file("extracted.expt")
        assert list(f.identifiers.values()) == list(expected.identifiers())


def test_two_lattices_on_an_image(stills):
    experiments = ExperimentListFactory.from_json_file(stills, check_format=False)
    second = experiments[1]
    other = ExperimentList([*experiments])
    extra = type(second)(
        identifier="other",
        beam=second.beam,
        detector=second.detector,
        goniometer=second.goniometer,
        scan=second.scan,
        imageset=second.imageset,
        crystal=make_crystal("P 21 21 21", seed=9),
    )
    other.append(extra)
    other.as_file("lattices.expt")
    run("lattices.expt", "mp.nproc=1", "bragg.exclusion=none")
    table = read_table()
    sums = [table["counts"][table["id"] == i].sum() for i in range(4)]
    assert sums[3] == pytest.approx(sums[1], rel=0.02)  # the corners differ


def test_hdf5_output_is_read_by_dials(stills):
    """DIALS from 3.13 on reads the layout."""
    run(stills, "mp.nproc=1")
    try:
        table = flex.reflection_table.from_file("extracted.refl")
    except (RuntimeError, pickle.UnpicklingError) as e:
        pytest.skip(f"this DIALS does not read HDF5 reflection tables: {e}")
    ours = read_table()
    np.testing.assert_array_equal(flumpy.to_numpy(table["counts"]), ours["counts"])
    assert dict(table.experiment_identifiers()) == {i: f"stills-{i}" for i in range(3)}


def test_report_has_the_figures_of_the_data(stills):
    """The page and its JSON file, against the table and the models."""
    refl = write_reflections(stills)
    run(stills, refl, "mp.nproc=1", "output.html=page.html", "bragg.absent=True")
    record = json.loads(Path("dials.diffuse_extract.json").read_text())
    table = read_table()
    assert record["pixels"]["used"] == table["num_pixels.valid"].sum()
    assert record["pixels"]["total"] == 3 * 50 * 60
    assert record["observations"]["n"] == len(table["id"])
    assert record["blocks"]["experiment"] == [0, 1, 2]
    for i in range(3):
        rows = table["id"] == i
        n_pixels = table["num_pixels.valid"][rows].sum()
        assert record["blocks"]["n_pixels"][i] == n_pixels
        mean = table["counts"][rows].sum() / n_pixels
        assert record["blocks"]["photons_per_pixel"][i] == pytest.approx(mean, 1e-5)
    names = ("used", "masked", "outside_resolution", "bragg", "dropped")
    parts = sum(record["pixels"][name] for name in names)
    assert parts == record["pixels"]["total"]
    assert record["geometry"]["images"]["experiment"] == [0, 1, 2]
    assert record["geometry"]["n_beyond"] == 0
    (pair,) = record["corrections"]["pairs"]
    assert [f["label"][:5] for f in pair["factors"]][:2] == ["polar", "solid"]
    page = Path("page.html").read_text()
    assert f"<td>{record['pixels']['used']}</td>" in page
    (data,) = re.findall(r'id="plot-data">(.*)</script>', page)
    plots = json.loads(data)
    photons, intensity, _ = plots["blocks"]["data"]
    assert (photons["x0"], photons["dx"]) == (0, 1)
    for trace, name in ((photons, "photons_per_pixel"), (intensity, "intensity")):
        assert trace["y"] == pytest.approx(record["blocks"][name], rel=5e-4)
    mean = plots["geometry"]["data"][1]["y"]
    assert mean == pytest.approx(record["geometry"]["images"]["mean"], rel=5e-4)
    assert all(f'id="{name}"' in page for name in plots)
    titles = {plot["layout"]["title"]["text"] for plot in plots.values()}
    assert {"Polarization", "Solid angle", "Product", "Exposure"} <= titles
    assert "No image is beyond it" in page and "Warnings" not in page


def test_report_names_images_and_warnings(stills):
    refl = write_reflections(stills)
    table = flex.reflection_table.from_file(refl)
    x, y, z = table["xyzobs.px.value"].parts()
    table["xyzobs.px.value"] = flex.vec3_double(x + 4.0, y, z)
    table.as_file(refl)
    arguments = ("mp.nproc=1", "geometry.tolerance=0.001", "output.html=page.html")
    run(stills, refl, *arguments)
    record = json.loads(Path("dials.diffuse_extract.json").read_text())
    assert record["geometry"]["images"]["is_beyond"] == [True] * 3
    assert record["geometry"]["tolerance_is_given"]
    (warning,) = record["warnings"]
    assert warning.startswith("the spots of 3 of 3 images are on average farther")
    page = Path("page.html").read_text()
    assert page.count("beyond the tolerance</td>") == 3
    assert "<h2>Warnings</h2>" in page


def test_no_report(stills):
    run(stills, "mp.nproc=1", "output.json=None")
    assert not [name for name in files(Path.cwd()) if name.endswith(("html", "json"))]


def test_more_bragg_peaks_than_a_table_can_hold(stills, monkeypatch):
    """The observations are kept; log, page and figures know that the table is not there."""
    arguments = ("mp.nproc=1", "bragg.semi_axes=0.2", "output.html=page.html")
    run(stills, *arguments)
    before = read_table()
    record = json.loads(Path("dials.diffuse_extract.json").read_text())
    assert record["output"]["bragg"] == "bragg.refl" and Path("bragg.refl").is_file()
    assert ", are in bragg.refl" in Path("page.html").read_text()
    monkeypatch.setattr(bragg, "MAX_BYTES", 100)
    log = run(stills, *arguments)
    assert not Path("bragg.refl").exists()
    for name, values in read_table().items():
        np.testing.assert_array_equal(values, before[name])
    assert "to bragg.refl" not in log
    record = json.loads(Path("dials.diffuse_extract.json").read_text())
    assert record["output"]["bragg"] is None
    (warning,) = record["warnings"]
    assert "bragg.refl was not written" in warning
    page = Path("page.html").read_text()
    assert ", are in bragg.refl" not in page and "bragg.refl was not written" in page


# Wrong input


@pytest.mark.parametrize(
    "arg, match",
    [
        ("grid.d_min=0.5", "d_min=0.5 is beyond the detector.* or more"),
        ("grid.d_min=2.5 grid.d_max=2", "d_max=2 must be greater than d_min=2.5"),
        ("grid.ndiv=2,3", "grid.ndiv takes one number or three"),
        ("grid.ndiv=5000", "too large.*smaller ndiv"),
        ("grid.reference_cell=given", "needs unit_cell"),
        ("mask=nowhere.mask", "Cannot read the mask nowhere.mask .No such file"),
        ("mask=stills.expt", "Cannot read the mask stills.expt.*generate_mask"),
        ("mask=.", "Cannot read the mask .*generate_mask"),
        ("trusted_range=5,1", "trusted_range needs the smaller value first"),
        ("trusted_range=1e6,2e6", "No pixel is left: check .*trusted range"),
        ("bragg.semi_axes=0.9", "ellipsoids of bragg.semi_axes=.* cover 100 %"),
        (
            "output.reflections=nowhere/extracted.refl",
            "Cannot write nowhere/extracted.refl: there is no folder nowhere",
        ),
        (
            "output.experiments=nowhere/extracted.expt",
            "Cannot write nowhere/extracted.expt: there is no folder nowhere",
        ),
        ("output.html=nowhere/a.html", "Cannot write nowhere/a.html: there is no fol"),
        ("output.json=extracted.expt", "output.json=extracted.expt is in use"),
        ("output.log=nowhere/log", "Cannot write the log file nowhere/log"),
        ("output.experiments=None", "output.experiments .* must be names"),
        ("output.reflections=None", "output.reflections must be names"),
        ("output.reflections=.", "Cannot write .: it is a folder"),
        ("stills_0001.cbf", "stills_0001.cbf is empty, damaged or of a kind"),
        ("bragg.unit=inverse_angstrom", "ellipsoids of bragg.semi_axes=.* cover 100 %"),
        ("nowhere.expt", "nowhere.expt does not exist"),
        ("missing.cbf", "missing.cbf does not exist"),
    ],
)
def test_wrong_arguments(stills, arg, match):
    with refused(match):
        run(stills, "mp.nproc=1", *arg.split())


@pytest.mark.parametrize(
    "arg, match",
    [
        ("grid.ndvi=2", "grid.ndvi"),
        ("grid.ndiv=two", "grid.ndiv"),
        ("grid.ndiv=0", "grid.ndiv"),
        ("mp.nproc=0", "mp.nproc"),
        ("bragg.exclusion=sphere", "bragg.exclusion"),
        ("corrections.path=argon", "corrections.path"),
    ],
)
def test_wrong_parameters(stills, capsys, arg, match):
    """DIALS from 3.13 on prints the message itself before it exits."""
    before = files(Path.cwd())
    with pytest.raises((Sorry, SystemExit)) as error:
        run(stills, arg)
    assert error.value.args != (0,)
    text = str(error.value) + capsys.readouterr().err
    assert match in text
    assert files(Path.cwd()) == before


def test_no_experiments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("experiment list"):
        run("grid.ndiv=3")


def test_missing_images(stills, tmp_path):
    (tmp_path / "stills_0002.cbf").unlink()
    with refused("1 image.* missing, the first is .*stills_0002.cbf: restore"):
        run(stills)


def test_reflections_of_another_experiment_list(stills, tmp_path):
    other = write_reflections(write_sweep(tmp_path))
    with refused("sweep.refl belongs to other experiments.*pair"):
        run(stills, other)


def test_reflections_of_more_experiments_without_identifiers(stills, tmp_path):
    refl = write_reflections(stills, identifiers=False)
    one = ExperimentListFactory.from_json_file(stills, check_format=False)[:1]
    one.as_file("one.expt")
    with refused("stills.refl refers to 3 experiments, the list has 1"):
        run("one.expt", refl)


def test_empty_reflections(stills):
    flex.reflection_table().as_file("empty.refl")
    with refused("empty.refl has no reflections"):
        run(stills, "empty.refl")


def test_reflections_that_are_not_indexed(stills):
    """Strong spots of dials.find_spots: a warning, as they are not needed."""
    refl = write_reflections(stills)
    table = flex.reflection_table.from_file(refl)
    table["flags"] = flex.size_t(len(table), 0)
    table.as_file(refl)
    log = run(stills, refl, "mp.nproc=1")
    assert "Warning: no indexed reflection" in log


def test_strong_spots_without_miller_indices(stills):
    refl = write_reflections(stills)
    table = flex.reflection_table.from_file(refl)
    del table["miller_index"]
    table.as_file(refl)
    with refused("stills.refl has no column miller_index: index first"):
        run(stills, refl)


def test_no_crystal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expt = write_stills(tmp_path, crystal=lambda i: None)
    with refused("stills.expt: no experiment has a crystal. Index"):
        run(expt)


def test_no_images_in_the_experiment_list(stills):
    experiments = ExperimentListFactory.from_json_file(stills, check_format=False)
    for e in experiments:
        e.imageset = None
    experiments.as_file("bare.expt")
    with refused("bare.expt: experiments without images"):
        run("bare.expt")


def test_different_space_groups(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("P 21 21 21", "P 41 21 2", "P 21 21 21")
    expt = write_stills(tmp_path, crystal=lambda i: make_crystal(names[i]))
    with refused("different Laue symmetry .P 21 21 21, P 41 21 2.*reindex"):
        run(expt)


def test_subdivision_that_breaks_the_symmetry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expt = write_stills(tmp_path, crystal=lambda i: make_crystal("P 41 21 2", i))
    with refused("ndiv=2,3,2 does not fit.*same number"):
        run(expt, "grid.ndiv=2,3,2")


def test_mask_of_another_size(stills):
    write_mask(Path("other.mask"), np.ones((60, 50), dtype=bool))
    with refused("other.mask has 1 panel.* of .60, 50. pixels, the detector 1 of"):
        run(stills, "mask=other.mask")


def test_mask_of_more_panels(stills):
    with open("two.mask", "wb") as handle:
        mask = flex.bool(flex.grid(50, 60), True)
        pickle.dump((mask, mask), handle)
    with refused("two.mask has 2 panel"):
        run(stills, "mask=two.mask")


def test_the_same_experiment_list_twice(stills):
    """Each image would count twice."""
    shutil.copy(stills, "copy.expt")
    with refused("stills.expt and copy.expt hold the same experiment"):
        run(stills, "copy.expt")
    with refused("hold the same experiment .identifier stills-0."):
        run(stills, stills)


def test_output_files_of_one_name(stills):
    with refused("output.reflections=./a.expt is in use"):
        run(stills, "output.experiments=a.expt", "output.reflections=./a.expt")
    with refused("output.experiments=a.refl must end in .expt"):
        run(stills, "output.experiments=a.refl")


def test_observations_as_input(stills):
    run(stills, "mp.nproc=1")
    with refused("extracted.refl is an HDF5 file"):
        run(stills, "extracted.refl")


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("n_bytes", [2500, 700, 0])
def test_damaged_image(stills, tmp_path, nproc, n_bytes):
    """Cut short in its data, in its header, or empty."""
    image = tmp_path / "stills_0002.cbf"
    image.write_bytes(image.read_bytes()[:n_bytes])
    with refused("Cannot read image .*stills_0002.cbf .*: restore the file"):
        run(stills, f"mp.nproc={nproc}")


def test_image_of_another_size(stills, tmp_path):
    """A file that was overwritten by another detector's."""
    write_images(tmp_path, count_images(1, (40, 30)), prefix="other")
    (tmp_path / "other_0001.cbf").replace(tmp_path / "stills_0002.cbf")
    with refused("stills_0002.cbf has 1 panel.* of .30, 40. pixels, its detector"):
        run(stills, "mp.nproc=1")


def test_damaged_experiment_list(stills):
    text = stills.read_text()
    Path("half.expt").write_text(text[: len(text) // 2])
    with refused("half.expt"):
        run("half.expt")


# In a process of its own


def command(*args, limit_bytes=None, **kwargs) -> subprocess.CompletedProcess:
    def limit():
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run(
        [*COMMAND, *map(str, args)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=120,
        **kwargs,
    )


def assert_one_line(result, *parts):
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    (line,) = result.stderr.strip().splitlines()
    for part in parts:
        assert part in line


def test_command_in_a_process(stills):
    result = command(stills, "mp.nproc=2")
    assert result.returncode == 0, result.stderr
    assert "observations" in result.stdout
    before = files(Path.cwd())
    result = command(stills, "grid.d_min=0.5")
    assert_one_line(result, "d_min=0.5 is beyond the detector")
    assert files(Path.cwd()) == before


@pytest.mark.parametrize(
    "args, text",
    [
        (["-h"], "sum of its counts"),
        (["-c"], "ndiv"),
        (["-c", "-e2", "-a2"], "Temperature of the gas in K."),
    ],
)
def test_help(args, text):
    result = command(*args)
    assert result.returncode == 0
    assert text in " ".join(result.stdout.split())


@pytest.mark.parametrize("n_bytes", [700, 0])
@pytest.mark.slow
def test_damaged_first_image(stills, tmp_path, n_bytes):
    """In a process of its own, as dxtbx remembers files that it has opened."""
    image = tmp_path / "stills_0001.cbf"
    image.write_bytes(image.read_bytes()[:n_bytes])
    before = files(Path.cwd())
    result = command(stills, "mp.nproc=1")
    assert_one_line(result, "Cannot open the images of", "stills_0001.cbf): restore")
    assert files(Path.cwd()) == before


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("kib", [1, 30, 120, 300])
def test_disk_full(stills, nproc, kib):
    """At whatever stage: one line, nothing left."""
    before = files(Path.cwd())
    no_report = ("output.log=None", "output.html=None", "output.json=None")
    result = command(stills, f"mp.nproc={nproc}", *no_report, limit_bytes=kib * 1024)
    if result.returncode == 0:
        assert files(Path.cwd()) == before | {"extracted.expt", "extracted.refl"}
        assert kib > 100
        return
    assert_one_line(result, "Cannot write extracted.", "no space left")
    assert files(Path.cwd()) == before


@pytest.mark.slow
def test_killed_worker(stills, tmp_path):
    """As by the kernel when memory runs out."""
    code = (
        "import os, sys, signal\n"
        "from dials_diffuse.command_line import diffuse_extract\n"
        "from dials_diffuse.extraction import extract\n"
        "parent = os.getpid()\n"
        "read = extract.accumulate_block\n"
        "def killed(*args):\n"
        "    assert os.getpid() != parent\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "extract.accumulate_block = killed\n"
        "diffuse_extract.run(sys.argv[1:])\n"
    )
    before = files(Path.cwd())
    result = subprocess.run(
        [sys.executable, "-c", code, str(stills), "mp.nproc=2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_one_line(result, "worker process was ended", "mp.nproc")
    assert files(Path.cwd()) == before
