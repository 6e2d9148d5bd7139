"""The whole of extraction: experiments in, a sorted table of voxel observations out."""

from __future__ import annotations

import dataclasses
import functools
import logging
import multiprocessing
import multiprocessing.synchronize
import os
from pathlib import Path
from typing import Callable, Collection, Iterator, NamedTuple, Sequence

import numpy as np

from dxtbx.model.experiment_list import ExperimentList

import dials_diffuse_ext as ext
from dials_diffuse.bragg.points import PointGrid
from dials_diffuse.bragg.sums import (
    PeakIntensities,
    exclusion_regions,
    peak_intensities,
)
from dials_diffuse.extraction.blocks import Block, limits_of, make_blocks
from dials_diffuse.extraction.extras import ImageExtrasSource
from dials_diffuse.extraction.loop import accumulate_block
from dials_diffuse.extraction.runs import merge_runs, statistical_peaks, write_runs
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.extraction.tables import (
    PanelTable,
    PixelCounts,
    TableKey,
    detector_tables,
    table_keys,
)
from dials_diffuse.extraction.totals import ObservationTotals, PeakTotals
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ObservationWriter
from dials_diffuse.util.files import temporary_folder
from dials_diffuse.util.parallel import FORK, forked_results
from dials_diffuse.util.signals import progress_bar

logger = logging.getLogger("dials.diffuse.extract")

CACHED_TABLES = 2  # 100 MB each for 6 million pixels


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker needs; handed over by fork, never pickled.

    Attributes:
        keys: Which detector arrays each experiment needs.
        first: The first experiment of each key.
        n_threads: Threads of each worker.
        extras: What else is known of the images.
        stop: Set when the results are no longer wanted.
    """

    experiments: ExperimentList
    keys: tuple[TableKey, ...]
    first: dict[TableKey, int]
    blocks: tuple[Block, ...]
    grid: Grid
    settings: ExtractionSettings
    folder: Path
    n_threads: int
    extras: ImageExtrasSource
    stop: multiprocessing.synchronize.Event


@dataclasses.dataclass
class TaskResult:
    """What a worker did: the runs it wrote, and counts for the log."""

    paths: list[Path] = dataclasses.field(default_factory=list)
    n_images: int = 0
    n_pixels: int = 0
    counts: float = 0.0
    background: float = 0.0


class Extracted(NamedTuple):
    """What extraction wrote, and sums for the report.

    Attributes:
        n_rows: Number of observations in the table.
        peaks: Sums over the Bragg peaks that are not in it.
        blocks: The blocks of images that the observations were made from.
        totals: Sums over the observations.
        pixels: Of an image with the detector, beam and mask of the first one.
    """

    n_rows: int
    peaks: PeakTotals
    blocks: tuple[Block, ...]
    totals: ObservationTotals
    pixels: dict[TableKey, PixelCounts]


_job: Job | None = None


@functools.lru_cache(maxsize=CACHED_TABLES)
def _tables(key: TableKey) -> list[PanelTable]:
    """Detector arrays of a key, made when first needed."""
    # before the fork all processors are free for it
    in_parent = multiprocessing.parent_process() is None
    n_threads = _job.settings.nproc if in_parent else _job.n_threads
    experiment = _job.experiments[_job.first[key]]
    return detector_tables(experiment, _job.settings, n_threads, _job.grid)


def _blocks_of_task(
    blocks: Sequence[Block], result: TaskResult
) -> Iterator[np.ndarray]:
    """The observations of each block; adds to the counts of the result."""
    accumulators: list[ext.Accumulator] = []
    n_voxels = PointGrid(_job.grid).n_voxels
    for block in blocks:
        if _job.stop.is_set():
            return
        experiment = _job.experiments[block.experiment]
        extras = None
        if _job.extras.any(block.experiment):
            extras = _job.extras.of_block(block)
        tables = _tables(_job.keys[block.experiment])
        rows = accumulate_block(
            block,
            experiment,
            tables,
            accumulators,
            _job.grid,
            _job.settings,
            _job.n_threads,
            extras,
        )
        result.n_images += len(block)
        diffuse = rows["key"] < n_voxels
        result.n_pixels += int(rows["n_pixels"][diffuse].sum())
        result.counts += float(rows["counts"][diffuse].sum())
        result.background += float(rows["background"][diffuse].sum())
        yield rows


def _run_task(first: int, last: int) -> TaskResult:
    """Process the blocks first..last-1 of the job."""
    ext.keep_freed_memory()
    result = TaskResult()
    rows = _blocks_of_task(_job.blocks[first:last], result)
    result.paths = write_runs(rows, _job.folder, f"run_{first:08d}")
    return result


def cut_into_tasks(blocks: Sequence[Block], nproc: int) -> list[tuple[int, int]]:
    """Ranges of blocks with about equal numbers of images, a few for each process."""
    n_images = np.concatenate([[0], np.cumsum([len(block) for block in blocks])])
    n_tasks = min(len(blocks), 16 * nproc)
    targets = np.arange(n_tasks + 1) * n_images[-1] / n_tasks
    cuts = np.unique(np.searchsorted(n_images, targets))
    return list(zip(map(int, cuts[:-1]), map(int, cuts[1:])))


def _run_tasks(
    job: Job, n_processes: int
) -> tuple[list[TaskResult], dict[TableKey, PixelCounts]]:
    """Run a job; the tables that its first images need are made before the fork.

    Returns:
        The results, and the pixels of an image with these tables.
    """
    global _job
    _job = job
    _tables.cache_clear()
    tasks = cut_into_tasks(job.blocks, n_processes)
    try:
        key = job.keys[job.blocks[0].experiment]
        panels = [table.pixels for table in _tables(key)]
        with progress_bar(
            total=sum(map(len, job.blocks)), desc="Extracting", unit=" images"
        ) as bar:
            done = []
            with forked_results(
                _run_task, tasks, n_processes, stop=job.stop.set
            ) as results:
                for result in results:
                    bar.update(result.n_images)
                    done.append(result)
        return done, {key: PixelCounts(*map(sum, zip(*panels)))}
    finally:
        _job = None
        _tables.cache_clear()


def extract(
    experiments: ExperimentList,
    grid: Grid,
    settings: ExtractionSettings,
    path: str | os.PathLike,
    phil: str = "",
    inputs: list[str] | None = None,
    rejected: Collection[tuple[int, int]] = (),
    take_peaks: Callable[[PeakIntensities], None] | None = None,
) -> Extracted:
    """Extract voxel observations from images to a file.

    Args:
        experiments: Experiments with images and crystals.
        grid: The voxel grid.
        settings: The settings.
        path: The file to write; see ``dials_diffuse.io.observations``. Pass the path
            of ``atomic_path``: sorted parts are kept in a folder beside it meanwhile.
        phil: The PHIL parameters, for the record.
        inputs: Names of the input files, for the record.
        rejected: Experiment and array index of images to leave out.
        take_peaks: Called with the intensities of the Bragg peaks left out, some lattice
            points at a time, in their order.

    Returns:
        The number of observations, and sums over the peaks and the observations.

    Raises:
        ValueError: An image cannot be read, or no pixel is left.
    """
    path = Path(path)
    with temporary_folder(path, "runs") as folder:
        job, n_processes = make_job(experiments, grid, settings, folder, rejected)
        results, pixels = _run_tasks(job, n_processes)
        identifiers = {i: e.identifier for i, e in enumerate(experiments)}
        paths = [path for result in results for path in result.paths]
        with ObservationWriter(path, grid, identifiers, phil, inputs) as writer:
            writer.write_blocks(limits_of(job.blocks))
            peaks, totals, n_beyond = _merge(job, paths, writer, take_peaks)
    _report(results, len(job.blocks), writer.n_rows, n_beyond)
    if writer.n_rows == 0:
        raise ValueError(
            "No pixel is left: check the mask, the trusted range, the resolution "
            "limits and bragg.semi_axes"
        )
    return Extracted(writer.n_rows, peaks, job.blocks, totals, pixels)


def _merge(
    job: Job,
    paths: Sequence[Path],
    writer: ObservationWriter,
    take_peaks: Callable[[PeakIntensities], None] | None,
) -> tuple[PeakTotals, ObservationTotals, int]:
    """Merge the runs of a job to the table; hand over the Bragg intensities.

    Returns:
        Sums over the peaks and the observations, and the number of observations left
        out beyond d_min.
    """
    experiments, grid, settings = job.experiments, job.grid, job.settings
    regions = exclusion_regions(experiments, grid, settings)
    peaks, totals = PeakTotals(grid, experiments), ObservationTotals(grid, job.blocks)
    left_out = None
    if settings.bragg.exclusion == "statistical":
        left_out = statistical_peaks(paths, grid)
        logger.info(
            "%d voxels stand out of those around them and are left out", len(left_out)
        )
    if settings.ellipsoids:
        fitted = [region.numbers for region in regions]
        writer.write_bragg_regions(np.unique(fitted, axis=0))

    def add_peaks(rows: np.ndarray) -> None:
        part = peak_intensities(rows, experiments, grid, settings, regions)
        peaks.add(part)
        if take_peaks is not None:
            take_peaks(part)

    n_beyond = merge_runs(paths, grid, writer, left_out, totals, add_peaks)
    return peaks, totals, n_beyond


def make_job(
    experiments: ExperimentList,
    grid: Grid,
    settings: ExtractionSettings,
    folder: Path,
    rejected: Collection[tuple[int, int]] = (),
) -> tuple[Job, int]:
    """The job and the number of processes for it.

    Processes that would have no block become threads.
    """
    keys = table_keys(experiments, settings.masks)
    blocks = make_blocks(experiments, settings.block_width, rejected)
    n_processes = min(settings.nproc, len(blocks))
    job = Job(
        experiments=experiments,
        keys=keys,
        first={key: i for i, key in reversed(list(enumerate(keys)))},
        blocks=tuple(blocks),
        grid=grid,
        settings=settings,
        folder=folder,
        n_threads=max(1, settings.nproc // n_processes),
        extras=ImageExtrasSource(experiments, grid, settings),
        stop=FORK.Event(),
    )
    return job, n_processes


def _report(
    results: Sequence[TaskResult], n_blocks: int, n_rows: int, n_beyond: int
) -> None:
    """Log what was done."""
    n_pixels = sum(result.n_pixels for result in results)
    logger.info(
        "%d images in %d blocks: %d pixels used, %.0f photons, %.4g per pixel",
        sum(result.n_images for result in results),
        n_blocks,
        n_pixels,
        sum(result.counts for result in results),
        sum(result.counts for result in results) / max(n_pixels, 1),
    )
    background = sum(result.background for result in results)
    if background:
        logger.info("%.4g photons per pixel are background", background / n_pixels)
    if background > sum(result.counts for result in results):
        logger.warning(
            "Warning: the background is larger than what was measured. Was it made with "
            "the same gain, trusted range and mask?"
        )
    logger.info(
        "%d observations of voxels, %.1f pixels each", n_rows, n_pixels / max(n_rows, 1)
    )
    if n_beyond:
        logger.info(
            "%d observations beyond d_min in the reference cell were left out: their "
            "crystals have larger cells",
            n_beyond,
        )
