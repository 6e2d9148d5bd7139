"""The C++ pixel loop against a slow numpy twin.

The loop computes hkl in single precision: pixels within ``MARGIN`` of a limit may fall
on either side. They are masked in both, after a check that they are few.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cctbx import uctbx
from dxtbx import flumpy

import dials_diffuse_ext as ext
from dials_diffuse.grid import Grid

NDIV = (3, 2, 4)
CELL = uctbx.unit_cell((23, 27, 31, 82, 97, 104))
HALF_SIZE = (16, 20, 29)  # cuts off the outer pixels on each axis
MARGIN = 2e-3  # voxels, of hkl and of the other limits relative
WAVELENGTH = 1.03
SIZE = (67, 53)  # fast, slow; no multiple of the width of a vector
SPHERE = tuple(np.array(CELL.reciprocal().metrical_matrix()) / 0.008**2)
EXCLUSIONS = {
    "none": None,
    "hkl": (1 / 0.3**2, 1 / 0.2**2, 1 / 0.4**2, 0.0, 0.0, 0.0),
    "sphere": SPHERE,
}


def as_flex(array):
    """A flex array of its own: one that shares numpy's memory would end the process
    when it is freed while an exception of the extension is on its way (flumpy)."""
    return flumpy.from_numpy(np.ascontiguousarray(array)).deep_copy()


class PanelInput:
    """Arrays and numbers of a panel, as the extension and the twin take them."""

    def __init__(self, seed=1, low=0.0, high=60.0):
        rng = np.random.default_rng(seed)
        nfast, nslow = SIZE
        x, y = np.meshgrid(np.arange(nfast) + 0.5, np.arange(nslow) + 0.5)
        position = np.stack([0.31 * (x - 33), -0.29 * (y - 20), np.full_like(x, -17)])
        turn = Rotation.from_euler("xyz", [9, -7, 30 + seed], True).as_matrix()
        position = np.tensordot(turn, position, axes=1)
        e = position / np.linalg.norm(position, axis=0)
        self.e = e.astype(np.float32)
        self.weight = rng.integers(1, 2**30, x.shape).astype(np.int32)
        self.weight[rng.random(x.shape) < 0.1] = 0
        self.low, self.high = low, high

    def ext(self):
        return ext.Panel(
            *(as_flex(component.ravel()) for component in self.e),
            weight=as_flex(self.weight.ravel()),
            nfast=SIZE[0],
            nslow=SIZE[1],
            trusted_min=self.low,
            trusted_max=self.high,
        )


class FrameInput:
    """Numbers of a frame, as the extension and the twin take them."""

    def __init__(self, z=0.5, exclusion="hkl", s_min=0.05, s_max=0.42):
        b = np.array(CELL.fractionalization_matrix()).reshape(3, 3).T
        u = Rotation.from_euler("xyz", [20 + z, -35, 50], True).as_matrix()
        self.w = np.diag(NDIV) @ np.linalg.inv(u @ b)
        s0 = np.array([0.02, 0.01, -1.0])
        self.s0 = s0 / np.linalg.norm(s0) / WAVELENGTH
        self.z = z
        self.exclusion = EXCLUSIONS[exclusion]
        self.s_min, self.s_max = s_min, s_max

    def ext(self):
        return ext.make_frame(
            w=tuple(self.w.ravel()),
            s0=tuple(self.s0),
            wavelength=WAVELENGTH,
            s_min=self.s_min,
            s_max=self.s_max,
            ndiv=tuple(map(float, NDIV)),
            exclusion=self.exclusion,
            z=self.z,
        )


def twin_voxels(panel, frame, half_size=HALF_SIZE):
    """Number of each pixel's voxel in the C-ordered box or -1, and whether that is sure."""
    half = np.array(half_size)[:, None, None]
    rlp = panel.e.astype(float) / WAVELENGTH - frame.s0[:, None, None]
    s = np.sqrt(np.sum(rlp**2, axis=0))
    h = np.tensordot(frame.w, rlp, axes=1)
    index = np.floor(h + 0.5).astype(int)
    inside = (s >= frame.s_min) & (s <= frame.s_max)
    inside &= np.all(np.abs(index) <= half, axis=0)
    sure = np.all(np.abs(h + 0.5 - np.rint(h + 0.5)) > MARGIN, axis=0)
    for limit in (frame.s_min, frame.s_max):
        sure &= np.abs(s - limit) > MARGIN * 0.01
    if frame.exclusion is not None:
        hkl = h / np.array(NDIV)[:, None, None]
        dh = hkl - np.floor(hkl + 0.5)
        g11, g22, g33, g12, g13, g23 = frame.exclusion
        g = np.array([[g11, g12, g13], [g12, g22, g23], [g13, g23, g33]])
        distance = np.einsum("iyx,ij,jyx->yx", dh, g, dh)
        inside &= distance >= 1
        sure &= np.abs(distance - 1) > MARGIN
        sure &= np.all(np.abs(np.abs(dh) - 0.5) > MARGIN, axis=0)
    size = 2 * np.array(half_size) + 1
    index = index + half
    place = (index[0] * size[1] + index[1]) * size[2] + index[2]
    return np.where(inside, place, -1), sure


def twin_sums(images, half_size=HALF_SIZE):
    """Sums per voxel over (panel, frame, data) triples, as ``Accumulator.finish``."""
    n_voxels = int(np.prod(2 * np.array(half_size) + 1))
    sums = {
        name: np.zeros(n_voxels)
        for name in ("n_pixels", "value", "weight", "x", "y", "z")
    }
    for panel, frame, data in images:
        voxel, _ = twin_voxels(panel, frame, half_size)
        good = (voxel >= 0) & (panel.weight > 0)
        good &= (data >= panel.low) & (data <= panel.high)  # False for NaN
        slow, fast = np.nonzero(good)
        terms = {
            "n_pixels": np.ones(len(slow)),
            "value": data[good],
            "weight": panel.weight[good],
            "x": fast + 0.5,
            "y": slow + 0.5,
            "z": np.full(len(slow), frame.z),
        }
        for name, term in terms.items():
            np.add.at(sums[name], voxel[good], term)
    (seen,) = np.nonzero(sums["n_pixels"])
    return {"voxel": seen, **{name: column[seen] for name, column in sums.items()}}


def loop_sums(images, n_threads=1, half_size=HALF_SIZE):
    accumulator = ext.Accumulator(half_size, n_threads)
    panels = dict.fromkeys(panel for panel, _, _ in images)
    for panel in panels:
        accumulator.add_images(
            panel.ext(),
            [frame.ext() for p, frame, _ in images if p is panel],
            [as_flex(data) for p, _, data in images if p is panel],
        )
    return {k: flumpy.to_numpy(v) for k, v in accumulator.finish().items()}


def mask_unsure_pixels(images):
    """Gives weight 0 to pixels that rounding may put on either side of a limit."""
    for panel, frame, _ in images:
        _, sure = twin_voxels(panel, frame)
        assert np.count_nonzero(~sure) < 0.05 * sure.size
        panel.weight[~sure] = 0


def integer_image(seed=3):
    rng = np.random.default_rng(seed)
    data = rng.poisson(20, SIZE[::-1]).astype(np.int32)
    data[rng.random(data.shape) < 0.2] = 0
    data[2, 3:9] = [-1, -2, 61, 60, 10**6, 2**31 - 1]
    return data


def double_image(seed=3):
    data = integer_image(seed) * 1.37
    data[5, 3:9] = [np.nan, np.inf, -np.inf, -1e-9, 60.0000001, 60.0]
    return data


def assert_sums_equal(found, expected, rtol=0.0):
    """Equal, but for a relative error of the values alone: the rest are integers."""
    assert len(expected["voxel"]) > 100
    assert set(found) == set(expected)
    np.testing.assert_allclose(found["value"], expected["value"], rtol, atol=rtol)
    for name in set(found) - {"value"}:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


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
    panel.weight = panel.weight[1:]
    with pytest.raises(ValueError, match="nfast x nslow"):
        panel.ext()
