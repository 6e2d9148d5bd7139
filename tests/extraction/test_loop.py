from __future__ import annotations

import numpy as np
import pytest
from simulate_images import (
    Image,
    MemReader,
    make_beam,
    make_crystal,
    make_detector,
    random_images,
)

from dxtbx.imageset import ImageSequence, ImageSetData
from dxtbx.masking import GoniometerShadowMasker
from dxtbx.model import Experiment, GoniometerFactory, ScanFactory
from scitbx.array_family import flex

from dials_diffuse.extraction.loop import read_image, without_shadow


@pytest.fixture
def shadowed():
    """A sweep about omega of a goniometer with a part that shadows the detector."""
    detector = make_detector(1, (60, 50), 12.0)
    axes = flex.vec3_double([(1, 0, 0), (0.91, -0.298, -0.298), (1, 0, 0)])
    goniometer = GoniometerFactory.multi_axis(
        axes,
        flex.double([0, 60, 0]),
        flex.std_string(["GON_PHI", "GON_KAPPA", "GON_OMEGA"]),
        2,
    )
    n = 12
    scan = ScanFactory.make_scan(
        (1, n), [0.1] * n, (-15.0, 3.0), dict.fromkeys(range(1, n + 1), 0.0)
    )
    # a square between sample and detector, which turns with omega
    corners = [(-1, -1, -6), (1, -1, -6), (1, 1, -6), (-1, 1, -6)]
    masker = GoniometerShadowMasker(
        goniometer, flex.vec3_double(corners), flex.size_t([2] * 4)
    )
    images = [Image(panels) for panels in random_images(n, detector)]
    data = ImageSetData(MemReader(images), masker)
    beam = make_beam()
    imageset = ImageSequence(data, beam, detector, goniometer, scan)
    return Experiment(
        identifier="0",
        beam=beam,
        detector=detector,
        goniometer=goniometer,
        scan=scan,
        crystal=make_crystal(),
        imageset=imageset,
    )


def test_goniometer_shadow_is_left_out(shadowed):
    """Image by image, the pixels that DIALS masks and no others."""
    n_shadowed = set()
    for i in range(len(shadowed.imageset)):
        (panel,) = read_image(shadowed, i)
        (mask,) = shadowed.imageset.get_mask(i)
        never = panel.as_numpy_array() == -(2**31)
        np.testing.assert_array_equal(never, ~mask.as_numpy_array())
        n_shadowed.add(int(never.sum()))
    assert len(n_shadowed) > 2 and max(n_shadowed) > 0  # it moves with the scan


def test_image_itself_is_not_changed(shadowed):
    raw = shadowed.imageset.get_raw_data(0)[0].as_numpy_array().copy()
    read_image(shadowed, 0)
    np.testing.assert_array_equal(
        shadowed.imageset.get_raw_data(0)[0].as_numpy_array(), raw
    )


def test_floating_point_pixels_become_nan():
    mask = flex.bool(flex.grid(2, 3), True)
    mask[1, 2] = False
    (panel,) = without_shadow((flex.double(flex.grid(2, 3), 1.0),), (mask,))
    assert np.isnan(panel[1, 2]) and np.nansum(panel.as_numpy_array()) == 5
