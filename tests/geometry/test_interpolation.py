from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import lagrange

from dials_diffuse.geometry.interpolation import (
    PixelInterpolation,
    lagrange_matrix,
    nodes,
)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9, 40, 41, 47])
@pytest.mark.parametrize("step", [1, 2, 8])
def test_nodes_reach_from_end_to_end(n, step):
    at = nodes(n, step)
    assert at[0] == 0 and at[-1] == n - 1
    assert np.diff(at).max(initial=0) <= step
    assert len(at) >= min(n, 4)


def test_polynomials_of_third_order_are_exact():
    at = nodes(45, 8)
    x = np.arange(45)
    matrix = lagrange_matrix(45, at)
    for order in range(4):
        np.testing.assert_allclose(matrix @ at**order, x**order, rtol=1e-12, atol=1e-9)
    assert np.abs(matrix @ at**4 - x**4).max() > 1


def test_same_as_the_polynomial_of_scipy():
    at = nodes(60, 8)
    values = np.random.default_rng(3).normal(size=len(at))
    found = lagrange_matrix(60, at) @ values
    for pixel, around in ((3, slice(0, 4)), (27, slice(2, 6)), (58, slice(-4, None))):
        polynomial = lagrange(at[around] - at[around][0], values[around])
        assert found[pixel] == pytest.approx(polynomial(pixel - at[around][0]))
    np.testing.assert_allclose(found[at], values, atol=1e-12)


def wave(length: float):
    def function(fast, slow):
        x, y = np.meshgrid(fast, slow)
        return np.stack([np.sin(x / length), np.cos((x + y) / length)])

    return function


@pytest.mark.parametrize("length, step", [(1000.0, 8), (12.0, 2), (1.0, 1)])
def test_as_many_nodes_as_the_function_needs(length, step):
    """Smoothness is found out, not assumed."""
    function = wave(length)
    shape = (60, 75)
    exact = function(np.arange(75), np.arange(60))
    interpolation = PixelInterpolation(function, shape, np.full(2, 1e-4))
    assert interpolation.step == step
    found = interpolation.rows(slice(0, 60))
    # a few times the tolerance, since only some pixels are tried
    np.testing.assert_allclose(found, exact, atol=3e-4)
    np.testing.assert_array_equal(interpolation.rows(slice(7, 9)), found[:, 7:9])
    interpolation.set_scale(np.array([2.0, -3.0]))
    scaled = interpolation.rows(slice(0, 60))
    np.testing.assert_allclose(scaled, found * [[[2.0]], [[-3.0]]], rtol=1e-12)


def test_what_is_not_smooth_is_computed_everywhere():
    """A function that jumps in one pixel could pass for smooth in random ones."""

    def function(fast, slow):
        x, y = np.meshgrid(fast, slow)
        return ((x == 31) & (y == 17)).astype(float)[None]

    exact = PixelInterpolation(function, (40, 50), np.array([1e-6]), smooth=False)
    found = exact.rows(slice(0, 40))[0]
    assert exact.step == 1
    assert found[17, 31] == pytest.approx(1.0)
    assert np.count_nonzero(np.abs(found) > 1e-12) == 1
