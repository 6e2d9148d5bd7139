"""One block of images through the C++ pixel loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Detector, Experiment
from scitbx.array_family import flex

import dials_diffuse_ext as ext
from dials_diffuse.bragg.points import PointGrid
from dials_diffuse.bragg.sums import add_surroundings
from dials_diffuse.extraction.blocks import Block, image_number
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.extraction.tables import PanelTable
from dials_diffuse.geometry.orientation import FrameModel, frame_model, inverse
from dials_diffuse.geometry.shadow import image_shadow, knows_shadow
from dials_diffuse.grid import Grid

if TYPE_CHECKING:
    from dials_diffuse.extraction.extras import BlockExtras

WIDE_IMAGE = 1.0  # voxels: from there on the middles of images leave voxels out

BATCH_PIXELS = (
    64_000_000  # of raw images held in memory, 4 bytes each (8 if floating-point)
)

# The sums of one observation: ``key`` is the voxel's place in the grid's bounding box,
# x, y and z are sums over the pixels (px, px, images). Keys from the grid's number of
# voxels on are those of reciprocal lattice points and their Bragg peaks.
SUMS = np.dtype(
    [
        ("key", "i4"),
        ("id", "i4"),
        ("panel", "i4"),
        ("n_pixels", "i4"),
        ("counts", "f8"),
        ("normalisation", "f8"),
        ("background", "f8"),
        ("background_variance", "f8"),
        ("x", "f8"),
        ("y", "f8"),
        ("z", "f8"),
    ]
)


def loop_frame(
    model: FrameModel, experiment: Experiment, grid: Grid, settings: ExtractionSettings
) -> ext.Frame:
    """What the pixel loop needs to know of one image."""
    region = settings.region(experiment, grid)
    ndiv = np.array(grid.ndiv)[:, None]
    w = ndiv * inverse(model.setting)
    sweep = ndiv * model.sweep()
    return ext.make_frame(
        w=tuple(w.ravel()),
        s0=tuple(model.s0),
        wavelength=1.0 / float(np.linalg.norm(model.s0)),
        s_min=1.0 / grid.d_max if grid.d_max else 0.0,
        s_max=1.0 / grid.d_min,
        ndiv=tuple(map(float, grid.ndiv)),
        exclusion=region.metric if region else None,
        z=model.z,
        growth=region.growth if region else 0.0,
        growth_radial=region.growth_radial if region else 0.0,
        radial=region.radial if region else 0.0,
        sweep=tuple(sweep.ravel()) if np.any(sweep) else None,
        spread=is_spread(sweep, grid, settings),
    )


def is_spread(sweep: np.ndarray, grid: Grid, settings: ExtractionSettings) -> bool:
    """Whether the rows of an image are spread over its range of rotation.

    Args:
        sweep: Change of diag(ndiv) (S R F A)^-1 over the image, Å, shape (3, 3).
        grid: The voxel grid.
        settings: With ``phi_sampling`` auto, they are spread if the image sweeps more
            than ``WIDE_IMAGE`` voxels at d_min.
    """
    if settings.phi_sampling != "auto":
        return settings.phi_sampling == "spread"
    return float(np.linalg.norm(sweep, axis=1).max()) / grid.d_min > WIDE_IMAGE


def new_accumulator(
    grid: Grid, settings: ExtractionSettings, n_threads: int
) -> ext.Accumulator:
    """An empty accumulator for the voxels of a grid and its Bragg peaks."""
    points = PointGrid(grid)
    absent = None
    if not settings.bragg.absent:
        absent = flumpy.from_numpy(points.is_absent())
    return ext.Accumulator(grid.half_size, n_threads, points.half_size, absent)


def read_image(experiment: Experiment, array_index: int) -> tuple:
    """The raw counts of an image, one flex array (int or double) per panel.

    Raises:
        ValueError: The image cannot be read.
    """
    number = image_number(experiment, array_index)
    try:
        data = experiment.imageset.get_raw_data(number)
    except Exception as e:  # formats raise whatever their file reader raises
        path = experiment.imageset.get_path(number)
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(
            f"Cannot read image {path} ({reason}): restore the file or leave the image "
            "out"
        ) from e
    expected = [panel.get_image_size()[::-1] for panel in experiment.detector]
    found = [tuple(p.focus()) for p in data]
    if found != expected:
        raise ValueError(
            f"Image {experiment.imageset.get_path(number)} has {len(found)} panel(s) of "
            f"{found[0]} pixels, its detector model {len(expected)} of {expected[0]} "
            "(slow, fast): give the experiment list that belongs to the images"
        )
    # NeXus files may hold float32
    data = tuple(p.as_double() if isinstance(p, flex.float) else p for p in data)
    if knows_shadow(experiment):
        data = without_shadow(data, image_shadow(experiment, array_index))
    return data


def without_shadow(data: tuple, shadows: Sequence[np.ndarray]) -> tuple:
    """Copies of the panels with a value that is never trusted where they are shadowed.

    For formats that know the shadow of their goniometer, which moves with the scan. The
    panels' trusted ranges are not applied: those of the settings may be others.
    """
    result = []
    for panel, shadow in zip(data, shadows):
        panel = panel.deep_copy()
        never = -(2**31) if isinstance(panel, flex.int) else float("nan")
        panel.as_1d().set_selected(flumpy.from_numpy(shadow.ravel()), never)
        result.append(panel)
    return tuple(result)


def batches(block: Block, detector: Detector) -> list[range]:
    """The images of a block, as many at a time as may be held in memory."""
    n_pixels = sum(int(np.prod(panel.get_image_size())) for panel in detector)
    size = max(1, BATCH_PIXELS // n_pixels)
    starts = range(0, len(block), size)
    return [block.array_indices[start : start + size] for start in starts]


def accumulate_block(
    block: Block,
    experiment: Experiment,
    tables: Sequence[PanelTable],
    accumulators: list[ext.Accumulator],
    grid: Grid,
    settings: ExtractionSettings,
    n_threads: int = 1,
    extras: BlockExtras | None = None,
) -> np.ndarray:
    """The observations of a block.

    Args:
        block: Which images.
        experiment: Their experiment.
        tables: Its detector's arrays, one per panel.
        accumulators: Empty accumulators for the grid, left empty; more are appended
            when needed. Pass the same list again, so that their memory is used again.
        grid: The voxel grid.
        settings: The settings of extraction.
        n_threads: Threads of new accumulators.
        extras: What else is known of the images.

    Returns:
        Array of dtype ``SUMS``, ordered by panel and voxel.
    """
    parts = []
    exposure = block.exposure if settings.corrections.exposure else 1.0
    all_batches = batches(block, experiment.detector)
    # if all images are in memory, one accumulator can serve panel after panel
    n_needed = 1 if len(all_batches) == 1 else len(tables)
    while len(accumulators) < n_needed:
        accumulators.append(new_accumulator(grid, settings, n_threads))
    for indices in all_batches:
        frames = [
            loop_frame(frame_model(experiment, i), experiment, grid, settings)
            for i in indices
        ]
        images = [read_image(experiment, i) for i in indices]
        for number, table in enumerate(tables):
            accumulator = accumulators[number % n_needed]
            more = None
            if extras is not None:
                more = extras.images(indices, number, table, exposure)
            accumulator.add_images(
                table.panel, frames, [i[number] for i in images], more
            )
            if indices is all_batches[-1]:
                sums = accumulator.finish()
                parts.append(sum_rows(sums, block.experiment, number, table, exposure))
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
    points = PointGrid(grid)
    if extras is not None and extras.terms:
        extras.add_smooth_variance(rows, points.s(rows["key"]))
    region = settings.region(experiment, grid)
    add_surroundings(rows, points, region.metric if region else None)
    return rows


def sum_rows(
    sums: dict, experiment: int, number: int, table: PanelTable, exposure: float
) -> np.ndarray:
    """Rows of dtype ``SUMS`` of what an accumulator returns.

    Args:
        sums: Raw values and integer weights, summed.
        experiment: Number of the experiment.
        number: Number of the panel.
        table: What the panel's values and weights stand for.
        exposure: Exposure time of each image of the block, s.
    """
    columns = {name: flumpy.to_numpy(column) for name, column in sums.items()}
    rows = np.empty(len(columns["voxel"]), dtype=SUMS)
    rows["key"] = columns["voxel"]
    rows["id"] = experiment
    rows["panel"] = number
    rows["counts"] = table.photons(columns["value"], columns["n_pixels"])
    rows["normalisation"] = columns["weight"] * (table.weight_unit * exposure)
    rows["background_variance"] = columns["variance"]
    for name in ("n_pixels", "background", "x", "y", "z"):
        rows[name] = columns[name]
    return rows
