"""Robust azimuthal profiles of images: intensity against s.

All panels share one profile. The pixels nearest to each of its points are a bin; the
quantile of their counts gives the intensity, see ``quantile``. This is done twice: within
a bin the intensity changes and the pixels are not spread evenly, so a first profile,
smoothed, gives the shape that a second one corrects. In between, the surroundings of
bright spots are left out.

What a profile holds is all that depends on s alone: air, solvent and Compton scattering,
and the isotropic part of the crystal's diffuse scattering as well.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage

from dials_diffuse.background.model import linear_weights
from dials_diffuse.background.pixels import Pixels
from dials_diffuse.background.quantile import Solution, solve_bins
from dials_diffuse.background.settings import ProfileSettings
from dials_diffuse.background.spots import near_spots

MIN_PIXELS = 20  # of a bin, else its value comes from its neighbours
SMOOTHING = np.array([0.25, 0.5, 0.25])


@dataclasses.dataclass(frozen=True)
class Profile:
    """Intensity at s = k step and its variance, photons/(s sr), shape (n_s,)."""

    value: np.ndarray
    variance: np.ndarray


def radial_profile(
    photons: np.ndarray,
    m: np.ndarray,
    used: np.ndarray,
    pixels: Pixels,
    n_points: int,
    settings: ProfileSettings,
) -> tuple[Profile, np.ndarray]:
    """The profile of an image, or of a sum of images.

    Args:
        photons: Photons of ``pixels``, shape (n,).
        m: Their normalisation with the exposure time, s sr.
        used: Which of them to use.
        pixels: The pixels of the detector.
        n_points: Number of points; the first is at s = 0.
        settings: Spacing, quantile, surroundings of spots.

    Returns:
        The profile, and which pixels it was made from: those used less those near spots.

    Raises:
        ValueError: No bin has enough pixels.
    """
    step, q = settings.step, settings.quantile
    bins = np.minimum(np.floor(pixels.s / step + 0.5).astype(np.intp), n_points - 1)
    first = solve_bins(bins[used], photons[used], m[used], n_points, q)
    shape = smoothed(first.value, is_measured(first))
    if not np.isfinite(shape).any():
        raise ValueError(
            f"no bin of the profile has {MIN_PIXELS} pixels: check the mask, the trusted "
            "range and bragg.semi_axes, or use a larger radial.step"
        )
    shape = filled(shape)
    k, t = linear_weights(pixels.s, 0.0, step, n_points)
    following = np.minimum(k + 1, n_points - 1)
    known = ((1 - t) * shape[k] + t * shape[following]) * m
    used = used & ~near_spots(photons, known, used, pixels, settings.spot_margin)
    second = solve_bins(bins[used], photons[used], m[used], n_points, q, known[used])
    good = is_measured(second)
    profile = Profile(
        value=filled(np.where(good, shape + second.value, np.nan)),
        variance=filled(np.where(good, second.variance, np.nan)),
    )
    return profile, used


def is_measured(solution: Solution) -> np.ndarray:
    """Which bins have a value of their own."""
    enough = solution.n_pixels >= MIN_PIXELS
    return enough & np.isfinite(solution.value) & np.isfinite(solution.variance)


def smoothed(values: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Values averaged with their measured neighbours, weights 1:2:1 along each axis.

    Returns:
        Of the same shape; NaN where neither the value nor a neighbour is measured.
    """
    total = np.where(measured, values, 0.0)
    weight = measured.astype(float)
    for axis in range(values.ndim):
        total, weight = (
            ndimage.convolve1d(x, SMOOTHING, axis=axis, mode="constant")
            for x in (total, weight)
        )
    with np.errstate(invalid="ignore"):
        return np.where(weight > 0, total / weight, np.nan)


def filled(values: np.ndarray) -> np.ndarray:
    """Values with gaps filled: linear in one dimension, from around in two.

    Constant beyond the ends; all zero if there are no values.
    """
    measured = np.isfinite(values)
    if measured.all():
        return values
    if not measured.any():
        return np.zeros(values.shape)
    if values.ndim == 1:
        x = np.arange(len(values))
        return np.interp(x, x[measured], values[measured])
    result = values
    while not np.isfinite(result).all():
        around = smoothed(result, np.isfinite(result))
        result = np.where(np.isfinite(result), result, around)
    return result
