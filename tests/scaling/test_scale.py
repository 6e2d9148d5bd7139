"""Derivatives, gauge, choice of observations, and which terms are determined."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Sequence

import numpy as np
import pytest
from simulated_observations import (
    ROTATION,
    STILLS,
    Geometry,
    Observed,
    draw,
    observe,
    read_all,
    write,
)
from truth_ladder import vary

from dxtbx import flumpy

from dials_diffuse import symmetry
from dials_diffuse.command_line import diffuse_scale
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.sums import mix_bits, pack
from dials_diffuse.scaling import portions, selection
from dials_diffuse.scaling.block import ImageRange
from dials_diffuse.scaling.determination import standard_error
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.result import Scaling, Source
from dials_diffuse.scaling.scale import Session, scale
from dials_diffuse.scaling.selection import agreement
from dials_diffuse.util.command import parse_arguments

TERMS = ("scale", "decay", "absorption", "detector", "offset")
COARSE = [
    "model.scale.interval=20",
    "model.decay.interval=60",
    "model.absorption.interval=60",
    "model.absorption.n_directions=2",
    "model.detector.n_knots=2",
    "model.offset.interval=60",
    "model.offset.n_resolution=3",
]


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> Observed:
    """A sweep with all terms in it."""
    folder = tmp_path_factory.mktemp("sweep")
    settings = vary(
        ROTATION,
        n_images=30,
        scan={"width": 4.0},
        detector={"size": (60, 60), "pixel": 1.5},
    )
    geometry = observe(settings, folder)
    x, y = geometry.place.T
    turn = 2 * np.pi * geometry.turn
    outer = np.exp(0.5 * x * np.cos(turn) + 0.2 * x * y)
    offset = 0.2 * (1 + np.cos(turn)) * np.exp(-10 * geometry.s)
    factor = outer * np.exp(0.3 * np.sin(turn))
    return draw(geometry, folder, factor, outer * offset, 0.5, counts_per_pixel=50)


def scaled(observed: Observed, *options: str) -> Scaling:
    arguments = [*observed.files, *COARSE, *options]
    params, _, files = parse_arguments(diffuse_scale.make_parser(), arguments)
    experiments = observed.geometry.experiments
    with ObservationFile(files[0]) as table:
        return scale(experiments, [table], [{0: 0}], params)[0]


@pytest.fixture(scope="module")
def result(observed) -> Scaling:
    return scaled(observed, *(f"model.{name}.use=yes" for name in TERMS))


def test_model_fits_the_observations(result):
    assert set(TERMS) <= set(result.components)
    assert result.before > 1.3
    assert 0.97 < result.after < 1.03


@pytest.mark.parametrize("name", TERMS)
def test_gradient(result, name):
    """Against finite differences, away from the minimum."""
    refiner, component = result.refiner, result.components[name]
    saved, minimum = component.parameters.deep_copy(), refiner.evaluate()
    rng = np.random.default_rng(5)
    away = 0.1 * rng.standard_normal(len(saved))
    direction = rng.standard_normal(len(saved))

    def value(step: float) -> float:
        start = flumpy.to_numpy(saved) + away
        component.parameters = flumpy.from_numpy(start + step * direction)
        return refiner.evaluate()

    try:
        while value(0.0) < 1.1 * minimum:
            away *= 2
        gradient = refiner.gradient(name)
        assert np.linalg.norm(gradient) > 0
        step = 1e-4 * np.linalg.norm(away)
        numerical = (value(step) - value(-step)) / (2 * step)
        assert gradient @ direction == pytest.approx(numerical, rel=1e-3)
    finally:
        component.parameters = saved
        refiner.evaluate()


def test_minimum(result):
    """No term can gain by a step along its gradient, restraints included."""
    refiner = result.refiner
    refiner.evaluate()
    for name in TERMS:
        component = result.components[name]
        gradient, curvature = refiner.gradient(name), refiner.curvature(name)
        restraint = flumpy.to_numpy(component.calculate_restraints()[1])
        gain = (gradient + restraint) ** 2 / (
            2 * (curvature + component.restraint_curvature())
        )
        # of χ², which is known to the root of twice the number of observations
        assert gain.sum() < 5, name


def test_gauge(result):
    """Mean scale 1; mean logarithm 0 of the other factors that can be turned about."""
    block = result.refiner.block
    scales = result.components["scale"].cell_values()[block.cells["scale"]]
    assert scales.mean() == pytest.approx(1, abs=1e-6)
    weight = np.maximum(result.refiner.photons, 0) * result.refiner.used
    for name in ("absorption", "detector"):
        values = result.components[name].cell_values()[block.cells[name]]
        mean = np.average(np.log(values), weights=weight)
        assert mean == pytest.approx(0, abs=1e-6)
    offset = result.components["offset"].cell_values()
    assert offset.min() > -0.02 * result.components["offset"].unit


@pytest.mark.parametrize("name", TERMS)
def test_standard_error_is_that_of_the_full_matrix(result, name):
    """Its trace, from the derivatives by each parameter, one after the other."""
    refiner, component = result.refiner, result.components[name]
    refiner.evaluate()
    intensity = refiner.intensities().astype(float)
    group = refiner.block.group
    x, o = (a.astype(float) for a in refiner.responses())
    weight = refiner.weight.astype(float)
    saved = component.parameters.deep_copy()
    trace, n_seen, step = 0.0, 0, 1e-3
    try:
        for i in range(component.n_params):
            expected = []
            for sign in (-1, 1):
                values = saved.deep_copy()
                values[i] += sign * step
                component.parameters = values
                response, offset = (a.astype(float) for a in refiner.responses())
                expected.append(response * intensity[group] + offset)
            slope = (expected[1] - expected[0]) / (2 * step)
            common = np.bincount(group, weight * x * slope)
            norm = np.bincount(group, weight * x * x)
            taken = np.divide(common**2, norm, out=0 * norm, where=norm > 0)
            trace += np.sum(weight * slope**2) - taken.sum()
            n_seen += bool(np.any(slope))
    finally:
        component.parameters = saved
        refiner.evaluate()
    # Few probes of few parameters: the trace is known to a factor of two.
    assert standard_error(refiner, name) == pytest.approx(
        np.sqrt(n_seen / trace), rel=0.4
    )


@pytest.mark.parametrize("name", ["scale", "decay", "offset"])
def test_values_that_are_no_numbers_are_found(result, name):
    """Also of the scale, which may have any size."""
    session = SimpleNamespace(result=result)
    component = result.components[name]
    saved = component.parameters.deep_copy()
    assert Session._worst_term(session) is None
    try:
        component.parameters = saved * float("nan")
        assert Session._worst_term(session) == name
        component.parameters = saved * 0.0 + 100.0
        assert Session._worst_term(session) == (None if name == "scale" else name)
    finally:
        component.parameters = saved


@pytest.mark.parametrize("size, is_warned", [(0.2, False), (8.0, True)])
def test_an_offset_of_most_of_the_photons_is_warned_of(
    observed, tmp_path, caplog, size, is_warned
):
    geometry = observed.geometry
    turn = 2 * np.pi * geometry.turn
    scale_factor = np.exp(1.2 * np.sin(turn))
    offset = size * np.exp(-3 * geometry.s)
    drawn = draw(geometry, tmp_path, scale_factor, offset, 0.5, counts_per_pixel=50)
    used = {"scale", "offset"}
    no = [f"model.{name}.use=no" for name in TERMS if name not in used]
    scaled(drawn, "model.offset.use=yes", *no)
    assert ("% of the photons above the background" in caplog.text) == is_warned


def test_choice_of_observations(observed, caplog):
    """A part of the voxels gives nearly the same scales, and says that it was enough."""
    options = [f"model.{name}.use=no" for name in TERMS[1:]]
    fine = "model.scale.interval=5"
    whole = scaled(observed, *options, fine)
    n = whole.refiner.block.n_rows
    part = scaled(observed, *options, fine, f"refinement.max_rows={n // 3}")
    assert 0.2 * n < part.refiner.block.n_rows < 0.4 * n
    assert whole.control is None
    assert part.control == pytest.approx(part.after, rel=0.1)
    a, b = (flumpy.to_numpy(r.components["scale"].parameters) for r in (whole, part))
    assert a.std() > 0.1
    assert np.std(a - b) < 0.02


STILL_SCALES = np.array([0.5, 0.8, 1.0, 1.2, 1.5, 3.0])
SCALE_ONLY = [f"model.{name}.use=no" for name in TERMS[1:]]
SMALL = ["refinement.max_rows=1000"]


@pytest.fixture(scope="module")
def still_geometry(tmp_path_factory) -> Geometry:
    settings = vary(STILLS, n_images=6, detector={"size": (120, 120), "pixel": 0.75})
    return observe(settings, tmp_path_factory.mktemp("geometry"))


def draw_stills(
    geometry: Geometry, folder: Path, n_rows: float | np.ndarray, photons: float = 50
) -> Observed:
    """Stills of unequal scales with about so many rows each."""
    number = geometry.experiment
    share = np.broadcast_to(n_rows, 6) / np.bincount(number)
    use = np.random.default_rng(4).random(geometry.n_rows) < share[number]
    return draw(
        geometry, folder, STILL_SCALES[number], counts_per_pixel=photons, use=use
    )


@pytest.fixture(scope="module")
def stills(still_geometry, tmp_path_factory) -> Observed:
    """Six stills; the last has a few hundred rows only."""
    n_rows = np.where(np.arange(6) == 5, 300, np.inf)
    return draw_stills(still_geometry, tmp_path_factory.mktemp("stills"), n_rows)


def changed(
    observed: Observed, folder: Path, add: np.ndarray | None = None, drop: int = -1
) -> Observed:
    """The same with more counts, or without the rows of an experiment."""
    rows = read_all(observed.files[1])
    if add is not None:
        rows["counts"] = rows["counts"] + add
    rows = {name: values[rows["id"] != drop] for name, values in rows.items()}
    files = write(observed.geometry, rows, folder, "changed")
    return dataclasses.replace(observed, files=files)


def scaled_stills(
    stills: Observed,
    *options: str,
    excluded: Sequence[ImageRange] = (),
    reference: Reference | None = None,
) -> Scaling:
    arguments = [*stills.files, *SCALE_ONLY, *options]
    params, _, files = parse_arguments(diffuse_scale.make_parser(), arguments)
    with ObservationFile(files[0]) as table:
        numbers = [{i: i for i in range(6)}]
        models = stills.geometry.experiments
        return scale(models, [table], numbers, params, excluded, reference)[0]


def relative_errors(result: Scaling, which: np.ndarray | None = None) -> np.ndarray:
    """Of the scales of some stills, whose common factor nothing tells."""
    which = np.arange(6) if which is None else which
    ratio = np.log(result.experiment_scales() / STILL_SCALES)[which]
    return ratio - ratio.mean()


def test_experiment_with_few_of_the_chosen_rows(stills, caplog):
    """Its scale is that of all of its rows."""
    caplog.set_level("INFO", logger="dials.diffuse.scale")
    result = scaled_stills(stills, *SMALL)
    assert result.step >= 8
    assert 0 < result.n_observations[5] < 50
    assert list(result.source) == [Source.REFINEMENT] * 5 + [Source.ALL]
    assert np.abs(relative_errors(result)).max() < 0.05
    assert "The scales of 1 experiments with less than 100 observations among" in (
        caplog.text
    )
    assert f": 5 ({result.n_observations[5]})" in caplog.text
    assert "are uncertain" not in caplog.text


def test_all_experiments_with_few_of_the_chosen_rows(still_geometry, tmp_path, caplog):
    """Nothing but scales that are to be found; as with all rows refined against."""
    caplog.set_level("INFO", logger="dials.diffuse.scale")
    observed = draw_stills(still_geometry, tmp_path, 550, photons=200)
    whole = scaled_stills(observed)
    part = scaled_stills(observed, *SMALL)
    assert set(part.source) == {Source.ALL}
    assert 0 < part.n_observations.min() < part.n_observations.max() < 100
    assert np.std(relative_errors(whole)) < 0.02
    assert np.std(relative_errors(part)) < 0.02
    assert np.std(relative_errors(part) - relative_errors(whole)) < 0.005
    cells = part.refiner.block.cells["scale"]
    mean = part.components["scale"].cell_values()[cells].mean()
    assert mean == pytest.approx(1, abs=1e-6)
    assert "uncertain" not in caplog.text


def true_map(geometry: Geometry, observed: Observed) -> Reference:
    """A map of true intensities."""
    index = geometry.columns["miller_index"]
    unique = pack(symmetry.map_to_asu(index, geometry.grid.laue_group))
    voxel, first = np.unique(unique, return_index=True)
    response = 100 * geometry.columns["normalisation"][first]
    nothing = np.zeros(len(voxel))
    return Reference(voxel, observed.intensity[first], response, nothing, nothing)


@pytest.mark.parametrize("n_excluded", [0, 4, 5])
def test_a_map_tells_the_scales_of_experiments_with_few_rows(
    still_geometry, tmp_path, n_excluded
):
    """A map of true intensities makes them absolute, also that of a single still."""
    n_rows = np.where(np.arange(6) < 4, np.inf, 300)
    observed = draw_stills(still_geometry, tmp_path, n_rows)
    reference = true_map(still_geometry, observed)
    excluded = [ImageRange(i) for i in range(n_excluded)]
    result = scaled_stills(observed, *SMALL, excluded=excluded, reference=reference)
    expected = [Source.REFINEMENT] * 4 + [Source.ALL] * 2
    expected[:n_excluded] = [Source.NOTHING] * n_excluded
    assert list(result.source) == expected
    found = result.experiment_scales()[n_excluded:]
    assert found == pytest.approx(STILL_SCALES[n_excluded:], rel=0.03)


def test_remaining_scales_do_not_depend_on_the_size_of_portions(stills, monkeypatch):
    """The rows of a voxel are in one portion, whatever their number."""
    whole = scaled_stills(stills, *SMALL)
    monkeypatch.setattr(portions, "ROWS_PER_PORTION", 1000)
    parts = scaled_stills(stills, *SMALL)
    assert parts.experiment_scales() == pytest.approx(
        whole.experiment_scales(), rel=1e-4
    )
    assert list(parts.source) == list(whole.source)


@pytest.mark.parametrize("n_hot, size", [(3, 2e4), (1, 1e6)])
def test_hot_rows_of_an_experiment_with_few_rows(stills, tmp_path, n_hot, size):
    """They are outliers also where they are not refined against."""
    rows = read_all(stills.files[1])
    mine = np.flatnonzero(rows["id"] == 5)
    hot = np.zeros(len(rows["id"]))
    hot[np.random.default_rng(1).choice(mine, n_hot, replace=False)] = size
    seen = rows["counts"][mine].sum()
    assert hot.sum() > 0.2 * seen
    spoilt = changed(stills, tmp_path, hot)
    refined, remaining = scaled_stills(spoilt), scaled_stills(spoilt, *SMALL)
    assert [r.source[5] for r in (refined, remaining)] == [
        Source.REFINEMENT,
        Source.ALL,
    ]
    assert relative_errors(remaining)[5] == pytest.approx(
        relative_errors(refined)[5], abs=0.05
    )
    assert np.abs(relative_errors(remaining)).max() < 0.05


def test_hot_rows_of_an_experiment_that_only_a_map_knows(still_geometry, tmp_path):
    """A map judges rows that no other experiment can; control: without outliers."""
    n_rows = np.where(np.arange(6) == 4, 300, np.inf)
    observed = draw_stills(still_geometry, tmp_path, n_rows)
    rows = read_all(observed.files[1])
    mine = np.flatnonzero(rows["id"] == 4)
    hot = np.zeros(len(rows["id"]))
    hot[np.random.default_rng(1).choice(mine, 3, replace=False)] = 1e4
    spoilt = changed(observed, tmp_path, hot)
    options = {"excluded": [ImageRange(i) for i in (0, 1, 2, 3, 5)]}
    options["reference"] = true_map(still_geometry, observed)
    result = scaled_stills(spoilt, *SMALL, **options)
    assert result.source[4] is Source.ALL
    good = result.experiment_scales()[4]
    assert good == pytest.approx(STILL_SCALES[4], rel=0.05)
    all_rows = scaled_stills(spoilt, *SMALL, "outliers.reject=False", **options)
    assert all_rows.experiment_scales()[4] > 1.2 * good


def test_experiment_with_few_rows_at_all(still_geometry, tmp_path, caplog):
    """All are refined against; what is uncertain is named."""
    caplog.set_level("INFO", logger="dials.diffuse.scale")
    n_rows = np.where(np.arange(6) == 5, 60, np.inf)
    result = scaled_stills(draw_stills(still_geometry, tmp_path, n_rows))
    assert result.step == 1
    assert set(result.source) == {Source.REFINEMENT}
    n = result.n_observations[5]
    assert 0 < n < 100
    assert (
        "The scales of 1 experiments are uncertain, as they have less than 100 "
        f"observations of voxels that others saw: 5 ({n})" in caplog.text
    )
    assert np.abs(relative_errors(result)).max() < 0.05


def test_few_rows_at_all_and_fewer_of_the_chosen(still_geometry, tmp_path, caplog):
    """From all of its rows, and uncertain all the same."""
    caplog.set_level("INFO", logger="dials.diffuse.scale")
    n_rows = np.where(np.arange(6) == 5, 60, np.inf)
    result = scaled_stills(draw_stills(still_geometry, tmp_path, n_rows), *SMALL)
    assert result.source[5] is Source.ALL
    assert "are from all of their observations: 5 (" in caplog.text
    assert "are uncertain" in caplog.text
    assert np.abs(relative_errors(result)).max() < 0.1


@pytest.mark.parametrize("options", [(), SMALL])
@pytest.mark.parametrize("way", ["excluded", "range", "no rows"])
def test_experiment_without_rows_is_not_warned_of(
    stills, tmp_path, caplog, way, options
):
    """None are expected to tell its scale."""
    excluded = {
        "excluded": [ImageRange(2)],
        "range": [ImageRange(2, 0, 1)],
        "no rows": [],
    }[way]
    observed = changed(stills, tmp_path, drop=2) if way == "no rows" else stills
    result = scaled_stills(observed, *options, excluded=excluded)
    assert result.n_observations[2] == 0
    assert result.source[2] is Source.NOTHING
    assert "nothing tells the scales" not in caplog.text
    assert np.abs(relative_errors(result, np.array([0, 1, 3, 4, 5]))).max() < 0.05


def test_blank_experiment_with_few_of_the_chosen_rows(stills, tmp_path, caplog):
    """All of its rows tell no more than that it has no photons."""
    rows = read_all(stills.files[1])
    blank = changed(stills, tmp_path, np.where(rows["id"] == 5, -rows["counts"], 0))
    result = scaled_stills(blank, *SMALL)
    assert list(result.source) == [Source.REFINEMENT] * 5 + [Source.NOTHING]
    assert "nothing tells the scales of 1 of 6 experiments, which have no photons" in (
        caplog.text
    )
    assert np.abs(relative_errors(result, np.arange(5))).max() < 0.05


def test_rows_that_count_are_those_of_shared_voxels(stills):
    """Row by row, with another way to find what is shared."""
    result = scaled_stills(stills)
    rows = read_all(stills.files[1])
    laue_group = stills.geometry.grid.laue_group
    unique = map(tuple, symmetry.map_to_asu(rows["miller_index"], laue_group))
    seen: dict[tuple[int, ...], list[int]] = {}
    for voxel, number in zip(unique, rows["id"]):
        seen.setdefault(voxel, []).append(number)
    shared = [number for ids in seen.values() if len(set(ids)) > 1 for number in ids]
    expected = np.bincount(shared, minlength=6)
    assert 0 < expected.sum() < len(rows["id"])
    n_outliers = np.count_nonzero(~result.refiner.used)
    assert 0 <= (expected - result.n_observations).sum() <= n_outliers


def test_mean_scale_is_that_of_the_images_that_were_observed(observed):
    """Of a sweep with rows on the first half only, whatever the other half may be."""
    result = scaled(observed, *SCALE_ONLY)
    block, component = result.refiner.block, result.components["scale"]
    first = block.cells["scale"] <= np.median(block.cells["scale"])
    half = dataclasses.replace(
        result,
        refiner=SimpleNamespace(
            block=SimpleNamespace(
                experiment=block.experiment[first],
                cells={"scale": block.cells["scale"][first]},
            )
        ),
    )
    expected = component.cell_values()[block.cells["scale"][first]].mean()
    assert half.experiment_scales() == pytest.approx([expected])
    assert result.experiment_scales() == pytest.approx([1], abs=1e-6)
    assert abs(expected - 1) > 0.02


def test_error_model_warns_once(stills, caplog):
    """Counts of a detector with a wrong gain scatter too little."""
    rows = read_all(stills.files[1])
    rows["counts"] = rows["counts"].mean() * np.ones(len(rows["counts"]))
    rows["counts"] *= rows["normalisation"] * STILL_SCALES[rows["id"]]
    rows["counts"] /= (rows["normalisation"] * STILL_SCALES[rows["id"]]).mean()
    folder = Path(stills.files[1]).parent
    files = write(stills.geometry, rows, folder, "smooth")
    scaled_stills(dataclasses.replace(stills, files=files))
    assert caplog.text.count("scatter less than Poisson counts") == 1


def test_absorption_of_stills_makes_no_sense(tmp_path, caplog):
    settings = vary(
        ROTATION,
        mode="stills",
        n_images=4,
        scan={"orientations": "random"},
        detector={"size": (60, 60), "pixel": 1.5},
    )
    geometry = observe(settings, tmp_path)
    observed = draw(geometry, tmp_path)
    params, _, files = parse_arguments(
        diffuse_scale.make_parser(), [*observed.files, "model.offset.use=no"]
    )
    with ObservationFile(files[0]) as table:
        numbers = [{i: i for i in range(4)}]
        result, _ = scale(geometry.experiments, [table], numbers, params)
    assert result.dropped["absorption"] == "it makes no sense for stills"
    assert "absorption" not in result.components


@pytest.mark.parametrize(
    "use, size, kept", [("auto", 3, False), ("yes", 3, True), ("yes", 0.01, False)]
)
def test_weak_term(tmp_path, caplog, use, size, kept):
    """B factors that the observations determine, but not as well as they should.

    They stay if the user asks for them, unless nothing more is known than was expected.
    """
    settings = vary(STILLS, n_images=6, detector={"size": (60, 60), "pixel": 1.5})
    geometry = observe(settings, tmp_path)
    observed = draw(geometry, tmp_path, counts_per_pixel=0.15)
    options = [f"model.{name}.use=no" for name in ("detector", "absorption", "offset")]
    options += [f"model.decay.use={use}", f"model.decay.size={size}"]
    params, _, files = parse_arguments(
        diffuse_scale.make_parser(), [*observed.files, *options]
    )
    with ObservationFile(files[0]) as table:
        numbers = [{i: i for i in range(6)}]
        result, _ = scale(geometry.experiments, [table], numbers, params)
    assert ("decay" in result.components) is kept
    if not kept:
        assert "the observations do not determine it" in result.dropped["decay"]


def test_a_single_sweep_needs_no_other(result, caplog):
    assert list(result.source) == [Source.REFINEMENT]
    assert "nothing tells the scales" not in caplog.text


def test_experiment_that_shares_nothing(tmp_path, caplog):
    """Half of the voxels belong to experiment 2 alone."""
    settings = vary(STILLS, n_images=6, detector={"size": (60, 60), "pixel": 1.5})
    geometry = observe(settings, tmp_path)
    use = (geometry.experiment == 2) == (geometry.voxel % 2 == 0)
    observed = draw(geometry, tmp_path, use=use, counts_per_pixel=10)
    result = scaled_stills(observed)
    expected = [Source.NOTHING if i == 2 else Source.REFINEMENT for i in range(6)]
    assert list(result.source) == expected
    assert "nothing tells the scales of 1 of 6 experiments" in caplog.text
    assert result.experiment_scales()[2] == pytest.approx(1, abs=0.2)


def test_no_other_voxels_to_check_the_choice(stills, tmp_path):
    """The result stands without; it happens where voxels are few."""
    rows = read_all(stills.files[1])
    laue_group = stills.geometry.grid.laue_group
    voxel = pack(symmetry.map_to_asu(rows["miller_index"], laue_group))
    step = 2
    phase = mix_bits(voxel.view(np.uint64)) % np.uint64(step)
    few = {name: values[phase == 0] for name, values in rows.items()}
    n = len(few["id"])
    files = write(stills.geometry, few, tmp_path, "few")
    observed = dataclasses.replace(stills, files=files)
    result = scaled_stills(observed, f"refinement.max_rows={n - 1}")
    assert result.step == step
    assert result.control is None
    assert np.abs(relative_errors(result, np.arange(5))).max() < 0.05


def test_agreement_is_that_of_each_still_with_all_others(stills, monkeypatch):
    """By its definition, voxel by voxel, and in whatever parts it is found."""
    refiner = scaled_stills(stills).refiner
    whole = agreement(refiner, 6)
    monkeypatch.setattr(selection, "ROWS_PER_PART", 500)
    for a, b in zip(whole, agreement(refiner, 6)):
        assert b == pytest.approx(a, rel=1e-4)
    block, (response, offset) = refiner.block, refiner.responses()
    use = refiner.used
    sums = np.zeros((2, block.n_groups, 6))
    for total, values in zip(sums, (refiner.photons - offset, response)):
        np.add.at(total, (block.group[use], block.experiment[use]), values[use])
    photons, norm = sums
    rest, rest_norm = (x.sum(axis=1, keepdims=True) - x for x in sums)
    shared = (norm > 0) & (rest_norm > 1e-6)
    shell = np.broadcast_to(refiner.shell[:, None], shared.shape)[shared]

    def anisotropic(n: np.ndarray, m: np.ndarray) -> np.ndarray:
        n, m = n[shared], m[shared]
        with np.errstate(invalid="ignore"):  # shells without voxels
            means = np.bincount(shell, n) / np.bincount(shell, m)
        return n / m - means[shell]

    own, other = anisotropic(photons, norm), anisotropic(rest, rest_norm)
    weight = 1 / (1 / norm[shared] + 1 / rest_norm[shared])
    number = np.nonzero(shared)[1]
    for i in range(6):
        w, x, y = (v[number == i] for v in (weight, own, other))
        cc = np.sum(w * x * y) / np.sqrt(np.sum(w * x**2) * np.sum(w * y**2))
        assert whole.cc[i] == pytest.approx(cc, abs=1e-4)
        assert whole.n_pairs[i] == len(w)
