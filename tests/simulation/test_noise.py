from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse.simulation.noise import (
    GAP_VALUE,
    detect,
    image_generator,
    make_defects,
)
from dials_diffuse.simulation.settings import (
    LARGEST_COUNT,
    DetectorSettings,
    SimulationSettings,
)

N = 40000


def settings(noise: str = "poisson", **detector) -> SimulationSettings:
    return SimulationSettings(noise=noise, detector=DetectorSettings(**detector))


def image(s: SimulationSettings, mean: float = 3.0, i: int = 0, active=None):
    active = np.ones(N, dtype=bool) if active is None else active
    rng = image_generator(s, 1, i, 0)
    return detect(np.full(N, mean), active, make_defects(s, 0, N), s, rng)


@pytest.mark.parametrize("mean", [0.05, 3.0, 200.0])
def test_poisson_mean_and_variance(mean):
    counts = image(settings(), mean)
    assert counts.dtype == np.int32
    assert counts.mean() == pytest.approx(mean, abs=4 * np.sqrt(mean / N))
    assert counts.var() == pytest.approx(mean, rel=0.05)


def test_gain_scales_photons():
    counts = image(settings(gain=2.5))
    assert counts.mean() == pytest.approx(7.5, rel=0.02)
    assert counts.var() == pytest.approx(2.5**2 * 3.0, rel=0.06)


def test_images_differ_and_repeat():
    s = settings()
    np.testing.assert_array_equal(image(s, i=3), image(s, i=3))
    assert np.mean(image(s, i=3) == image(s, i=4)) < 0.5


def test_no_noise_rounds():
    np.testing.assert_array_equal(image(settings("none"), 3.4), 3)


def test_gaps_and_saturation():
    active = np.arange(N) % 7 != 0
    counts = image(settings(count_cutoff=100), 1000.0, active=active)
    np.testing.assert_array_equal(counts[~active], GAP_VALUE)
    np.testing.assert_array_equal(counts[active], 101)


def test_the_largest_count_that_fits_into_the_image():
    counts = image(settings(count_cutoff=LARGEST_COUNT, gain=1e4), 1e9)
    np.testing.assert_array_equal(counts, 2**31 - 1)
    with pytest.raises(ValueError, match="count_cutoff=2147483647 is too large"):
        settings(count_cutoff=LARGEST_COUNT + 1)


def test_faulty_pixels_are_those_that_were_asked_for():
    s = settings(hot_fraction=0.01, dead_fraction=0.02)
    defects = make_defects(s, 0, N)
    assert len(defects.hot) == len(defects.flickering) == N // 200
    assert len(defects.dead) == N // 50
    images = np.stack([image(s, i=i) for i in range(40)])
    np.testing.assert_array_equal(images[:, defects.dead], 0)
    assert np.all(images[:, defects.hot].mean(axis=0) > 3 + 15)
    seen = np.mean(images[:, defects.flickering] > 15, axis=0)
    assert seen.mean() == pytest.approx(0.2, abs=0.02)
    faulty = np.concatenate([defects.hot, defects.flickering, defects.dead])
    assert len(np.unique(faulty)) == len(faulty)
    good = np.delete(images, faulty, axis=1)
    assert good.mean() == pytest.approx(3.0, abs=0.01)
    assert good.max() < 20
