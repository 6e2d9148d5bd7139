from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse.background.model import (
    BackgroundAxes,
    BackgroundModel,
    ImageBackground,
    evaluate,
    grid_at,
    n_nodes,
    profile_at,
)
from dials_diffuse.extraction.settings import CorrectionSettings

AXES = BackgroundAxes(s_start=0.1, s_step=0.05, spacing_px=4)


def test_terms_add_up_by_hand():
    s = np.array([[0.125, 0.4], [0.0, 0.175]])
    m = np.array([[2.0, 3.0], [4.0, 5.0]])
    base = np.array([[10.0, 20.0], [30.0, np.nan]])
    terms = ImageBackground(
        base_index=0,
        rate_scale=0.5,
        profile=np.array([1.0, 2.0, -3.0]),
        profile_variance=np.array([0.1, 0.2, 0.3]),
        grids=(np.array([[8.0, 0.0], [0.0, 0.0]]),),
        grid_variances=(np.array([[1.0, 0.0], [0.0, 0.0]]),),
    )
    value, variance = evaluate(terms, AXES, 0, s, m, base, 2 * base)
    # pixel (0, 0): half-way between the first points; 1/8 of the way between nodes
    weight = (7 / 8) ** 2
    assert value[0, 0] == pytest.approx(5 + (1.5 + 8 * weight) * 2)
    assert variance[0, 0] == pytest.approx(0.25 * 20 + (0.25 * 0.3 + weight**2) * 4)
    # beyond either end the profile is constant; and what is negative stays so
    assert value[0, 1] == pytest.approx(10 + (-3 + 8 * (5 / 8) * (7 / 8)) * 3)
    assert value[1, 0] == pytest.approx(15 + (1 + 8 * (7 / 8) * (5 / 8)) * 4)
    assert np.isnan(value[1, 1])


def test_profile_goes_through_its_points():
    profile = np.array([3.0, 1.0, 4.0, 1.5])
    s = AXES.s_start + AXES.s_step * np.arange(4)
    value, variance = profile_at(s, profile, profile**2, AXES)
    np.testing.assert_allclose(value, profile, rtol=1e-12)
    np.testing.assert_allclose(variance, profile**2, rtol=1e-9)


def test_grid_is_exact_for_a_bilinear_function():
    spacing, shape = 7, (30, 17)
    i, j = np.indices([n_nodes(n, spacing) for n in shape])
    y, x = i * spacing, j * spacing
    slow, fast = np.indices(shape) + 0.5
    value, _ = grid_at(
        fast, slow, 2 + 0.3 * x - 0.1 * y + 0.02 * x * y, np.zeros(i.shape), spacing
    )
    np.testing.assert_allclose(value, 2 + 0.3 * fast - 0.1 * slow + 0.02 * fast * slow)


@pytest.mark.parametrize("n, expected", [(8, 3), (9, 4), (1, 2)])
def test_nodes_cover_the_panel(n, expected):
    assert n_nodes(n, 4) == expected


def test_model_picks_the_base_of_the_image():
    bases = tuple((np.full((2, 2), 10.0 * i),) for i in range(3))
    terms = ImageBackground(base_index=2, rate_scale=3.0)
    model = BackgroundModel(
        "images", CorrectionSettings(), AXES, {("a", 4): terms}, bases, bases
    )
    assert model.of_image("a", 4) is terms
    value, variance = model.evaluate(terms, 0, np.ones((2, 2)), np.ones((2, 2)))
    assert np.all(value == 60)
    assert np.all(variance == 180)
    with pytest.raises(ValueError, match="no image 6 of experiment a"):
        model.of_image("a", 5)
