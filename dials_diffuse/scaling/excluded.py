"""Images that the user leaves out, in the syntax of ``dials.scale``.

A row is of a block of images, of which some may be left out and others not. Nothing tells
their counts apart any more, so that a block goes as a whole.
"""

from __future__ import annotations

import logging
import re
from typing import Mapping, Sequence

import h5py

import libtbx.phil
from dxtbx.model import Experiment

from dials_diffuse.extraction.blocks import experiment_blocks
from dials_diffuse.io.observations import ROOT
from dials_diffuse.merging.observations import ObservationTable
from dials_diffuse.scaling.block import ImageRange
from dials_diffuse.util.compat import oscillation_width

logger = logging.getLogger("dials.diffuse.scale")


def parse_excluded(
    texts: Sequence[str],
    experiments: Sequence[Experiment],
    widths: Mapping[int, float] | None = None,
) -> list[ImageRange]:
    """The images that the user leaves out, whole blocks of them.

    Args:
        texts: ``number`` of an experiment, ``number:first:last`` with image numbers as in
            ``dials.scale``, or ``first:last`` if there is one experiment; commas or
            spaces separate several.
        experiments: The experiments.
        widths: Rotation of a block of images of each experiment, degrees; images of
            those without are taken one by one.

    Raises:
        ValueError: A text is not of that form, or there are no such images.
    """
    parts = (part for text in texts for part in re.split(r"[,\s]+", text) if part)
    return [_range_of(part, experiments, widths or {}) for part in parts]


def _range_of(
    text: str, experiments: Sequence[Experiment], widths: Mapping[int, float]
) -> ImageRange:
    """The images of one text."""
    try:
        numbers = [int(field) for field in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) == 2 and len(experiments) == 1:
        numbers = [0, *numbers]
    if len(numbers) not in (1, 3):
        raise ValueError(
            f"exclude_images={text} is neither the number of an experiment nor "
            "number:first:last"
        )
    number = numbers[0]
    if not 0 <= number < len(experiments):
        raise ValueError(
            f"exclude_images={text}: there is no experiment {number}, they are "
            f"numbered from 0 to {len(experiments) - 1}"
        )
    if len(numbers) == 1:
        logger.info("Experiment %d is left out", number)
        return ImageRange(number)
    _check_images(text, *numbers[1:], experiments[number])
    return _whole_blocks(number, *numbers[1:], experiments[number], widths.get(number))


def _check_images(text: str, first: int, last: int, experiment: Experiment) -> None:
    """Raises ValueError if an experiment does not have the images."""
    if last < first:
        raise ValueError(f"exclude_images={text}: the last image is before the first")
    number = text.split(":")[0]
    if experiment.scan is None:
        raise ValueError(
            f"exclude_images={text}: experiment {number} is a still without a scan; "
            f"exclude_images={number} leaves it out"
        )
    low, high = experiment.scan.get_image_range()
    if first < low or last > high:
        raise ValueError(
            f"exclude_images={text}: the images of that experiment are numbered from "
            f"{low} to {high}"
        )


def _whole_blocks(
    number: int, first: int, last: int, experiment: Experiment, width: float | None
) -> ImageRange:
    """The blocks that hold any of the images from the first to the last."""
    if width is None or not oscillation_width(experiment.scan):
        width = 0.0  # every image is a block
    blocks = list(experiment_blocks(number, experiment, width))
    mine = [b.array_indices for b in blocks if b.array_indices.stop >= first]
    mine = [images for images in mine if images.start < last]
    start, stop = mine[0].start, mine[-1].stop
    logger.info(
        "Images %d to %d of experiment %d are left out, %d of %d blocks",
        start + 1,
        stop,
        number,
        len(mine),
        len(blocks),
    )
    return ImageRange(number, start, stop)


def block_width(table: ObservationTable) -> float | None:
    """Rotation of a block of images, degrees, by the parameters stored in a table."""
    with h5py.File(table.path) as handle:
        text = handle[ROOT]["phil"].asstr()[()]
    found = libtbx.phil.parse(text).get("block_width").objects
    return float(found[-1].extract()[0]) if found else None


def block_widths(
    tables: Sequence[ObservationTable], numbers: Sequence[Mapping[int, int]]
) -> dict[int, float]:
    """The width of the blocks of each experiment, as far as it is known.

    Args:
        tables: The observations.
        numbers: For each table the number of each experiment by its ``id``.
    """
    widths = {}
    for table, own in zip(tables, numbers):
        width = block_width(table)
        if width is not None:
            widths.update(dict.fromkeys(own.values(), width))
    return widths
