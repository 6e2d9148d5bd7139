"""Experiments of which too few observations were refined against.

Of a choice of voxels a small still may have seen next to none. Its scale is then set
afterwards, with all of its observations, by the ratio of its photons to those that the
others, as they have been scaled, let expect:

    k = Σ u n / Σ u x I        I = N/X,  u = X/(X + x)

summed over the voxels that it shares with others, with its photons n and their response x
to the intensity and the same, N and X, of all others and of a reference map. The weights
hold no counts, so that k is unbiased, however few these are.
"""

from __future__ import annotations

import logging
from typing import Iterator, NamedTuple

import numpy as np

from dxtbx import flumpy

from dials_diffuse.scaling.apply import ScaleFinder
from dials_diffuse.scaling.block import RowReader
from dials_diffuse.scaling.initial import MIN_ROWS, add_up_pairs
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.refinement import Refiner
from dials_diffuse.scaling.result import Scaling, Source

logger = logging.getLogger("dials.diffuse.scale")

MAX_NAMES = 10  # of experiments in the log


class Observed(NamedTuple):
    """Rows with the model applied.

    Args:
        voxel: Packed symmetry-unique voxel.
        experiment: Number of the experiment.
        photons: Less background and offset.
        response: x, to the intensity, s.sr.
    """

    voxel: np.ndarray
    experiment: np.ndarray
    photons: np.ndarray
    response: np.ndarray


def informative_rows(refiner: Refiner, n_experiments: int) -> np.ndarray:
    """Number of rows of each experiment in voxels that it shares with others.

    Args:
        refiner: Whose block has the rows.
        n_experiments: Number of experiments.
    """
    block = refiner.block
    low = np.minimum.reduceat(block.experiment, block.start[:-1])
    high = np.maximum.reduceat(block.experiment, block.start[:-1])
    shared = low < high
    if refiner.reference is not None:
        shared |= refiner.reference.known
    use = shared[block.group] & refiner.used
    return np.bincount(block.experiment[use], minlength=n_experiments)


def scale_remaining(
    scaling: Scaling, reader: RowReader, reference: Reference | None
) -> None:
    """Scale the experiments of which too few observations were refined against.

    Args:
        scaling: The result; its scales are changed, and it is told where they are from.
        reader: Of all observations.
        reference: The map that was scaled to.
    """
    n = len(scaling.extents)
    scaling.n_observations = informative_rows(scaling.refiner, n)
    scaling.source = np.array([Source.REFINEMENT] * n, dtype=object)
    if "scale" not in scaling.components:
        return
    few = ~reader.is_excluded(np.arange(n), np.full(n, np.nan))
    if reference is None and np.count_nonzero(few) == 1:
        return  # the scale of a single experiment is 1
    few &= scaling.n_observations < MIN_ROWS
    few &= scaling.components["scale"].layout.block >= 0
    ratio = np.zeros(n)
    if scaling.step > 1 and few.any():
        ratio = find_ratios(scaling, reader, few, reference)
    _set_scales(scaling, ratio)
    scaling.source[few & (scaling.n_observations == 0)] = Source.NOTHING
    scaling.source[ratio > 0] = Source.ALL
    _log(scaling, few)


def find_ratios(
    scaling: Scaling, reader: RowReader, few: np.ndarray, reference: Reference | None
) -> np.ndarray:
    """By how much the scales of some experiments are to be multiplied; 0: unknown.

    Args:
        scaling: The result.
        reader: Of all observations.
        few: Whether each experiment is among them.
        reference: The map that was scaled to.
    """
    own = Observed(
        *(
            np.concatenate(columns)
            for columns in zip(*_rows(reader, scaling, few, None))
        )
    )
    voxels, place = np.unique(own.voxel, return_inverse=True)
    total, norm = np.zeros((2, len(voxels)))
    if reference is not None:
        total, norm = reference.of(voxels).photons, reference.of(voxels).response
    for rows in _rows(reader, scaling, ~few, voxels):
        found = np.searchsorted(voxels, rows.voxel)
        total = total + np.bincount(found, rows.photons, len(voxels))
        norm = norm + np.bincount(found, rows.response, len(voxels))
    if len(voxels) == 0:
        return np.zeros(len(few))
    pairs = add_up_pairs(place, own.experiment, own.photons, own.response)
    share = norm[pairs.voxel] / (norm[pairs.voxel] + pairs.weight)
    rate = total[pairs.voxel] / (norm[pairs.voxel] + pairs.weight)
    due = np.bincount(pairs.experiment, pairs.weight * rate, len(few))
    seen = np.bincount(pairs.experiment, pairs.photons * share, len(few))
    good = (due > 0) & (seen > 0)
    return np.divide(seen, due, out=np.zeros(len(few)), where=good)


def _rows(
    reader: RowReader, scaling: Scaling, chosen: np.ndarray, voxels: np.ndarray | None
) -> Iterator[Observed]:
    """All rows of some experiments, in some voxels, slab by slab."""
    finder = ScaleFinder(scaling)
    for slab in reader.slabs("Scaling what is left"):
        rows = reader.read(*slab)
        use = chosen[rows.experiment]
        if voxels is not None:
            use &= np.isin(rows.voxel, voxels)
        factor, offset = finder.find(rows.cells, len(rows.voxel))
        photons = rows.counts - rows.background - rows.normalisation * offset
        columns = (rows.voxel, rows.experiment, photons, rows.normalisation * factor)
        yield Observed(*(column[use] for column in columns))


def _set_scales(scaling: Scaling, ratio: np.ndarray) -> None:
    component = scaling.components["scale"]
    values = flumpy.to_numpy(component.parameters).copy()
    for number in np.flatnonzero(ratio > 0):
        _, mine = component.layout.of_experiment(int(number))
        values[mine] += np.log(ratio[number])
    component.parameters = flumpy.from_numpy(values)


def _log(scaling: Scaling, few: np.ndarray) -> None:
    """Name the experiments whose scales are not those of the refinement, or uncertain."""

    def names(numbers: np.ndarray) -> str:
        text = ", ".join(
            f"{i} ({scaling.n_observations[i]})" for i in numbers[:MAX_NAMES]
        )
        return text + (", ..." if len(numbers) > MAX_NAMES else "")

    for source, text in (
        (
            Source.ALL,
            "The scales of %d experiments with less than %d observations among those "
            "refined against are from all of their observations: %s",
        ),
        (
            Source.REFINEMENT,
            "The scales of %d experiments are uncertain, as they have less than %d "
            "observations of voxels that others saw: %s",
        ),
    ):
        numbers = np.flatnonzero(few & (scaling.source == source))
        if len(numbers):
            logger.info(text, len(numbers), MIN_ROWS, names(numbers))
    numbers = np.flatnonzero(few & (scaling.source == Source.NOTHING))
    if len(numbers):
        logger.warning(
            "Warning: nothing tells the scales of %d of %d experiments, which share no "
            "voxel with others; they stay as they are: %s",
            len(numbers),
            len(few),
            ", ".join(map(str, numbers[:MAX_NAMES]))
            + (", ..." if len(numbers) > MAX_NAMES else ""),
        )
