"""Scales to start from: the ratio of counts in common voxels, one for each experiment.

A reference map counts as one more experiment, whose scale is 1.
"""

from __future__ import annotations

import numpy as np

from dials_diffuse.scaling.initial import (
    Pairs,
    RelativeScales,
    add_up_pairs,
    relative_scales,
)
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.refinement import Refiner


def with_reference(reference: Reference | None, pairs: Pairs, number: int) -> Pairs:
    """Pairs of voxels and experiments, and those of a reference map if there is one.

    Args:
        reference: What the map says of the voxels, by their numbers in the pairs.
        pairs: Of the experiments.
        number: Of the experiment that the map is to be.
    """
    if reference is None:
        return pairs
    known = np.flatnonzero(reference.known)
    further = (
        known,
        np.full(len(known), number),
        reference.photons[known],
        reference.response[known],
    )
    return Pairs(*(np.concatenate(columns) for columns in zip(pairs, further)))


def start_scales(refiner: Refiner, n_experiments: int) -> RelativeScales:
    """The scales of experiments and, last, of the reference map if there is one.

    Groups of experiments that nothing links to the map have a mean scale of 1.
    """
    block = refiner.block
    pairs = add_up_pairs(
        block.group,
        block.experiment,
        refiner.photons.astype(float),
        block.normalisation.astype(float),
    )
    if refiner.reference is None:
        return relative_scales(pairs, n_experiments)
    pairs = with_reference(refiner.reference, pairs, n_experiments)
    scale, group = relative_scales(pairs, n_experiments + 1)
    if group[-1] >= 0:
        scale[group == group[-1]] /= scale[-1]
    return RelativeScales(scale, group)
