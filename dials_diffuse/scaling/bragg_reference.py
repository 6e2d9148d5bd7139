"""Bragg intensities of the same images as further observations of scale and decay.

A peak that a sweep has recorded as a whole obeys the factors of the diffuse scattering
around it, a b |F|², and no offset: its own surroundings have been taken off. Peaks of
stills are partial, by fractions that nobody knows, and say nothing.
"""

from __future__ import annotations

import logging
from typing import Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment

from dials.array_family import flex
from dials_diffuse.grid import Grid
from dials_diffuse.merging.observations import asu_voxels, lookup
from dials_diffuse.scaling.block import RowReader, Rows
from dials_diffuse.scaling.terms import TERMS, Role
from dials_diffuse.util.compat import miller_index_to_numpy

logger = logging.getLogger("dials.diffuse.scale")

NEEDED = (
    "miller_index",
    "id",
    "panel",
    "xyzobs.px.value",
    "intensity.sum.value",
    "intensity.sum.variance",
    "partiality",
)

# Photons that one unit of variance is worth: rows have the variance of their table, and
# that of counting, which the model adds, must be small beside it.
PRECISE = 1e3


def bragg_rows(
    paths: Sequence[str],
    experiments: Sequence[Experiment],
    reader: RowReader,
    grid: Grid,
) -> list[Rows]:
    """The complete peaks of tables, as rows beside those of voxels.

    Args:
        paths: ``bragg.refl`` of dials.diffuse_extract.
        experiments: The experiments that are scaled.
        reader: Of the observations of voxels.
        grid: The voxel grid.

    Raises:
        ValueError: A table cannot be read, belongs to other experiments, or has no
            complete peaks.
    """
    return [_rows(path, experiments, reader, grid) for path in paths]


def _rows(
    path: str, experiments: Sequence[Experiment], reader: RowReader, grid: Grid
) -> Rows:
    table = _load(path)
    names = dict(table.experiment_identifiers())
    place = {experiment.identifier: i for i, experiment in enumerate(experiments)}
    missing = [name for name in names.values() if name not in place]
    if missing:
        raise ValueError(
            f"bragg_reference={path} belongs to other experiments: {missing[0]} is not in "
            "the experiment list. Give the bragg.refl of the same extraction"
        )
    complete = flumpy.to_numpy(table["partiality"]) >= 1
    variance = flumpy.to_numpy(table["intensity.sum.variance"])
    use = complete & (variance > 0)
    if not use.any():
        raise ValueError(
            f"bragg_reference={path} has no complete peaks: those of stills are partial"
        )
    logger.info(
        "%s: %d of %d Bragg peaks are complete and serve as observations",
        path,
        np.count_nonzero(use),
        len(table),
    )
    table = table.select(flumpy.from_numpy(use))
    numbers = {i: place[name] for i, name in names.items()}
    experiment = lookup(numbers, flumpy.to_numpy(table["id"]), path)
    return _as_rows(table, experiment, reader, grid)


def _load(path: str) -> flex.reflection_table:
    try:
        table = flex.reflection_table.from_file(path)
    except Exception as e:  # whatever a damaged file brings about
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"Cannot read bragg_reference={path} ({reason})") from None
    missing = [name for name in NEEDED if name not in table]
    if missing:
        raise ValueError(
            f"bragg_reference={path} has no column {missing[0]}: give the bragg.refl of "
            "dials.diffuse_extract"
        )
    return table


def _as_rows(
    table: flex.reflection_table,
    experiment: np.ndarray,
    reader: RowReader,
    grid: Grid,
) -> Rows:
    n = len(table)
    hkl = miller_index_to_numpy(table["miller_index"])
    index = hkl * np.array(grid.ndiv, dtype=np.int32)
    xyz = np.array(table["xyzobs.px.value"]).reshape(n, 3)
    columns = {
        "panel": flumpy.to_numpy(table["panel"]),
        "xyzobs.px.value": xyz,
        "d": 1 / np.maximum(grid.s(index), 1e-9),
    }
    cells = reader.cells(experiment, columns)
    for name in cells:
        if TERMS[name].role is Role.ADDITIVE:
            cells[name] = np.zeros_like(cells[name])  # the cell without a term
    value = flumpy.to_numpy(table["intensity.sum.value"])
    variance = flumpy.to_numpy(table["intensity.sum.variance"])
    norm = PRECISE * np.abs(value) / variance + 1 / np.sqrt(variance)
    keep = ~reader.is_excluded(experiment, xyz[:, 2])
    unique = asu_voxels(index, grid.laue_group)
    return Rows(
        voxel=~unique[keep],  # negative: beside those of the voxels
        experiment=experiment[keep].astype(np.int32),
        counts=(value * norm)[keep].astype(np.float32),
        background=np.zeros(keep.sum(), np.float32),
        variance=(variance * norm**2)[keep].astype(np.float32),
        normalisation=norm[keep].astype(np.float32),
        cells={name: values[keep] for name, values in cells.items()},
        number=np.flatnonzero(keep),
    )
