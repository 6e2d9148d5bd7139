from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import integrate

from dials_diffuse.scaling.axes import (
    DecayAxis,
    SmoothAxis,
    StepAxis,
    axis_from_dict,
)

AXES = [
    SmoothAxis("phi", -10, 80, 7.0),
    SmoothAxis("phi", 0, 0.3, 5.0, 4),  # a single interval
    SmoothAxis("s", 0.1, 0.5, 0.2, 3),  # two of them
    StepAxis("panel", 5),
    DecayAxis(0.1, 0.6),
]


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.kind)
def test_serialisation(axis):
    again = axis_from_dict(json.loads(json.dumps(axis.as_dict())))
    assert again == axis
    assert hash(again) == hash(axis)
    assert (again.n_params, again.n_cells) == (axis.n_params, axis.n_cells)
    x = axis.centres()
    assert (again.weights(x) != axis.weights(x)).nnz == 0


def test_axes_differ():
    assert len(set(AXES)) == len(AXES)
    assert SmoothAxis("phi", 0, 10, 5) != SmoothAxis("phi", 0, 10, 2)


def test_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind spline"):
        axis_from_dict({"kind": "spline", "coordinate": "phi"})


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.kind)
def test_centres_are_in_their_cells(axis):
    centres = axis.centres()
    assert len(centres) == axis.n_cells
    np.testing.assert_array_equal(axis.cell(centres), np.arange(axis.n_cells))
    assert axis.cell(centres).dtype == np.int32


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.kind)
def test_what_is_beyond_the_ends_is_in_the_last_cells(axis):
    cells = axis.cell(np.array([-1000.0, 1000.0]))
    np.testing.assert_array_equal(cells, [0, axis.n_cells - 1])


@pytest.mark.parametrize("axis", AXES[:4], ids=lambda axis: axis.kind)
def test_weights_are_a_partition_of_unity(axis):
    assert axis.is_partition
    x = np.linspace(axis.centres()[0], axis.centres()[-1], 200)
    weights = axis.weights(x)
    assert weights.shape == (200, axis.n_params)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    assert weights.min() >= 0
    # Every parameter has a say somewhere.
    assert np.all(weights.max(axis=0).toarray() > 0.1)


@pytest.mark.parametrize("axis", AXES[:3])
def test_a_smooth_axis_beyond_its_ends_keeps_the_value_there(axis):
    ends = axis.weights(np.array([axis.low, axis.high])).toarray()
    beyond = axis.weights(np.array([axis.low - 100, axis.high + 100])).toarray()
    np.testing.assert_array_equal(beyond, ends)


def test_a_smooth_axis_follows_what_is_smooth():
    """A parabola at the knots gives it back between them, but for the smoothing."""
    axis = SmoothAxis("phi", -10, 80, 3.0)
    knots = axis.knots()
    assert len(knots) == axis.n_params
    assert np.ptp(np.diff(knots)) < 1e-9
    assert np.diff(knots)[0] == pytest.approx(3.0)
    x = np.linspace(-10, 80, 100)
    line = axis.weights(x) @ knots
    np.testing.assert_allclose(line, x, atol=0.1)
    np.testing.assert_allclose(axis.weights(x) @ knots**2, x**2, atol=20)
    differences = axis.differences()
    assert differences.shape == (axis.n_params - 2, axis.n_params)
    np.testing.assert_allclose(differences @ knots, 0, atol=1e-9)
    np.testing.assert_allclose(differences @ knots**2, 2 * 3.0**2)


def test_many_points_are_weighted_in_parts(monkeypatch):
    axis, x = AXES[0], np.linspace(-10, 80, 101)
    whole = axis.weights(x)
    monkeypatch.setattr("dials_diffuse.scaling.axes.POINTS_PER_CALL", 7)
    assert (axis.weights(x) != whole).nnz == 0
    assert axis.weights(x[:0]).shape == (0, axis.n_params)


@pytest.mark.parametrize("low, high, interval", [(1, 1, 1), (2, 1, 1), (0, 1, 0)])
def test_wrong_range(low, high, interval):
    with pytest.raises(ValueError, match="a smooth axis of phi needs a range"):
        SmoothAxis("phi", low, high, interval)


def test_steps():
    axis = StepAxis("panel", 3)
    np.testing.assert_array_equal(
        axis.weights(np.array([2, 0])).toarray(), [[0, 0, 1], [1, 0, 0]]
    )
    assert axis.differences().shape == (0, 3)


def test_decay():
    """exp(B (s² - s₀²)/2), s₀² the mean of s² over the volume of the shell."""
    low, high = 0.1, 0.6
    axis = DecayAxis(low, high)
    x = np.array([0.1, 0.3, 0.6])
    weights = axis.weights(x).toarray()
    top, bottom = (integrate.quad(lambda s, n=n: s**n, low, high)[0] for n in (4, 2))
    np.testing.assert_allclose(weights[:, 0], (x**2 - top / bottom) / 2)
    assert not axis.is_partition


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.kind)
def test_single_points(axis):
    """The smoother of DIALS refuses to look at one point alone."""
    x = axis.centres()
    for i in (0, len(x) - 1):
        alone = axis.weights(x[i : i + 1])
        np.testing.assert_allclose(alone.toarray(), axis.weights(x)[[i]].toarray())
