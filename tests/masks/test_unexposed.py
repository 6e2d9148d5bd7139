from __future__ import annotations

import numpy as np
from simulate_images import make_crystal, make_detector, memory_experiment

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.masks.make import MadeMask, make_mask
from dials_diffuse.masks.series import make_series
from dials_diffuse.masks.settings import MaskSettings


def made_of(images: list[np.ndarray]) -> MadeMask:
    detector = make_detector(1, (120, 100))
    experiments = [
        memory_experiment([[image]], detector, make_crystal(), identifier=str(i))
        for i, image in enumerate(images)
    ]
    (series,) = make_series(ExperimentList(experiments))
    return make_mask(series, MaskSettings(beamstop=False, find=()))


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


def test_weak_images_and_single_pixels_have_no_such_area():
    assert not made_of(counts(0.05)).warnings
    images = counts(5)
    for image in images:
        image[::3, ::3] = 0
    assert not made_of(images).warnings
