"""Derivatives, gauge, choice of observations, and which terms are determined."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_observations import ROTATION, Observed, draw, observe
from truth_ladder import vary

from dxtbx import flumpy

from dials_diffuse.command_line import diffuse_scale
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.scaling.determination import standard_error
from dials_diffuse.scaling.scale import Scaling, scale
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
    assert result.dropped["absorption"] == "it makes no sense for these experiments"
    assert "absorption" not in result.components
