"""A slow numpy twin of the C++ pixel loop, and the input of both.

The loop computes hkl in single precision: pixels within ``MARGIN`` of a limit may fall
on either side. They are masked in both, after a check that they are few.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from cctbx import uctbx
from dxtbx import flumpy

import dials_diffuse_ext as ext

NDIV = (3, 2, 4)
CELL = uctbx.unit_cell((23, 27, 31, 82, 97, 104))
HALF_SIZE = (16, 20, 29)  # cuts off the outer pixels on each axis
HALF_POINTS = (6, 11, 8)  # lattice points
GOLDEN = (np.sqrt(5) - 1) / 2
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

    def __init__(
        self,
        z=0.5,
        exclusion="hkl",
        s_min=0.05,
        s_max=0.42,
        growth=0.0,
        degrees=0.0,
        spread=False,
        growth_radial=0.0,
        radial=0.0,
    ):
        b = np.array(CELL.fractionalization_matrix()).reshape(3, 3).T
        u = Rotation.from_euler("xyz", [20 + z, -35, 50], True).as_matrix()
        self.w = np.diag(NDIV) @ np.linalg.inv(u @ b)
        s0 = np.array([0.02, 0.01, -1.0])
        self.s0 = s0 / np.linalg.norm(s0) / WAVELENGTH
        self.z = z
        self.exclusion = EXCLUSIONS[exclusion]
        self.s_min, self.s_max = s_min, s_max
        self.growth, self.spread = growth, spread
        self.growth_radial, self.radial = growth_radial, radial
        axis = np.array([0.6, 0.64, 0.48]) * np.radians(degrees) / 2
        turn = [Rotation.from_rotvec(x).as_matrix() for x in (-axis, axis)]
        self.sweep = self.w @ (turn[0] - turn[1])
        self.sweeps = degrees > 0

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
            growth=self.growth,
            sweep=tuple(self.sweep.ravel()) if self.sweeps else None,
            spread=self.spread,
            growth_radial=self.growth_radial,
            radial=self.radial,
        )

    def shift_of_rows(self):
        """Where the rows of an image are indexed, in widths of the image."""
        if not self.spread:
            return np.zeros(SIZE[1])
        return (np.arange(SIZE[1]) + 0.5) * GOLDEN % 1.0 - 0.5


class Twin:
    """Geometry of the pixels of a frame.

    Attributes:
        voxel: Number of each pixel's voxel in the C-ordered box or -1.
        point: Miller indices of the nearest lattice point, shape (3, n_slow, n_fast).
        near: Whether a point excludes the pixel.
        other_point: Whether the pixel comes close to another point within its image.
        sure: Whether rounding cannot change any of it.
    """

    def __init__(self, panel, frame, half_size=HALF_SIZE):
        half = np.array(half_size)[:, None, None]
        rlp = panel.e.astype(float) / WAVELENGTH - frame.s0[:, None, None]
        s = np.sqrt(np.sum(rlp**2, axis=0))
        change = np.tensordot(frame.sweep, rlp, axes=1)
        shift = frame.shift_of_rows()[:, None]
        h = np.tensordot(frame.w, rlp, axes=1) + shift * change
        index = np.floor(h + 0.5).astype(int)
        inside = (s >= frame.s_min) & (s <= frame.s_max)
        inside &= np.all(np.abs(index) <= half, axis=0)
        self.sure = np.all(np.abs(h + 0.5 - np.rint(h + 0.5)) > MARGIN, axis=0)
        for limit in (frame.s_min, frame.s_max):
            self.sure &= np.abs(s - limit) > MARGIN * 0.01
        size = 2 * np.array(half_size) + 1
        index = index + half
        place = (index[0] * size[1] + index[1]) * size[2] + index[2]
        self.voxel = np.where(inside, place, -1)
        hkl = h / np.array(NDIV)[:, None, None]
        self.point = np.floor(hkl + 0.5).astype(int)
        self.near = np.zeros(s.shape, dtype=bool)
        self.other_point = np.zeros(s.shape, dtype=bool)
        if frame.exclusion is not None:
            self.exclude(frame, hkl, change, shift, s)

    def exclude(self, frame, hkl, change, shift, s):
        """The least distance by trying many angles, each with its own nearest point.

        There the radial term is taken.
        """
        g11, g22, g33, g12, g13, g23 = frame.exclusion
        g = np.array([[g11, g12, g13], [g12, g22, g23], [g13, g23, g33]])
        v = change / np.array(NDIV)[:, None, None]
        distance, along = np.full(s.shape, np.inf), np.zeros(s.shape)
        limit = 1 + frame.growth * s**2
        at_row = self.point
        for t in np.linspace(-0.5, 0.5, 1001) if frame.sweeps else [0.0]:
            h = hkl + (t - shift) * v
            point = np.floor(h + 0.5).astype(int)
            d = h - point
            q = np.einsum("iyx,ij,jyx->yx", d, g, d)
            self.other_point |= np.any(point != at_row, axis=0) & (q < 1.5 * limit)
            nearer = q < distance
            along = np.where(nearer, np.einsum("iyx,ij,jyx->yx", d, g, hkl), along)
            self.point = np.where(nearer, point, self.point)
            distance = np.minimum(distance, q)
        distance += frame.radial * along**2 / (1 + frame.growth_radial * s**2)
        self.near = distance < limit
        self.sure &= np.abs(distance - limit) > MARGIN


def twin_voxels(panel, frame, half_size=HALF_SIZE):
    """Number of each pixel's voxel or -1, also where excluded, and whether it is sure."""
    twin = Twin(panel, frame, half_size)
    return np.where(twin.near, -1, twin.voxel), twin.sure


@dataclasses.dataclass
class ExtrasInput:
    """What else is known of an image, as the extension and the twin take it.

    Attributes:
        others: Frames of other lattices.
        rectangles: Rows x0, x1, y0, y1, h, k, l.
        base, base_variance, rate: Measured background and its scale.
        profile, s_start, s_step: Intensity of the background by resolution.
        nodes, spacing: Intensity of the background at nodes of the panel.
        unit: Photons per unit of intensity and weight.
    """

    others: tuple = ()
    rectangles: tuple = ()
    base: np.ndarray | None = None
    base_variance: np.ndarray | None = None
    rate: float = 1.0
    profile: np.ndarray | None = None
    s_start: float = 0.0
    s_step: float = 1.0
    nodes: np.ndarray | None = None
    spacing: float = 1.0
    unit: float = 1.0

    def ext(self):
        extras = ext.ImageExtras()
        for frame in self.others:
            extras.add_other(frame.ext())
        if self.rectangles:
            columns = np.array(self.rectangles, dtype=np.int32).ravel()
            extras.set_rectangles(as_flex(columns), HALF_POINTS)
        if self.base is not None:
            arrays = (self.base, self.base_variance)
            base, variance = (as_flex(a.astype(np.float32).ravel()) for a in arrays)
            extras.set_base(base, variance, self.rate)
        if self.profile is not None:
            profile = as_flex(self.profile.astype(np.float32))
            extras.set_profile(profile, self.s_start, self.s_step)
        if self.nodes is not None:
            nodes = as_flex(self.nodes.astype(np.float32).ravel())
            extras.set_grid(nodes, *self.nodes.shape[::-1], self.spacing)
        extras.set_unit(self.unit)
        return extras

    def background(self, panel, frame):
        """Background of each pixel and its variance."""
        result, variance = np.zeros(panel.weight.shape), np.zeros(panel.weight.shape)
        if self.base is not None:
            result = self.rate * self.base
            variance = self.rate**2 * self.base_variance
        intensity = np.zeros(result.shape)
        if self.profile is not None:
            rlp = panel.e.astype(float) / WAVELENGTH - frame.s0[:, None, None]
            s = np.sqrt(np.sum(rlp**2, axis=0))
            at = self.s_start + self.s_step * np.arange(len(self.profile))
            intensity = intensity + np.interp(s, at, self.profile)
        if self.nodes is not None:
            y, x = np.indices(result.shape) + 0.5
            at = np.array([y, x]) / self.spacing
            last = np.array(self.nodes.shape)[:, None, None] - 1
            intensity = intensity + map_coordinates(
                self.nodes, np.minimum(at, last), order=1, mode="nearest"
            )
        return result + intensity * self.unit * panel.weight, variance


def twin_places(panel, frame, extras, half_size, keep_peaks, absent):
    """Number of each pixel's voxel or lattice point, or -1.

    Args:
        absent: Function of Miller indices, shape (3, ...), or None.
    """
    n_voxels = int(np.prod(2 * np.array(half_size) + 1))
    half = np.array(HALF_POINTS)[:, None, None]
    size = 2 * np.array(HALF_POINTS) + 1

    def place_of_point(hkl):
        inside = np.all(np.abs(hkl) <= half, axis=0)
        place = np.ravel_multi_index(tuple(np.where(inside, hkl + half, 0)), size)
        return np.where(inside & keep_peaks, n_voxels + place, -1)

    twin = Twin(panel, frame, half_size)
    result = twin.voxel
    near = twin.near if absent is None else twin.near & ~absent(twin.point)
    result = np.where(near & (result >= 0), place_of_point(twin.point), result)
    for other in extras.others if extras else ():
        twin = Twin(panel, other, half_size)
        result = np.where(twin.near & (twin.voxel >= 0), -1, result)
    for x0, x1, y0, y1, *hkl in extras.rectangles if extras else ():
        part = result[y0:y1, max(x0, 0) : x1]
        place = int(place_of_point(np.array(hkl)[:, None, None])[0, 0])
        part[part >= 0] = place
    return result


def twin_sums(images, half_size=HALF_SIZE, keep_peaks=False, absent=None):
    """Sums per voxel over (panel, frame, data[, extras]), as ``Accumulator.finish``."""
    n_places = int(np.prod(2 * np.array(half_size) + 1))
    n_places += int(np.prod(2 * np.array(HALF_POINTS) + 1))
    names = ("n_pixels", "value", "weight", "x", "y", "z", "background", "variance")
    sums = {name: np.zeros(n_places) for name in names}
    for panel, frame, data, *rest in images:
        extras = rest[0] if rest else None
        place = twin_places(panel, frame, extras, half_size, keep_peaks, absent)
        good = (place >= 0) & (panel.weight > 0)
        good &= (data >= panel.low) & (data <= panel.high)  # False for NaN
        slow, fast = np.nonzero(good)
        zero = np.zeros(good.shape)
        background = extras.background(panel, frame) if extras else (zero, zero)
        terms = {
            "n_pixels": np.ones(len(slow)),
            "value": data[good],
            "weight": panel.weight[good],
            "x": fast + 0.5,
            "y": slow + 0.5,
            "z": frame.z + frame.shift_of_rows()[slow],
            "background": background[0][good],
            "variance": background[1][good],
        }
        for name, term in terms.items():
            np.add.at(sums[name], place[good], term)
    (seen,) = np.nonzero(sums["n_pixels"])
    return {"voxel": seen, **{name: column[seen] for name, column in sums.items()}}


def loop_sums(images, n_threads=1, half_size=HALF_SIZE, keep_peaks=False, absent=None):
    flags = None
    if absent is not None:
        points = np.indices(2 * np.array(HALF_POINTS) + 1).reshape(3, -1)
        flags = as_flex(absent(points - np.array(HALF_POINTS)[:, None]))
    accumulator = ext.Accumulator(
        half_size, n_threads, HALF_POINTS if keep_peaks else None, flags
    )
    for panel in dict.fromkeys(image[0] for image in images):
        own = [image for image in images if image[0] is panel]
        extras = [image[3].ext() for image in own if len(image) > 3]
        accumulator.add_images(
            panel.ext(),
            [frame.ext() for _, frame, *_ in own],
            [as_flex(data) for _, _, data, *_ in own],
            extras or None,
        )
    return {k: flumpy.to_numpy(v) for k, v in accumulator.finish().items()}


def mask_pixels_of_two_points(images):
    """Gives weight 0 to pixels that come close to another lattice point in their image.

    Which of the two they are added to depends on the order in which they are tried.
    """
    for panel, frame, *_ in images:
        twin = Twin(panel, frame)
        panel.weight[twin.near & twin.other_point] = 0


def mask_unsure_pixels(images):
    """Gives weight 0 to pixels that rounding may put on either side of a limit."""
    for panel, frame, *_ in images:
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
