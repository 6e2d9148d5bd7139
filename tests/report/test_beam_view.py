from __future__ import annotations

import math

import numpy as np
import pytest
from simulate_images import make_beam, make_detector

from dxtbx.model import Detector
from dxtbx.model.beam import BeamFactory

from dials_diffuse.report.beam_view import (
    beam_view,
    close_gaps,
    coarse_detector,
    pixel_spacing,
    resolution_circles,
    spaced_pixels,
    to_picture,
)

BEAM = BeamFactory.simple(1.1)  # along -z


def detector_of(*turns: float) -> Detector:
    """A panel of 70 x 50 pixels for each turn about the vertical axis, degrees.

    One that is not turned is perpendicular to the beam.
    """
    detector = Detector()
    for turn in turns:
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        rotation = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        panel = detector.add_panel()
        panel.set_image_size((70, 50))
        panel.set_pixel_size((0.4, 0.4))
        frame = [(1, 0, 0), (0, -1, 0), (-33.5 * 0.4, 24.25 * 0.4, -30)]
        panel.set_frame(*(tuple(rotation @ np.array(axis)) for axis in frame))
    return detector


@pytest.mark.parametrize("size, spacing", [((70, 50), 1), ((70, 50), 6), ((5, 90), 8)])
def test_fields_cover_the_panel(size, spacing):
    detector = make_detector(1, size, 20.0, parallax=False)
    coarse = coarse_detector(detector, spacing)
    for n, (coarse_panel, panel) in enumerate(zip(coarse, detector)):
        assert np.allclose(coarse_panel.get_image_size_mm(), panel.get_image_size_mm())
        fast, slow = spaced_pixels(panel, spacing)
        assert coarse_panel.get_image_size() == (len(fast), len(slow))
        corner = [panel.get_pixel_lab_coord((fast[-1] + 0.5, slow[-1] + 0.5))]
        corner.append(
            coarse_panel.get_pixel_lab_coord((len(fast) - 0.5, len(slow) - 0.5))
        )
        assert math.dist(*corner) <= panel.get_pixel_size()[0]
    assert pixel_spacing(detector, math.prod(size) // spacing**2) == spacing


@pytest.mark.parametrize("turns", [(0,), (0, 25), (-30, 12, 40)])
@pytest.mark.parametrize("spacing", [1, 4])
@pytest.mark.parametrize("beam", [BEAM, make_beam(1.1)], ids=["along z", "oblique"])
def test_pixels_are_seen_at_their_scattering_angle(turns, spacing, beam):
    """tan 2θ from the beam, for panels that are turned about the sample."""
    detector = detector_of(*turns)
    view = beam_view(detector, beam, spacing)
    two_theta = np.concatenate(
        [
            [
                panel.get_two_theta_at_pixel(beam.get_s0(), (float(x), float(y)))
                for y in (np.arange(n_slow) + 0.5) * 50 / n_slow
                for x in (np.arange(n_fast) + 0.5) * 70 / n_fast
            ]
            for panel, (n_fast, n_slow) in zip(
                detector, (map(len, spaced_pixels(p, spacing)) for p in detector)
            )
        ]
    )
    seen = np.hypot(view.rings.u, view.rings.v) * view.rings.step
    np.testing.assert_allclose(seen, np.tan(two_theta), rtol=1e-5)


@pytest.mark.parametrize("spacing", [1, 3, 4])
def test_flat_detector_is_seen_in_its_own_pixels(spacing):
    detector = detector_of(0)
    view = beam_view(detector, BEAM, spacing)
    x, y = detector[0].get_beam_centre_px(BEAM.get_s0())
    row, column, shape = view.cells()
    left, right, bottom, top = view.extent(shape)
    assert left == pytest.approx(-x, abs=0.1)  # fields are not all as wide
    assert right == pytest.approx(70 - x, abs=view.size)
    assert bottom == pytest.approx(-y, abs=view.size)
    assert top == pytest.approx(50 - y, abs=view.size)
    assert np.abs((bottom + top) / 2 - (25 - y)) <= view.size
    n = to_picture(np.ones(len(row)), row, column, shape)
    assert np.isfinite(n).all()  # no holes


def test_beam_is_at_the_origin_and_up_is_up():
    """A pixel is in the cell where its place along the beam is."""
    detector = detector_of(0)
    view = beam_view(detector, BEAM, 1)
    row, column, shape = view.cells()
    left, _, _, top = view.extent(shape)
    place = np.array(list(np.ndindex(50, 70)))[:, ::-1] + 0.5
    lab = np.array([detector[0].get_pixel_lab_coord(tuple(p)) for p in place.tolist()])
    pixel = detector[0].get_pixel_size()[0]
    np.testing.assert_array_equal(column, (lab[:, 0] / pixel - left) // view.size)
    np.testing.assert_array_equal(row, (top - lab[:, 1] / pixel) // view.size)


def test_circles_are_of_equal_resolution():
    detector = detector_of(0)
    view = beam_view(detector, BEAM, 2)
    _, _, shape = view.cells()
    extent = view.extent(shape)
    circles = resolution_circles(BEAM, view.rings.step, extent)
    assert len(circles) > 2
    x, y = detector[0].get_beam_centre_px(BEAM.get_s0())
    for d, radius in circles:
        found = detector[0].get_resolution_at_pixel(BEAM.get_s0(), (x + radius, y))
        assert found == pytest.approx(d, rel=1e-5)
    assert circles[-1][1] == pytest.approx(max(map(abs, extent)))


def test_mean_of_the_values_of_a_cell():
    values = np.array([1.0, 3.0, 7.0, np.nan, 9.0])
    picture = to_picture(values, np.array([0, 0, 1, 1, -1]), np.zeros(5, int), (3, 1))
    np.testing.assert_array_equal(picture, [[2.0], [7.0], [np.nan]])


def test_narrow_gaps_are_closed_and_wide_ones_stay():
    row, column = np.mgrid[:12, :15]
    plane = 3.0 + 0.1 * row - 0.2 * column
    given = plane.copy()
    given[4], given[:, 7] = np.nan, np.nan  # gaps that cross
    given[8:10] = np.nan  # two cells wide
    given[-1, -1] = np.nan  # beyond the corner
    closed = close_gaps(given)
    expected = plane.copy()
    expected[8:10] = np.nan
    expected[-1, -1] = np.nan
    np.testing.assert_allclose(closed, expected)
