"""Voxels that stand out of their neighbours: Bragg peaks among halos.

On a grid so fine that a peak covers a few voxels, each voxel is compared with those around
it. With the counts n and the normalisation m of the voxel, and n_b and m_b of its
neighbours, the rate of the neighbours has the posterior Gamma(n_b + 1/2, m_b), and n or
more counts are found by chance with

    p = I_x(n, n_b + 1/2),   x = (1 + a) m / ((1 + a) m + m_b)

(the negative binomial tail; I is the regularized incomplete beta function), where a is
what halos may rise from the mean of the neighbours. Voxels with the p of a false discovery
rate (Benjamini & Hochberg, 1995, J. R. Statist. Soc. B 57, 289-300,
doi:10.1111/j.2517-6161.1995.tb02031.x) no longer count as neighbours, and the test is
repeated until no more are found: a peak is taken away from its summit downwards. At last
voxels beside these are taken if they are unlikely by themselves.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import ndimage
from scipy.special import betainc

from dials_diffuse.grid import Grid

RINGS = 2  # of voxels beside found ones that are looked at again
SLAB_VOXELS = 20_000_000  # of the dense arrays in memory


@dataclasses.dataclass(frozen=True)
class OutlierSettings:
    """How voxels that stand out are found.

    Attributes:
        reach: Half the width of the neighbourhood, voxels; more than that of a peak.
        false_discovery: Fraction of the found voxels that may be found by chance.
        rise: Relative excess over the mean of the neighbours that is no peak.
        beside: p of voxels beside found ones.
        most_rounds: Repetitions at most.
        fewest_neighbours: Voxels with less are left as they are.
    """

    reach: int = 3
    false_discovery: float = 0.001
    rise: float = 0.2
    beside: float = 0.02
    most_rounds: int = 20
    fewest_neighbours: int = 6

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise ValueError(
                f"A reach of {self.reach} voxels has no neighbours: use 1 or more"
            )
        if not 0 < self.false_discovery < 1:
            raise ValueError(
                f"The false discovery rate {self.false_discovery:g} must be between 0 and 1"
            )


def upper_tail(
    counts: np.ndarray,
    normalisation: np.ndarray,
    counts_around: np.ndarray,
    normalisation_around: np.ndarray,
    rise: float = 0.0,
) -> np.ndarray:
    """Probability of at least these counts at the rate of the neighbours.

    Args:
        counts, normalisation: Of the voxels, shape (n,).
        counts_around, normalisation_around: Of the neighbours of each.
        rise: Relative excess that is allowed for.
    """
    m = (1 + rise) * normalisation
    total = m + normalisation_around
    x = np.divide(m, total, out=np.ones_like(total), where=normalisation_around > 0)
    p = betainc(np.maximum(counts, 1e-9), np.maximum(counts_around, 0) + 0.5, x)
    return np.where(counts > 0, p, 1.0)


def discovery_threshold(p: np.ndarray, rate: float) -> float:
    """Largest p that is a discovery (Benjamini & Hochberg), 0 if none is."""
    ordered = np.sort(p)
    below = np.flatnonzero(ordered <= rate * np.arange(1, len(p) + 1) / len(p))
    return float(ordered[below[-1]]) if len(below) else 0.0


class _Neighbourhoods:
    """Sums over the boxes about voxels, from dense slabs of the grid.

    Args:
        index: Voxels, each once, shape (n, 3).
        reach: Half the width of the box, voxels.
    """

    def __init__(self, index: np.ndarray, reach: int) -> None:
        order = np.argsort(index[:, 0], kind="stable")
        self._order, self._index = order, index[order]
        self._low = index.min(axis=0)
        self._size = np.ptp(index, axis=0) + 1
        self._reach = reach

    def sums(self, *columns: np.ndarray) -> list[np.ndarray]:
        """Sum of each column over the neighbours of each voxel, without its own."""
        h = self._index[:, 0] - self._low[0]
        step = max(1, SLAB_VOXELS // int(self._size[1] * self._size[2]))
        result = [np.empty(len(h)) for _ in columns]
        for start in range(0, int(self._size[0]), step):
            low, high = max(start - self._reach, 0), start + step + self._reach
            rows = slice(*np.searchsorted(h, [low, high]))
            own = slice(*np.searchsorted(h, [start, start + step]))
            place = self._index[rows] - self._low - [low, 0, 0]
            target = self._index[own] - self._low - [low, 0, 0]
            depth = min(high, int(self._size[0])) - low
            for column, sums in zip(columns, result):
                dense = np.zeros((depth, *self._size[1:]))
                dense[tuple(place.T)] = column[self._order[rows]]
                box = _box_sum(dense, self._reach)
                sums[self._order[own]] = box[tuple(target.T)] - dense[tuple(target.T)]
        return result


def _box_sum(dense: np.ndarray, reach: int) -> np.ndarray:
    """Sums over cubes of 2 reach + 1, nothing beyond the edges."""
    kernel = np.ones(2 * reach + 1)
    for axis in range(3):
        dense = ndimage.convolve1d(dense, kernel, axis=axis, mode="constant")
    return dense


def bragg_voxels(
    index: np.ndarray,
    counts: np.ndarray,
    normalisation: np.ndarray,
    grid: Grid,
    settings: OutlierSettings = OutlierSettings(),
) -> np.ndarray:
    """Whether observations are of voxels that hold a part of a Bragg peak.

    Observations of one voxel, from several blocks, are taken together.

    Args:
        index: Voxel indices, shape (n, 3).
        counts: Photons, shape (n,).
        normalisation: M of each, shape (n,).
        grid: The grid.
        settings: How.

    Returns:
        Boolean array of shape (n,).

    Raises:
        ValueError: The arrays have different lengths.
    """
    if not len(index) == len(counts) == len(normalisation):
        raise ValueError(
            f"{len(index)} voxels, {len(counts)} counts and {len(normalisation)} "
            "normalisations do not go together"
        )
    if len(index) == 0:
        return np.zeros(0, dtype=bool)
    key, place = np.unique(grid.key(index), return_inverse=True)
    place = place.ravel()
    n = np.bincount(place, weights=counts)
    m = np.bincount(place, weights=normalisation)
    return _peaks(grid.index(key), n, m, settings)[place]


def _peaks(
    index: np.ndarray, n: np.ndarray, m: np.ndarray, settings: OutlierSettings
) -> np.ndarray:
    """Which voxels stand out."""
    around = _Neighbourhoods(index, settings.reach)
    seen = m > 0
    peak = np.zeros(len(n), dtype=bool)

    def tail() -> np.ndarray:
        rest = seen & ~peak
        n_b, m_b, voxels = around.sums(n * rest, m * rest, rest.astype(float))
        p = upper_tail(n, m, n_b, m_b, settings.rise)
        return np.where(seen & (voxels >= settings.fewest_neighbours), p, 1.0)

    p = tail()
    for _ in range(settings.most_rounds):
        found = seen & (p <= discovery_threshold(p[seen], settings.false_discovery))
        if not np.any(found & ~peak):
            break
        peak |= found
        p = tail()
    next_to = _Neighbourhoods(index, 1)
    for _ in range(RINGS):
        (beside,) = next_to.sums(peak.astype(float))
        peak |= seen & (beside > 0) & (p <= settings.beside)
        p = tail()
    return peak
