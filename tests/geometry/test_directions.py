from __future__ import annotations

import numpy as np
import pytest
from simulate_images import SILICON_MU, make_beam, make_detector

from dxtbx.model import OffsetParallaxCorrectedPxMmStrategy, Panel
from scitbx.array_family import flex

from dials_diffuse.extraction.settings import CorrectionSettings
from dials_diffuse.extraction.tables import panel_arrays
from dials_diffuse.geometry import directions, interpolation

SIZE = (151, 138)


def exact_rays(panel: Panel) -> np.ndarray:
    """Lab coordinates of all pixel centres by dxtbx, shape (3, n_slow, n_fast)."""
    nfast, nslow = panel.get_image_size()
    rays = [
        panel.get_pixel_lab_coord((i + 0.5, j + 0.5))
        for j in range(nslow)
        for i in range(nfast)
    ]
    return np.array(rays).T.reshape(3, nslow, nfast)


def all_pixels(panel: Panel, parallax: bool = True) -> np.ndarray:
    fast, slow = map(np.arange, panel.get_image_size())
    return directions.lab_coordinates(panel, fast, slow, parallax)


def loop_directions(panel: Panel) -> np.ndarray:
    """Unit vectors as the pixel loop has them."""
    good = np.ones(panel.get_image_size()[::-1], dtype=bool)
    return panel_arrays(panel, make_beam(), good, CorrectionSettings()).e


def rays(panel: Panel) -> np.ndarray:
    """Where the loop's directions meet the panel."""
    return loop_directions(panel) * np.linalg.norm(exact_rays(panel), axis=0)


def pixels_off(panel: Panel, found: np.ndarray, expected: np.ndarray) -> float:
    """Largest distance in pixels."""
    distance = np.sqrt(np.sum((found - expected) ** 2, axis=0))
    return float(distance.max() / min(panel.get_pixel_size()))


def close_tilted_panel(parallax: bool) -> Panel:
    """Rays as oblique as 60 degrees from the normal, on one side more than the other."""
    detector = make_detector(
        size=SIZE, distance=25.0, tilt=20.0, parallax=parallax, pixel=(0.3, 0.25)
    )
    return detector[0]


def offset_strategy(offset: np.ndarray) -> OffsetParallaxCorrectedPxMmStrategy:
    dx, dy = (flex.double(np.ascontiguousarray(o)) for o in offset)
    return OffsetParallaxCorrectedPxMmStrategy(SILICON_MU, 0.45, dx, dy)


@pytest.mark.parametrize("parallax", [False, True])
def test_rays_go_where_dxtbx_puts_the_pixel_centres(parallax):
    panel = close_tilted_panel(parallax)
    expected = exact_rays(panel)
    assert pixels_off(panel, rays(panel), expected) < 1e-3
    # negative control: the parallax is large here
    geometric = all_pixels(panel, parallax=False)
    assert pixels_off(panel, all_pixels(panel), expected) < 1e-9
    assert (pixels_off(panel, geometric, expected) > 0.5) == parallax


def test_parallax_is_within_tolerance_on_a_real_size_of_pixel():
    """0.1 mm pixels and a thick sensor: more pixels of shift, at 2 theta up to 70."""
    detector = make_detector(
        size=SIZE, distance=4.0, tilt=25.0, parallax=True, pixel=(0.1, 0.1)
    )
    panel = detector[0]
    assert pixels_off(panel, rays(panel), exact_rays(panel)) < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 1), (2, 3), (9, 17)])
def test_small_panels(size):
    panel = make_detector(size=size, distance=5.0, tilt=20, parallax=True)[0]
    assert pixels_off(panel, rays(panel), exact_rays(panel)) < 1e-3


def test_table_of_offsets_is_followed_pixel_by_pixel():
    panel = close_tilted_panel(True)
    offset = np.random.default_rng(3).uniform(-0.4, 0.4, (2, *SIZE[::-1]))
    panel.set_px_mm_strategy(offset_strategy(offset))
    assert pixels_off(panel, rays(panel), exact_rays(panel)) < 1e-4


@pytest.mark.parametrize("corner", [(41, 66), (10, 20), (121, 9), (60, 130)])
def test_table_of_offsets_of_a_few_pixels_only(corner):
    """A table that is zero nearly everywhere must not pass for a smooth parallax."""
    panel = close_tilted_panel(True)
    offset = np.zeros((2, *SIZE[::-1]))
    i, j = corner
    offset[:, i : i + 3, j : j + 3] = 0.4
    panel.set_px_mm_strategy(offset_strategy(offset))
    assert pixels_off(panel, rays(panel), exact_rays(panel)) < 1e-3


@pytest.mark.parametrize("parallax", [False, True])
def test_arrays_for_the_loop_are_unit_vectors_to_the_pixels(parallax):
    panel = close_tilted_panel(parallax)
    e = loop_directions(panel)
    assert e.dtype == np.float32
    expected = exact_rays(panel)
    distance = np.linalg.norm(expected, axis=0)
    np.testing.assert_allclose(np.linalg.norm(e.astype(float), axis=0), 1, atol=2e-7)
    assert pixels_off(panel, e * distance, expected) < 1e-3


def test_chunks_of_rows_cover_the_panel(monkeypatch):
    panel = close_tilted_panel(True)
    good = np.random.default_rng(1).random(SIZE[::-1]) < 0.9
    whole = panel_arrays(panel, make_beam(), good, CorrectionSettings())
    monkeypatch.setattr(interpolation, "CHUNK", 1000)
    assert len(list(interpolation.row_chunks(good.shape))) > 10
    parts = panel_arrays(panel, make_beam(), good, CorrectionSettings())
    np.testing.assert_array_equal(parts.e, whole.e)
    np.testing.assert_array_equal(parts.weight, whole.weight)
    np.testing.assert_array_equal(whole.weight == 0, ~good)
