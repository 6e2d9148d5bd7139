from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse.simulation.models import make_detector
from dials_diffuse.simulation.settings import (
    PRESETS,
    DetectorSettings,
    SimulationSettings,
)
from dials_diffuse.simulation.shadows import gap_mask, shadow


def given(**kwargs) -> SimulationSettings:
    values = {"size": (60, 50), "pixel": 0.2, "distance": 30.0, **kwargs}
    return SimulationSettings(detector=DetectorSettings(preset="given", **values))


@pytest.mark.parametrize(
    "preset, module", [("pilatus6m", (487, 195)), ("eiger4m", (1030, 514))]
)
def test_modules_of_known_detectors(preset, module):
    (active,) = gap_mask(SimulationSettings(detector=DetectorSettings(preset=preset)))
    size, _, modules, gap = PRESETS[preset]
    assert active.shape == size[::-1]
    assert active.sum() == np.prod(module) * np.prod(modules)
    x, y = (n + g for n, g in zip(module, gap))  # start of the second module
    assert active[0, module[0] - 1] and active[0, x]
    assert not active[:, module[0] : x].any()
    assert active[module[1] - 1, 0] and active[y, 0]
    assert not active[module[1] : y].any()


def test_modules_that_do_not_divide_evenly():
    masks = gap_mask(given(size=(10, 7), modules=(3, 1), gap=(1, 5), panels=(2, 1)))
    assert len(masks) == 2
    for active in masks:
        assert active.shape == (7, 10)
        np.testing.assert_array_equal(active[0], [1, 1, 0, 1, 1, 1, 0, 1, 1, 1])
        assert (active == active[0]).all()


def test_no_gaps():
    (active,) = gap_mask(given())
    assert active.all()


def transmission(s: SimulationSettings) -> list[np.ndarray]:
    return shadow(s, make_detector(s))


def test_disc_and_arm_at_known_pixels():
    """Pixels of 0.2 mm; the beam is at the corner of four pixels."""
    (t,) = transmission(
        given(beamstop=1.3, beamstop_arm=0.9, beam_centre=(20, 30), thickness=0.0)
    )
    y, x = np.mgrid[:50, :60] * 0.2 + 0.1
    x, y = x - 4.0, 6.0 - y
    expected = np.where(x**2 + y**2 < 1.3**2, 0.0, 1.0)
    assert expected[30, 26] == 1 and expected[30, 25] == 0
    expected[:30, 18:22] = 0  # 0.1 and 0.3 mm from the beam, upwards to the edge
    np.testing.assert_array_equal(t, expected)


def test_nothing_in_the_way():
    (t,) = transmission(given(beamstop=0.0, beamstop_arm=0.0))
    assert (t == 1).all()
    (t,) = transmission(given(beamstop=0.0, beamstop_arm=0.5, thickness=0.0))
    assert not t[:25, 29:31].any() and t[25:].all()


@pytest.mark.parametrize("two_theta", [0, 20, -15])
@pytest.mark.parametrize("panels, tilt", [((1, 1), 0), ((2, 2), 14)])
def test_shadow_is_a_cone(two_theta, panels, tilt):
    """The disc covers the same angle wherever the detector stands."""
    s = given(
        panels=panels,
        panel_tilt=tilt,
        two_theta=two_theta,
        beamstop=3.0,
        beamstop_arm=0.0,
        thickness=0.0,
        pixel=0.4,
    )
    n_dark = 0
    for panel, t in zip(make_detector(s), transmission(s)):
        for (slow, fast), value in np.ndenumerate(t[::3, ::3]):
            r = panel.get_pixel_lab_coord((3 * fast + 0.5, 3 * slow + 0.5))
            angle = np.arccos(-r[2] / np.linalg.norm(r))
            assert value == (0 if angle < np.arctan(3.0 / 30.0) else 1)
            n_dark += value == 0
    assert n_dark > 5


def test_shadow_follows_the_beam_over_panels():
    """A detector in parts has the shadow of the whole."""
    common = {"beamstop": 2.0, "beamstop_arm": 0.9, "beam_centre": (55.0, 60.0)}
    (whole,) = transmission(given(size=(120, 100), **common))
    parts = transmission(given(panels=(2, 2), **common))
    np.testing.assert_array_equal(np.block([parts[:2], parts[2:]]), whole)


def test_the_arm_is_not_behind_the_sample():
    s = given(two_theta=80.0, size=(20, 800), beamstop=0.0, beamstop_arm=2.0)
    detector = make_detector(s)
    (t,) = shadow(s, detector)
    assert detector[0].get_pixel_lab_coord((10, 0))[2] > 0  # the upper end
    assert t[0].all() and not t[:, 10].all()


def test_shadow_of_a_large_detector_is_interpolated_well():
    """Within the rounding of edges, pixel by pixel along two lines of pixels."""
    s = SimulationSettings(detector=DetectorSettings(beamstop=30.03, beamstop_arm=1.0))
    detector = make_detector(s)
    (t,) = shadow(s, detector)
    y, x = (n // 2 for n in t.shape)
    for fast, slow in [(i, y) for i in range(487)] + [(x, i) for i in range(619)]:
        lab = detector[0].get_pixel_lab_coord((fast + 0.5, slow + 0.5))
        r = np.hypot(*lab[:2]) * 120 / -lab[2]
        dark = r < 30.03 or (abs(lab[0]) < 0.5 and lab[1] > 0)
        assert t[slow, fast] == (0 if dark else 1)
