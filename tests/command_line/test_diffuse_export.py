from __future__ import annotations

import re
from pathlib import Path

import gemmi
import numpy as np
import pytest
from simulate_images import count_images, import_images, write_images
from truth_ladder import SMALL, extraction_settings, vary

from dxtbx import flumpy
from libtbx.utils import Sorry

from dials.array_family import flex
from dials.command_line import merge as dials_merge
from dials.command_line import scale as dials_scale
from dials.command_line import show as dials_show
from dials_diffuse.command_line import diffuse_export, diffuse_merge
from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import BOXES, MapFile
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.simulate import Simulation, series_scales
from dials_diffuse.simulation.simulate import write_images as write_simulated
from dials_diffuse.simulation.truth import true_map

EXTRACTED = ("extracted.expt", "extracted.refl")
GRID = Grid((9.1, 9.1, 12.2, 90, 90, 120), (2, 2, 1), " P 3", 1.8)


@pytest.fixture(autouse=True)
def merged(write_observations, tmp_path, monkeypatch):
    """merged.h5 of half of the unique voxels, in the current folder."""
    monkeypatch.chdir(tmp_path)
    index = np.repeat(GRID.asu_indices()[::2], 3, axis=0)
    rng = np.random.default_rng(7)
    counts = rng.poisson(50 * np.exp(-GRID.s(index))).astype(float)
    columns = {"miller_index": index, "counts": counts, "id": np.arange(len(index)) % 3}
    files = write_observations("extracted", GRID, columns)
    diffuse_merge.run([*files, "plot=None", "output.log=None"])


def read_ccp4(path: str) -> np.ndarray:
    return np.array(gemmi.read_ccp4_map(path).grid, copy=True)


def boxes() -> dict[str, np.ndarray]:
    with MapFile("merged.h5") as handle:
        return {name: handle.box(name) for name in BOXES}


def test_default_is_a_ccp4_map_of_the_intensity(tmp_path):
    diffuse_export.run(["merged.h5"])
    intensity = boxes()["map/intensity"]
    found = read_ccp4("merged.ccp4")
    seen = np.isfinite(intensity)
    np.testing.assert_array_equal(found[seen], intensity[seen])
    assert np.all(found[~seen] == 0)
    n = np.count_nonzero(~seen)
    log = (tmp_path / "dials.diffuse_export.log").read_text()
    assert f"{n} of {intensity.size} voxels were not observed" in log
    header = gemmi.read_ccp4_map("merged.ccp4")
    labels = [header.header_str(57 + 20 * i, 80) for i in range(10)]
    assert any(f"{n} voxels not observed, set to 0" in label for label in labels)


def test_quantities_fill_and_prefix():
    diffuse_export.run(
        [
            "merged.h5",
            "what=sigma+n_obs+half_1+half_2+anisotropic",
            "ccp4.fill=-5",
            "output.prefix=crystal",
        ]
    )
    expected = boxes()
    for what, name in (
        ("sigma", "map/intensity_errors"),
        ("half_1", "half_1/intensity"),
        ("half_2", "half_2/intensity"),
    ):
        np.testing.assert_array_equal(
            read_ccp4(f"crystal_{what}.ccp4"), np.nan_to_num(expected[name], nan=-5)
        )
    np.testing.assert_array_equal(
        read_ccp4("crystal_n_obs.ccp4"), expected["map/n_obs"]
    )
    anisotropic = read_ccp4("crystal_anisotropic.ccp4")
    intensity = expected["map/intensity"]
    seen = np.isfinite(intensity)
    assert np.all(anisotropic[~seen] == -5)
    assert abs(anisotropic[seen].mean()) < 0.05 * intensity[seen].mean()
    isotropic = intensity[seen] - anisotropic[seen]
    s = GRID.s(GRID.index(np.flatnonzero(seen)))
    assert np.corrcoef(isotropic, s)[0, 1] < -0.9


def test_npz_has_everything():
    diffuse_export.run(["merged.h5", "format=npz"])
    expected = boxes()
    with np.load("merged.npz") as found:
        np.testing.assert_array_equal(found["intensity"], expected["map/intensity"])
        np.testing.assert_array_equal(found["sigma"], expected["map/intensity_errors"])
        np.testing.assert_array_equal(found["n_obs"], expected["map/n_obs"])
        np.testing.assert_array_equal(found["half_2"], expected["half_2/intensity"])
        for axis, values in zip("hkl", GRID.axes()):
            np.testing.assert_array_equal(found[axis], values)
        np.testing.assert_array_equal(found["unit_cell"], GRID.unit_cell)
        np.testing.assert_array_equal(found["ndiv"], GRID.ndiv)
        assert found["space_group"] == " P 3"


def test_both_formats(tmp_path):
    diffuse_export.run(["merged.h5", "format=ccp4+npz"])
    assert (tmp_path / "merged.ccp4").is_file()
    assert (tmp_path / "merged.npz").is_file()


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "Please give one map .*, not 0"),
        (["merged.h5", "merged.h5"], "Please give one map .*, not 2"),
        (["nowhere.h5"], "^nowhere.h5 does not exist$"),
        (["extracted.refl"], "^extracted.refl is not a merged map: give the output"),
        (["extracted.expt"], "experiment list is exported by format=pixels or, with"),
        (["merged.h5", "format=pixels"], "give format=pixels alone, and a refined"),
        (["extracted.expt", "format=pixels+npz"], "give format=pixels alone"),
        (["merged.h5", "format=dials"], "give format=dials alone, and the .expt and"),
        (["extracted.expt", "format=dials"], "give format=dials alone, and the .expt"),
        (["extracted.expt", "merged.h5", "format=dials"], "no diffuse observations"),
        (
            [*EXTRACTED, "format=dials"],
            "Experiment a has no detector",
        ),
        (
            [*EXTRACTED, "format=dials", "output.prefix=extracted"],
            "output.prefix=extracted would overwrite the input",
        ),
        (
            [*EXTRACTED, "format=dials", "output.prefix=nowhere/x"],
            "no detector|Cannot write nowhere",
        ),
        (["merged.h5", "format=mtz"], "mtz"),
        (["merged.h5", "ccp4.fill=nan"], "ccp4.fill must be a finite number"),
        (["merged.h5", "output.prefix=nowhere/x"], "Cannot write nowhere/x.ccp4"),
    ],
)
def test_wrong_input(args, message):
    with pytest.raises(Sorry, match=message) as sorry:
        diffuse_export.run(args)
    assert sorry.value.__suppress_context__
    assert len(str(sorry.value).splitlines()) == 1


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        diffuse_export.run(["-c", "-e2", "-a2"])
    assert not stop.value.code
    assert "Angstrom of the map for each" in capsys.readouterr().out


@pytest.fixture
def refined(tmp_path):
    """refined.expt of three images of rotation data."""
    paths = write_images(tmp_path, count_images(3), width=0.5)
    experiments = import_images(paths)
    experiments.as_file("refined.expt")
    return experiments


def test_pixels(refined, tmp_path):
    diffuse_export.run(["refined.expt", "format=pixels", "pixels.image=2"])
    diffuse_export.run(
        [
            *("refined.expt", "format=pixels", "pixels.image=2", "pixels.file=csv"),
            *("pixels.extraction.corrections.polarization=False", "output.prefix=x"),
        ]
    )
    image = count_images(3)[1]
    csv = np.genfromtxt("x.csv", delimiter=",", names=True)
    with np.load("pixels_0_2.npz") as found:
        np.testing.assert_array_equal(found["counts"], image[found["y"], found["x"]])
        np.testing.assert_array_equal(found["x"], csv["x"])
        np.testing.assert_allclose(found["hkl"][:, 2], csv["l"], rtol=1e-6)
        np.testing.assert_array_equal(found["voxel"][:, 0], csv["voxel_h"])
        ratio = found["normalisation"] / csv["normalisation"]
    assert ratio.min() < 0.95 and ratio.max() < 1.001  # the polarization factor
    log = (tmp_path / "dials.diffuse_export.log").read_text()
    assert "of experiment 0, image 2 written to x.csv" in log


@pytest.mark.parametrize(
    "args, message",
    [
        (["pixels.image=4"], "pixels.image=4: the experiment has the images 1 to 3"),
        (["pixels.experiment=1"], "the list has 1 experiments"),
        (["pixels.extraction.trusted_range=9000,9001"], "No pixel is left"),
        (["pixels.extraction.mask=nowhere.mask"], "nowhere.mask"),
    ],
)
def test_wrong_pixels(refined, args, message):
    with pytest.raises(Sorry, match=message):
        diffuse_export.run(["refined.expt", "format=pixels", *args])


SWEEP = vary(SMALL, n_images=36, scan={"width": 4.0}, scale={"variation": 0.2})
STILLS = vary(SMALL, mode="stills", n_images=6, scale={"variation": 0.4})


def extracted(settings: SimulationSettings) -> Simulation:
    """Makes extracted.expt and .refl of simulated images in the current folder."""
    simulation = Simulation(settings)
    experiments = write_simulated(simulation, Path.cwd(), "image")
    extraction = extraction_settings(simulation, BraggSettings(exclusion="none"))
    grid = make_grid(experiments, extraction)
    extract(experiments, grid, extraction, "extracted.refl")
    experiments.as_file("extracted.expt")
    return simulation


def scaled_by_dials(*options: str) -> flex.reflection_table:
    """What dials.scale makes of diffuse.expt and diffuse.refl."""
    dials_scale.run(["diffuse.expt", "diffuse.refl", "output.html=None", *options])
    return flex.reflection_table.from_file("scaled.refl")


@pytest.mark.slow
def test_dials_scales_and_merges_an_exported_sweep(tmp_path, capsys):
    simulation = extracted(SWEEP)
    diffuse_export.run([*EXTRACTED, "format=dials", "dials.max_rows=6000"])
    log = (tmp_path / "dials.diffuse_export.log").read_text()
    assert re.search(r"\d+ of \d+ observations exported, of 1 experiments", log)
    assert "as dials.max_rows=6000 asks" in log
    assert "Cell 72.00 80.00 88.00 (2, 2, 2 voxels" in log

    dials_show.run(["diffuse.expt", "diffuse.refl"])
    shown = capsys.readouterr().out
    assert "Space group: P m m m" in shown

    table = scaled_by_dials(
        *("model=physical", "physical.scale_interval=8"),
        *("physical.absorption_correction=False", "physical.decay_correction=False"),
    )
    frame = flumpy.to_numpy(table["xyzobs.px.value"])[:, 2]
    found = flumpy.to_numpy(table["inverse_scale_factor"])
    truth = series_scales(SWEEP, 1)[np.floor(frame).astype(int)]
    ratio = found / truth
    assert np.std(truth) > 0.15
    assert np.std(ratio) < 0.025 * np.mean(ratio)

    dials_merge.run(["scaled.expt", "scaled.refl", "output.html=None"])
    mtz = gemmi.read_mtz_file("merged.mtz")
    indices = mtz.array[:, :3].astype(int).tolist()
    merged = dict(zip(map(tuple, indices), mtz.column_with_label("IMEAN").array))
    with ObservationFile("extracted.refl") as table:
        index, parts, _ = true_map(simulation.sample, table.grid)
    voxels = [i for i, x in enumerate(index.tolist()) if tuple(x) in merged]
    assert len(voxels) > 0.9 * len(merged)
    truth = parts["intensity"][voxels]
    found = np.array([merged[tuple(x)] for x in index[voxels].tolist()])
    assert np.corrcoef(found, truth)[0, 1] > 0.975


def test_dials_scales_exported_stills():
    extracted(STILLS)
    diffuse_export.run([*EXTRACTED, "format=dials", "dials.max_rows=12000"])
    table = scaled_by_dials("model=KB", "KB.decay_correction=False")
    ids = flumpy.to_numpy(table["id"])
    factor = flumpy.to_numpy(table["inverse_scale_factor"])
    found = np.bincount(ids, factor) / np.bincount(ids)
    truth = series_scales(STILLS, 1)
    assert np.std(truth) > 0.15
    np.testing.assert_allclose(found / found.mean(), truth / truth.mean(), rtol=0.006)
