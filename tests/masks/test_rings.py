from __future__ import annotations

import numpy as np
import pytest
from simulate_images import make_beam, make_detector

from dials_diffuse.masks.neighbours import neighbour_values, surroundings
from dials_diffuse.masks.rings import (
    RING_WIDTH,
    make_rings,
    ring_centre_and_spread,
    ring_levels,
    ring_quantiles,
)

SHAPES = [(6, 9), (5, 4)]
N_PIXELS = 6 * 9 + 5 * 4


def test_rings_are_resolution_rings():
    """2θ of dxtbx gives the distance from the beam in the plane."""
    detector, beam = make_detector(2), make_beam()
    rings = make_rings(detector, beam)
    start = 0
    for panel in detector:
        n_fast, n_slow = panel.get_image_size()
        for fast, slow in ((0, 0), (n_fast - 1, 3), (10, n_slow - 1)):
            # without parallax, which moves the spot, not the pixel
            r = np.array(panel.get_pixel_lab_coord((fast + 0.5, slow + 0.5)))
            cosine = r @ np.array(beam.get_unit_s0()) / np.linalg.norm(r)
            radius = np.tan(np.arccos(cosine)) / rings.step
            pixel = start + slow * n_fast + fast
            found = np.hypot(rings.u[pixel], rings.v[pixel])
            assert found == pytest.approx(radius, rel=1e-3, abs=0.02)
            assert abs(rings.number[pixel] - radius / RING_WIDTH) <= 1.02
        start += n_slow * n_fast
    assert rings.number.max() < rings.n_rings


def test_ring_quantiles():
    rng = np.random.default_rng(7)
    values, number = rng.normal(size=3000), rng.integers(0, 4, 3000)
    number[number == 2] = 3
    found = ring_quantiles(values, number, 5, (0.25, 0.5))
    for i in (0, 1, 3):
        expected = np.quantile(values[number == i], (0.25, 0.5))
        np.testing.assert_allclose(found[:, i], expected, atol=0.01)
    assert np.isnan(found[:, [2, 4]]).all()


def test_spread_is_that_of_a_normal_distribution():
    rng = np.random.default_rng(7)
    values = rng.normal(5, 3, 20000)
    values[:200] = 1e6
    centre, spread = ring_centre_and_spread(values, np.zeros(20000, int), 1)
    assert centre[0] == pytest.approx(5, abs=0.1)
    assert spread[0] == pytest.approx(3, rel=0.04)


@pytest.mark.parametrize("mean", [0.05, 1, 20, 500])
def test_ring_levels_ignore_peaks(mean):
    rng = np.random.default_rng(7)
    counts = rng.poisson(mean, 40000)
    counts[:40] = 1_000_000
    level, variance = ring_levels(counts, np.ones(40000, int), 3)
    assert level[1] == pytest.approx(mean, rel=0.03, abs=0.01)
    assert variance[1] == pytest.approx(mean, rel=0.2, abs=0.1)
    assert level[0] == level[2] == 0


def test_surroundings_are_means_of_good_pixels_within_the_panel():
    rng = np.random.default_rng(7)
    values = rng.uniform(size=N_PIXELS)
    good = rng.uniform(size=N_PIXELS) < 0.7
    found = surroundings(values, good, SHAPES, np.full(N_PIXELS, -1.0))
    start = 0
    for shape in SHAPES:
        v = values[start : start + shape[0] * shape[1]].reshape(shape)
        g = good[start : start + v.size].reshape(shape)
        for i, j in np.ndindex(shape):
            box = slice(max(i - 3, 0), i + 4), slice(max(j - 3, 0), j + 4)
            n = g[box].sum() - g[i, j]
            expected = ((v * g)[box].sum() - v[i, j] * g[i, j]) / n
            here = start + i * shape[1] + j
            assert found[here] == pytest.approx(expected, abs=1e-5)
        start += v.size


def test_surroundings_without_good_pixels():
    nothing = np.zeros(N_PIXELS, dtype=bool)
    found = surroundings(np.ones(N_PIXELS), nothing, SHAPES, np.arange(N_PIXELS))
    np.testing.assert_array_equal(found, np.arange(N_PIXELS))


def test_neighbours_do_not_reach_over_edges():
    values = np.arange(N_PIXELS, dtype=float)
    good = np.ones(N_PIXELS, dtype=bool)
    good[10] = False
    pixels = np.array([0, 11, 54])  # corner; inside; corner of the second panel
    found = neighbour_values(values, good, SHAPES, pixels, np.array([-1.0, -2, -3]))
    assert list(found[:, 0]) == [-1] * 6 + [1, 9]
    assert list(found[:, 1]) == [-2, 1, 2, 3, 12, 19, 20, 21]
    assert list(found[:, 2]) == [-3] * 5 + [55, 58, 59]
