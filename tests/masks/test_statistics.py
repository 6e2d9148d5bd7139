from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from simulate_images import make_beam, make_detector, random_images

from dials_diffuse.masks.rings import make_rings
from dials_diffuse.masks.settings import MaskSettings
from dials_diffuse.masks.statistics import PixelModel, PixelSums, add_image

DETECTOR = make_detector(1, size=(40, 30))


def make_model(**settings) -> PixelModel:
    usable = np.ones(40 * 30, dtype=bool)
    rings = make_rings(DETECTOR, make_beam())
    return PixelModel.of_detector(DETECTOR, usable, rings, MaskSettings(**settings))


def sums_of(images, model: PixelModel) -> PixelSums:
    sums = PixelSums.empty(40 * 30)
    for image in images:
        add_image(sums, image, model, model.usable)
    return sums


def images_with_a_hot_pixel(when, n_images: int = 12, mean: float = 2.0) -> list:
    images = random_images(n_images, DETECTOR, mean=mean)
    for i in when:
        images[i][0][10, 20] += 60
    return images


def test_sums_of_parts_are_the_sums_of_all():
    images = images_with_a_hot_pixel((0, 3, 4, 5, 9, 10))
    model = make_model()
    expected = sums_of(images, model)
    for cuts in ((0, 4, 12), (0, 1, 2, 5, 10, 12)):
        sums = PixelSums.empty(40 * 30)
        for start, stop in zip(cuts, cuts[1:]):
            sums.add(sums_of(images[start:stop], model))
        for field in dataclasses.fields(PixelSums):
            np.testing.assert_allclose(
                getattr(sums, field.name), getattr(expected, field.name), rtol=1e-6
            )


def test_runs_of_high_images():
    sums = sums_of(images_with_a_hot_pixel((0, 3, 4, 5, 9, 10)), make_model())
    hot = 10 * 40 + 20
    assert (sums.high[hot], sums.runs[hot]) == (6, 3)
    assert np.count_nonzero(sums.high) == 1


def test_a_peak_is_not_isolated():
    images = images_with_a_hot_pixel((2,))
    images[2][0][10, 21] += 50
    images[2][0][11, 20] += 50
    assert not sums_of(images, make_model()).high.any()


@pytest.mark.parametrize("scales", [(1,) * 40, tuple(np.geomspace(0.3, 3, 40))])
def test_scatter_of_poisson_counts_is_one_whatever_the_scales(scales):
    rng = np.random.default_rng(7)
    images = [[rng.poisson(20 * k, (30, 40)).astype(np.int32)] for k in scales]
    sums = sums_of(images, make_model())
    # squares beyond 3 sigma are cut off, and the expectation has an error too
    assert np.mean(sums.square / sums.n) == pytest.approx(0.98, abs=0.05)
    assert sums.total.sum() == pytest.approx(sum(x[0].sum() for x in images), rel=1e-3)
    assert sums.variance.sum() == pytest.approx(sums.total.sum(), rel=0.1)


def test_untrusted_values_do_not_count():
    images = random_images(4, DETECTOR, mean=3)
    for image in images:
        image[0][3, 3], image[0][4, 4] = -1, 2_000_000
    images[1][0][5, 5] = -1
    sums = sums_of(images, make_model())
    gap, saturated, once = (3 * 41, 4 * 41, 5 * 41)
    assert (sums.n[gap], sums.below[gap], sums.above[gap]) == (0, 4, 0)
    assert (sums.n[saturated], sums.below[saturated], sums.above[saturated]) == (
        0,
        0,
        4,
    )
    assert (sums.n[once], sums.below[once]) == (3, 1)
    assert np.isnan(sums.mean()[[gap, saturated]]).all()
    assert not sums.high[[gap, 4 * 41 + 1]].any()


def test_gain_gives_photons():
    images = random_images(6, DETECTOR, mean=5)
    adu = [[np.asarray(p * 7, dtype=np.int32) for p in image] for image in images]
    one, seven = sums_of(images, make_model()), sums_of(adu, make_model(gain=7.0))
    np.testing.assert_allclose(seven.total, one.total, rtol=1e-5)
    np.testing.assert_allclose(seven.square, one.square, rtol=1e-3, atol=1e-3)
