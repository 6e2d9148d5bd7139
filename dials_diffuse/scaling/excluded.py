"""Images that the user leaves out, in the syntax of ``dials.scale``.

A row is of a block of images, of which some may be left out and others not. Nothing tells
their counts apart any more, so that a block goes as a whole. Tables say what their blocks
are: no one else knows which images extraction did not use, and where blocks start.
"""

from __future__ import annotations

import logging
import re
from typing import Mapping, Sequence

import numpy as np

from dxtbx.model import Experiment

from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.observations import lookup
from dials_diffuse.scaling.block import ImageRange
from dials_diffuse.util.compat import oscillation_width

logger = logging.getLogger("dials.diffuse.scale")


def parse_excluded(
    texts: Sequence[str],
    experiments: Sequence[Experiment],
    blocks: np.ndarray | None = None,
) -> list[ImageRange]:
    """The images that the user leaves out, whole blocks of them.

    Args:
        texts: ``number`` of an experiment, ``number:first:last`` with image numbers as in
            ``dials.scale``, or ``first:last`` if there is one experiment; commas or
            spaces separate several.
        experiments: The experiments.
        blocks: Number of the experiment and limits of each block of images, as from
            ``read_blocks``; images of experiments without are taken one by one, with a
            warning.

    Raises:
        ValueError: A text is not of that form, or there are no such images.
    """
    parts = (part for text in texts for part in re.split(r"[,\s]+", text) if part)
    found = [_range_of(part, experiments) for part in parts]
    if blocks is None:
        blocks = np.zeros((0, 3), dtype=np.int32)
    _warn_of_unknown(found, experiments, blocks)
    whole = (_whole_blocks(images, blocks) for images in found)
    return [images for images in whole if images is not None]


def _range_of(text: str, experiments: Sequence[Experiment]) -> ImageRange:
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
        return ImageRange(number)
    first, last = numbers[1:]
    _check_images(text, first, last, experiments[number])
    return ImageRange(number, first - 1, last)


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


def _warn_of_unknown(
    found: Sequence[ImageRange], experiments: Sequence[Experiment], blocks: np.ndarray
) -> None:
    """Warn if images may be of blocks of several, and the blocks are not known."""
    unknown = {
        images.experiment
        for images in found
        if images.first > -np.inf
        and oscillation_width(experiments[images.experiment].scan)
    }.difference(blocks[:, 0].tolist())
    if unknown:
        logger.warning(
            "Warning: it is not known which images make up an observation (extracted "
            "by an older version?), so that those to leave out are taken one by one: an "
            "observation goes if the middle of its images does. Extract again to leave "
            "out whole blocks. This concerns the experiments %s",
            ", ".join(map(str, sorted(unknown))),
        )


def _whole_blocks(images: ImageRange, blocks: np.ndarray) -> ImageRange | None:
    """The blocks that hold any of the images; None if extraction has used none of them."""
    number, first, stop = images
    if first == -np.inf:
        logger.info("Experiment %d is left out", number)
        return images
    mine = blocks[blocks[:, 0] == number, 1:]
    chosen = mine[(mine[:, 0] < stop) & (mine[:, 1] > first)]
    text = f"Images {first + 1} to {stop} of experiment {number}"
    if len(mine) == 0:
        logger.info("%s are left out", text)
        return images
    if len(chosen) == 0:
        logger.info("%s are in no observation: extraction has left them out", text)
        return None
    first, stop = int(chosen[:, 0].min()), int(chosen[:, 1].max())
    logger.info(
        "Images %d to %d of experiment %d are left out, %d of %d blocks",
        first + 1,
        stop,
        number,
        len(chosen),
        len(mine),
    )
    return ImageRange(number, first, stop)


def read_blocks(
    tables: Sequence[ObservationFile], numbers: Sequence[Mapping[int, int]]
) -> np.ndarray | None:
    """The blocks of images of all tables, as far as they say.

    Args:
        tables: The observations.
        numbers: For each table the number of each experiment by its ``id``.

    Returns:
        Number of the experiment, array index of the first image and the one after the
        last of each block, int32, shape (n, 3). None if no table says.
    """
    parts = []
    for table, own in zip(tables, numbers):
        if table.blocks is not None:
            part = table.blocks.copy()
            part[:, 0] = lookup(own, part[:, 0], table.path)
            parts.append(part)
    return np.concatenate(parts) if parts else None
