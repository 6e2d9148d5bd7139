"""One block of images through the C++ pixel loop."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment

import dials_diffuse_ext as ext
from dials_diffuse.extraction.blocks import Block, image_number
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.geometry.orientation import FrameModel, frame_model
from dials_diffuse.grid import Grid

# The sums of one observation: ``key`` is the voxel's place in the grid's bounding box,
# x, y and z are sums over the pixels (px, px, images).
SUMS = np.dtype(
    [
        ("key", "i4"),
        ("id", "i4"),
        ("panel", "i4"),
        ("n_pixels", "i4"),
        ("counts", "f8"),
        ("normalisation", "f8"),
        ("x", "f8"),
        ("y", "f8"),
        ("z", "f8"),
    ]
)


def loop_frame(
    model: FrameModel, experiment: Experiment, grid: Grid, settings: ExtractionSettings
) -> ext.Frame:
    """What the pixel loop needs to know of one image."""
    w = np.diag(grid.ndiv) @ np.linalg.inv(model.setting)
    return ext.make_frame(
        w=tuple(w.ravel()),
        s0=tuple(model.s0),
        wavelength=1.0 / float(np.linalg.norm(model.s0)),
        s_min=1.0 / grid.d_max if grid.d_max else 0.0,
        s_max=1.0 / grid.d_min,
        ndiv=tuple(map(float, grid.ndiv)),
        exclusion=settings.bragg.metric(experiment.crystal.get_unit_cell()),
        z=model.z,
        exposure=model.exposure if settings.corrections.exposure else 1.0,
    )


def read_image(experiment: Experiment, array_index: int) -> tuple:
    """The raw counts of an image, one flex array per panel.

    Raises:
        ValueError: The image cannot be read.
    """
    number = image_number(experiment, array_index)
    try:
        return experiment.imageset.get_raw_data(number)
    except Exception as e:  # formats raise whatever their file reader raises
        path = experiment.imageset.get_path(number)
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(
            f"Cannot read image {path} ({reason}): restore the file or leave the image "
            "out"
        ) from e


def accumulate_block(
    block: Block,
    experiment: Experiment,
    tables: Sequence[ext.Panel],
    accumulators: Sequence[ext.Accumulator],
    grid: Grid,
    settings: ExtractionSettings,
) -> np.ndarray:
    """The observations of a block.

    Args:
        block: Which images.
        experiment: Their experiment.
        tables: Its detector's arrays, one per panel.
        accumulators: Empty accumulators for the grid, one per panel; left empty. One
            for all will do if the block is a single image.
        grid: The voxel grid.
        settings: The settings of extraction.

    Returns:
        Array of dtype ``SUMS``, ordered by panel and voxel.
    """
    parts: list[np.ndarray] = []
    for array_index in block.array_indices:
        model = frame_model(experiment, array_index)
        frame = loop_frame(model, experiment, grid, settings)
        data = read_image(experiment, array_index)
        last = array_index == block.array_indices[-1]
        for number, (panel, pixels) in enumerate(zip(tables, data)):
            accumulator = accumulators[number % len(accumulators)]
            accumulator.add_image(panel, frame, pixels)
            if last:
                parts.append(sum_rows(accumulator.finish(), block.experiment, number))
    return np.concatenate(parts)


def sum_rows(sums: dict, experiment: int, panel: int) -> np.ndarray:
    """Rows of dtype ``SUMS`` of what an accumulator returns."""
    columns = {name: flumpy.to_numpy(column) for name, column in sums.items()}
    rows = np.empty(len(columns["voxel"]), dtype=SUMS)
    rows["key"] = columns["voxel"]
    rows["id"] = experiment
    rows["panel"] = panel
    rows["counts"] = columns["value"]
    for name in ("n_pixels", "normalisation", "x", "y", "z"):
        rows[name] = columns[name]
    return rows
