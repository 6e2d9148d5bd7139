from __future__ import annotations

import numpy as np
import pytest
from simulate_images import (
    make_crystal,
    make_detector,
    memory_experiment,
    random_images,
)

from scitbx import matrix

from dials_diffuse.background.pixels import make_pixels, near_bragg, read_photons
from dials_diffuse.background.settings import BackgroundSettings
from dials_diffuse.background.spots import near_spots
from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.geometry.orientation import frame_model


def _experiment(n_panels=2, **detector):
    made = make_detector(n_panels, tilt=4.0, **detector)
    return memory_experiment(random_images(1, made), made, make_crystal("P 1"))


def test_s_is_the_resolution_that_dxtbx_gives():
    experiment = _experiment()
    pixels = make_pixels(experiment, BackgroundSettings())
    s0 = experiment.beam.get_s0()
    rng = np.random.default_rng(7)
    for number, part in enumerate(pixels.panels):
        fast, slow = pixels.places(number)
        for i in rng.integers(len(fast), size=20):
            d = experiment.detector[number].get_resolution_at_pixel(
                s0, (fast[i], slow[i])
            )
            assert pixels.s[part][i] == pytest.approx(1 / d, rel=1e-5)


def test_masked_pixels_are_left_out():
    experiment = _experiment()
    mask = [np.ones(p.get_image_size()[::-1], dtype=bool) for p in experiment.detector]
    mask[1][10:20, 5:9] = False
    pixels = make_pixels(experiment, BackgroundSettings(mask=tuple(mask)))
    assert len(pixels.flat) == 2 * 70 * 60 - 40
    fast, slow = pixels.places(1)
    inside = (fast > 5) & (fast < 9) & (slow > 10) & (slow < 20)
    assert not inside.any()


def test_experiments_have_masks_of_their_own():
    experiments = [_experiment(), _experiment()]
    masks = {}
    for i, experiment in enumerate(experiments):
        experiment.identifier = f"e{i}"
        shapes = [panel.get_image_size()[::-1] for panel in experiment.detector]
        masks[f"e{i}"] = tuple(np.ones(shape, dtype=bool) for shape in shapes)
        masks[f"e{i}"][i][:10] = False
    settings = BackgroundSettings(masks=masks)
    for i, experiment in enumerate(experiments):
        pixels = make_pixels(experiment, settings)
        for number in range(2):
            _, slow = pixels.places(number)
            assert (slow.min() > 10) == (number == i)


def test_photons_are_without_pedestal_and_gain():
    experiment = _experiment(1)
    panel = experiment.detector[0]
    panel.set_pedestal(2.0)
    settings = BackgroundSettings(gain=4.0, trusted_range=(1, 5))
    photons, trusted = read_photons(experiment, 0, settings)
    raw = np.array(experiment.imageset.get_raw_data(0)[0])
    np.testing.assert_allclose(photons, (raw - 2.0) / 4.0)
    np.testing.assert_array_equal(trusted, (raw >= 1) & (raw <= 5))
    assert 0 < trusted.sum() < len(raw)


def test_ellipsoids_pixel_by_pixel():
    """Against Miller indices of single pixels by scitbx."""
    experiment = _experiment()
    radius = 0.012
    settings = BackgroundSettings(
        bragg=BraggSettings(semi_axes=(radius,) * 3, unit="inverse_angstrom")
    )
    pixels = make_pixels(experiment, settings)
    found = near_bragg(pixels.e, frame_model(experiment, 0), experiment, settings)
    a = matrix.sqr(experiment.crystal.get_A())
    s0 = matrix.col(experiment.beam.get_s0())
    rng = np.random.default_rng(7)
    n_near = 0
    fast, slow = pixels.places(1)
    for i in rng.integers(len(fast), size=300):
        ray = matrix.col(experiment.detector[1].get_pixel_lab_coord((fast[i], slow[i])))
        h = a.inverse() * (ray.normalize() * s0.length() - s0)
        offset = a * matrix.col([x - round(x) for x in h])
        if abs(offset.length() - radius) > 1e-5:
            assert found[pixels.panels[1]][i] == (offset.length() < radius)
        n_near += offset.length() < radius
    assert 10 < n_near < 290


def test_surroundings_of_a_spot_stay_on_its_panel():
    pixels = make_pixels(_experiment(), BackgroundSettings())
    photons = np.ones(len(pixels.flat))
    fast, slow = pixels.places(0)
    spot = np.flatnonzero((fast == 69.5) & (slow == 30.5))[0]
    photons[spot] = 50
    expected, used = np.ones(len(photons)), np.ones(len(photons), dtype=bool)
    near = near_spots(photons, expected, used, pixels, 2)
    assert near.sum() == 15  # 5 x 3, as the spot is in the last column
    assert not near[pixels.panels[1]].any()
    assert not near_spots(photons, expected, used, pixels, -1).any()
    used[spot] = False  # a hot pixel is no spot
    assert not near_spots(photons, expected, used, pixels, 2).any()
