"""Width of Bragg peaks from the spots of many images, in Å⁻¹.

The variance of the distance from the lattice point is taken to grow as

    v(s) = v0 + v2 s²

for each of the directions across, radial and along of ``spots``. Across and radial it is
that of the photons within spots plus that of the spots' centres. Within spots, moments are
taken under a Gaussian weight of the peak's own width (adaptive moments, Bernstein &
Jarvis, 2002, Astron. J. 123, 583-618, doi:10.1086/338085), which neither halos nor the
cut of a threshold change: with the weight w of a variance v_w, a peak of variance v gives
the moment m with 1/m = 1/v + 1/v_w. Medians over the spots in shells of s, weighted
by their photons, make zingers, other lattices and wrong indices harmless.

Along the path, an image that has swept the length a sees a lattice point at the distance
u beyond its end with

    I(u) ∝ Φ((u + a)/√v) - Φ(u/√v)

(a Gaussian in u for a still), whose moment gives v. There v0 is taken from across: a few
strong spots dominate, and what widens spots on the detector does not widen them along.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import nnls
from scipy.special import ndtr

from dials_diffuse.bragg.spots import Spots

ITERATIONS = 15
SHELL_SPOTS = 30  # in a shell of s at least
MOST_SHELLS = 8
BOOTSTRAPS = 30
MOST_PARTIAL_NET = 0.98  # quantile at which the weight of a spot is cut off
LEAST_V0 = 0.05  # v0 over the least variance of a shell
MAD = 1.4826  # standard deviation of a normal distribution over its median deviation


@dataclasses.dataclass(frozen=True)
class Widths:
    """Variances v = v0 + v2 s² of the peaks in three directions.

    Attributes:
        across, radial, along: (v0, v2); Å⁻² and none. ``along`` is None if too few
            images show a lattice point beyond the end of what they sweep.
        n_shells: Shells of s.
    """

    across: tuple[float, float]
    radial: tuple[float, float]
    along: tuple[float, float] | None
    n_shells: int

    def envelope(self, s_max: float) -> tuple[float, float]:
        """The smallest v0 + v2 s² from 0 to s_max above all directions."""
        lines = [line for line in (self.across, self.radial, self.along) if line]
        v0 = max(line[0] for line in lines)
        top = max(line[0] + line[1] * s_max**2 for line in lines)
        return v0, max(top - v0, 0.0) / s_max**2


def shells_of(s: np.ndarray, n_spots: int = SHELL_SPOTS) -> np.ndarray:
    """Number of the shell of each spot; shells hold equal numbers of spots."""
    n_shells = int(np.clip(len(s) // n_spots, 1, MOST_SHELLS))
    rank = np.empty(len(s), dtype=int)
    rank[np.argsort(s, kind="stable")] = np.arange(len(s))
    return rank * n_shells // max(len(s), 1)


def moments(spots: Spots, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and weighted variance of each spot, across and radial.

    Args:
        spots: The spots.
        v: Variance of the weight for each, Å⁻².

    Returns:
        Arrays of shape (n, 2); nan for spots whose weighted sum is not positive.
    """
    centre = np.zeros((len(spots), 2))
    with np.errstate(all="ignore"):
        for _ in range(3):
            d = spots.x - centre[:, :, None]
            w = spots.counts * np.exp(-0.5 * np.sum(d**2, axis=1) / v[:, None])
            total = np.where(w.sum(axis=1) > 0, w.sum(axis=1), np.nan)[:, None]
            # under a weight of the peak's own width a shift shows by half
            step = np.einsum("nkp,np->nk", d, w) / total
            centre = centre + np.clip(
                2 * step, -np.sqrt(v)[:, None], np.sqrt(v)[:, None]
            )
        d = spots.x - centre[:, :, None]
        w = spots.counts * np.exp(-0.5 * np.sum(d**2, axis=1) / v[:, None])
        total = np.where(w.sum(axis=1) > 0, w.sum(axis=1), np.nan)[:, None]
        return centre, np.einsum("nkp,np->nk", d**2, w) / total


def unweighted(m: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Variance of a Gaussian from its moment under a Gaussian weight of variance v."""
    return m * v / np.maximum(v - m, 0.2 * v)


def pixel_size(spots: Spots) -> float:
    """Distance of neighbouring pixels, Å⁻¹."""
    steps = np.linalg.norm(spots.x[:, :, 1] - spots.x[:, :, 0], axis=1)
    return float(np.median(steps))


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """The value that half the weight lies below; values of nan have none."""
    order = np.argsort(values)
    w = np.where(np.isfinite(values), weights, 0.0)[order]
    total = np.cumsum(w)
    return float(values[order][np.searchsorted(total, 0.5 * total[-1])])


def _medians(values: np.ndarray, shell: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted medians of the columns in each shell."""
    columns = values.reshape(len(values), -1).T
    result = [
        [weighted_median(c[shell == i], weights[shell == i]) for c in columns]
        for i in range(shell.max() + 1)
    ]
    return np.array(result).reshape(-1, *values.shape[1:])


def _weights(net: np.ndarray) -> np.ndarray:
    """Photons of the spots, cut off at a high quantile.

    Halos may be taken for spots where they are strong, but Bragg peaks are stronger.
    """
    return np.minimum(net, np.quantile(net, MOST_PARTIAL_NET))


@dataclasses.dataclass(frozen=True)
class SpotMoments:
    """What of each spot the widths need.

    Attributes:
        s: 1/d, Å⁻¹, shape (n,).
        centre: From the lattice point, across and radial, Å⁻¹, shape (n, 2).
        moment: Weighted variance about the centre, Å⁻², shape (n, 2).
        weight: Variance of the weight, Å⁻², shape (n,).
        offset: Along the path, Å⁻¹, shape (n,).
        sweep: Length of the path, Å⁻¹.
        net: Photons, cut off at a high quantile.
    """

    s: np.ndarray
    centre: np.ndarray
    moment: np.ndarray
    weight: np.ndarray
    offset: np.ndarray
    sweep: np.ndarray
    net: np.ndarray

    def select(self, chosen: np.ndarray) -> SpotMoments:
        return SpotMoments(
            *(getattr(self, f.name)[chosen] for f in dataclasses.fields(self))
        )


def spot_moments(spots: Spots) -> SpotMoments:
    """Moments of the spots under weights of the median width of their shell.

    Spots without any are left out (``with_moments``).
    """
    return with_moments(spots)[1]


def with_moments(spots: Spots) -> tuple[Spots, SpotMoments]:
    """The spots that have moments, and these."""
    moments = _all_moments(spots)
    good = np.isfinite(moments.moment).all(axis=1)
    return spots.select(good), moments.select(good)


def _all_moments(spots: Spots) -> SpotMoments:
    shell = shells_of(spots.s)
    # a weight narrower than the pixels would see but one of them
    least = pixel_size(spots) ** 2
    bright = np.maximum(spots.counts, 0)
    total = np.maximum(bright.sum(axis=1), 1e-9)
    mean = np.einsum("nkp,np->nk", spots.x, bright) / total[:, None]
    square = np.einsum("nkp,np->nk", spots.x**2, bright) / total[:, None]
    net = _weights(spots.net)
    v = np.maximum(_medians(np.mean(square - mean**2, axis=1), shell, net), least)
    for _ in range(ITERATIONS):
        centre, m = moments(spots, v[shell])
        v = np.mean(unweighted(_medians(m, shell, net), v[:, None]), axis=1)
        v = np.maximum(v, least)
    used = v[shell]
    centre, m = moments(spots, used)
    return SpotMoments(spots.s, centre, m, used, spots.offset, spots.sweep, net)


def _line(s2: np.ndarray, v: np.ndarray) -> tuple[float, float]:
    """v0 and v2 of v0 + v2 s² with the least relative deviations, neither negative."""
    (v0, v2), _ = nnls(np.stack([1 / v, s2 / v], axis=1), np.ones(len(v)))
    # a peak of no width at the origin would make an ellipsoid of none
    return max(float(v0), LEAST_V0 * float(v.min())), float(v2)


def expected_moment(v: np.ndarray, sweep: float, weight: float) -> np.ndarray:
    """Mean u² under the weight exp(-u²/2w) of photons beyond the end of a sweep.

    Args:
        v: Variances, shape (n,).
        sweep: Length a of the path, in the unit of √v.
        weight: Variance w of the weight.
    """
    u = (np.arange(200) + 0.5) * (5 * np.sqrt(weight) / 200)
    root = np.sqrt(v)[:, None]
    if sweep < 1e-3 * np.sqrt(weight):
        seen = np.exp(-0.5 * (u / root) ** 2)
    else:
        seen = ndtr(-u / root) - ndtr(-(u + sweep) / root)
    seen = seen * np.exp(-0.5 * u**2 / weight)
    return (seen @ u**2) / np.maximum(seen.sum(axis=1), 1e-300)


def _variance_along(spots: SpotMoments, weight: float) -> float:
    """Variance along the path, of spots of about the same s."""
    factors = np.logspace(-1.5, 1.5, 61)
    sweep = float(np.median(spots.sweep))
    for _ in range(6):
        w = spots.net * np.exp(-0.5 * spots.offset**2 / weight)
        m = float(np.sum(w * spots.offset**2) / np.sum(w))
        expected = expected_moment(factors * weight, sweep, weight)
        weight *= float(np.interp(m, expected, factors))
    return weight


def _along(spots: SpotMoments, v0: float) -> tuple[float, float] | None:
    """v0 and v2 along the path, of given v0."""
    partial = spots.select(spots.offset != 0)
    if len(partial.s) < SHELL_SPOTS:
        return None
    shell = shells_of(partial.s, 2 * SHELL_SPOTS)
    s2, v = [], []
    for i in range(shell.max() + 1):
        chosen = partial.select(shell == i)
        s2.append(float(np.median(chosen.s**2)))
        v.append(_variance_along(chosen, float(np.median(chosen.weight))))
    slope, residual = np.array(s2) / v, 1 - v0 / np.array(v)
    return v0, max(float(slope @ residual / (slope @ slope)), 0.0)


def fit_widths(spots: SpotMoments) -> Widths:
    """Widths in the three directions."""
    shell = shells_of(spots.s)
    s2 = _medians(spots.s**2, shell, spots.net)
    weight = _medians(spots.weight, shell, spots.net)[:, None]
    within = unweighted(_medians(spots.moment, shell, spots.net), weight)
    centres = (MAD * _medians(np.abs(spots.centre), shell, spots.net)) ** 2
    across, radial = (_line(s2, v) for v in (within + centres).T)
    return Widths(across, radial, _along(spots, across[0]), len(s2))


def envelope_and_error(
    spots: SpotMoments, s_max: float
) -> tuple[Widths, tuple[float, float], tuple[float, float]]:
    """Widths, their envelope at s = 0 and s_max, and its relative standard error there.

    The width along the path, of which few spots tell, is left out unless it makes the
    envelope wider by more than twice the standard error. The errors are those of spots
    drawn again with replacement.
    """
    widths = fit_widths(spots)
    rng = np.random.default_rng(7)
    n = len(spots.s)
    again = [fit_widths(spots.select(rng.integers(0, n, n))) for _ in range(BOOTSTRAPS)]
    ends, error = _ends_and_error(widths, again, s_max)
    without, *others = (dataclasses.replace(w, along=None) for w in (widths, *again))
    ends_without, error_without = _ends_and_error(without, others, s_max)
    if ends[1] * (1 - 2 * error[1]) < ends_without[1]:
        return without, ends_without, error_without
    return widths, ends, error


def _ends_and_error(
    widths: Widths, again: list[Widths], s_max: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    def ends(widths: Widths) -> tuple[float, float]:
        v0, v2 = widths.envelope(s_max)
        return v0, v0 + v2 * s_max**2

    low, high = np.std(np.log([ends(w) for w in again]), axis=0)
    return ends(widths), (float(low), float(high))
