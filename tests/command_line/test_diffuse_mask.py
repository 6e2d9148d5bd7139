from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory
from libtbx.utils import Sorry

from dials.command_line import apply_mask
from dials_diffuse.command_line import diffuse_extract, diffuse_mask, diffuse_simulate
from dials_diffuse.extraction.tables import lookup_mask
from dials_diffuse.io.inputs import read_mask, write_mask
from dials_diffuse.io.masks import MaskFile, read_masks
from dials_diffuse.io.truth import TruthFile

SIMULATION = """
    mode=stills n_images=20 mp.nproc=1 grid.d_min=3 detector.preset=given
    detector.size=120,110 detector.pixel=0.5 detector.distance=60 detector.modules=1,2
    detector.gap=0,4 detector.beamstop=5 detector.beamstop_arm=2 background.air=1e2 beam.flux=1e9
    detector.hot_fraction=0.002 detector.dead_fraction=0.002 scale.variation=0.35
    crystal.unit_cell=20,21,22,90,90,90
""".split()
OUTPUT = [
    "diffuse.mask",
    "diffuse_mask.h5",
    "diffuse_mask_total.png",
    "diffuse_mask_beamstop.png",
    "diffuse_mask_bragg.png",
    "dials.diffuse_mask.html",
    "dials.diffuse_mask.json",
    "dials.diffuse_mask.log",
]
QUIET = ["html=None", "plots=None", "mp.nproc=1"]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        diffuse_simulate.run(SIMULATION)
    return folder


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_mask(simulated):
    diffuse_mask.run([str(simulated / "simulated.expt"), "mp.nproc=1"])
    assert all(Path(name).stat().st_size > 500 for name in OUTPUT)
    (good,) = read_mask("diffuse.mask")
    np.testing.assert_array_equal(read_masks("diffuse_mask.h5")[0][0], good)

    # gaps and beam stop of the simulation, and its faulty pixels
    (truth,) = read_mask(str(simulated / "simulated.mask"))
    assert np.count_nonzero(~truth & ~good) >= 0.97 * np.count_nonzero(~truth)
    with TruthFile(simulated / "truth.h5") as handle:
        (defects,) = handle.defects()
    for name in ("hot", "dead"):
        assert np.count_nonzero(~good.ravel()[defects[name]]) >= len(defects[name]) - 1
    faulty = np.concatenate([defects[x] for x in ("hot", "dead", "flickering")])
    sound = truth.copy()
    sound.ravel()[faulty] = False
    with MaskFile("diffuse_mask.h5") as handle:
        identifiers = ExperimentList.from_file(
            str(simulated / "simulated.expt"), check_format=False
        ).identifiers()
        assert handle.identifiers == [list(identifiers)]
        for name in ("hot", "dead", "flickering", "unstable"):
            assert np.count_nonzero(handle.layer(name)[0] & sound) <= 1

    (detector,) = json.loads(Path(OUTPUT[-2]).read_text())["detectors"]
    assert detector["n_masked"] == np.count_nonzero(~good)
    log = Path("dials.diffuse_mask.log").read_text()
    assert "20 images of 20 experiments, 13200 pixels in 1 panel(s)" in log
    (bragg,) = detector["image_layers"]
    with MaskFile("diffuse_mask.h5") as handle:
        layer = handle.image_layer("bragg")
    assert bragg["n_pixels"] == np.count_nonzero(layer.panels[0]) > 100
    assert bragg["n_together"] == np.count_nonzero(layer.panels[0] | ~good)
    assert "not in the mask: dials.diffuse_extract leaves out of each image" in log
    page = Path("dials.diffuse_mask.html").read_text()
    assert "Bragg positions in one image" in page
    assert f"<td>{detector['n_masked']}</td>" in page
    assert page.count("data:image/png") == len(list(Path(".").glob("*.png")))


def test_without_crystals_there_is_no_bragg_layer(simulated):
    experiments = ExperimentList.from_file(
        str(simulated / "simulated.expt"), check_format=False
    )
    for experiment in experiments:
        experiment.crystal = None
    experiments.as_file("bare.expt")
    diffuse_mask.run(["bare.expt", "plots=None", "mp.nproc=1"])
    reason = "no experiment has a crystal"
    assert reason in Path("dials.diffuse_mask.log").read_text()
    assert "the experiments have no crystal" in Path(OUTPUT[-3]).read_text()
    with MaskFile("diffuse_mask.h5") as handle:
        assert handle.image_layer_names() == []


def test_warnings_of_the_log_are_in_the_page(simulated):
    diffuse_mask.run(
        [str(simulated / "simulated.expt"), "pixels.max_images=2", "mp.nproc=1"]
    )
    warning = "cannot be told from Bragg peaks in fewer than 3 images"
    for name in ("dials.diffuse_mask.log", "dials.diffuse_mask.html"):
        assert warning in Path(name).read_text()


def test_mask_is_read_by_dials_and_by_extraction(simulated, caplog):
    expt = str(simulated / "simulated.expt")
    diffuse_mask.run([expt, *QUIET])
    (good,) = read_mask("diffuse.mask")
    # of stills, each has an image set of its own
    masks = []
    for i in range(20):
        shutil.copy("diffuse.mask", f"{i}.mask")
        masks.append(f"mask={i}.mask")
    apply_mask.run([expt, *masks, "output.experiments=masked.expt"])
    masked = ExperimentListFactory.from_json_file("masked.expt")
    np.testing.assert_array_equal(lookup_mask(masked[0].imageset)[0], good)
    diffuse_extract.run([expt, "mask=diffuse.mask", "grid.d_min=4", "mp.nproc=1"])
    assert Path("extracted.refl").is_file()
    # and by this command itself: all of it is masked by a file now
    diffuse_mask.run(
        [expt, "mask=diffuse.mask", "output.layers=2.h5", "output.mask=2.mask", *QUIET]
    )
    with MaskFile("2.h5") as handle:
        np.testing.assert_array_equal(handle.layer("file")[0], ~good)


def test_result_does_not_depend_on_processes(simulated):
    expt = str(simulated / "simulated.expt")
    for nproc in (1, 2):
        options = ["html=None", "plots=None", f"output.mask={nproc}.mask"]
        diffuse_mask.run([expt, f"mp.nproc={nproc}", *options])
    assert Path("1.mask").read_bytes() == Path("2.mask").read_bytes()


@pytest.mark.slow
def test_one_mask_for_each_detector(simulated):
    experiments = ExperimentListFactory.from_json_file(
        str(simulated / "simulated.expt")
    )
    detector = experiments[0].detector
    moved = type(detector).from_dict(detector.to_dict())
    axes = moved[0].get_fast_axis(), moved[0].get_slow_axis()
    moved[0].set_frame(*axes, (-30, 27, -70))
    for i in range(10, 20):
        experiments[i].detector = moved
    experiments.as_file("two.expt")
    diffuse_mask.run(["two.expt", "html=None", "mp.nproc=1", "untrusted.circle=9,9,4"])
    assert Path("diffuse_2.mask").is_file()
    assert Path("diffuse_mask_2_total.png").is_file()
    assert not read_mask("diffuse_2.mask")[0][9, 9]
    with MaskFile("diffuse_mask.h5") as handle:
        assert [len(names) for names in handle.identifiers] == [10, 10]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Please give an experiment list"),
        (["no.expt"], "no.expt does not exist"),
        (["{expt}", "mask=no.mask"], "Cannot read the mask no.mask"),
        (["{expt}", "sample.experiment=20"], "the first is 0"),
        (["{expt}", "mask=small.mask"], "make one for this detector"),
        (["{expt}", "output.mask=None"], "must be names"),
        (["{expt}", "output.json=diffuse.mask"], "is in use"),
        (["{expt}", "output.json=no/x.json"], "there is no folder"),
        (["{expt}", "untrusted.rectangle=0,120,0,110"], "No pixel is left"),
        (["{expt}", "untrusted.panel=3"], "has the panels 0 to 0"),
        (["{expt}", "untrusted.polygon=1,2,3"], "four corners"),
        (["{expt}", "trusted_range=3,1"], "smaller value first"),
        (["{expt}", "beamstop.transmission=2"], "transmission"),
    ],
)
def test_bad_input_is_answered_in_one_line(simulated, arguments, message):
    write_mask("small.mask", [np.ones((3, 3), dtype=bool)])
    arguments = [x.format(expt=simulated / "simulated.expt") for x in arguments]
    with pytest.raises(Sorry, match=message) as error:
        diffuse_mask.run([*arguments, *QUIET])
    assert "\n" not in str(error.value)
    assert not Path("diffuse_mask.h5").exists()


def test_exit_status(simulated):
    command = [sys.executable, "-m", "dials_diffuse.command_line.diffuse_mask"]
    bad = subprocess.run([*command, "no.expt"], capture_output=True, text=True)
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr


def test_damaged_image(simulated):
    shutil.copytree(simulated, "copy")
    images = sorted(Path("copy").glob("sim_*.cbf"))
    expt = Path("copy/simulated.expt")
    expt.write_text(
        expt.read_text().replace(str(simulated), str(Path("copy").resolve()))
    )
    images[7].write_bytes(images[7].read_bytes()[:2000])
    with pytest.raises(Sorry, match=images[7].name):
        diffuse_mask.run([str(expt), *QUIET])
    assert not Path("diffuse.mask").exists()
