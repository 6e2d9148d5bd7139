"""How much of what a term does shows in differences between equivalent observations.

A factor f changes the intensity of a voxel by the mean of ln f over its observations, and
lets them disagree by what is left. The observations speak of the latter alone. Small
systematic errors can be described a little better by a surface that mostly changes
intensities, most easily of one short sweep, in which equivalent voxels lie in like places
of the detector; the map is then bent by far more than the errors were. Of a true correction
most shows: all but 1/n where voxels have n observations, so half in those with two.

A map that is scaled to is one more observation of each voxel that it has, with f = 1.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np

ROUNDS = 5  # of the removal of means, as groupings are not independent


class Visibility(NamedTuple):
    """Spread of ln f, rms.

    Attributes:
        size: Of all that is not common to an image or a resolution.
        seen: Of what is left without the means of the voxels.
    """

    size: float
    seen: float

    @property
    def share(self) -> float:
        """Part of the variance that shows."""
        return (self.seen / self.size) ** 2 if self.size > 0 else 1.0


def visibility(
    values: np.ndarray,
    weight: np.ndarray,
    voxel: np.ndarray,
    common: Sequence[np.ndarray],
    known: np.ndarray | None = None,
) -> Visibility:
    """The spread of a factor over the observations, and within their voxels.

    Args:
        values: ln f of each row, shape (n,).
        weight: Photons of each row, 0 for those that do not count.
        voxel: Number of the voxel of each row.
        common: Groupings whose means are not looked at: images, resolution shells.
        known: Photons that a map counts for in each voxel, 0 where it does not have it.
    """
    total = np.sum(weight)
    if not total > 0:
        return Visibility(0.0, 0.0)

    def rms(x: np.ndarray, further: float = 0.0) -> float:
        return float(np.sqrt((np.sum(weight * x**2) + further) / total))

    rest = values - np.sum(weight * values) / total
    for _ in range(ROUNDS if len(common) > 1 else 1):
        for group in common:
            rest = rest - _means(rest, weight, group)[group]
    if known is None:
        known = np.zeros(int(voxel.max()) + 1)
    mean = _means(rest, weight, voxel, known)
    return Visibility(rms(rest), rms(rest - mean[voxel], float(known @ mean**2)))


def _means(
    values: np.ndarray,
    weight: np.ndarray,
    group: np.ndarray,
    zero: np.ndarray | float = 0.0,
) -> np.ndarray:
    """The weighted mean of each group, with one more value of 0 of the weight ``zero``."""
    norm = np.bincount(group, weight) + zero
    mean = np.bincount(group, weight * values)
    return np.divide(mean, norm, out=np.zeros_like(mean), where=norm > 0)
