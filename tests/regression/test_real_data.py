"""The README's commands on real images, from refined models to a map.

The figures were measured once and are bounds that must not get worse.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cctbx import sgtbx
from dxtbx.model import Crystal
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory

from dials.command_line import generate_mask
from dials_diffuse.command_line import (
    diffuse_background,
    diffuse_export,
    diffuse_extract,
    diffuse_mask,
    diffuse_merge,
)
from dials_diffuse.io.background import BackgroundFile
from dials_diffuse.io.inputs import read_mask
from dials_diffuse.io.maps import read_map
from dials_diffuse.io.masks import MaskFile
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.observations import usable_rows

pytestmark = pytest.mark.regression

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def extract_and_merge(*args: str) -> dict:
    """Run both commands; returns the statistics of merging."""
    diffuse_extract.run([*map(str, args), "mp.nproc=2"])
    diffuse_merge.run(["extracted.expt", "extracted.refl"])
    assert Path("merged.png").stat().st_size > 10_000
    return json.loads(Path("dials.diffuse_merge.json").read_text())


def all_rows(columns: list[str]) -> dict[str, np.ndarray]:
    with ObservationFile("extracted.refl") as table:
        return table.read(0, table.n_rows, columns)


def photons_within(path: Path, low: float, high: float) -> int:
    """Upper bound of the photons: all trusted pixels of all images."""
    total = 0
    for experiment in ExperimentList.from_file(path):
        scan = experiment.scan
        images = range(*scan.get_array_range()) if scan else range(1)
        for i in images:
            for panel in experiment.imageset.get_raw_data(i - images[0]):
                values = panel.as_numpy_array()
                total += values[(values >= low) & (values <= high)].sum()
    return int(total)


@pytest.fixture(scope="module")
def snase_map(diffuse_data, tmp_path_factory):
    """The demonstration, run as the README says; returns its folder."""
    data = diffuse_data("snase_stills").parent
    out = tmp_path_factory.mktemp("demo")
    if shutil.which("dials.diffuse_extract") is None:
        pytest.skip("the commands are not on PATH")
    subprocess.run(["sh", ROOT / "demo" / "snase_stills.sh", data, out], check=True)
    return out


@pytest.mark.slow
def test_snase_stills_are_complete(snase_map):
    """At least 99 % of the unique voxels to 1/d = 0.6 are observed."""
    merged = read_map(snase_map / "merged.h5")
    grid = merged.grid
    possible = grid.asu_indices()
    possible = possible[grid.s(possible) <= 0.6]
    s = grid.s(merged["index"])
    n_seen = np.count_nonzero((s <= 0.6) & (s > 0))
    assert n_seen / len(possible) >= 0.99


@pytest.mark.slow
def test_snase_stills_show_structure(snase_map):
    """The anisotropic part of the map is reproducible between independent halves."""
    statistics = json.loads((snase_map / "dials.diffuse_merge.json").read_text())
    assert statistics["overall"]["cc_half"] > 0.97
    assert min(shell["cc_half"] for shell in statistics["shells"]) > 0.75
    log = (snase_map / "dials.diffuse_extract.log").read_text()
    assert "96 images in 96 blocks" in log
    assert re.search(r"Indexing settings of 96 crystals.*: 96 by h,k,l, 0 by", log)
    assert "Reindexed" not in log
    assert "Warning" not in log


@pytest.mark.slow
def test_snase_scales(snase_map):
    """The crystal in the beam varies by a factor of 2.5, smoothly within three parts."""
    found = json.loads((snase_map / "dials.diffuse_scale.json").read_text())
    scale = np.array(found["experiments"]["scale"])
    assert len(scale) == 96
    assert scale.max() / scale.min() == pytest.approx(2.48, abs=0.05)
    steps = np.sort(np.abs(np.diff(np.log(scale))))
    assert np.median(steps) < 0.02
    assert found["error_model"]["a"] == pytest.approx(1, abs=0.05)
    assert found["dropped"].keys() == {"absorption"}


def friedel_correlation(path: Path) -> tuple[float, int]:
    """CC of the anisotropic parts of the voxels h and -h, no symmetry applied.

    Voxels with 1/d from 0.15 to 0.6 1/Å, each less the mean of its shell of 0.01 1/Å;
    Bragg positions are left out.

    Returns:
        The correlation, and the number of pairs.
    """
    with ObservationFile(path) as table:
        grid, rows = table.grid, table.read(0, table.n_rows, list(table.columns))
    rows = usable_rows(rows)
    index, voxel = np.unique(rows["miller_index"], axis=0, return_inverse=True)
    factor = rows.get("inverse_scale_factor", 1.0)
    offset = rows.get("additive_offset", 0.0) * rows["normalisation"]
    photons = rows["counts"] - rows["background.sum.value"] - offset
    intensity = np.bincount(voxel, photons)
    intensity /= np.bincount(voxel, rows["normalisation"] * factor)
    s = grid.s(index.astype(np.int32))
    use = (s > 0.15) & (s < 0.6) & np.any(index % grid.ndiv, axis=1)
    index, intensity, shell = index[use], intensity[use], (s[use] / 0.01).astype(int)
    mean = np.bincount(shell, intensity) / np.maximum(np.bincount(shell), 1)
    part = dict(zip(map(tuple, index), intensity - mean[shell]))
    pairs = [
        (x, part[m]) for h, x in part.items() if (m := tuple(-i for i in h)) in part
    ]
    return float(np.corrcoef(np.array(pairs).T)[0, 1]), len(pairs) // 2


@pytest.mark.slow
def test_scaling_makes_friedel_mates_of_snase_agree(snase_map):
    before, n = friedel_correlation(snase_map / "extracted.refl")
    assert n > 150_000
    assert before < 0
    after, n = friedel_correlation(snase_map / "scaled.refl")
    assert n > 150_000
    assert after > 0.95
    log = (snase_map / "dials.diffuse_scale.log").read_text()
    for term in ("scale", "decay", "detector", "offset"):
        assert f"without {term}" in log


def c_star(crystal: Crystal) -> np.ndarray:
    return np.array(crystal.get_A()).reshape(3, 3)[:, 2]


@pytest.mark.slow
def test_snase_stills_in_two_settings_are_brought_into_one(
    in_tmp, diffuse_data, caplog
):
    """40 of the stills reindexed by k,h,-l: all come back, the four in doubt too."""
    folder = diffuse_data("snase_stills") / "processed"
    experiments = ExperimentListFactory.from_json_file(str(folder / "refined.expt"))
    other = np.random.default_rng(3).choice(96, 40, replace=False)
    originals = [c_star(e.crystal) for e in experiments]
    swap = sgtbx.change_of_basis_op("k,h,-l")
    for i in map(int, other):
        experiments[i].crystal = experiments[i].crystal.change_basis(swap)
    experiments.as_file("mixed.expt")
    statistics = {}
    for name in (folder / "refined.expt", "mixed.expt"):
        caplog.clear()
        result = extract_and_merge(name, "grid.d_min=2.5", "trusted_range=1,10000")
        statistics[str(name)] = result["overall"]
    assert "56 by h,k,l, 40 by h,-k,-l" in caplog.text
    assert "Reindexed 40 experiments to the setting of the others" in caplog.text
    extracted = ExperimentList.from_file("extracted.expt", check_format=False)
    # up to the fourfold axis, which keeps c*, all are as they were
    for found, crystal in zip(extracted, originals):
        np.testing.assert_allclose(c_star(found.crystal), crystal, atol=1e-9)
    one, mixed = statistics.values()
    assert mixed["cc_half"] == pytest.approx(one["cc_half"], abs=0.005)
    assert mixed["n_voxels"] == pytest.approx(one["n_voxels"], rel=0.001)


def test_snase_rotation(in_tmp, diffuse_data):
    folder = diffuse_data("snase_osc") / "processed"
    statistics = extract_and_merge(
        folder / "refined.expt",
        folder / "refined.refl",
        "grid.d_min=1.6",
        "trusted_range=1,10000",
    )
    rows = all_rows(["id", "counts", "num_pixels.valid", "xyzobs.px.value"])
    assert set(rows["id"]) == {0, 1, 2}
    assert rows["counts"].sum() < photons_within(folder / "refined.expt", 1, 10000)
    assert rows["counts"].sum() / rows["num_pixels.valid"].sum() > 300
    assert statistics["overall"]["completeness"] > 0.1


def test_l_cysteine(in_tmp, diffuse_data):
    """Four sweeps, two detector models, counts of mostly zero."""
    folder = diffuse_data("l_cysteine") / "processed"
    statistics = extract_and_merge(folder / "refined.expt", "grid.ndiv=4")
    rows = all_rows(["id", "counts", "num_pixels.valid", "normalisation"])
    assert set(rows["id"]) == {0, 1, 2, 3}
    mean = rows["counts"].sum() / rows["num_pixels.valid"].sum()
    assert 0.02 < mean < 0.09  # as the README of the data says
    assert np.all(rows["normalisation"] > 0)
    assert statistics["overall"]["n_obs"] > 1000


def test_thermolysin(in_tmp, diffuse_data):
    """XFEL stills of four crystals, 64 panels, a wavelength for each image."""
    folder = diffuse_data("thermolysin_cspad") / "processed"
    # four panels lie beyond the circle that the detector holds whole, at 2.08 A
    extract_and_merge(
        folder / "refined.expt", folder / "refined.refl", "grid.d_min=1.7"
    )
    rows = all_rows(["id", "panel", "num_pixels.valid"])
    assert set(rows["id"]) == {0, 1, 2, 3}
    assert len(set(rows["panel"])) == 64
    assert rows["num_pixels.valid"].sum() > 5_000_000


def test_thaumatin_stills(in_tmp, diffuse_data):
    folder = diffuse_data("thaumatin_stills") / "processed"
    extract_and_merge(folder / "refined.expt", folder / "refined.refl")
    rows = all_rows(["id", "counts", "num_pixels.valid", "d"])
    assert set(rows["id"]) == {0, 1, 2, 3}
    assert 1 < rows["counts"].sum() / rows["num_pixels.valid"].sum() < 8
    diffuse_export.run(["merged.h5", "format=ccp4+npz"])
    assert Path("merged.npz").is_file()


STILLS_PROCESS = """
spotfinder.filter.min_spot_size = 3
indexing {
  known_symmetry.space_group = P41212
  known_symmetry.unit_cell = 58.4,58.4,152.2,90,90,90
  refinement_protocol.mode = None
  stills.refine_all_candidates = False
}
dispatch.integrate = False
output.composite_output = True
"""


@pytest.mark.slow
def test_thaumatin_stills_from_images(in_tmp, dials_data_or_local):
    """DIALS' own programs before ours, on images of dials_data where it is installed."""
    images = [
        str(path)
        for path in dials_data_or_local("thaumatin_stills").images
        if path.name.startswith(("thau_3_2_0002", "thau_3_2_0005"))
    ]
    Path("index.phil").write_text(STILLS_PROCESS)
    for program in ("dials.stills_process", "dials.combine_experiments"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on PATH")
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["dials.stills_process", *images, "index.phil"], **quiet)
    indexed = [str(path) for path in sorted(Path().glob("idx*_[ri][en]*.[er]*"))]
    reference = [f"reference_from_experiment.{m}=0" for m in ("detector", "beam")]
    subprocess.run(["dials.combine_experiments", *indexed, *reference], **quiet)
    extract_and_merge("combined.expt", "combined.refl", "grid.d_min=2.5")
    assert set(all_rows(["id"])["id"]) == {0, 1}


def test_masks_of_dials_are_obeyed(in_tmp, diffuse_data):
    """A rectangle masked by dials.generate_mask takes its pixels out, and only those."""
    folder = diffuse_data("snase_stills")
    rectangle = (400, 500, 600, 650)
    generate_mask.run(
        [
            str(folder / "geometry.expt"),
            "untrusted.rectangle=%d,%d,%d,%d" % rectangle,
            "output.mask=box.mask",
        ]
    )
    one = ExperimentList.from_file(folder / "processed" / "refined.expt")[:1]
    one.as_file("one.expt")
    n_pixels = {}
    for mask in ("mask=None", "mask=box.mask"):
        diffuse_extract.run(["one.expt", "bragg.exclusion=none", "grid.d_min=2", mask])
        n_pixels[mask] = all_rows(["num_pixels.valid"])["num_pixels.valid"].sum()
    assert n_pixels["mask=None"] - n_pixels["mask=box.mask"] == 100 * 50


@pytest.mark.slow
def test_beamstop_of_snase_is_found(in_tmp, diffuse_data):
    """Its shadow is at x 505 to 560, y 470 to 520, and the mask takes it out."""
    expt = diffuse_data("snase_stills") / "processed" / "refined.expt"
    ExperimentList.from_file(expt)[::8].as_file("some.expt")
    diffuse_mask.run(["some.expt", "trusted_range=1,10000", "mp.nproc=2", "html=None"])
    with MaskFile("diffuse_mask.h5") as handle:
        (beamstop,) = handle.layer("beamstop")
        (good,) = handle.good()
    y, x = np.nonzero(beamstop)
    assert 500 < np.count_nonzero(beamstop) < 55 * 50
    assert 505 <= x.min() < x.max() <= 560
    assert 470 <= y.min() < y.max() <= 520
    assert beamstop[490, 533]
    np.testing.assert_array_equal(read_mask("diffuse.mask")[0], good)
    n_pixels = {}
    for mask in ("mask=None", "mask=diffuse.mask", "mask=diffuse_mask.h5"):
        options = ["trusted_range=1,10000", "grid.d_min=3", "indexing.consistent=none"]
        diffuse_extract.run(["some.expt", "mp.nproc=2", mask, *options])
        n_pixels[mask] = all_rows(["num_pixels.valid"])["num_pixels.valid"].sum()
    assert n_pixels["mask=diffuse_mask.h5"] == n_pixels["mask=diffuse.mask"]
    assert n_pixels["mask=diffuse.mask"] < n_pixels["mask=None"]


def test_single_images_in_detector_units_have_no_beamstop(in_tmp, diffuse_data, caplog):
    """One image for each detector, with an offset in each panel: darkness says nothing."""
    folder = diffuse_data("thermolysin_cspad") / "processed"
    ExperimentList.from_file(folder / "refined.expt")[1:2].as_file("one.expt")
    diffuse_mask.run(["one.expt", "html=None", "plots=None", "pixels.find=None"])
    assert "The shadow of a beam stop is not looked for" in caplog.text
    with MaskFile("diffuse_mask.h5") as handle:
        assert not any(panel.any() for panel in handle.layer("beamstop"))


@pytest.mark.slow
def test_background_of_thaumatin(in_tmp, diffuse_data):
    """The blank of the grid scan takes off part of the counts, radial nearly all.

    Beyond 4 Å, where the direct beam's scatter behind the crystal does not matter, the
    blank has less than the images with crystal in every shell.
    """
    folder = diffuse_data("thaumatin_stills")
    expt = str(folder / "processed" / "refined.expt")
    blank = folder / "images" / "thau_3_2_0017.cbf.bz2"
    ExperimentListFactory.from_filenames([str(blank)]).as_file("blank.expt")
    left = {}
    for method in ("images", "radial"):
        options = ["images.experiments=blank.expt"] if method == "images" else []
        diffuse_background.run([expt, f"method={method}", "mp.nproc=2", *options])
        record = json.loads(Path("dials.diffuse_background.json").read_text())
        with BackgroundFile("diffuse_background.h5") as handle:
            assert len(handle.images) == 4
        shells = [x for x in record["sample"]["shells"] if x["s"] > 0.1]
        left[method] = np.array([x["residual"] / x["measured"] for x in shells])
        diffuse_extract.run(
            [expt, "background=diffuse_background.h5", "grid.d_min=2.5", "mp.nproc=2"]
            + ["indexing.consistent=none"]
        )
        rows = all_rows(["counts", "background.sum.value"])
        share = rows["background.sum.value"].sum() / rows["counts"].sum()
        assert (0.2 < share < 0.9) if method == "images" else (0.9 < share < 1.1)
    assert left["images"].min() > 0.05
    assert abs(left["radial"]).max() < 0.1
