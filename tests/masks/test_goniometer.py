"""The shadow of the goniometer by the maskers of dxtbx."""

from __future__ import annotations

import numpy as np
import pytest
from simulate_images import (
    Image,
    make_beam,
    make_crystal,
    make_detector,
    make_scan,
    random_images,
)

from dxtbx import flumpy
from dxtbx.imageset import ImageSequence, ImageSetData, MemReader
from dxtbx.masking import GoniometerMaskerFactory
from dxtbx.model import Experiment, GoniometerFactory
from dxtbx.model.experiment_list import ExperimentList
from scitbx.array_family import flex

from dials_diffuse.masks.make import make_mask
from dials_diffuse.masks.series import make_series
from dials_diffuse.masks.settings import MaskSettings
from dials_diffuse.masks.shadow import goniometer_shadow

N_IMAGES = 6


def shadowed(kind: str, width: float) -> Experiment:
    """A sweep of a wide detector, close to the crystal."""
    names = {"smargon": "PHI CHI OMEGA", "mini_kappa": "PHI KAPPA OMEGA"}[kind]
    axes = flex.vec3_double([(1, 0, 0), (0.0, 0.0, -1.0), (1, 0, 0)])
    if kind == "mini_kappa":
        axes[1] = (0.914, 0.279, -0.297)
    goniometer = GoniometerFactory.multi_axis(
        axes,
        flex.double([0, 45 if kind == "smargon" else 90, 0]),
        flex.std_string([f"GON_{name}" for name in names.split()]),
        2,
    )
    detector = make_detector(1, (100, 90), 30.0, pixel=(1.5, 1.5))
    scan = make_scan(N_IMAGES, width)
    masker = getattr(GoniometerMaskerFactory, kind)(goniometer)
    reader = MemReader([Image(panels) for panels in random_images(N_IMAGES, detector)])
    beam = make_beam()
    imageset = ImageSequence(
        ImageSetData(reader, masker), beam, detector, goniometer, scan
    )
    return Experiment(
        identifier="0",
        beam=beam,
        detector=detector,
        goniometer=goniometer,
        scan=scan,
        crystal=make_crystal(),
        imageset=imageset,
    )


def shadows(e: Experiment) -> np.ndarray:
    """By dxtbx, at the begin, the end and three angles within each image."""
    masker, scan = e.imageset.masker(), e.imageset.get_scan()
    start, width = scan.get_oscillation()
    angles = start + width * (np.arange(N_IMAGES)[:, None] + np.linspace(0, 1, 5))
    return np.array(
        [
            np.any(
                [~flumpy.to_numpy(masker.get_mask(e.detector, a)[0]) for a in of_image],
                axis=0,
            )
            for of_image in angles
        ]
    )


@pytest.mark.parametrize(
    "kind, width", [("smargon", 30.0), ("mini_kappa", 1.0), ("mini_kappa", 30.0)]
)
def test_shadow_of_all_and_of_some_images(kind, width):
    e = shadowed(kind, width)
    truth = shadows(e)
    (series,) = make_series(ExperimentList([e]))
    shadow = goniometer_shadow(series.images, truth[0].size)
    always = truth.all(axis=0)
    np.testing.assert_array_equal(shadow.always.reshape(always.shape), always)
    sometimes = truth.any(axis=0) & ~always
    np.testing.assert_array_equal(shadow.sometimes.reshape(always.shape), sometimes)
    assert shadow.known and truth.any()


def test_pixels_in_a_moving_shadow_stay_in_the_mask():
    """They are left out image by image; their mean is that of the other images."""
    e = shadowed("mini_kappa", 30.0)
    truth = shadows(e)
    (series,) = make_series(ExperimentList([e]))
    made = make_mask(series, MaskSettings(beamstop=False))
    always = truth.all(axis=0)
    sometimes = truth.any(axis=0) & ~always
    assert sometimes.sum() > 50
    np.testing.assert_array_equal(made.layers["goniometer"][0], always)
    assert made.good[0][sometimes].mean() > 0.99
    raw = np.array([e.imageset.get_raw_data(i)[0].as_numpy_array() for i in range(6)])
    mean = np.ma.masked_array(raw, truth).mean(axis=0)
    close = np.isclose(made.mean[0], mean, rtol=1e-6)
    assert close[sometimes].mean() > 0.95  # but for outliers that are cut off
    assert any(f"{sometimes.sum()} more lie in it in some" in x for x in made.notes)
