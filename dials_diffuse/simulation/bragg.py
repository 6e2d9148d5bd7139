"""Bragg peaks of known integrated |F|².

Around each reciprocal lattice point the intensity per unit cell is

    I(q) = |F|²/Vc · G(q),   ∫ G d³q = 1

so that its mean over a reciprocal cell (of volume 1/Vc) is |F|². G is a Gaussian: of
standard deviation σ along the reciprocal lattice vector (size of the mosaic blocks,
divergence and bandwidth of the beam) and √(σ² + s²η²) across it (mosaic spread η). During
a rotation the lattice point moves across its own vector, so the mean over an image has a
closed form with error functions.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
from scipy.special import erf

REACH = 6.0  # standard deviations, beyond which a peak is nothing


class Intensities(Protocol):
    """|F|² of reflections."""

    def at(self, h: np.ndarray, k: np.ndarray, l: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class PeakShape:
    """Standard deviations of the peaks.

    Attributes:
        sigma: σ, Å⁻¹.
        mosaicity: η, radians.
    """

    sigma: float
    mosaicity: float

    def across(self, s: np.ndarray | float) -> np.ndarray | float:
        """√(σ² + s²η²) at s = 1/d, Å⁻¹."""
        return np.sqrt(self.sigma**2 + (s * self.mosaicity) ** 2)


def path_mean(offset: np.ndarray, speed: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Mean of exp(-x²/2σ²) over the path x from offset - speed/2 to offset + speed/2.

        σ √(π/2)/v · [erf((x + v/2)/√2σ) - erf((x - v/2)/√2σ)]

    Args:
        offset: x at the middle of the path.
        speed: Length v of the path, not negative.
        sigma: Standard deviation.
    """
    speed = np.maximum(speed, 1e-4 * sigma)  # where the difference would be rounding
    width = np.sqrt(2.0) * sigma
    difference = erf((offset + speed / 2) / width) - erf((offset - speed / 2) / width)
    return sigma * np.sqrt(np.pi / 2) / speed * difference


def peak_intensity(
    hkl: np.ndarray,
    setting: np.ndarray,
    axis: np.ndarray | None,
    width: float,
    intensities: Intensities,
    shape: PeakShape,
    volume: float,
) -> np.ndarray:
    """Intensity of the peaks at scattering vectors, averaged over a small rotation.

    Each vector belongs to the nearest lattice point, by its indices, in the middle of
    the rotation: peaks must be narrower than half a reciprocal cell.

    Args:
        hkl: Fractional Miller indices in the middle of the rotation, shape (3, n).
        setting: Setting matrix at that time, shape (3, 3), Å⁻¹, laboratory frame.
        axis: Rotation axis, unit vector in the laboratory frame; None for a still.
        width: Angle of the rotation, radians.
        intensities: |F|² of the reflections.
        shape: Standard deviations of the peaks.
        volume: Volume Vc of the unit cell, Å³.

    Returns:
        Electrons² per unit cell, shape (n,).
    """
    nearest = np.floor(hkl + 0.5)
    delta = setting @ (hkl - nearest)
    rlp = setting @ nearest
    s = np.sqrt(np.einsum("in,in->n", rlp, rlp))
    reach = REACH * shape.across(s) + (0.0 if axis is None else s * width / 2)
    distance2 = np.einsum("in,in->n", delta, delta)
    chosen = np.flatnonzero((distance2 < reach**2) & (s > 0))
    result = np.zeros(hkl.shape[1])
    if len(chosen) == 0:
        return result
    f2 = intensities.at(*nearest[:, chosen].astype(np.int64))
    chosen, f2 = chosen[f2 > 0], f2[f2 > 0]
    profile = _profile(delta[:, chosen], rlp[:, chosen], axis, width, shape)
    result[chosen] = f2 / volume * profile
    return result


def _profile(
    delta: np.ndarray,
    rlp: np.ndarray,
    axis: np.ndarray | None,
    width: float,
    shape: PeakShape,
) -> np.ndarray:
    """Mean of G over the rotation, Å³.

    Args:
        delta: From the lattice points to the scattering vectors, Å⁻¹, shape (3, n).
        rlp: The lattice points, Å⁻¹, shape (3, n).
        axis, width, shape: As for ``peak_intensity``.
    """
    s = np.sqrt(np.einsum("in,in->n", rlp, rlp))
    along = np.einsum("in,in->n", delta, rlp) / s
    across2 = np.einsum("in,in->n", delta, delta) - along**2
    sigma = shape.across(s)
    norm = (2 * np.pi) ** -1.5 / (shape.sigma * sigma**2)
    radial = norm * np.exp(-0.5 * (along / shape.sigma) ** 2)
    if axis is None:
        return radial * np.exp(-0.5 * across2 / sigma**2)
    motion = np.cross(axis, rlp, axis=0)  # perpendicular to rlp
    speed = np.sqrt(np.einsum("in,in->n", motion, motion))
    moving = speed > 1e-12
    offset = np.einsum("in,in->n", delta, motion) / np.where(moving, speed, 1.0)
    closest2 = np.maximum(across2 - offset**2, 0.0)
    mean = path_mean(offset, speed * width, sigma)
    return radial * np.exp(-0.5 * closest2 / sigma**2) * mean
