from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Collection

import h5py
import numpy as np
import pytest
from simulate_images import random_images, with_images
from simulated_observations import (
    CELLS,
    ROTATION,
    STILLS,
    draw,
    observe,
    read_all,
    read_models,
    term_values,
    write,
)
from truth_ladder import vary

from cctbx import sgtbx, uctbx
from dxtbx.model.experiment_list import ExperimentList
from libtbx.utils import Sorry

from dials.array_family import flex
from dials_diffuse.command_line import diffuse_merge, diffuse_scale
from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import BraggSettings, ExtractionSettings
from dials_diffuse.io.maps import read_map
from dials_diffuse.io.observations import SCALED_COLUMNS, ObservationFile
from dials_diffuse.report import scaling as scaling_report
from dials_diffuse.scaling.selection import gains
from dials_diffuse.scaling.terms import TERMS as ALL_TERMS
from dials_diffuse.simulation.models import make_series

FLAGS = flex.reflection_table.flags
TERMS = ("scale", "decay", "absorption", "detector", "offset")
SMALL = {"detector": {"size": (90, 90), "pixel": 1.0}}
QUIET = ["output.html=None", "output.json=None"]
# The scales alone are found in less than a second.
SCALES_ONLY = [*QUIET, *(f"model.{name}.use=no" for name in TERMS[1:])]


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    settings = vary(STILLS, n_images=8, **SMALL)
    return observe(settings, tmp_path_factory.mktemp("stills"))


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    settings = vary(ROTATION, n_images=30, n_crystals=2, scan={"width": 4.0}, **SMALL)
    return observe(settings, tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


SCALES = np.array([0.5, 0.7, 0.8, 1.0, 1.1, 1.2, 1.3, 1.4])


@pytest.fixture
def observed(stills, tmp_path):
    return draw(stills, tmp_path, SCALES[stills.experiment], counts_per_pixel=10)


def split(observed, tmp_path, limit: int) -> list[str]:
    """The files of the first ``limit`` experiments, and those of the others."""
    geometry, rows = observed.geometry, read_all(observed.files[1])
    files = []
    for name, chosen in ("first", range(limit)), ("second", range(limit, 8)):
        mine = np.isin(rows["id"], chosen)
        own = dataclasses.replace(
            geometry,
            experiments=ExperimentList([geometry.experiments[i] for i in chosen]),
        )
        columns = {key: values[mine] for key, values in rows.items()}
        columns["id"] = columns["id"] - chosen[0]
        files += write(own, columns, tmp_path, name)
    return files


def flagged(rows: dict[str, np.ndarray], flag: int) -> np.ndarray:
    return (rows["flags"] & np.uint64(int(flag))) != 0


def scales_of(rows: dict[str, np.ndarray]) -> np.ndarray:
    """The factor of each experiment, with the mean 1."""
    n = rows["id"].max() + 1
    found = np.array(
        [np.median(rows["inverse_scale_factor"][rows["id"] == i]) for i in range(n)]
    )
    return found / found.mean()


def test_output(observed, tmp_path):
    diffuse_scale.run([*observed.files, "refinement.cycles=1"])
    for name in ("scaled.expt", "scaled.refl", "dials.diffuse_scale.log"):
        assert (tmp_path / name).is_file()
    with ObservationFile("scaled.refl") as table:
        assert set(table.columns) == set(SCALED_COLUMNS)
        assert list(table.identifiers.values()) == list(
            observed.geometry.experiments.identifiers()
        )
    rows = read_all("scaled.refl")
    before = read_all(observed.files[1])
    for name in ("counts", "normalisation", "miller_index", "id"):
        np.testing.assert_array_equal(rows[name], before[name])
    assert flagged(rows, FLAGS.scaled).all()
    log = (tmp_path / "dials.diffuse_scale.log").read_text()
    assert "χ² per degree of freedom" in log
    assert "Scaled observations written to scaled.refl, models to scaled.expt" in log


def test_report_files(observed, tmp_path):
    """What is asked for is there, what is not is not."""
    diffuse_scale.run([*observed.files, *SCALES_ONLY[2:], "output.log=None"])
    names = {path.name for path in tmp_path.iterdir()} - {"extracted.expt"}
    assert "dials.diffuse_scale.log" not in names
    figures = json.loads((tmp_path / "dials.diffuse_scale.json").read_text())
    assert figures["experiments"]["scale_from"] == ["refinement"] * 8
    assert min(figures["experiments"]["n_observations"]) > 100
    page = (tmp_path / "dials.diffuse_scale.html").read_text()
    assert "</html>" in page
    for name in ("dials.diffuse_scale.json", "dials.diffuse_scale.html"):
        os.unlink(name)
    diffuse_scale.run([*observed.files, *SCALES_ONLY, "output.log=None"])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"extracted.expt", "extracted.refl", "scaled.expt", "scaled.refl"}


def test_contributions_are_found_once(observed, monkeypatch, caplog):
    """For log and report, which tell the same."""
    calls = []

    def counted(*args):
        calls.append(gains(*args))
        return calls[-1]

    for module in (diffuse_scale, scaling_report):
        monkeypatch.setattr(module, "gains", counted)
    diffuse_scale.run([*observed.files, *SCALES_ONLY[2:]])
    assert len(calls) == 1
    with open("dials.diffuse_scale.json", encoding="utf-8") as file:
        found = json.load(file)["contributions"]
    expected = {name: gain.chi_square for name, gain in calls[0].items()}
    assert {row["without"]: row["chi_square"] for row in found} == expected
    assert f"{expected['scale']:.3f}" in caplog.text


def test_models_reload_and_reproduce_the_factors(sweeps, tmp_path):
    """Evaluated by themselves, away from the cells of the refinement."""
    x, y = sweeps.place.T
    scale = np.exp(0.3 * np.sin(2 * np.pi * sweeps.turn)) * (1 + sweeps.experiment)
    factor = scale * np.exp(0.5 * x * np.cos(2 * np.pi * sweeps.turn) + 0.1 * y)
    observed = draw(sweeps, tmp_path, factor, counts_per_pixel=20)
    diffuse_scale.run(
        [
            *observed.files,
            *QUIET,
            "model.offset.use=yes",
            "refinement.max_iterations=10",
            "refinement.cycles=1",
        ]
    )
    rows = {name: values[::20] for name, values in read_all("scaled.refl").items()}
    experiments = read_models("scaled.expt")
    model = experiments[0].scaling_model
    assert model.id_ == "diffuse" and model.is_scaled
    assert {"scale", "absorption", "detector", "offset"} <= set(model.components)
    outer, inner = np.ones(len(rows["id"])), np.ones(len(rows["id"]))
    for name in set(model.components) - {"offset"}:
        if name in ("absorption", "detector"):
            outer = outer * term_values(experiments, rows, name)
        else:
            inner = inner * term_values(experiments, rows, name)
    change = np.log(outer * inner / rows["inverse_scale_factor"])
    assert np.std(np.log(rows["inverse_scale_factor"])) > 0.1
    assert np.sqrt(np.mean(change**2)) < 0.004
    assert np.abs(change).max() < 0.05
    offset = outer * term_values(experiments, rows, "offset")
    assert np.std(offset) > 0
    assert np.std(offset - rows["additive_offset"]) < 0.1 * np.std(offset)


def test_scales(observed):
    diffuse_scale.run([*observed.files, *SCALES_ONLY])
    found = scales_of(read_all("scaled.refl"))
    assert found == pytest.approx(SCALES / SCALES.mean(), rel=0.02)


def test_two_pairs_of_files_give_one_table(observed, tmp_path):
    diffuse_scale.run([*observed.files, *SCALES_ONLY])
    together = read_all("scaled.refl")
    diffuse_scale.run([*split(observed, tmp_path, 3), *SCALES_ONLY])
    apart = read_all("scaled.refl")
    for name in ("miller_index", "id", "counts", "flags"):
        np.testing.assert_array_equal(apart[name], together[name])
    factor = "inverse_scale_factor"
    np.testing.assert_allclose(apart[factor], together[factor], rtol=1e-5)
    names = [e.identifier for e in read_models("scaled.expt")]
    assert names == list(observed.geometry.experiments.identifiers())


def test_scaling_to_a_reference(observed, tmp_path):
    """New images get the scale of the map, not a mean scale of 1."""
    first, second = np.split(np.array(split(observed, tmp_path, 5)), 2)
    diffuse_scale.run([*first, *SCALES_ONLY])
    diffuse_merge.run(["scaled.expt", "scaled.refl", "output.plot=None"])
    norm = np.mean(SCALES[:5])
    diffuse_scale.run([*second, *SCALES_ONLY, "reference=merged.h5"])
    rows = read_all("scaled.refl")
    found = [np.median(rows["inverse_scale_factor"][rows["id"] == i]) for i in range(3)]
    assert found == pytest.approx(SCALES[5:] / norm, rel=0.04)
    # The report is of the observations, and the map one more to compare them with.
    diffuse_scale.run([*second, *SCALES_ONLY[2:], "reference=merged.h5"])
    with open("dials.diffuse_scale.json", encoding="utf-8") as file:
        figures = json.load(file)
    total, images = figures["refined_against"], figures["images"]
    assert total["reference"] is True
    assert total["n_observations"] == sum(images["n_observations"]) == len(rows["id"])
    assert 0.9 < total["chi_square_after"] < 1.1
    shared = figures["experiments"]["n_shared_voxels"]
    assert min(shared) > 0.5 * len(rows["id"]) / 3
    assert min(figures["experiments"]["cc"]) > 0.5
    diffuse_scale.run([*second, *SCALES_ONLY])
    rows = read_all("scaled.refl")
    alone = [np.median(rows["inverse_scale_factor"][rows["id"] == i]) for i in range(3)]
    assert np.mean(alone) == pytest.approx(1, abs=0.02)


def test_reference_of_another_grid(observed, tmp_path):
    diffuse_merge.run([*observed.files, "output.plot=None"])
    other = observe(
        vary(STILLS, n_images=2, crystal={"space_group": "P 1"}, **SMALL), tmp_path
    )
    files = draw(other, tmp_path, name="other").files
    message = error([*files, "reference=merged.h5"])
    assert "reference=merged.h5 has a grid with" in message


def test_excluded_images(observed, sweeps, tmp_path, caplog):
    diffuse_scale.run([*observed.files, *SCALES_ONLY, "exclude_images=2,5"])
    rows = read_all("scaled.refl")
    out = flagged(rows, FLAGS.user_excluded_in_scaling)
    np.testing.assert_array_equal(out, np.isin(rows["id"], (2, 5)))
    assert not np.any(out & flagged(rows, FLAGS.scaled))
    n_all = read_map_rows(["scaled.expt", "scaled.refl"])
    assert n_all == np.count_nonzero(~out & ~flagged(rows, FLAGS.outlier_in_scaling))

    files = draw(sweeps, tmp_path, name="sweeps").files
    diffuse_scale.run([*files, *SCALES_ONLY, "exclude_images=1:3:7"])
    rows = read_all("scaled.refl")
    frame = rows["xyzobs.px.value"][:, 2]
    expected = (rows["id"] == 1) & (frame > 2) & (frame < 7)
    out = flagged(rows, FLAGS.user_excluded_in_scaling)
    np.testing.assert_array_equal(out, expected)
    n, n_all = np.count_nonzero(out), np.count_nonzero(rows["id"] == 1)
    assert f"{n} of {n_all} observations of experiment 1 are of images left out" in (
        caplog.text
    )
    assert "Images 3 to 7 of experiment 1 are left out" in caplog.text


SWEEP = vary(ROTATION, n_images=30, n_crystals=2, scan={"width": 1.5}, **SMALL)


def extracted(
    folder: Path,
    number: int,
    images_per_block: int,
    rejected: Collection[int] = (),
    bright: Collection[int] = (),
) -> list[str]:
    """Observations of blocks of images, extracted from noise.

    Args:
        folder: For the files.
        number: Of the crystal.
        images_per_block: Number of images of a block.
        rejected: Array indices of images to leave out.
        bright: Array indices of images with more photons.
    """
    group = sgtbx.space_group_info("P 21 21 21").group()
    cell = uctbx.unit_cell(CELLS["P 21 21 21"])
    (model,) = make_series(SWEEP, cell, group)[number].experiments
    images = random_images(SWEEP.n_images, model.detector, seed=number)
    for i in bright:
        images[i][0] += 1
    experiments = ExperimentList([with_images(model, images)])
    settings = ExtractionSettings(
        ndiv=(2, 2, 2),
        d_min=1.9,
        block_width=images_per_block * SWEEP.scan.width,
        bragg=BraggSettings(exclusion="none"),
    )
    grid = dataclasses.replace(  # the same for all crystals, to the last digit
        make_grid(experiments, settings), unit_cell=CELLS["P 21 21 21"]
    )
    expt, refl = (str(folder / f"{number}.{suffix}") for suffix in ("expt", "refl"))
    out = {(0, i) for i in rejected}
    extract(experiments, grid, settings, refl, rejected=out)
    ExperimentList([model]).as_file(expt)
    return [expt, refl]


def test_all_of_a_block_is_excluded(tmp_path, caplog):
    """Image 16 is in the third block: blocks start anew after the fourth image."""
    before = read_all(extracted(tmp_path, 0, 10, rejected=[3])[1])["counts"]
    files = extracted(tmp_path, 0, 10, rejected=[3], bright=[15])
    touched = read_all(files[1])["counts"] != before
    diffuse_scale.run([*files, *SCALES_ONLY, "exclude_images=16:16"])
    rows = read_all("scaled.refl")
    out = flagged(rows, FLAGS.user_excluded_in_scaling)
    assert np.count_nonzero(touched) > 100
    assert out[touched].all()
    frame = rows["xyzobs.px.value"][:, 2]
    np.testing.assert_array_equal(out, (frame > 14) & (frame < 24))
    assert "Images 15 to 24 of experiment 0 are left out, 1 of 4 blocks" in caplog.text


AGAIN = ["output.experiments=again.expt", "output.reflections=again.refl"]


def in_images(rows: dict[str, np.ndarray], ranges: dict[int, tuple[int, int]]):
    """Whether rows are of array indices from the first up to the last of an experiment."""
    frame = rows["xyzobs.px.value"][:, 2]
    return np.any(
        [
            (rows["id"] == i) & (frame > start) & (frame < stop)
            for i, (start, stop) in ranges.items()
        ],
        axis=0,
    )


def test_blocks_of_different_widths(tmp_path, caplog):
    """Those of each table, in the scaled table too, under the numbers that it has."""
    (expt0, refl0), (expt1, refl1) = (
        extracted(tmp_path, 0, 3),
        extracted(tmp_path, 1, 5),
    )
    images = "exclude_images=0:7:7,1:7:7"
    diffuse_scale.run([expt1, expt0, refl0, refl1, *SCALES_ONLY, images])
    expected = {0: (5, 10), 1: (6, 9)}
    for name in ("scaled", "again"):
        rows = read_all(f"{name}.refl")
        out = flagged(rows, FLAGS.user_excluded_in_scaling)
        np.testing.assert_array_equal(out, in_images(rows, expected))
        assert {0, 1} == set(rows["id"][out])
        if name == "scaled":
            diffuse_scale.run(
                ["scaled.expt", "scaled.refl", *SCALES_ONLY, *AGAIN, images]
            )
    assert "not known" not in caplog.text
    # The parameters are those that were given, and can be given again.
    with h5py.File("scaled.refl") as handle:
        text = handle["dials_diffuse/phil"].asstr()[()]
    (tmp_path / "given.phil").write_text(text)
    assert "exclude_images" in text and "block_width" not in text
    diffuse_scale.run(["given.phil", refl0, refl1])
    np.testing.assert_array_equal(read_all("scaled.refl")["flags"], rows["flags"])


def test_old_table_without_blocks(tmp_path, caplog):
    """Its images are taken one by one, also from the scaled table; others as ever."""
    files = [*extracted(tmp_path, 0, 3), *extracted(tmp_path, 1, 5)]
    with h5py.File(files[1], "r+") as handle:
        del handle["dials_diffuse/blocks"]
    images = "exclude_images=0:6:7,1:7:7"
    message = "out whole blocks. This concerns the experiments 0"
    diffuse_scale.run([*files, *SCALES_ONLY, images])
    diffuse_scale.run(["scaled.expt", "scaled.refl", *SCALES_ONLY, *AGAIN, images])
    assert [message in text for text in caplog.messages].count(True) == 2
    for name in ("scaled", "again"):
        rows = read_all(f"{name}.refl")
        out = flagged(rows, FLAGS.user_excluded_in_scaling)
        expected = in_images(rows, {0: (5, 7), 1: (5, 10)})
        expected |= (rows["id"] == 0) & (rows["xyzobs.px.value"][:, 2] == 5)
        np.testing.assert_array_equal(out, expected)
        assert {0, 1} == set(rows["id"][out])
    with ObservationFile("scaled.refl") as table:
        assert set(table.blocks[:, 0]) == {1}


def read_map_rows(files: list[str]) -> int:
    """Number of observations that merging takes."""
    diffuse_merge.run([*files, "output.plot=None"])
    return int(read_map("merged.h5")["n_obs"].sum())


@pytest.mark.parametrize(
    "text, message",
    [
        ("x", "exclude_images=x is neither the number of an experiment nor"),
        (
            "8",
            "exclude_images=8: there is no experiment 8, they are numbered from 0 to 7",
        ),
        ("0:4:2", "exclude_images=0:4:2: the last image is before the first"),
        ("1:2", "exclude_images=1:2 is neither the number of an experiment nor"),
        (
            "0:1:1",
            "exclude_images=0:1:1: experiment 0 is a still without a scan; "
            "exclude_images=0 leaves it out",
        ),
    ],
)
def test_impossible_exclusion(observed, text, message):
    assert error([*observed.files, f"exclude_images={text}"]).startswith(message)


@pytest.mark.parametrize("text", ["0:0:5", "1:28:31", "0:1:3,1:40:50"])
def test_images_that_are_not_there(sweeps, tmp_path, text):
    files = draw(sweeps, tmp_path, name="sweeps").files
    message = error([*files, f"exclude_images={text}"])
    assert len(message.splitlines()) == 1
    assert message.endswith(
        f"{text.split(',')[-1]}: the images of that experiment are numbered from 1 to 30"
    )


def test_experiment_that_disagrees(stills, tmp_path, caplog):
    """The intensities of experiment 3 are those of other voxels."""
    observed = draw(stills, tmp_path, SCALES[stills.experiment], counts_per_pixel=10)
    rows = read_all(observed.files[1])
    rng = np.random.default_rng(3)
    mine = np.flatnonzero(rows["id"] == 3)
    order = mine[np.argsort(stills.s[mine])]
    for part in np.array_split(order, 20):
        other = rng.permutation(part)
        for name in ("counts", "normalisation", "num_pixels.valid"):
            rows[name][part] = rows[name][other]
    files = write(stills, rows, tmp_path, "wrong")
    diffuse_scale.run([*files, *SCALES_ONLY, "min_cc=0.3"])
    assert (
        "Left out, as their correlation with the rest is below 0.3: 3 (" in caplog.text
    )
    rows = read_all("scaled.refl")
    out = flagged(rows, FLAGS.user_excluded_in_scaling)
    np.testing.assert_array_equal(out, rows["id"] == 3)
    good = np.arange(8) != 3
    found = scales_of(rows)[good]
    assert found / found.mean() == pytest.approx(
        SCALES[good] / SCALES[good].mean(), rel=0.03
    )


def test_scaled_observations_can_be_merged_and_scaled_again(observed, tmp_path):
    diffuse_scale.run([*observed.files, *SCALES_ONLY])
    once = read_all("scaled.refl")
    diffuse_scale.run(
        [
            "scaled.expt",
            "scaled.refl",
            *SCALES_ONLY,
            "output.experiments=again.expt",
            "output.reflections=again.refl",
        ]
    )
    again = read_all("again.refl")
    for name in once:
        np.testing.assert_allclose(again[name], once[name], rtol=1e-6, err_msg=name)
    diffuse_merge.run(["again.expt", "again.refl", "output.plot=None"])
    merged = read_map("merged.h5", ["intensity", "normalisation"])
    g = once["inverse_scale_factor"][~flagged(once, FLAGS.outlier_in_scaling)]
    m = once["normalisation"][~flagged(once, FLAGS.outlier_in_scaling)]
    assert merged["normalisation"].sum() == pytest.approx(np.sum(m * g))


def error(args) -> str:
    """The error message of the command, which must be one line for each error."""
    with pytest.raises(Sorry) as sorry:
        diffuse_scale.run(args)
    assert sorry.value.__suppress_context__
    return str(sorry.value)


def test_missing_files(observed):
    expt, refl = observed.files
    assert error([expt, "nowhere.refl"]) == "nowhere.refl does not exist"
    assert error([]).splitlines() == [
        "Please give an experiment list (.expt)",
        "Please give an observation file (.refl of dials.diffuse_extract)",
    ]


def test_experiments_of_other_observations(observed, tmp_path):
    files = split(observed, tmp_path, 3)
    message = error([files[0], files[3]])
    assert (
        "second.refl belongs to other experiments than the experiment list" in message
    )
    assert len(message.splitlines()) == 1
    assert not os.path.exists("scaled.refl")


def test_table_without_rows(stills, tmp_path):
    none = np.zeros(stills.n_rows, dtype=bool)
    columns = {name: values[none] for name, values in stills.columns.items()}
    files = write(stills, columns, tmp_path, "empty")
    message = error([*files, *QUIET])
    assert "empty.refl has no" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "option", ["experiments", "reflections", "html", "json", "log"]
)
def test_output_that_would_replace_the_input(observed, option):
    name = observed.files[1]
    before = os.path.getsize(name)
    assert f"output.{option}={name} is in use" in error(
        [*observed.files, f"output.{option}={name}"]
    )
    assert os.path.getsize(name) == before


@pytest.mark.parametrize("option", ["experiments", "reflections"])
def test_output_that_must_have_a_name(observed, option):
    message = error([*observed.files, f"output.{option}=None"])
    assert message == f"Please give a file name: output.{option}"


def test_parameters_that_do_not_exist(observed):
    assert "offst" in error([*observed.files, "model.offst.use=no"])


def test_help_tells_when_a_term_is_switched_off_all_the_same():
    for name, term in ALL_TERMS.items():
        (use,) = diffuse_scale.phil_scope.get(f"model.{name}.use").objects
        assert ("In any case" in use.help) == (term.error_limit is not None), name


def test_files_of_other_commands_are_not_replaced(observed, tmp_path):
    """A map, or observations as extracted; control: those of an earlier scaling."""
    diffuse_scale.run([*observed.files, *SCALES_ONLY])
    diffuse_merge.run(["scaled.expt", "scaled.refl", "output.plot=None"])
    for name in ("merged.h5", observed.files[1]):
        other = tmp_path / f"copy_of_{Path(name).name}"
        shutil.copy(name, other)
        message = error([*observed.files, f"output.reflections={other}"])
        assert "exists and is not of dials.diffuse_scale" in message
        assert other.read_bytes() == Path(name).read_bytes()
    os.unlink("scaled.expt")
    diffuse_scale.run([*observed.files, *SCALES_ONLY])
    assert (tmp_path / "scaled.expt").is_file()


def test_full_disk_is_one_line_and_leaves_nothing(observed, tmp_path):
    """Rows that are dealt out to files beside the output are the first to be too many."""
    before = set(tmp_path.iterdir())
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        message = error([*observed.files, *SCALES_ONLY, "output.log=None"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert message.startswith(f"Cannot write {tmp_path / 'scaled.refl'}: no space left")
    assert set(tmp_path.iterdir()) == before


def test_experiments_that_min_cc_cannot_judge(stills, tmp_path, caplog):
    caplog.set_level("INFO", logger="dials.diffuse.scale")
    share = np.where(stills.experiment == 3, 0.005, 1.0)
    use = np.random.default_rng(1).random(stills.n_rows) < share
    observed = draw(
        stills, tmp_path, SCALES[stills.experiment], counts_per_pixel=10, use=use
    )
    diffuse_scale.run([*observed.files, *SCALES_ONLY, "min_cc=0.0"])
    assert "1 experiments share less than 30 voxels" in caplog.text
