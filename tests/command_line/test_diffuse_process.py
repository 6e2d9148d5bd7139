"""The command on simulated images with stand-ins for DIALS' programs, on images without
spots with the programs themselves, and on real images."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
from pathlib import Path

import h5py
import numpy as np
import pytest
from simulate_images import count_images, import_images, make_crystal, write_images

from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList
from libtbx.utils import Sorry

from dials.array_family import flex
from dials_diffuse.command_line import (
    diffuse_extract,
    diffuse_process,
    diffuse_simulate,
)
from dials_diffuse.io.background import BackgroundFile
from dials_diffuse.io.inputs import read_mask, write_mask
from dials_diffuse.io.maps import read_map
from dials_diffuse.io.masks import DetectorMask, MaskFile, write_masks
from dials_diffuse.io.observations import ObservationFile

EXTRACT = ["extract.grid.d_min=2.0", "extract.bragg.exclusion=none", "mp.nproc=1"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rotation_images(tmp_path, width: float = 0.5, prefix: str = "image") -> list[str]:
    paths = write_images(tmp_path, count_images(4), width, prefix=prefix)
    return [str(path) for path in paths]


def reflections(experiments: ExperimentList, n: int = 20) -> flex.reflection_table:
    """Reflections with random positions, so that they fit no crystal."""
    rng = np.random.default_rng(3)
    table = flex.reflection_table()
    table["id"] = flex.int(n, 0)
    table["panel"] = flex.size_t(n, 0)
    table["miller_index"] = flex.miller_index(n, (1, 2, 3))
    for name in ("xyzobs.px.value", "xyzcal.px"):
        positions = rng.uniform(0, (60, 50, 4), (n, 3))
        table[name] = flumpy.vec_from_numpy(positions).deep_copy()
    table["flags"] = flex.size_t(n, 0)
    for flag in (table.flags.indexed, table.flags.used_in_refinement):
        table.set_flags(flex.bool(n, True), flag)
    table.experiment_identifiers()[0] = experiments[0].identifier
    return table


@pytest.fixture
def fake_dials(tmp_path, monkeypatch):
    """Programs that copy prepared results, and note their arguments in NAME.args."""
    prepared, programs = tmp_path / "prepared", tmp_path / "bin"
    for folder in (prepared, programs):
        folder.mkdir()
    images = rotation_images(tmp_path)
    experiments = import_images([Path(p) for p in images], lambda i: make_crystal())
    table = reflections(experiments)
    for name, outputs in (
        ("import", ["imported.expt"]),
        ("find_spots", ["strong.refl"]),
        ("index", ["indexed.expt", "indexed.refl"]),
        ("refine", ["refined.expt", "refined.refl"]),
    ):
        for output in outputs:
            is_list = output.endswith(".expt")
            (experiments if is_list else table).as_file(str(prepared / output))
        files = " ".join(str(prepared / output) for output in outputs)
        script = programs / f"dials.{name}"
        script.write_text(
            f'#!/bin/sh\necho "$@" >dials.{name}.args\necho ok >dials.{name}.log\n'
            f"cp {files} .\n"
        )
        script.chmod(0o755)
    monkeypatch.setattr(diffuse_process, "find_program", str)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(
        "dials_diffuse.process.programs.find_program",
        lambda name: str(programs / name),
    )
    return images


def test_from_images_to_the_page(fake_dials, tmp_path):
    diffuse_process.run(
        [*fake_dials, "output.directory=out", "merge.n_shells=3", *EXTRACT]
        + ['index.options="fft3d.reciprocal_space_grid.n_points=64"']
    )
    assert os.getcwd() == str(tmp_path)
    out = tmp_path / "out"
    arguments = (out / "dials.index.args").read_text().split()
    assert arguments[:2] == ["imported.expt", "strong.refl"]
    assert arguments[-1] == "fft3d.reciprocal_space_grid.n_points=64"

    record = json.loads((out / "diffuse.json").read_text())
    assert record["mode"] == "rotation"
    assert record["reason"] == "4 images of 0.5 degrees in 1 sweep"
    assert record["n_images"] == 4
    names = ["import", "find_spots", "index", "refine"]
    names += [f"diffuse_{name}" for name in ("mask", "extract", "scale", "merge")]
    names = [f"dials.{name}" for name in names]
    assert [stage["name"] for stage in record["stages"]] == names
    assert {stage["state"] for stage in record["stages"]} == {"done"}
    assert record["spots"]["n_found"] == record["spots"]["n_indexed"] == 20
    assert record["refinement"]["n_reflections"] == 20
    assert len(record["merging"]["shells"]) == 3
    assert record["error"] is None
    (mask,) = record["mask"]
    assert mask["n_pixels"] == 3000
    assert mask["n_masked"] == np.count_nonzero(
        ~read_mask(str(out / "diffuse.mask"))[0]
    )
    assert record["background"] is record["indexing"] is None
    assert record["geometry"]["n_spots"] == 20
    assert record["geometry"]["n_images_beyond"] == record["geometry"]["n_images"]
    assert any("do not describe these images" in w for w in record["warnings"])

    page = (out / "diffuse.html").read_text()
    assert "4 images of 0.5 degrees in 1 sweep" in page
    assert "do not describe these images" in page
    assert page.count("data:image/") == 3
    log = (out / "dials.diffuse_process.log").read_text()
    assert "Rotation: 4 images of 0.5 degrees in 1 sweep" in log
    assert "Completeness to 2.0" in log


def test_our_stages_are_those_of_the_commands(fake_dials, tmp_path):
    """The recorded command line of extraction gives the same observations."""
    options = ["extract.grid.ndiv=3", 'extract.trusted_range="0 5"']
    diffuse_process.run([*fake_dials, *EXTRACT, *options])
    record = json.loads(Path("diffuse.json").read_text())
    (stage,) = (s for s in record["stages"] if s["name"] == "dials.diffuse_extract")
    diffuse_extract.run(
        ["refined.expt", "grid.d_min=2.0", "grid.ndiv=3", "bragg.exclusion=none"]
        + ["trusted_range=0,5", "output.reflections=other.refl"]
        + ["output.experiments=other.expt", "mp.nproc=1"]
    )
    assert "grid.ndiv=3" in stage["command"]
    with ObservationFile("extracted.refl") as a, ObservationFile("other.refl") as b:
        assert a.n_rows == b.n_rows == record["extraction"]["n_observations"]
        for name in a.columns:
            columns = [x.read(0, x.n_rows, [name])[name] for x in (a, b)]
            np.testing.assert_array_equal(*columns)
        counts = a.read(0, a.n_rows, ["counts", "num_pixels.valid"])
    assert record["extraction"]["photons"] == counts["counts"].sum()
    assert record["extraction"]["n_pixels"] == counts["num_pixels.valid"].sum()
    merged = read_map("merged.h5")
    s = merged.grid.s(merged["index"])
    n_voxels = np.count_nonzero(merged.grid.in_resolution_range(s))
    assert n_voxels == record["merging"]["overall"]["n_voxels"]


@pytest.mark.slow
def test_mask_is_used_for_spots_and_extraction(fake_dials):
    """Its masked half makes half of the pixels."""
    mask = flex.bool(flex.grid(50, 60), True)
    for i in range(25):
        for j in range(60):
            mask[i, j] = False
    with open("half.mask", "wb") as handle:
        pickle.dump((mask,), handle)
    n_pixels = {}
    for name in ("mask", "no_mask"):
        args = ["input.mask=half.mask"] if name == "mask" else []
        diffuse_process.run([*fake_dials, f"output.directory={name}", *args, *EXTRACT])
        record = json.loads((Path(name) / "diffuse.json").read_text())
        n_pixels[name] = record["extraction"]["n_pixels"]
        arguments = (Path(name) / "dials.find_spots.args").read_text()
        assert ("half.mask" in arguments) == (name == "mask")
    assert 0.3 < n_pixels["mask"] / n_pixels["no_mask"] < 0.7


def command_of(name: str, folder: str = ".") -> list[str]:
    """The recorded arguments of a stage, none if it was not run."""
    record = json.loads((Path(folder) / "diffuse.json").read_text())
    commands = [s["command"] for s in record["stages"] if s["name"] == name]
    return shlex.split(commands[0])[1:] if commands else []


@pytest.mark.slow
def test_all_masks_go_into_one(fake_dials):
    """A file, a rectangle of two parameters and the resolution: each has its layer."""
    good = np.ones((50, 60), dtype=bool)
    good[:10] = False
    write_mask("rows.mask", [good])
    diffuse_process.run(
        [*fake_dials, *EXTRACT, "output.directory=out", "input.mask=rows.mask"]
        + ["mask.untrusted.rectangle=0,4,20,30", "mask.d_min=2.5"]
        + ["mask.pixels.find=None", "extract.trusted_range=0,1000"]
    )
    with MaskFile("out/diffuse_mask.h5") as handle:
        assert np.count_nonzero(handle.layer("file")[0]) == 10 * 60
        shapes = np.zeros_like(good)
        shapes[20:30, :4] = True
        np.testing.assert_array_equal(handle.layer("shapes")[0], shapes)
        assert handle.layer("resolution")[0].any()
        (total,) = handle.good()
    arguments = command_of("dials.diffuse_mask", "out")
    assert "trusted_range=0 1000" in arguments
    assert arguments[-1] == "untrusted.phil"
    assert "mask=diffuse_mask.h5" in command_of("dials.diffuse_extract", "out")

    # the same pixels as by the mask alone
    diffuse_process.run(
        [
            *fake_dials,
            *EXTRACT,
            "output.directory=b",
            "extract.mask=out/diffuse_mask.h5",
        ]
        + ["extract.trusted_range=0,1000"]
    )
    assert command_of("dials.diffuse_mask", "b") == []
    records = [json.loads(Path(d, "diffuse.json").read_text()) for d in ("out", "b")]
    assert records[1]["mask"] is None
    a, b = (record["extraction"]["n_pixels"] for record in records)
    assert a == b > 0
    assert np.count_nonzero(total) < 0.9 * good.size


def test_without_a_mask(fake_dials):
    diffuse_process.run([*fake_dials, *EXTRACT, "mask.make=False"])
    assert not Path("diffuse_mask.h5").exists()
    assert not any("mask" in a for a in command_of("dials.diffuse_extract"))


def test_radial_background(fake_dials):
    """It is taken off with the corrections of the extraction, and shown."""
    diffuse_process.run(
        [
            *fake_dials,
            *EXTRACT,
            "background.method=radial",
            "background.radial.step=0.05",
        ]
        + ["extract.corrections.path=helium"]
    )
    arguments = command_of("dials.diffuse_background")
    assert {"method=radial", "mask=diffuse_mask.h5"} < set(arguments)
    assert any(argument.startswith("corrections.path=") for argument in arguments)
    assert "background=diffuse_background.h5" in command_of("dials.diffuse_extract")
    record = json.loads(Path("diffuse.json").read_text())
    assert record["background"]["method"] == "radial"
    # the images have no structure on average: nothing is left
    shells = record["background"]["sample"]["shells"]
    left = sum(x["residual"] * x["n_pixels"] for x in shells)
    assert abs(left) < 0.1 * sum(x["measured"] * x["n_pixels"] for x in shells)
    statistics = record["merging"]["overall"]
    assert abs(statistics["mean_intensity"]) > 0
    assert "the isotropic part" in Path("diffuse.html").read_text()


def test_mask_in_layers_reaches_the_background(fake_dials, tmp_path):
    """A mask of the user's, by the extraction's parameter; profiles end before it."""
    (identifier,) = {
        e.identifier
        for e in ExperimentList.from_file("prepared/refined.expt", check_format=False)
    }
    layer = np.zeros((50, 60), dtype=bool)
    layer[:, 30:] = True
    write_masks("given.h5", [DetectorMask([identifier], {"half": [layer]})])
    diffuse_process.run(
        [*fake_dials, *EXTRACT, "extract.mask=given.h5", "output.directory=out"]
        + ["background.method=radial", "background.radial.step=0.05"]
        + ["background.bragg.exclusion=none"]
    )
    given = f"mask={tmp_path / 'given.h5'}"
    assert given in command_of("dials.diffuse_background", "out")
    record = json.loads(Path("out/diffuse.json").read_text())
    shells = record["background"]["sample"]["shells"]
    assert 0.8 * 1500 < sum(shell["n_pixels"] for shell in shells) <= 1500


@pytest.mark.slow
def test_blank_images_are_taken_for_the_background(fake_dials, tmp_path):
    blanks = import_images(
        [Path(p) for p in rotation_images(tmp_path, prefix="blank")], lambda i: None
    )
    blanks.as_file("blank.expt")
    diffuse_process.run(
        [*fake_dials, *EXTRACT, "background.images.experiments=blank.expt"]
        + ["output.directory=out"]
    )
    arguments = command_of("dials.diffuse_background", "out")
    assert f"images.experiments={tmp_path / 'blank.expt'}" in arguments
    with BackgroundFile("out/diffuse_background.h5") as handle:
        assert handle.method == "images"
        assert handle.n_bases > 0


@pytest.mark.slow
def test_imported_experiments(fake_dials, tmp_path):
    expt = tmp_path / "prepared" / "imported.expt"
    diffuse_process.run([str(expt), "output.directory=out", *EXTRACT])
    arguments = (tmp_path / "out" / "dials.find_spots.args").read_text().split()
    assert arguments[0] == str(expt)
    assert not (tmp_path / "out" / "dials.import.args").exists()


def test_mask_of_another_detector(fake_dials, tmp_path):
    """Noticed before spots are looked for, which would fail without saying why."""
    write_mask("other.mask", [np.ones((60, 50), dtype=bool)])
    with pytest.raises(Sorry, match="other.mask"):
        diffuse_process.run([*fake_dials, *EXTRACT, "input.mask=other.mask"])
    assert not (tmp_path / "dials.find_spots.args").exists()


def test_a_failing_program_stops_the_run(fake_dials, tmp_path):
    script = tmp_path / "bin" / "dials.index"
    script.write_text("#!/bin/sh\necho 'no lattice' | tee dials.index.log\nexit 1\n")
    expected = r"dials.index failed \(exit status 1, log dials.index.log\): no lattice"
    with pytest.raises(Sorry, match=f"^{expected}$"):
        diffuse_process.run([*fake_dials, *EXTRACT])
    record = json.loads(Path("diffuse.json").read_text())
    assert re.fullmatch(expected, record["error"])
    assert [s["state"] for s in record["stages"]] == ["done", "done", "failed"]
    assert record["spots"]["n_found"] == 20
    assert record["spots"]["n_indexed"] == 0
    assert "no lattice" in Path("diffuse.html").read_text()
    assert Path("strong.refl").is_file()
    assert not Path("refined.expt").exists()


def test_missing_program_is_noticed_before_anything_is_run(tmp_path, monkeypatch):
    images = rotation_images(tmp_path)

    def find(name):
        if name == "dials.refine":
            raise ValueError("dials.refine is not found")

    monkeypatch.setattr(diffuse_process, "find_program", find)
    with pytest.raises(Sorry, match="dials.refine is not found"):
        diffuse_process.run(images)
    assert not Path("imported.expt").exists()


def test_mixed_images(tmp_path):
    images = rotation_images(tmp_path)
    images += rotation_images(tmp_path, width=0, prefix="still")
    expected = r"of two kinds: 4 of rotation data \(as .*0001.cbf\) and 4 still\(s\)"
    with pytest.raises(Sorry, match=expected):
        diffuse_process.run(images)


def test_stills_are_no_rotation_data_even_if_mode_says_so(fake_dials, tmp_path):
    images = rotation_images(tmp_path, width=0, prefix="still")
    stills = import_images([Path(p) for p in images], lambda i: None)
    stills.as_file(str(tmp_path / "prepared" / "imported.expt"))
    with pytest.raises(Sorry, match="mode=rotation, but 4 image.* have no rotation"):
        diffuse_process.run([*images, "mode=rotation"])


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "Please give image files"),
        (["none.cbf"], "none.cbf does not exist"),
        (["qqq=1"], "Unknown command line parameter"),
        (["mode=laue"], "Not a possible choice for mode: laue"),
        (["extract.grid.ndiv=0"], "ndiv"),
        (["extract.bragg.semi_axes=1,2"], "semi_axes"),
        (["input.mask=image_0001.cbf"], "Cannot read the mask"),
        (["merge.output.map=None"], "merge.output.map"),
        (["mask.mask=none.mask"], "Cannot read the mask .*none.mask"),
        (["mask.output.layers=None"], "mask.output.layers"),
        (["mask.untrusted.polygon=1,2,3"], "untrusted.polygon=1,2,3"),
        (["mask.trusted_range=5,1"], "trusted_range needs the smaller value first"),
        (["background.method=images"], "needs images without the crystal"),
        (["background.images.experiments=no.expt"], "no.expt does not exist"),
        (["background.method=radial", "background.radial.step=9"], "step"),
        (["background.method=radial", "extract.background=b.h5"], "b.h5 is a back"),
        (["output.directory=image_0001.cbf"], "output.directory=image_0001.cbf"),
        (["integrate=True"], "integrate=True is for rotation data, not stills"),
    ],
)
def test_wrong_arguments_are_noticed_before_anything_is_run(tmp_path, args, message):
    images = rotation_images(tmp_path, width=0) if args else []
    with pytest.raises(Sorry, match=message):
        diffuse_process.run([*images, *args])
    assert not Path("imported.expt").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["truth=merged.h5"], "merged.h5 .*truth"),
        (["truth=truth.h5"], "has 3,3,3 voxels per reciprocal cell.*2,2,2"),
        (
            ["truth=truth.h5", "extract.grid.ndiv=3", "space_group=P4"],
            "space_group=P 4 has the Laue group P 4/m, .*truth.h5 P m m m",
        ),
    ],
)
def test_truth_of_another_crystal_is_noticed_before_anything_is_run(args, message):
    diffuse_simulate.run(
        [
            "detector.preset=given",
            "detector.size=40,40",
            "detector.pixel=1",
            "n_images=1",
            "grid.ndiv=3",
            "crystal.unit_cell=15,18,21,90,90,90",
            "background.compton=False",
            "mp.nproc=1",
        ]
    )
    with h5py.File("merged.h5", "w") as f:
        f["x"] = 1
    with pytest.raises(Sorry, match=message):
        diffuse_process.run(["sim_1_00001.cbf", *args])
    assert not Path("imported.expt").exists()


@pytest.mark.slow
def test_images_without_spots(tmp_path):
    """DIALS' own programs: the one that fails, its log and its reason are named.

    In DIALS 3.12 that is dials.index, in 3.30 dials.find_spots.
    """
    images = rotation_images(tmp_path)
    with pytest.raises(Sorry, match=r"^dials.\w+ .*log .*No reflections") as e:
        diffuse_process.run([*images, "output.directory=out", "mp.nproc=1"])
    record = json.loads((tmp_path / "out" / "diffuse.json").read_text())
    assert record["stages"][0]["state"] == "done"
    assert record["stages"][-1]["state"] == "failed"
    log = re.search(r"log ([\w.]+)\)", str(e.value))[1]
    assert (tmp_path / "out" / log).is_file()
    assert (tmp_path / "out" / "imported.expt").is_file()


@pytest.mark.slow
def test_stills_without_lattice(tmp_path):
    images = rotation_images(tmp_path, width=0)
    expected = r"indexed none of the images \(log dials.process.log\): \w+"
    with pytest.raises(Sorry, match=f"^dials.stills_process {expected}"):
        diffuse_process.run([*images, "output.directory=out", "mp.nproc=1"])
    record = json.loads((tmp_path / "out" / "diffuse.json").read_text())
    assert record["reason"] == "angle increment 0 in all 4 headers"


def run_on(images: list[Path], *args: str) -> dict:
    diffuse_process.run([*map(str, images), "mp.nproc=2", *args])
    for name in ("diffuse.html", "merged.h5", "merged.png"):
        assert Path(name).stat().st_size > 10_000
    return json.loads(Path("diffuse.json").read_text())


@pytest.mark.regression
@pytest.mark.slow
def test_l_cysteine(diffuse_data):
    """One sweep; the cell is that of the whole data set."""
    folder = diffuse_data("l_cysteine") / "images"
    record = run_on(
        sorted(folder.glob("l-cyst_01*")),
        "unit_cell=5.475,8.211,12.158,90,90,90",
        "space_group=P212121",
        'refine.options="scan_varying=False"',
    )
    assert record["reason"] == "15 images of 0.1 degrees in 1 sweep"
    assert 50 <= record["spots"]["n_found"] <= 60
    assert record["spots"]["n_indexed"] >= 40
    cell = record["crystal"]["unit_cell"]
    assert cell == pytest.approx([5.475, 8.211, 12.158, 90, 90, 90], rel=0.02)
    assert record["refinement"]["rmsd_x_px"] < 1.5
    assert record["merging"]["overall"]["n_voxels"] > 10


SNASE = [
    "unit_cell=48.45,48.45,63.4,90,90,90",
    "space_group=P41",
    'stills_process.options="filter.min_spot_size=3 spotfinder.filter.d_min=2 '
    'spotfinder.filter.d_max=40 threshold.algorithm=radial_profile"',
    "extract.grid.d_min=2.5",
    "extract.trusted_range=1,10000",
]


@pytest.mark.regression
@pytest.mark.slow
def test_snase_stills(diffuse_data):
    folder = diffuse_data("snase_stills")
    record = run_on(
        sorted((folder / "images").iterdir())[::10],
        f"input.reference_geometry={folder / 'geometry.expt'}",
        *SNASE,
    )
    assert record["reason"] == "angle increment 0 in all 10 headers"
    assert record["spots"]["n_images_indexed"] == 10
    assert record["spots"]["fraction_indexed"] > 0.9
    assert record["refinement"]["rmsd_x_px"] < 0.45
    assert record["refinement"]["rmsd_y_px"] < 0.7
    cell = record["crystal"]["unit_cell"]
    assert cell == pytest.approx([48.45, 48.45, 63.4, 90, 90, 90], rel=0.005)
    # each still has its own image, and they share one detector
    experiments = ExperimentList.from_file("refined.expt", check_format=False)
    assert len({e.imageset.get_path(0) for e in experiments}) == 10
    assert len(experiments.detectors()) == 1


@pytest.mark.regression
@pytest.mark.slow
def test_stills_that_were_imported_as_sequences(diffuse_data, tmp_path):
    """Without convert_sequences_to_stills all share one image sequence."""
    folder = diffuse_data("snase_stills") / "images"
    images = sorted(folder.iterdir())[:21:10]
    import_images(images, lambda i: None).as_file("sequences.expt")
    diffuse_process.run(["sequences.expt", "output.directory=a", *SNASE])
    diffuse_process.run([*map(str, images), "output.directory=b", *SNASE])
    a, b = (json.loads(Path(d, "diffuse.json").read_text()) for d in "ab")
    assert a["mode"] == b["mode"] == "stills"
    assert a["spots"] == b["spots"]
    assert a["spots"]["n_found"] > 500
