"""Agreement of experiments with the rest, and what terms contribute to it.

The agreement of an experiment with the rest is the correlation of its intensities with
those of all other experiments, and of the reference map if there is one, in the voxels
that they share, each less its isotropic part, the mean of thin resolution shells. Delta
CC is what the mean correlation of all would gain without it, as ΔCC1/2 of images in DIALS
(Assmann, Brehm & Diederichs 2016, https://doi.org/10.1107/S1600576716005471).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dials_diffuse.scaling.initial import add_up_pairs
from dials_diffuse.scaling.refinement import Refiner
from dials_diffuse.scaling.start import with_reference

MIN_PAIRS = 30  # voxels that an experiment must share for its correlation to count


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


def agreement(refiner: Refiner, n_experiments: int) -> Agreement:
    """The agreement of each experiment with the rest, for the current model."""
    block = refiner.block
    response, offset = refiner.responses()
    used = refiner.used & block.is_diffuse
    pairs = add_up_pairs(
        block.group[used],
        block.experiment[used],
        (refiner.photons - offset)[used].astype(float),
        response[used].astype(float),
    )
    pairs = with_reference(refiner.reference, pairs, n_experiments)
    voxel, experiment, photons, norm = pairs
    total = np.bincount(voxel, photons, block.n_groups)[voxel]
    total_norm = np.bincount(voxel, norm, block.n_groups)[voxel]
    shared = (total_norm - norm > 1e-6 * total_norm) & (norm > 0)
    voxel, experiment = voxel[shared], experiment[shared]
    photons, norm = photons[shared], norm[shared]
    rest, rest_norm = total[shared] - photons, total_norm[shared] - norm
    shell = refiner.shell[voxel]
    own = photons / norm - _means(shell, photons, norm)
    other = rest / rest_norm - _means(shell, rest, rest_norm)
    # Each difference has about the variance 1/norm + 1/rest_norm of its counts.
    weight = 1 / (1 / norm + 1 / rest_norm)

    def by_experiment(values: np.ndarray) -> np.ndarray:
        return np.bincount(experiment, weight * values, n_experiments)[:n_experiments]

    n_pairs = np.bincount(experiment, minlength=n_experiments)[:n_experiments]
    with np.errstate(invalid="ignore", divide="ignore"):
        cc = by_experiment(own * other) / np.sqrt(
            by_experiment(own**2) * by_experiment(other**2)
        )
    cc = np.where(n_pairs >= MIN_PAIRS, cc, np.nan)
    known = np.isfinite(cc)
    n = np.count_nonzero(known)
    mean = np.nansum(cc) / n if n else np.nan
    delta = (mean - cc) / (n - 1) if n > 1 else np.full(n_experiments, np.nan)
    return Agreement(cc, delta, n_pairs)


def _means(shell: np.ndarray, photons: np.ndarray, norm: np.ndarray) -> np.ndarray:
    total, total_norm = np.bincount(shell, photons), np.bincount(shell, norm)
    return (total / np.where(total_norm > 0, total_norm, 1))[shell]
