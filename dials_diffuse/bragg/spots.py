"""Strong Bragg spots of images, seen from the reciprocal lattice points.

Strong pixels are those of DIALS' dispersion threshold; connected ones make a spot. The
pixels of a window about each spot, less the local background, are put into a frame of
their own: ``along`` the way on which the lattice point passes the Ewald sphere (its normal
s1 in a still; the velocity m × rlp during a rotation), ``across`` the scattering vector,
and the third, nearly ``radial``. In the latter two a spot has the width of the peak
itself, whatever part of it an image has swept.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Sequence

import numpy as np
from scipy import ndimage

from dxtbx import flumpy
from dxtbx.model import Experiment, Panel
from scitbx.array_family import flex

from dials.algorithms.image.threshold import DispersionExtendedThreshold
from dials_diffuse.extraction.loop import read_image
from dials_diffuse.extraction.tables import good_pixels
from dials_diffuse.geometry.directions import pixel_to_millimeter
from dials_diffuse.geometry.orientation import (
    FrameModel,
    frame_model,
    inverse,
    rotation_axis,
)
from dials_diffuse.util.compat import inclusive_trusted_range

KERNEL = (3, 3)
SIGMA_BACKGROUND, SIGMA_STRONG, MIN_COUNT = 6.0, 3.0, 2
MIN_SIZE = 3  # pixels of a spot; fewer are hot pixels and zingers
LARGEST_SHARE = 0.9  # of a spot's photons in one pixel
MOST_SPOTS = 400  # of an image, the strongest
HALF_WINDOW = (4, 12)  # pixels, least and most
MOST_OFFSET = 0.35  # fractional index; farther spots belong to no lattice point
STEEPEST = 0.2  # cosine between the path and the normal of the Ewald sphere
STEPS = np.linspace(-0.5, 0.5, 5)  # of an image's rotation, to find the nearest point


@dataclasses.dataclass(frozen=True)
class Spots:
    """Spots and the pixels of their windows.

    Attributes:
        hkl: Nearest lattice point, shape (n, 3).
        s: 1/d of it, Å⁻¹, shape (n,).
        net: Photons above the background, shape (n,).
        offset: Of the spot along the path, beyond what the image swept, Å⁻¹.
        sweep: Length of the path during the image, Å⁻¹; 0 for stills.
        axes: Unit vectors ``across`` and ``radial`` in the crystal's Cartesian frame,
            shape (n, 2, 3).
        x: Pixels from the lattice point along these, Å⁻¹, shape (n, 2, n_px).
        counts: Photons above the background, 0 for pixels that do not count,
            shape (n, n_px).
        strong: Number of strong pixels, shape (n,).
    """

    hkl: np.ndarray
    s: np.ndarray
    net: np.ndarray
    offset: np.ndarray
    sweep: np.ndarray
    axes: np.ndarray
    x: np.ndarray
    counts: np.ndarray
    strong: np.ndarray

    def __len__(self) -> int:
        return len(self.s)

    def select(self, chosen: np.ndarray) -> Spots:
        return Spots(*(getattr(self, f.name)[chosen] for f in dataclasses.fields(self)))


class Rotation(NamedTuple):
    """Of the crystal during an image: axis in the laboratory frame, angle in radians."""

    axis: np.ndarray
    width: float


class Windows(NamedTuple):
    """Windows about the spots of a panel.

    Attributes:
        px: Pixel coordinates (fast, slow) of the pixels, shape (n, n_px, 2).
        counts: Photons above the background, 0 for those that do not count.
        centre: Centres of the spots, px, shape (n, 2).
        net: Photons of their strong pixels above the background.
        strong: Number of strong pixels.
    """

    px: np.ndarray
    counts: np.ndarray
    centre: np.ndarray
    net: np.ndarray
    strong: np.ndarray


def rotation_of_image(experiment: Experiment) -> Rotation | None:
    """The rotation during each image, None for a still."""
    if experiment.is_still():
        return None
    axis = rotation_axis(experiment, 0)
    return Rotation(axis, math.radians(experiment.scan.get_oscillation()[1]))


def usable_pixels(
    experiment: Experiment, mask: tuple[np.ndarray, ...] | None = None
) -> list[np.ndarray]:
    """Pixels of each panel that no static mask leaves out."""
    return [
        good_pixels(panel, number, experiment.imageset, mask)
        for number, panel in enumerate(experiment.detector)
    ]


def photons_of_image(
    experiment: Experiment,
    array_index: int,
    good: Sequence[np.ndarray],
    gain: float | None = None,
    trusted_range: tuple[float, float] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Photons (float64) and usable pixels of each panel, shape (n_slow, n_fast)."""
    result = []
    data = read_image(experiment, array_index)
    for panel, values, usable in zip(experiment.detector, data, good):
        low, high = trusted_range or inclusive_trusted_range(panel)
        raw = flumpy.to_numpy(values).astype(float)
        usable = usable & (raw >= low) & (raw <= high)
        photons = (raw - panel.get_pedestal()) / (gain or panel.get_gain())
        result.append((np.where(usable, photons, 0.0), usable))
    return result


def strong_pixels(photons: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Pixels far above their neighbours, by DIALS' dispersion threshold."""
    shape = photons.shape
    if min(shape) < 2 * max(KERNEL) + 1:
        return np.zeros(shape, dtype=bool)
    threshold = DispersionExtendedThreshold(
        shape, KERNEL, SIGMA_BACKGROUND, SIGMA_STRONG, 0.0, MIN_COUNT
    )
    # copies: arrays that share numpy's memory must not be freed during an exception
    image = flumpy.from_numpy(np.ascontiguousarray(photons)).deep_copy()
    mask = flumpy.from_numpy(np.ascontiguousarray(usable)).deep_copy()
    result = flex.bool(flex.grid(shape), False)
    threshold(image, mask, result)
    return flumpy.to_numpy(result) & usable


def label_spots(strong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the spot of each pixel, 0 for none, and the pixels in each number."""
    labels, _ = ndimage.label(strong, structure=np.ones((3, 3)))
    return labels, np.bincount(labels.ravel())


def lone_pixels(strong: np.ndarray) -> np.ndarray:
    """Strong pixels that are too few together for a spot."""
    labels, sizes = label_spots(strong)
    return strong & (sizes[labels] < MIN_SIZE)


def _background(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean of each row without what is far above its median, shape (n, 1)."""
    masked = np.where(counted, values, np.nan)
    with np.errstate(all="ignore"):
        enough = counted.any(axis=1)
        masked[~enough] = 0.0
        median = np.nanmedian(masked, axis=1)[:, None]
        keep = counted & (values <= median + 4 * np.sqrt(np.maximum(median, 0) + 1))
    n = np.maximum(keep.sum(axis=1), 1)
    return (np.sum(values * keep, axis=1) / n)[:, None]


def spot_windows(photons: np.ndarray, usable: np.ndarray, half: int) -> Windows:
    """Windows of 2 half + 1 pixels about the spots of a panel.

    A pixel counts if it is usable and not strong in another spot. Spots that are too
    small, or have nearly all their photons in one pixel, are left out.
    """
    strong = strong_pixels(photons, usable)
    labels, sizes = label_spots(strong)
    numbers = 1 + np.flatnonzero(sizes[1:] >= MIN_SIZE)
    totals = ndimage.sum(photons, labels, numbers)
    numbers = numbers[np.argsort(totals)[::-1][:MOST_SPOTS]]
    n_slow, n_fast = photons.shape
    if len(numbers) == 0:
        centres = np.empty((0, 2))
    else:
        centres = np.array(ndimage.center_of_mass(photons, labels, numbers))
    step = np.arange(-half, half + 1)
    dy, dx = (a.ravel() for a in np.meshgrid(step, step, indexing="ij"))
    y = np.rint(centres[:, :1]).astype(int) + dy
    x = np.rint(centres[:, 1:]).astype(int) + dx
    inside = (y >= 0) & (y < n_slow) & (x >= 0) & (x < n_fast)
    y_in, x_in = np.where(inside, y, 0), np.where(inside, x, 0)
    values, label = photons[y_in, x_in], labels[y_in, x_in]
    own = inside & (label == numbers[:, None])
    counted = inside & usable[y_in, x_in] & (own | (label == 0))
    around = counted & ~ndimage.binary_dilation(strong, np.ones((3, 3)))[y_in, x_in]
    net = np.where(counted, values - _background(values, around), 0.0)
    total = np.sum(net * own, axis=1)
    largest = np.max(net * own, axis=1, initial=0.0)
    keep = (total > 0) & (largest < LARGEST_SHARE * total)
    px = np.stack([x + 0.5, y + 0.5], axis=-1)
    return Windows(
        px[keep],
        net[keep],
        centres[keep][:, ::-1] + 0.5,
        total[keep],
        sizes[numbers][keep],
    )


def scattering_vectors(panel: Panel, px: np.ndarray, s0: np.ndarray) -> np.ndarray:
    """s1 of pixel coordinates (fast, slow), Å⁻¹, laboratory frame, shape (..., 3)."""
    flat = px.reshape(-1, 2)
    d = np.array(panel.get_d_matrix()).reshape(3, 3)
    ray = pixel_to_millimeter(panel, flat) @ d[:, :2].T + d[:, 2]
    s1 = ray * (np.linalg.norm(s0) / np.linalg.norm(ray, axis=1)[:, None])
    return s1.reshape(*px.shape[:-1], 3)


def nearest_points(
    rlp: np.ndarray, setting: np.ndarray, rotation: Rotation | None
) -> tuple[np.ndarray, np.ndarray]:
    """Lattice points that scattering vectors come nearest to during an image.

    Returns:
        Miller indices, shape (n, 3), and the fractions of the rotation, -1/2 to 1/2.
    """
    to_hkl = inverse(setting)
    h = rlp @ to_hkl.T
    if rotation is None:
        return np.rint(h), np.zeros(len(h))
    # the crystal turns under a vector that stays: it turns the other way in the crystal
    back = np.cross(rotation.axis, rlp) * -rotation.width @ to_hkl.T
    points = np.rint(h + STEPS[:, None, None] * back)
    delta = rlp - points @ setting.T
    way = np.cross(rotation.axis, points @ setting.T) * rotation.width
    length2 = np.maximum(np.sum(way**2, axis=-1), 1e-30)
    t = np.clip(np.sum(delta * way, axis=-1) / length2, -0.5, 0.5)
    distance = np.sum((delta - t[..., None] * way) ** 2, axis=-1)
    best = np.argmin(distance, axis=0)
    each = np.arange(len(rlp))
    return points[best, each], t[best, each]


def _frame(
    points: np.ndarray, s1: np.ndarray, rotation: Rotation | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors along the path, across and radial, and the path in one image.

    Args:
        points: Lattice points, Å⁻¹, shape (n, 3), laboratory frame.
        s1: Vectors of the spots, Å⁻¹.
        rotation: Of the image.
    """
    sweep = np.zeros(len(points))
    along = s1
    if rotation is not None:
        along = np.cross(rotation.axis, points)
        sweep = np.linalg.norm(along, axis=1) * abs(rotation.width)
    along = _unit(along)
    across = _unit(np.cross(along, points))
    return along, across, np.cross(across, along), sweep


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1), 1e-30)[:, None]


def spots_in_frame(
    windows: Windows,
    panel: Panel,
    model: FrameModel,
    rotation: Rotation | None,
    crystal_frame: np.ndarray,
) -> Spots:
    """Windows seen from the lattice points.

    Args:
        windows: Of one panel.
        panel: The panel.
        model: Orientation and beam of the image.
        rotation: During the image.
        crystal_frame: B of the crystal, shape (3, 3).
    """
    s1 = scattering_vectors(panel, windows.centre, model.s0)
    rlp = s1 - model.s0
    hkl, t = nearest_points(rlp, model.setting, rotation)
    points = hkl @ model.setting.T
    along, across, radial, sweep = _frame(points, s1, rotation)
    delta = rlp - points
    u = np.sum(delta * along, axis=1)
    if rotation is not None:
        u = u - np.clip(u, -sweep / 2, sweep / 2)
        delta = delta - t[:, None] * np.cross(rotation.axis, points) * rotation.width
    dh = delta @ inverse(model.setting).T
    steep = np.abs(np.sum(along * _unit(s1), axis=1))
    s = np.linalg.norm(points, axis=1)
    keep = (np.abs(dh).max(axis=1) < MOST_OFFSET) & (s > 0) & (steep > STEEPEST)
    pixels = scattering_vectors(panel, windows.px, model.s0) - model.s0
    pixels = pixels - points[:, None]
    x = np.stack([np.einsum("npi,ni->np", pixels, b) for b in (across, radial)], axis=1)
    to_crystal = crystal_frame @ inverse(model.setting)
    axes = np.stack([across, radial], axis=1) @ to_crystal.T
    result = Spots(
        hkl.astype(np.int32),
        s,
        windows.net,
        u,
        sweep,
        axes,
        x.astype(np.float32),
        windows.counts.astype(np.float32),
        windows.strong,
    )
    return result.select(keep)


def spots_of_image(
    experiment: Experiment,
    array_index: int,
    photons: Sequence[tuple[np.ndarray, np.ndarray]],
    half: int,
) -> tuple[Spots, int]:
    """The spots of an image that are near a lattice point, and the number of all.

    Args:
        experiment: The experiment.
        array_index: Of the image.
        photons: Of ``photons_of_image``.
        half: Half the width of the windows, pixels.
    """
    model = frame_model(experiment, array_index)
    rotation = rotation_of_image(experiment)
    b = np.array(experiment.crystal.get_B()).reshape(3, 3)
    parts, n_all = [], 0
    for panel, (counts, usable) in zip(experiment.detector, photons):
        windows = spot_windows(counts, usable, half)
        n_all += len(windows.net)
        parts.append(spots_in_frame(windows, panel, model, rotation, b))
    return join(parts), n_all


def join(parts: Sequence[Spots]) -> Spots:
    """All spots of several lists with windows of the same size."""
    return Spots(
        *(
            np.concatenate([getattr(part, f.name) for part in parts])
            for f in dataclasses.fields(Spots)
        )
    )


def window_size(strong: Sequence[np.ndarray]) -> int | None:
    """Half the width of windows for the spots of an image, pixels; None without spots.

    Args:
        strong: Strong pixels of each panel.
    """
    extents = []
    for pixels in strong:
        labels, sizes = label_spots(pixels)
        for box, size in zip(ndimage.find_objects(labels), sizes[1:]):
            if size >= MIN_SIZE:
                extents.append(max(side.stop - side.start for side in box))
    if not extents:
        return None
    return int(np.clip(math.ceil(np.percentile(extents, 75)) + 2, *HALF_WINDOW))
