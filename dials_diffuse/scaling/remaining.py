"""Experiments of which too few observations were refined against.

Of a choice of voxels a small still may have seen next to none. Its scale is then set
afterwards, with all of its observations, by the ratio of its photons to those that the
others let expect (``photon_ratios``); where there are many small stills, or nothing else,
that of all of them together.

Outliers count most where observations are few. They can only be judged by a scale that is
about right, so that at first none but gross ones go, then those of the error model, each
time with the scales found without those of the time before.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dxtbx import flumpy

from dials_diffuse.scaling.block import RowReader
from dials_diffuse.scaling.error_model import ErrorModel
from dials_diffuse.scaling.initial import MIN_ROWS
from dials_diffuse.scaling.photon_ratios import find_ratios
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.refinement import Refiner
from dials_diffuse.scaling.result import Scaling, Source
from dials_diffuse.scaling.shared_rows import SharedRows, seen_by_several
from dials_diffuse.util.files import temporary_folder
from dials_diffuse.util.text import shortened

logger = logging.getLogger("dials.diffuse.scale")

GROSS = 1.0  # relative scatter that scales not yet known well add
CYCLES = 2  # of outliers and scales, once these are about right


def informative_rows(refiner: Refiner, n_experiments: int) -> np.ndarray:
    """Number of rows of each experiment in voxels that it shares with others.

    Args:
        refiner: Whose block has the rows.
        n_experiments: Number of experiments.
    """
    block = refiner.block
    shared = seen_by_several(block.experiment, block.start[:-1])
    if refiner.reference is not None:
        shared |= refiner.reference.known
    use = shared[block.group] & refiner.used
    return np.bincount(block.experiment[use], minlength=n_experiments)


def scale_remaining(
    scaling: Scaling,
    reader: RowReader,
    reference: Reference | None,
    output: Path,
    threshold: float | None,
) -> None:
    """Scale the experiments of which too few observations were refined against.

    Args:
        scaling: The result; its scales are changed, and it is told where they are from.
        reader: Of all observations.
        reference: The map that was scaled to.
        output: What is to be written; temporary files are put beside it.
        threshold: Deviation from which on an observation is an outlier; None: none is.
    """
    n = len(scaling.extents)
    scaling.n_observations = informative_rows(scaling.refiner, n)
    scaling.source = np.array([Source.REFINEMENT] * n, dtype=object)
    if "scale" not in scaling.components:
        return
    present = ~reader.is_excluded(np.arange(n), np.full(n, np.nan))
    few = present & (scaling.n_observations < MIN_ROWS)
    few &= scaling.components["scale"].layout.block >= 0
    n_rows = scaling.n_observations
    if _is_single(present, reference):
        return
    if scaling.step > 1 and few.any():
        present, n_rows = _scale_by_all(
            scaling, reader, few, reference, output, threshold
        )
    elif np.any(few & (n_rows == 0)):
        present = _count_rows(reader, n) > 0
    if _is_single(present, reference):
        return
    lost = scaling.n_observations == 0
    if scaling.step > 1:
        lost |= few
    scaling.source[lost & (scaling.source == Source.REFINEMENT)] = Source.NOTHING
    _log(scaling, few & present, n_rows)


def _is_single(present: np.ndarray, reference: Reference | None) -> bool:
    """Whether there is one experiment only, whose scale is 1."""
    return reference is None and np.count_nonzero(present) == 1


def _count_rows(reader: RowReader, n_experiments: int) -> np.ndarray:
    """Number of usable rows of each experiment."""
    total = np.zeros(n_experiments, dtype=np.int64)
    for slab in reader.slabs("Counting"):
        total += np.bincount(reader.read(*slab).experiment, minlength=n_experiments)
    return total


def _scale_by_all(
    scaling: Scaling,
    reader: RowReader,
    few: np.ndarray,
    reference: Reference | None,
    output: Path,
    threshold: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scale some experiments by all of their rows.

    Args: as those of ``scale_remaining``; ``few`` says whether each experiment is one of
        them.

    Returns:
        Whether each experiment has usable rows, and how many of them in voxels that
        one of the few shares with another.
    """
    with temporary_folder(output, "rows") as folder:
        rows = SharedRows(reader, scaling, folder)
        present = rows.n_rows > 0
        few = few & present
        rows.keep(few, reference)
        log_k, n_rows = _find_scales(rows, scaling, few, threshold)
    found = few & np.isfinite(log_k)
    all_new = reference is None and bool(np.all(few[present]))
    _set_scales(scaling, np.where(found, log_k, 0.0), all_new)
    scaling.source[found] = Source.ALL
    return present, n_rows


def _find_scales(
    rows: SharedRows, scaling: Scaling, few: np.ndarray, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of what the scales of some experiments are to be multiplied by.

    Returns:
        They, -inf where nothing tells them, and the number of rows of each experiment
        that are no outliers.
    """
    own = scaling.error_model
    gross = ErrorModel(own.a, float(np.hypot(own.b, GROSS)))
    log_k = np.zeros(len(few))
    # The scale of one that has not been refined at all may be wrong by any factor.
    exempt = few & (scaling.n_observations == 0)
    for model in [gross, gross] + [own] * CYCLES:
        parts, n_rows = rows.add_up(log_k, threshold, model, exempt)
        of_map = np.zeros(1)
        log_k = find_ratios(
            parts, np.append(few, False), np.concatenate([log_k, of_map])
        )[:-1]
        if threshold is None:
            break
        exempt = few & ~np.isfinite(log_k)
    return log_k, n_rows


def _set_scales(scaling: Scaling, log_k: np.ndarray, all_new: bool) -> None:
    """Multiply scales; if all are new, the mean of those refined against is 1 again."""
    component = scaling.components["scale"]
    values = flumpy.to_numpy(component.parameters).copy()
    for number in np.flatnonzero(log_k):
        _, mine = component.layout.of_experiment(int(number))
        values[mine] += log_k[number]
    component.parameters = flumpy.from_numpy(values)
    if all_new:
        cells = scaling.refiner.block.cells["scale"]
        shift = np.log(component.cell_values()[cells].mean())
        component.parameters = component.parameters - float(shift)


def _log(scaling: Scaling, few: np.ndarray, n_rows: np.ndarray) -> None:
    """Name the experiments whose scales are not those of the refinement, or uncertain.

    Args:
        scaling: With the sources of the scales.
        few: Whether each experiment has rows, and few of them were refined against.
        n_rows: Number of rows of each experiment that tell its scale.
    """
    known = few & (scaling.source != Source.NOTHING)
    _log_numbers(
        known & (scaling.source == Source.ALL),
        scaling.n_observations,
        "The scales of %d experiments with less than %d observations among those "
        "refined against are from all of their observations: %s",
    )
    _log_numbers(
        known & (n_rows < MIN_ROWS),
        n_rows,
        "The scales of %d experiments are uncertain, as they have less than %d "
        "observations of voxels that others saw: %s",
    )
    lost = np.flatnonzero(few & ~known)
    if len(lost):
        logger.warning(
            "Warning: nothing tells the scales of %d of %d experiments, which have no "
            "photons in voxels that others saw; they stay as they are: %s",
            len(lost),
            len(few),
            shortened(lost),
        )


def _log_numbers(chosen: np.ndarray, n_rows: np.ndarray, text: str) -> None:
    """Log a text with some experiments, and with the number of rows of each."""
    numbers = np.flatnonzero(chosen)
    if len(numbers):
        names = [f"{i} ({n_rows[i]})" for i in numbers]
        logger.info(text, len(numbers), MIN_ROWS, shortened(names))
