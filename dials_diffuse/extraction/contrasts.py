"""Bragg peaks against their surroundings, a relative measure of Bragg intensities.

Each pixel belongs to the reciprocal lattice point nearest to it. The pixels less than a
sixth of a reciprocal cell from it along each axis are compared with the others of the
same point, which leaves out everything smooth: background, polarization, absorption.
What is left tells how strong the reflections are, with no model of the spots and no
integration, and so in which setting a crystal was indexed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Iterable, Sequence

import numpy as np

from dxtbx.model.experiment_list import ExperimentList

import dials_diffuse_ext as ext
from dials.util import progress
from dials_diffuse.extraction.blocks import Block, make_blocks
from dials_diffuse.extraction.loop import accumulate_block
from dials_diffuse.extraction.settings import BraggSettings, ExtractionSettings
from dials_diffuse.extraction.tables import (
    PanelTable,
    TableKey,
    detector_tables,
    table_keys,
)
from dials_diffuse.grid import MAX_VOXELS, Grid
from dials_diffuse.util.parallel import forked_results
from dials_diffuse.util.signals import progress_bar

NDIV = 3  # the peak is in the middle voxel, its surroundings in the 26 others
MAX_IMAGES = 100  # of a sweep, evenly spread
CACHED_TABLES = 2


@dataclasses.dataclass(frozen=True)
class Contrasts:
    """Bragg peaks against their surroundings in the images of one crystal.

    Attributes:
        hkl: Miller indices, shape (n, 3).
        value: Logarithm of the ratio of the mean intensities in and around the peak.
    """

    hkl: np.ndarray
    value: np.ndarray


def contrast_grid(grid: Grid) -> Grid:
    """The grid with three voxels per reciprocal cell along each axis.

    Where it would be too large for the pixel loop it ends at a larger d_min.
    """
    size = math.prod(2 * NDIV * a / grid.d_min + 5 for a in grid.unit_cell[:3])
    d_min = grid.d_min * max(1.0, 1.01 * (size / MAX_VOXELS) ** (1 / 3))
    d_max = grid.d_max if grid.d_max is None or grid.d_max > d_min else None
    return dataclasses.replace(grid, ndiv=(NDIV,) * 3, d_min=d_min, d_max=d_max)


def contrasts_of_sums(rows: np.ndarray, cells: Grid) -> Contrasts:
    """The contrasts of the reflections that some voxel sums hold.

        value = ln[(N + 1/2) / M] - ln[(N' + 1/2) / M']

    with photons N and normalisation M in the peak, N' and M' around it. The halves keep
    peaks without photons.

    Args:
        rows: Array of dtype ``dials_diffuse.extraction.loop.SUMS``.
        cells: The grid of ``contrast_grid``.
    """
    # what the pixel loop keeps besides voxels has keys beyond theirs
    rows = rows[rows["key"] < math.prod(cells.shape)]
    index = cells.index(rows["key"])
    hkl = (
        index + NDIV // 2
    ) // NDIV  # floors: voxels -1, 0 and 1 belong to the point 0
    is_peak = np.all(index == NDIV * hkl, axis=1)
    point = cells.key(hkl)
    _, first, of_row = np.unique(point, return_index=True, return_inverse=True)
    of_row, n = of_row.ravel(), len(first)

    def total(column: str, where: np.ndarray) -> np.ndarray:
        return np.bincount(of_row[where], rows[column][where], n)

    counts, counts_around = total("counts", is_peak), total("counts", ~is_peak)
    weight, weight_around = (
        total("normalisation", is_peak),
        total("normalisation", ~is_peak),
    )
    # a negative pedestal-corrected sum of an integrating detector has no logarithm
    use = (weight > 0) & (weight_around > 0) & (counts >= 0) & (counts_around >= 0)
    value = np.log(
        (counts[use] + 0.5)
        / weight[use]
        * weight_around[use]
        / (counts_around[use] + 0.5)
    )
    return Contrasts(hkl[first[use]], value)


@dataclasses.dataclass(frozen=True)
class ContrastJob:
    """All that measuring needs; handed over by fork.

    Attributes:
        units: Numbers of the experiments of each crystal.
        blocks: The images to look at of each crystal.
        cells: The grid of ``contrast_grid``.
    """

    experiments: ExperimentList
    keys: tuple[TableKey, ...]
    blocks: tuple[tuple[Block, ...], ...]
    cells: Grid
    settings: ExtractionSettings
    n_threads: int


_job: ContrastJob | None = None


@functools.lru_cache(maxsize=CACHED_TABLES)
def _tables(key: TableKey) -> list[PanelTable]:
    experiment = _job.experiments[_job.keys.index(key)]
    return detector_tables(experiment, _job.settings, _job.n_threads)


def _measure(units: Sequence[int]) -> list[Contrasts]:
    """The contrasts of some crystals."""
    ext.keep_freed_memory()
    accumulators: list[ext.Accumulator] = []
    results = []
    for unit in units:
        rows = [
            accumulate_block(
                block,
                _job.experiments[block.experiment],
                _tables(_job.keys[block.experiment]),
                accumulators,
                _job.cells,
                _job.settings,
                _job.n_threads,
            )
            for block in _job.blocks[unit]
        ]
        results.append(contrasts_of_sums(np.concatenate(rows), _job.cells))
    return results


def spread_evenly(blocks: Sequence[Block], n: int) -> list[Block]:
    """Blocks of single images, at most n of them and evenly spread over all."""
    images = [(block, i) for block in blocks for i in block.array_indices]
    chosen = np.unique(np.linspace(0, len(images) - 1, min(n, len(images))).round())
    return [
        dataclasses.replace(block, array_indices=range(i, i + 1))
        for block, i in (images[int(number)] for number in chosen)
    ]


def measure_contrasts(
    experiments: ExperimentList,
    units: Sequence[Sequence[int]],
    grid: Grid,
    settings: ExtractionSettings,
) -> list[Contrasts]:
    """The contrasts of each crystal, from its images.

    Args:
        experiments: Experiments with images and crystals.
        units: Numbers of the experiments of each crystal.
        grid: The voxel grid.
        settings: The settings of extraction.

    Raises:
        ValueError: An image cannot be read.
    """
    global _job
    of_experiment: dict[int, list[Block]] = {}
    for block in make_blocks(experiments, settings.block_width):
        of_experiment.setdefault(block.experiment, []).append(block)
    blocks = [
        spread_evenly([b for i in unit for b in of_experiment[i]], MAX_IMAGES)
        for unit in units
    ]
    cells = contrast_grid(grid)
    n_processes = min(settings.nproc, len(units))
    _job = ContrastJob(
        experiments,
        table_keys(experiments, settings.masks),
        tuple(map(tuple, blocks)),
        cells,
        dataclasses.replace(
            settings, ndiv=cells.ndiv, bragg=BraggSettings(exclusion="none")
        ),
        max(1, settings.nproc // n_processes),
    )
    _tables.cache_clear()
    try:
        # made before the fork, so that no process makes them again
        _tables(_job.keys[units[0][0]])
        tasks = [(list(part),) for part in _parts(len(units), 16 * n_processes)]
        with progress_bar(
            total=sum(map(len, blocks)), desc="Indexing", unit=" images"
        ) as bar:
            return list(_collect(tasks, n_processes, bar))
    finally:
        _job = None
        _tables.cache_clear()


def _parts(n: int, n_parts: int) -> list[np.ndarray]:
    return [part for part in np.array_split(range(n), n_parts) if len(part)]


def _collect(
    tasks: Sequence[tuple[list[int]]], n_processes: int, bar: progress
) -> Iterable[Contrasts]:
    """The contrasts of all tasks, in their order."""
    with forked_results(_measure, tasks, n_processes) as results:
        for (units,), contrasts in zip(tasks, results):
            bar.update(sum(len(_job.blocks[unit]) for unit in units))
            yield from contrasts
