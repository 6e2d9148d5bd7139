"""Spots without the halos around them.

Diffuse scattering rises towards the Bragg positions, by phonons and other motions that
neighbouring cells share. Such a halo ends nowhere, and where the peak itself has not
passed the Ewald sphere it is all that an image shows. The photons of a window are taken
as a sharp core, a broad halo and what is left of the background,

    n(x) = a exp(-|x|²/2v) + h (1 + |x|²/w²)^(-3/2) + b,

x from the centre of the spot; the halo is a Lorentzian squared that has been integrated
along one direction. a, h and b are those of the spot, by linear least squares, v and w
those of the spots of a shell of s, by search. Without h and b, what is left of a spot is
its core. Spots that are mostly halo are left out.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from dials_diffuse.bragg.spots import Spots
from dials_diffuse.bragg.widths import (
    MAD,
    shells_of,
    weighted_median,
    with_moments,
)

# Core widths to try, relative to that of the spots under a Gaussian weight, which halos
# make wider than the core; widths of halos relative to the core's.
CORES = np.geomspace(0.4, 1.2, 13)
HALOS = np.array([2.0, 2.8, 4.0, 5.6, 8.0])
MOST_SPOTS = 120  # of a shell, for the search
CORE_RADIUS = 2.0  # standard deviations of the core within which its share is taken
LEAST_SHARE = 0.5  # of the photons there
LEAST_AMPLITUDE = 5.0  # standard errors


@dataclasses.dataclass(frozen=True)
class Split:
    """Cores and halos of some spots.

    Attributes:
        core: Photons above halo and background, shape (n, n_px).
        share: Of the core in the photons of its inner part, shape (n,).
        significance: Height of the core over its standard error, shape (n,).
        misfit: Sum of the squared deviations over their variance, shape (n,).
    """

    core: np.ndarray
    share: np.ndarray
    significance: np.ndarray
    misfit: np.ndarray


def photon_variance(spots: Spots) -> np.ndarray:
    """Variance of the photons of windows: counting, and what the outer half shows.

    The same whatever widths are tried, so that their misfits can be compared.

    Returns:
        Shape (n, n_px).
    """
    counts = spots.counts.astype(float)
    r2 = np.sum(spots.x**2, axis=1)
    outer = (counts != 0) & (r2 > np.median(r2, axis=1)[:, None])
    rim = np.where(outer, counts, np.nan)
    rim[np.sum(outer, axis=1) < 5] = 0.0
    middle = np.nanmedian(rim, axis=1)[:, None]
    spread = MAD * np.nanmedian(np.abs(rim - middle), axis=1)[:, None]
    return np.maximum(counts, 0) + np.maximum(spread, 1.0) ** 2


def split(
    spots: Spots, centre: np.ndarray, variance: np.ndarray, v: float, w: float
) -> Split:
    """Least squares for the core and halo of each spot.

    Args:
        spots: The spots.
        centre: Of each, Å⁻¹, shape (n, 2).
        variance: Of the photons.
        v: Variance of the core, Å⁻².
        w: Width of the halo, Å⁻¹.
    """
    r2 = np.sum((spots.x - centre[:, :, None]) ** 2, axis=1)
    counts = spots.counts.astype(float)
    shapes = np.stack(
        [np.exp(-0.5 * r2 / v), (1 + r2 / w**2) ** -1.5, np.ones_like(r2)]
    )
    weight = (counts != 0) / variance
    normal = np.einsum("inp,jnp,np->nij", shapes, shapes, weight)
    normal += 1e-9 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(3)
    right = np.einsum("inp,np,np->ni", shapes, counts, weight)
    inverse = np.linalg.inv(normal)
    a, h, b = np.einsum("nij,nj->in", inverse, right)
    # no halo is negative: without it, core and background alone
    alone = np.linalg.solve(normal[:, ::2, ::2], right[:, ::2, None])[..., 0]
    a, b = np.where(h < 0, alone.T, (a, b))
    h = np.maximum(h, 0.0)
    solution = np.stack([a, h, b])
    model = np.einsum("in,inp->np", solution, shapes)
    inner = (counts != 0) & (r2 < CORE_RADIUS**2 * v)
    core, halo = (
        np.sum(height[:, None] * shape * inner, axis=1)
        for height, shape in zip((a, h), shapes)
    )
    smooth = h[:, None] * shapes[1] + b[:, None]
    return Split(
        np.where(counts != 0, counts - smooth, 0.0),
        core / np.maximum(core + halo, 1e-9),
        a / np.sqrt(inverse[:, 0, 0]),
        np.sum(weight * (counts - model) ** 2, axis=1),
    )


def widths_of_shell(spots: Spots, centre: np.ndarray, v: float) -> tuple[float, float]:
    """Variance of the core and width of the halo that suit the spots of a shell best.

    Those of the least mean of the spots' misfits, each relative to its own least.

    Args:
        spots: The spots.
        centre: Of each.
        v: Variance of the spots under a Gaussian weight.
    """
    bright = np.argsort(spots.net)[::-1][:MOST_SPOTS]
    spots, centre = spots.select(bright), centre[bright]
    variance = photon_variance(spots)
    pairs = [(v * f**2, f * g * math.sqrt(v)) for f in CORES for g in HALOS]
    misfit = np.stack([split(spots, centre, variance, *pair).misfit for pair in pairs])
    relative = misfit / np.maximum(misfit.min(axis=0), 1e-9)
    return pairs[int(np.argmin(np.mean(relative, axis=1)))]


def without_halos(spots: Spots) -> Spots:
    """The spots that are mostly core, with what is left of their photons."""
    spots, moments = with_moments(spots)
    shell = shells_of(spots.s)
    core = np.empty_like(spots.counts)
    share, significance = np.empty(len(spots)), np.empty(len(spots))
    for i in range(shell.max() + 1):
        at = np.flatnonzero(shell == i)
        chosen = spots.select(at)
        v = weighted_median(moments.weight[at], moments.net[at])
        pair = widths_of_shell(chosen, moments.centre[at], v)
        variance = photon_variance(chosen)
        found = split(chosen, moments.centre[at], variance, *pair)
        core[at], share[at] = found.core, found.share
        significance[at] = found.significance
    keep = (share > LEAST_SHARE) & (significance > LEAST_AMPLITUDE)
    return dataclasses.replace(spots, counts=core).select(keep)
