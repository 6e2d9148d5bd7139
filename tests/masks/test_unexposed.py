from __future__ import annotations

import numpy as np
from simulate_images import make_crystal, make_detector, memory_experiment

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.masks.make import MadeMask, make_mask
from dials_diffuse.masks.series import make_series
from dials_diffuse.masks.settings import MaskSettings


def made_of(images: list[np.ndarray], find: tuple[str, ...] = ()) -> MadeMask:
    detector = make_detector(1, (120, 100))
    experiments = [
        memory_experiment([[image]], detector, make_crystal(), identifier=str(i))
        for i, image in enumerate(images)
    ]
    (series,) = make_series(ExperimentList(experiments))
    return make_mask(series, MaskSettings(beamstop=False, find=find))


def counts(mean: float, n: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.poisson(mean, (100, 120)).astype(np.int32) for _ in range(n)]


def test_unexposed_corner_is_reported_with_what_to_do():
    images = counts(5)
    for image in images:
        image[:30, 80:] = 10
    (warning,) = made_of(images).warnings
    assert warning.startswith("1200 pixels (10%)")
    assert "x 80 to 120, y 0 to 30" in warning
    assert "trusted_range, from 11 on" in warning
    assert "untrusted.rectangle=80,120,0,30" in warning


def test_no_rectangle_is_advised_where_it_would_take_exposed_pixels():
    images = counts(5)
    for image in images:
        image[:30, 20:] = 10
        image[:90, 90:] = 10
    (warning,) = made_of(images).warnings
    assert "x 20 to 120, y 0 to 90" in warning
    assert "untrusted.rectangle" not in warning
    assert "untrusted.polygon" in warning


def test_what_a_layer_has_is_not_told_again():
    """Dead pixels; control: the same without looking for them."""
    images = counts(50, 20)
    for image in images:
        image[:30, 80:] = 0
    (warning,) = made_of(images).warnings
    assert warning.startswith("1200 pixels")
    assert not any("one value" in w for w in made_of(images, ("dead",)).warnings)


def test_weak_images_and_single_pixels_have_no_such_area():
    assert not made_of(counts(0.05)).warnings
    images = counts(5)
    for image in images:
        image[::3, ::3] = 0
    assert not made_of(images).warnings
