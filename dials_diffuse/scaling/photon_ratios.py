"""Scales of some experiments from their photons in voxels that others saw, too.

Each experiment is compared with all others, as they are scaled,

    k = Σ u n / Σ u x I        I = N/X,  u = X/(X + x)

summed over its voxels, with its photons n and their response x to the intensity and the
same, N and X, of all others. The weights hold no counts, so that k is unbiased, however
few these are. Where the others have unknown scales, too, all are found together: that the
ratios of all are 1 is what the likelihood of ``initial`` has at its maximum, where

    Σ_v [log-likelihood]' = Σ u n - Σ u x I = 0

for each experiment. It is searched for with sums over all voxels, which may be in files,
and nothing in memory but some numbers for each experiment.
"""

from __future__ import annotations

import logging
from typing import Iterable, NamedTuple

import numpy as np
from scipy import optimize

from dials_diffuse.scaling.initial import Pairs

logger = logging.getLogger("dials.diffuse.scale")

LARGEST_RATIO = 1e4
MAX_STEPS = 100
CONVERGED = 0.01  # of the standard error of each logarithm


class Sums(NamedTuple):
    """Sums over all voxels, those of shape (n,) for each experiment.

    Args:
        value: Minus the logarithm of the likelihood.
        photons: Σ n.
        seen: Σ u n.
        due: Σ u x I, that which the others let expect.
    """

    value: float
    photons: np.ndarray
    seen: np.ndarray
    due: np.ndarray


def add_up(parts: Iterable[Pairs], log_k: np.ndarray) -> Sums:
    """What each experiment has seen, and what it should have seen.

    Args:
        parts: Sums of each voxel and experiment; all those of a voxel are in one part.
            They are gone through many times.
        log_k: Logarithm of what the response of each experiment is to be multiplied by;
            -inf takes it out.
    """
    n, k, takes_part = len(log_k), np.exp(log_k), np.isfinite(log_k)
    value, totals = 0.0, np.zeros((3, n))
    for pairs in parts:
        number = pairs.experiment
        x = pairs.weight * k[number]
        photons = pairs.photons * takes_part[number]
        norm, total = np.bincount(pairs.voxel, x), np.bincount(pairs.voxel, photons)
        seen = norm > 0
        value += float(total[seen] @ np.log(norm[seen]))
        norm = np.where(seen, norm, 1.0)[pairs.voxel]
        columns = (
            photons,
            photons * (norm - x) / norm,
            x * (total[pairs.voxel] - photons) / norm,
        )
        totals += [np.bincount(number, column, n) for column in columns]
    value -= float(totals[0][takes_part] @ log_k[takes_part])
    return Sums(value, *totals)


def find_ratios(
    parts: Iterable[Pairs], unknown: np.ndarray, log_k: np.ndarray | None = None
) -> np.ndarray:
    """Logarithms of what scales are to be multiplied by; -inf where nothing tells them.

    Where nothing but unknown scales are linked, their mean logarithm stays the same,
    weighted with the photons that tell of them.

    Args:
        parts: As those of ``add_up``.
        unknown: Whether the scale of each experiment is to be found, shape (n,).
        log_k: To start from.
    """
    log_k = np.zeros(len(unknown)) if log_k is None else log_k.copy()
    log_k[~np.isfinite(log_k)] = 0.0
    while True:
        # One without photons has no scale, and would draw down the mean of the others.
        sums = add_up(parts, log_k)
        blank = unknown & np.isfinite(log_k)
        blank &= ~((sums.seen > 0) & (sums.due > 0))
        if not blank.any():
            break
        log_k[blank] = -np.inf
    active = unknown & np.isfinite(log_k)
    if active.any():
        log_k[active] = _maximise(parts, active, log_k, sums)
        at_limit = active & (np.abs(log_k) > 0.999 * np.log(LARGEST_RATIO))
        log_k[at_limit] = -np.inf
    return log_k


def _maximise(
    parts: Iterable[Pairs], active: np.ndarray, log_k: np.ndarray, sums: Sums
) -> np.ndarray:
    """The logarithms of greatest likelihood of the active experiments.

    In units of their standard errors, in which second derivatives are about 1.
    """
    unit = 1 / np.sqrt(sums.due[active])

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        trial = log_k.copy()
        trial[active] = x * unit
        found = add_up(parts, trial)
        slope = (found.due - found.seen)[active] * unit
        return found.value - sums.value, slope

    limit = np.log(LARGEST_RATIO) / unit
    result = optimize.minimize(
        evaluate,
        log_k[active] / unit,
        method="L-BFGS-B",
        jac=True,
        bounds=list(zip(-limit, limit)),
        options={"maxiter": MAX_STEPS, "gtol": CONVERGED, "ftol": 0.0},
    )
    logger.debug("%d scales after %d steps: %s", len(unit), result.nit, result.message)
    if result.nit >= MAX_STEPS:
        logger.warning(
            "Warning: the scales of %d experiments did not converge in %d steps; they "
            "are wrong by %.2g standard errors and more",
            len(unit),
            MAX_STEPS,
            np.abs(result.jac).max(),
        )
    return result.x * unit
