"""The shadow of a goniometer during an image, by the maskers of dxtbx."""

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
from scitbx.array_family import flex

from dials_diffuse.geometry import shadow
from dials_diffuse.geometry.shadow import (
    image_shadow,
    knows_shadow,
    outlines,
    pixels_inside,
    polygon_distance,
)

SHAPE = (90, 100)
# Axis of the middle circle, its angle, and further arguments of the masker
KINDS = {
    "smargon": ((0.0, 0.0, -1.0), 45, ()),
    "mini_kappa": ((0.914, 0.279, -0.297), 90, ()),
    "diamond_anvil_cell": ((0.0, 0.0, -1.0), 0, (0.4 * np.pi,)),
}


def make_masker(kind: str):
    axis, angle, arguments = KINDS[kind]
    goniometer = GoniometerFactory.multi_axis(
        flex.vec3_double([(1, 0, 0), axis, (1, 0, 0)]),
        flex.double([0, angle, 0]),
        flex.std_string(["GON_PHI", "GON_KAPPA", "GON_OMEGA"]),
        2,
    )
    return getattr(GoniometerMaskerFactory, kind)(goniometer, *arguments), goniometer


def sweep(kind: str, width: float, n_images: int = 12, pixel: float = 1.5):
    """A sweep on two panels of a detector, close to the crystal."""
    masker, goniometer = make_masker(kind)
    detector = make_detector(2, (100, 90), 30.0, pixel=(pixel, pixel))
    scan = make_scan(n_images, width)
    images = [Image(panels) for panels in random_images(n_images, detector)]
    data = ImageSetData(MemReader(images), masker)
    beam = make_beam()
    return Experiment(
        identifier="0",
        beam=beam,
        detector=detector,
        goniometer=goniometer,
        scan=scan,
        crystal=make_crystal(),
        imageset=ImageSequence(data, beam, detector, goniometer, scan),
    )


def shadow_at(e: Experiment, angle: float) -> np.ndarray:
    masks = e.imageset.masker().get_mask(e.detector, angle)
    return np.array([~flumpy.to_numpy(mask) for mask in masks])


def angle_of(e: Experiment, place: float) -> float:
    start, width = e.scan.get_oscillation()
    return start + width * place


@pytest.mark.parametrize("kind", KINDS)
def test_stills_have_the_shadow_of_dxtbx(kind):
    """Pixel by pixel; of an image that hardly turns it is that at its angle."""
    seen = set()
    for start in np.arange(0, 360, 23.7):
        e = sweep(kind, 1e-9, n_images=1)
        e.scan.set_oscillation((start, 1e-9))
        e.imageset.set_scan(e.scan)
        found = np.array(image_shadow(e, e.scan.get_array_range()[0]))
        np.testing.assert_array_equal(found, shadow_at(e, start))
        seen.add(int(found.sum()))
    assert knows_shadow(e) and len(seen) > 4


@pytest.mark.parametrize("kind", ["smargon", "mini_kappa"])
@pytest.mark.parametrize("width", [0.2, 2.0, 6.0])
def test_all_that_is_shadowed_during_the_image(kind, width):
    """Against 21 angles: what is between the angles taken is a thin line.

    Control: the shadow at the begin of the image misses more.
    """
    e = sweep(kind, width)
    first = e.scan.get_array_range()[0]
    missed = missed_by_start = edge = 0
    for i in range(0, 12, 3):
        fine = [shadow_at(e, angle_of(e, i + x)) for x in np.linspace(0, 1, 21)]
        truth = np.any(fine, axis=0)
        found = np.array(image_shadow(e, first + i))
        assert not np.any(found & ~truth)
        missed += np.count_nonzero(truth & ~found)
        missed_by_start += np.count_nonzero(truth & ~fine[0])
        edge += np.count_nonzero(np.diff(truth, axis=1)) + 1
    assert missed < 0.5 * edge
    if width > 1:
        assert missed < 0.1 * missed_by_start > 10


def test_number_of_angles(monkeypatch):
    """So many that the edge moves by a pixel between them, at the most five."""
    taken = []

    def counted(*args):
        taken.append(args[-1])
        return outlines(*args)

    monkeypatch.setattr(shadow, "outlines", counted)
    for width, n_angles in ((1e-9, {2}), (0.1, {2}), (30.0, {5})):
        e = sweep("mini_kappa", width)
        e.scan.set_oscillation((10.0, width))
        e.imageset.set_scan(e.scan)
        taken.clear()
        image_shadow(e, e.scan.get_array_range()[0])
        # one more tells whether the masker is inverted
        assert {len(taken) - 1} == n_angles
        assert taken[:2] == pytest.approx([10.0, 10.0 + width])


def test_pixels_inside_a_polygon():
    """A triangle whose pixels can be counted by hand, partly off the panel."""
    corners = np.array([(-2.0, 0.0), (4.0, 0.0), (-2.0, 6.0), (-2.0, 0.0)])
    # x + y < 4
    y, x = np.indices((5, 3)) + 0.5
    np.testing.assert_array_equal(pixels_inside(corners, (5, 3)), x + y < 4)
    assert not pixels_inside(np.zeros((0, 2)), (5, 3)).any()


def test_distance_of_polygons():
    square = np.array([(0.0, 0.0), (4, 0), (4, 4), (0, 4), (0, 0)])
    assert polygon_distance(square, square) == 0
    assert polygon_distance(square, square + [3, 0]) == pytest.approx(3)
    larger = 1.5 * square
    assert polygon_distance(square, larger) == pytest.approx(np.hypot(2, 2))
    nothing = np.zeros((0, 2))
    assert polygon_distance(nothing, nothing) == 0
    assert polygon_distance(square, nothing) == np.inf
