"""Agreement of experiments with the rest, and what terms contribute to it.

The agreement of an experiment with the rest is the correlation of its intensities with
those of all other experiments, and of the reference map if there is one, in the voxels
that they share, each less its isotropic part, the mean of thin resolution shells. Delta
CC is what the mean correlation of all would gain without it, as ΔCC1/2 of images in DIALS
(Assmann, Brehm & Diederichs 2016, https://doi.org/10.1107/S1600576716005471).
"""

from __future__ import annotations

from typing import Iterator, NamedTuple

import numpy as np

from dials_diffuse.scaling.error_model import ranges_of_groups
from dials_diffuse.scaling.initial import Pairs, add_up_pairs
from dials_diffuse.scaling.refinement import Refiner
from dials_diffuse.scaling.start import with_reference
from dials_diffuse.scaling.terms import TERMS

MIN_PAIRS = 30  # voxels that an experiment must share for its correlation to count
ROWS_PER_PART = 1 << 20  # looked at at once


class Gain(NamedTuple):
    """What a term contributes.

    Args:
        chi_square: χ² per degree of freedom without the term, the others as refined.
        cc: Mean correlation of the experiments with the rest without it.
    """

    chi_square: float
    cc: float


def gains(refiner: Refiner, n_experiments: int) -> dict[str, Gain]:
    """What each term contributes; under the name of "" the figures with all terms."""
    result = {"": _gain(refiner, n_experiments)}
    for name, component in refiner.components.items():
        if TERMS[name].stage is None:
            continue  # the gauge changes nothing here
        refined = component.parameters
        component.parameters = refined * 0.0
        result[name] = _gain(refiner, n_experiments)
        component.parameters = refined
    refiner.evaluate()
    return result


def _gain(refiner: Refiner, n_experiments: int) -> Gain:
    cc = agreement(refiner, n_experiments).cc
    known = cc[np.isfinite(cc)]
    return Gain(refiner.fit().reduced, float(known.mean()) if len(known) else np.nan)


class Agreement(NamedTuple):
    """Agreement of experiments with the rest.

    Args:
        cc: Correlation of each experiment, NaN where too few voxels are shared.
        delta: Gain of the mean correlation without the experiment.
        n_pairs: Number of voxels that it shares.
    """

    cc: np.ndarray
    delta: np.ndarray
    n_pairs: np.ndarray


class _Shared(NamedTuple):
    """Photons and response of pairs of a voxel and an experiment, and of all others.

    Args:
        shell: Thin resolution shell of the voxel, shape (n,).
        experiment: Number of the experiment.
        photons, norm: Of the experiment.
        rest, rest_norm: Of all others.
    """

    shell: np.ndarray
    experiment: np.ndarray
    photons: np.ndarray
    norm: np.ndarray
    rest: np.ndarray
    rest_norm: np.ndarray


def agreement(refiner: Refiner, n_experiments: int) -> Agreement:
    """The agreement of each experiment with the rest, for the current model."""
    parts = list(_shared_pairs(refiner, n_experiments))
    n_shells = int(refiner.shell.max()) + 1

    def shell_means(photons: str, norm: str) -> np.ndarray:
        sums = [
            sum(np.bincount(p.shell, getattr(p, name), n_shells) for p in parts)
            for name in (photons, norm)
        ]
        return sums[0] / np.where(sums[1] > 0, sums[1], 1)

    own_mean = shell_means("photons", "norm")
    other_mean = shell_means("rest", "rest_norm")
    # Of own times other, own squared, other squared, and the number of pairs.
    sums = np.zeros((4, n_experiments + 1))
    for part in parts:
        own = part.photons / part.norm - own_mean[part.shell]
        other = part.rest / part.rest_norm - other_mean[part.shell]
        # Each difference has about the variance 1/norm + 1/rest_norm of its counts.
        weight = 1 / (1 / part.norm + 1 / part.rest_norm)
        products = (weight * own * other, weight * own**2, weight * other**2)
        for total, values in zip(sums, (*products, np.ones(len(own)))):
            total += np.bincount(part.experiment, values, n_experiments + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cc = (sums[0] / np.sqrt(sums[1] * sums[2]))[:n_experiments]
    n_pairs = sums[3][:n_experiments].astype(np.int64)
    cc = np.where(n_pairs >= MIN_PAIRS, cc, np.nan)
    known = np.isfinite(cc)
    n = np.count_nonzero(known)
    mean = np.nansum(cc) / n if n else np.nan
    delta = (mean - cc) / (n - 1) if n > 1 else np.full(n_experiments, np.nan)
    return Agreement(cc, delta, n_pairs)


def _shared_pairs(refiner: Refiner, n_experiments: int) -> Iterator[_Shared]:
    """The pairs of voxels that an experiment shares with others, part by part."""
    block = refiner.block
    response, offset = refiner.responses()
    used = refiner.used & block.is_diffuse
    for first, last in ranges_of_groups(block.start, ROWS_PER_PART):
        start = block.start[first : last + 1]
        rows = slice(int(start[0]), int(start[-1]))
        use = used[rows]
        pairs = add_up_pairs(
            np.repeat(np.arange(last - first), np.diff(start))[use],
            block.experiment[rows][use],
            (refiner.photons[rows] - offset[rows])[use].astype(float),
            response[rows][use].astype(float),
        )
        known = refiner.reference
        if known is not None:
            known = known.select(np.arange(first, last))
        pairs = with_reference(known, pairs, n_experiments)
        yield _shared(pairs, refiner.shell[first:last])


def _shared(pairs: Pairs, shell: np.ndarray) -> _Shared:
    """Those of some pairs whose voxel something else has seen, too."""
    voxel, experiment, photons, norm = pairs
    rest = np.bincount(voxel, photons, len(shell))[voxel] - photons
    total_norm = np.bincount(voxel, norm, len(shell))[voxel]
    rest_norm = total_norm - norm
    shared = (rest_norm > 1e-6 * total_norm) & (norm > 0)
    values = (x[shared].astype(np.float32) for x in (photons, norm, rest, rest_norm))
    return _Shared(
        shell[voxel[shared]].astype(np.int32),
        experiment[shared].astype(np.int32),
        *values,
    )
