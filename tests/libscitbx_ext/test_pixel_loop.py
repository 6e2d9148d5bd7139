"""The C++ pixel loop against a slow numpy twin."""

from __future__ import annotations

import numpy as np
import pytest
from pixel_loop_twin import (
    EXCLUSIONS,
    HALF_SIZE,
    MARGIN,
    NDIV,
    SIZE,
    WAVELENGTH,
    FrameInput,
    PanelInput,
    as_flex,
    assert_sums_equal,
    double_image,
    integer_image,
    loop_sums,
    mask_unsure_pixels,
    twin_sums,
    twin_voxels,
)

from dxtbx import flumpy

import dials_diffuse_ext as ext
from dials_diffuse.grid import Grid


@pytest.mark.parametrize("exclusion", EXCLUSIONS)
@pytest.mark.parametrize(
    "make_image, rtol", [(integer_image, 0), (double_image, 1e-12)]
)
def test_loop_equals_numpy_twin(make_image, rtol, exclusion):
    panels = PanelInput(1), PanelInput(2)
    images = [
        (panel, FrameInput(z, exclusion), make_image(int(z)))
        for panel in panels
        for z in (0.5, 1.5, 2.5)
    ]
    mask_unsure_pixels(images)
    assert_sums_equal(loop_sums(images), twin_sums(images), rtol)


def test_voxels_equal_numpy_twin():
    panel, frame = PanelInput(), FrameInput(exclusion="sphere")
    expected, sure = twin_voxels(panel, frame)
    found = flumpy.to_numpy(ext.voxels(HALF_SIZE, panel.ext(), frame.ext()))
    found = found.reshape(expected.shape)
    np.testing.assert_array_equal(found[sure], expected[sure])
    # every limit is at work
    assert np.count_nonzero(expected >= 0) > 500
    no_limits = FrameInput(exclusion="none", s_min=0, s_max=9)
    inside = twin_voxels(panel, no_limits, (999, 999, 999))[0] >= 0
    assert inside.all()
    for other in (
        FrameInput(exclusion="none"),
        FrameInput(exclusion="sphere", s_min=0),
        FrameInput(exclusion="sphere", s_max=9),
    ):
        assert np.any((twin_voxels(panel, other)[0] >= 0) & (expected < 0))


def test_pixels_on_both_sides_of_the_origin_go_to_the_nearest_voxel():
    """Negative indices are floored, not cast: voxel 0 is no wider than the others."""
    panel = PanelInput()
    frame = FrameInput(exclusion="none", s_min=0, s_max=9)
    half = (60, 60, 60)
    voxel = flumpy.to_numpy(ext.voxels(half, panel.ext(), frame.ext()))
    index = np.stack(np.unravel_index(voxel, (121,) * 3)) - 60
    rlp = panel.e.reshape(3, -1) / WAVELENGTH - frame.s0[:, None]
    h = frame.w @ rlp
    assert np.abs(index - h).max() <= 0.5 + 1e-4
    assert np.any(h < -0.5) and np.any(h > 0.5)


@pytest.mark.parametrize("n_threads", [2, 3, 60])
def test_sums_of_integers_do_not_depend_on_threads(n_threads):
    panel = PanelInput()
    images = [(panel, FrameInput(z), integer_image()) for z in (0.5, 1.5)]
    assert_sums_equal(loop_sums(images, n_threads), loop_sums(images, 1))


def test_sums_of_floating_point_images_depend_on_threads_by_rounding_only():
    panel = PanelInput()
    images = [(panel, FrameInput(z), double_image()) for z in (0.5, 1.5)]
    assert_sums_equal(loop_sums(images, 3), loop_sums(images, 1), rtol=1e-13)


def test_sums_of_parts_equal_the_sum_of_all():
    images = [
        (panel, FrameInput(z), integer_image(int(z)))
        for panel in (PanelInput(1), PanelInput(2))
        for z in (0.5, 1.5)
    ]
    whole = loop_sums(images)
    parts = [loop_sums(images[:1]), loop_sums(images[1:])]
    voxel = np.concatenate([part["voxel"] for part in parts])
    assert set(whole["voxel"]) == set(voxel)
    for name in set(whole) - {"voxel"}:
        total = np.zeros(voxel.max() + 1)
        np.add.at(total, voxel, np.concatenate([part[name] for part in parts]))
        np.testing.assert_array_equal(total[whole["voxel"]], whole[name])


def test_images_of_other_beams_and_limits_do_not_mix():
    """What neighbouring images share, as the usable part of a row, is found anew."""
    loop_panel = PanelInput().ext()
    frames = [FrameInput(0.5), FrameInput(1.5, s_max=0.2), FrameInput(2.5, s_min=0.3)]
    other = FrameInput(3.5)
    other.s0 = np.array([0.0, -0.3, -0.95]) / WAVELENGTH
    frames = [*frames, other, FrameInput(4.5)]
    images = [as_flex(integer_image(i)) for i in range(len(frames))]

    def sums(*batches: list[int]) -> dict[str, np.ndarray]:
        accumulator = ext.Accumulator(HALF_SIZE, 1)
        for batch in batches:
            accumulator.add_images(
                loop_panel, [frames[i].ext() for i in batch], [images[i] for i in batch]
            )
        return {k: flumpy.to_numpy(v).copy() for k, v in accumulator.finish().items()}

    assert_sums_equal(sums([0, 1, 2, 3, 4]), sums([0], [1], [2], [3], [4]))
    seen = [sums([i])["n_pixels"].sum() for i in range(len(frames))]
    assert len(set(seen)) == len(seen)


def test_masked_edges_and_rows():
    panel = PanelInput()
    panel.weight[:, :7] = panel.weight[:, -1] = 0
    panel.weight[[0, 20, 21, 30, -1]] = 0
    panel.weight[30, 33] = 12345  # a row of one pixel
    images = [(panel, FrameInput(z), integer_image(int(z))) for z in (0.5, 1.5)]
    mask_unsure_pixels(images)
    found = loop_sums(images)
    assert_sums_equal(found, twin_sums(images))
    assert found["n_pixels"].sum() > 500


def test_finish_empties_the_accumulator():
    panel, frame = PanelInput(), FrameInput()
    accumulator = ext.Accumulator(HALF_SIZE, 2)
    results = []
    for _ in range(2):
        accumulator.add_images(panel.ext(), [frame.ext()], [as_flex(integer_image())])
        results.append(accumulator.finish())
    for name, column in results[0].items():
        np.testing.assert_array_equal(
            flumpy.to_numpy(results[1][name]), flumpy.to_numpy(column), err_msg=name
        )
    assert all(len(column) == 0 for column in accumulator.finish().values())


def test_zero_counts_are_observations():
    found = loop_sums([(PanelInput(), FrameInput(), np.zeros(SIZE[::-1], np.int32))])
    assert len(found["voxel"]) > 100
    assert np.all(found["value"] == 0)
    assert np.all(found["weight"] > 0)
    assert np.all(found["n_pixels"] > 0)


def test_rejected_values_touch_no_sum():
    """Whatever stands in a rejected pixel, the result is the same."""
    panel, frame = PanelInput(), FrameInput()
    data = integer_image().astype(float)
    masked = panel.weight == 0
    reference = loop_sums([(panel, frame, data)])
    for value in (np.nan, np.inf, -1e300, 5.0):
        data[masked] = value
        other = loop_sums([(panel, frame, data)])
        for name in reference:
            np.testing.assert_array_equal(other[name], reference[name])


@pytest.mark.parametrize(
    "low, high, used",
    [
        (-0.5, 2.5, [0, 1, 2]),
        (1.0, 2.0, [1, 2]),
        (1.1, 2.9, [2]),
        (-1e300, 1e300, [-1, 0, 1, 2, 3]),
        (-np.inf, np.inf, [-1, 0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("dtype", [np.int32, float])
def test_trusted_range_is_inclusive(low, high, used, dtype):
    panel = PanelInput(low=low, high=high)
    frame = FrameInput(exclusion="none")
    rng = np.random.default_rng(5)
    data = rng.integers(-1, 4, SIZE[::-1]).astype(dtype)
    panel.weight[~np.isin(data, used)] = 2**29  # present, but for the trusted range
    found = loop_sums([(panel, frame, data)])
    everything = PanelInput(low=low, high=high)
    everything.weight = np.where(np.isin(data, used), panel.weight, 0).astype(np.int32)
    everything.low, everything.high = -1e300, 1e300
    expected = loop_sums([(everything, frame, data)])
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("half_size", [(16, 20, 29), (3, 1, 2), (0, 0, 0), (5, 4, 7)])
def test_bricks_are_numbered_in_the_order_of_the_grid(half_size):
    """Results are sorted by the key that ``Grid`` gives to a voxel."""
    d_min = 1.0
    cell = [h / n - 0.25 / n for h, n in zip(half_size, NDIV)]
    grid = Grid((*(max(a, 0.05) for a in cell), 90, 90, 90), NDIV, " P 1", d_min)
    assert grid.half_size == half_size
    panel, frame = PanelInput(), FrameInput(exclusion="none", s_min=0.0)
    rlp = panel.e.reshape(3, -1) / WAVELENGTH - frame.s0[:, None]
    hkl = (frame.w @ rlp).T / NDIV
    found = flumpy.to_numpy(ext.voxels(half_size, panel.ext(), frame.ext()))
    index = grid.voxel_index(hkl)
    inside = np.all(np.abs(index) <= half_size, axis=1)
    inside &= np.linalg.norm(rlp, axis=0) <= frame.s_max
    sure = np.all(np.abs(hkl * NDIV + 0.5 - np.rint(hkl * NDIV + 0.5)) > MARGIN, axis=1)
    sure &= np.abs(np.linalg.norm(rlp, axis=0) - frame.s_max) > 1e-4
    assert np.count_nonzero(inside & sure) > 0
    np.testing.assert_array_equal(found[inside & sure], grid.key(index[inside & sure]))
    np.testing.assert_array_equal(found[~inside & sure], -1)
    sums = loop_sums([(panel, frame, integer_image())], half_size=half_size)
    assert np.all(np.diff(sums["voxel"]) > 0)
    assert set(sums["voxel"]) <= set(found[found >= 0])


def test_wrong_input_is_refused():
    panel, frame = PanelInput(), FrameInput()
    accumulator = ext.Accumulator(HALF_SIZE, 1)
    small = as_flex(np.zeros((3, 3), np.int32))
    image = as_flex(integer_image())
    with pytest.raises(ValueError, match="another size than its panel"):
        accumulator.add_images(panel.ext(), [frame.ext()], [small])
    with pytest.raises(ValueError, match="as many frames as images"):
        accumulator.add_images(panel.ext(), [frame.ext()], [image, image])
    with pytest.raises(TypeError, match="type"):
        accumulator.add_images(
            panel.ext(), [frame.ext()] * 2, [image, image.as_double()]
        )
    assert len(accumulator.finish()["voxel"]) == 0
    with pytest.raises(ValueError, match="n_threads must be positive"):
        ext.Accumulator(HALF_SIZE, 0)
    with pytest.raises(ValueError, match="too many voxels"):
        ext.Accumulator((700, 700, 700), 1)
    with pytest.raises(ValueError, match="negative size"):
        ext.Accumulator((-1, 2, 2), 1)
    frame.exclusion = (1.0, 1.0, 1.0, 2.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="positive matrix"):
        frame.ext()
    panel.weight = panel.weight[1:]
    with pytest.raises(ValueError, match="nfast x nslow"):
        panel.ext()
