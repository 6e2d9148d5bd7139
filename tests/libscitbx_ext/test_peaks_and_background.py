"""Bragg peaks, wide images and background in the C++ pixel loop, against its numpy twin."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from pixel_loop_twin import (
    HALF_SIZE,
    SIZE,
    ExtrasInput,
    FrameInput,
    PanelInput,
    Twin,
    assert_sums_equal,
    integer_image,
    loop_sums,
    mask_pixels_of_two_points,
    mask_unsure_pixels,
    twin_sums,
)

import dials_diffuse_ext as ext

N_VOXELS = int(np.prod(2 * np.array(HALF_SIZE) + 1))


def images_of(frames, *extras):
    panel = PanelInput(1)
    images = [
        (panel, frame, integer_image(number), *extras)
        for number, frame in enumerate(frames)
    ]
    mask_unsure_pixels(images)
    return images


def is_odd(hkl):
    """A centring: half of the points are absent."""
    return hkl.sum(axis=0) % 2 == 1


@pytest.mark.parametrize(
    "frame",
    [
        {"exclusion": "hkl"},
        {"exclusion": "sphere", "growth": 9.0},
        {"exclusion": "hkl", "degrees": 2.0},
        {"exclusion": "sphere", "growth": 9.0, "radial": 1e-3, "growth_radial": 2.0},
        {"exclusion": "sphere", "growth": 9.0, "radial": 1e-3, "degrees": 2.0},
        {"exclusion": "sphere", "degrees": 3.0, "spread": True},
        {"exclusion": "none", "degrees": 2.0, "spread": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("absent", [None, is_odd])
def test_peaks_are_added_up_under_their_lattice_point(frame, absent):
    images = images_of([FrameInput(z, **frame) for z in (0.5, 1.5)])
    mask_pixels_of_two_points(images)
    expected = twin_sums(images, keep_peaks=True, absent=absent)
    found = loop_sums(images, keep_peaks=True, absent=absent)
    z, z_expected = found.pop("z"), expected.pop("z")
    np.testing.assert_allclose(z, z_expected, rtol=1e-12)
    assert_sums_equal(found, expected)
    has_peaks = frame["exclusion"] != "none"
    assert np.any(found["voxel"] >= N_VOXELS) == has_peaks
    if absent is not None:
        return
    # voxels are the same whether peaks are kept or dropped
    dropped = loop_sums(images)
    is_voxel = found["voxel"] < N_VOXELS
    for name in ("voxel", "value", "n_pixels"):
        np.testing.assert_array_equal(dropped[name], found[name][is_voxel])


@pytest.mark.parametrize("spread", [False, True])
def test_points_that_only_the_ends_of_an_image_reach(spread):
    """A pixel may pass a lattice point that is not nearest to it at its own angle."""
    frames = [FrameInput(z, degrees=6.0, spread=spread) for z in (0.5, 1.5)]
    images = images_of(frames)
    twins = [Twin(panel, frame) for panel, frame, _ in images]
    assert sum(np.sum(t.near & t.other_point & (t.voxel >= 0)) for t in twins) > 50
    found, expected = loop_sums(images), twin_sums(images)
    np.testing.assert_allclose(found.pop("z"), expected.pop("z"), rtol=1e-12)
    assert_sums_equal(found, expected)


def test_no_pixel_is_lost_between_voxels_and_peaks():
    images = images_of([FrameInput(exclusion="sphere", growth=9.0)])
    whole = images_of([FrameInput(exclusion="none")])
    whole[0][0].weight[:] = images[0][0].weight
    parts, total = loop_sums(images, keep_peaks=True), loop_sums(whole)
    for name in ("n_pixels", "value", "weight", "x", "y"):
        assert parts[name].sum() == total[name].sum()


def test_a_wide_image_loses_more_pixels_to_peaks():
    lost = [
        loop_sums(images_of([FrameInput(degrees=degrees)]))["n_pixels"].sum()
        for degrees in (0.0, 0.5, 2.0)
    ]
    assert lost[0] > lost[1] > lost[2]


def test_peaks_of_other_lattices_are_dropped():
    other = FrameInput(z=20.5)
    images = images_of([FrameInput(z) for z in (0.5, 1.5)], ExtrasInput((other,)))
    mask_unsure_pixels([(images[0][0], other)])
    expected = twin_sums(images, keep_peaks=True)
    assert_sums_equal(loop_sums(images, keep_peaks=True), expected)
    alone = loop_sums([image[:3] for image in images], keep_peaks=True)
    assert expected["n_pixels"].sum() < 0.95 * alone["n_pixels"].sum()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_rectangles(n_threads):
    rng = np.random.default_rng(3)
    corner = np.stack([rng.integers(-3, n, 40) for n in SIZE], axis=-1)
    size = rng.integers(1, 9, (40, 2))
    hkl = rng.integers(-7, 8, (40, 3))  # some are outside
    lower = np.maximum(corner, 0)
    upper = np.maximum(corner + size, lower)
    rows = np.stack(
        [lower[:, 0], upper[:, 0], lower[:, 1], upper[:, 1], *hkl.T], axis=-1
    )
    rows = rows[np.argsort(rows[:, 2], kind="stable")]  # where two overlap, the last
    extras = ExtrasInput(rectangles=tuple(map(tuple, rows)))
    images = images_of([FrameInput(exclusion="none")], extras)
    expected = twin_sums(images, keep_peaks=True)
    assert_sums_equal(loop_sums(images, n_threads, keep_peaks=True), expected)
    assert np.count_nonzero(expected["voxel"] >= N_VOXELS) > 10
    dropped = loop_sums(images, n_threads)
    assert dropped["n_pixels"].sum() < expected["n_pixels"].sum()


def background_of(kinds):
    rng = np.random.default_rng(8)
    everything = ExtrasInput(
        base=rng.random(SIZE[::-1]),
        base_variance=rng.random(SIZE[::-1]),
        rate=0.3,
        profile=rng.random(12) - 0.3,
        s_start=0.08,
        s_step=0.02,
        nodes=rng.random((5, 6)) - 0.3,
        spacing=13.0,
        unit=2.0**-30,
    )
    unused = {name: None for name in ("base", "profile", "nodes") if name not in kinds}
    return dataclasses.replace(everything, **unused)


@pytest.mark.parametrize(
    "kinds", [("base",), ("profile",), ("nodes",), ("base", "profile", "nodes")]
)
def test_background(kinds):
    extras = background_of(kinds)
    images = images_of([FrameInput(z, degrees=1.0) for z in (0.5, 1.5)], extras)
    expected = twin_sums(images, keep_peaks=True)
    found = loop_sums(images, keep_peaks=True)
    for name in ("background", "variance"):
        np.testing.assert_allclose(
            found.pop(name), expected.pop(name), rtol=1e-4, atol=1e-5
        )
    assert_sums_equal(found, expected)


def test_pixels_without_a_measured_background_are_left_out():
    extras = background_of(("base",))
    unmeasured = np.random.default_rng(2).random(extras.base.shape) < 0.1
    holes = np.where(unmeasured, np.nan, extras.base)
    images = images_of([FrameInput()], dataclasses.replace(extras, base=holes))
    masked = images_of([FrameInput()], extras)
    masked[0][0].weight[unmeasured] = 0
    assert_sums_equal(loop_sums(images), loop_sums(masked))


def test_background_is_linear_in_its_parts():
    whole, parts = (
        loop_sums(images_of([FrameInput()], background_of(kinds)))["background"]
        for kinds in (("base", "profile", "nodes"), ("base", "nodes"))
    )
    profile = loop_sums(images_of([FrameInput()], background_of(("profile",))))
    np.testing.assert_allclose(whole, parts + profile["background"], atol=1e-5)


def test_wrong_extras_are_refused():
    panel, frame = PanelInput(), FrameInput()
    extras = ext.ImageExtras()
    small = ExtrasInput(base=np.zeros((2, 2)), base_variance=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="another size than its panel"):
        loop_sums([(panel, frame, integer_image(), small)])
    for wrong in (
        {"profile": np.zeros(1)},
        {"profile": np.zeros(3), "s_step": 0.0},
        {"nodes": np.zeros((1, 4))},
        {"base": np.zeros((2, 2)), "base_variance": np.zeros((2, 3))},
        {"rectangles": ((1, 2, 3),)},
    ):
        with pytest.raises(ValueError):
            ExtrasInput(**wrong).ext()
    accumulator = ext.Accumulator(HALF_SIZE, 1)
    with pytest.raises(ValueError, match="as many extras"):
        accumulator.add_images(panel.ext(), [frame.ext()], [None], [extras, extras])
    with pytest.raises(ValueError, match="absent needs a flag"):
        loop_sums([], absent=lambda hkl: np.zeros(3, dtype=bool), keep_peaks=True)
