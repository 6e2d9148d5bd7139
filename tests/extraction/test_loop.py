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
    """Image by image, the pixels that dxtbx masks at any time of it and no others."""
    n_shadowed = set()
    masker = shadowed.imageset.masker()
    for i in range(len(shadowed.imageset)):
        (panel,) = read_image(shadowed, i)
        angles = -15.0 + 3.0 * (i + np.linspace(0, 1, 5))
        masks = [masker.get_mask(shadowed.detector, a)[0] for a in angles]
        lit = np.logical_and.reduce([mask.as_numpy_array() for mask in masks])
        never = panel.as_numpy_array() == -(2**31)
        assert np.all(never[~masks[0].as_numpy_array()])
        assert np.count_nonzero(never != ~lit) <= 2  # fewer angles may do
        n_shadowed.add(int(never.sum()))
    assert len(n_shadowed) > 2 and max(n_shadowed) > 0  # it moves with the scan


def test_shadow_leaves_untrusted_values_to_the_settings(shadowed):
    """dxtbx' mask of an image would also mask what the panel does not trust."""
    raw = shadowed.imageset.get_raw_data(0)[0].as_numpy_array()
    for panel in shadowed.detector:
        panel.set_trusted_range((0, float(np.median(raw))))
    (panel,) = read_image(shadowed, 0)
    found = panel.as_numpy_array()
    kept = found != -(2**31)
    assert np.count_nonzero(kept & (raw > np.median(raw))) > 100
    np.testing.assert_array_equal(found[kept], raw[kept])


def test_image_itself_is_not_changed(shadowed):
    raw = shadowed.imageset.get_raw_data(0)[0].as_numpy_array().copy()
    read_image(shadowed, 0)
    np.testing.assert_array_equal(
        shadowed.imageset.get_raw_data(0)[0].as_numpy_array(), raw
    )


def test_floating_point_pixels_become_nan():
    shadow = np.zeros((2, 3), dtype=bool)
    shadow[1, 2] = True
    (panel,) = without_shadow((flex.double(flex.grid(2, 3), 1.0),), [shadow])
    assert np.isnan(panel[1, 2]) and np.nansum(panel.as_numpy_array()) == 5
