"""The images that make up one observation per voxel: a still, or a range of rotation."""

from __future__ import annotations

import dataclasses
import os
from typing import Collection, Hashable, Iterator, Sequence

import numpy as np

from dxtbx.imageset import ImageSequence
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive images of one experiment.

    Attributes:
        experiment: Number of the experiment in its list.
        array_indices: Array indices of the images in the scan; 0 for a still without.
        exposure: Exposure time of each of the images, s; 1 where they do not say.
    """

    experiment: int
    array_indices: range
    exposure: float

    def __len__(self) -> int:
        return len(self.array_indices)


def image_number(experiment: Experiment, array_index: int) -> int:
    """Where in its image set an experiment's image stands.

    Stills imported from a common file template share one image sequence that holds all
    images: only the scan of the experiment says which one is its own.

    Raises:
        ValueError: The image set does not hold the image, or holds several and nothing
            says which one belongs to the experiment.
    """
    imageset = experiment.imageset
    if isinstance(imageset, ImageSequence):
        number = array_index - imageset.get_array_range()[0]
    else:
        number = 0
        if len(imageset) != 1:
            raise ValueError(
                f"the still {experiment.identifier} shares an image set of "
                f"{len(imageset)} images and has no scan to say which is its own: "
                "import with convert_sequences_to_stills=True"
            )
    if not 0 <= number < len(imageset):
        raise ValueError(
            f"the scan of experiment {experiment.identifier} includes image "
            f"{array_index + 1}, which its image set does not hold"
        )
    return number


def exposure_times(experiment: Experiment) -> list[float]:
    """Exposure of each image of the scan in s, 1 where it is not known."""
    if experiment.scan is None:
        return [1.0]
    times = list(experiment.scan.get_exposure_times())
    times += [0.0] * (experiment.scan.get_num_images() - len(times))
    return [time if time > 0 else 1.0 for time in times]


def images_of(experiment: Experiment) -> range:
    """Array indices of an experiment's images; 0 for a still without a scan."""
    return range(*experiment.scan.get_array_range()) if experiment.scan else range(1)


def experiment_blocks(
    number: int,
    experiment: Experiment,
    block_width: float,
    rejected: Collection[tuple[int, int]] = (),
) -> Iterator[Block]:
    """The blocks of an experiment, in the order of its images.

    A block also ends where the exposure time changes, or at an image that is left out.

    Args:
        number: Number of the experiment in its list.
        experiment: The experiment.
        block_width: Width of a block in degrees, rounded to whole images, at least one.
        rejected: Experiment and array index of images to leave out.
    """
    scan = experiment.scan
    first = images_of(experiment).start
    size = 1
    if not experiment.is_still():
        size = max(1, round(block_width / abs(scan.get_oscillation()[1])))
    times = exposure_times(experiment)
    start = 0
    for stop in range(1, len(times) + 1):
        if (number, first + stop - 1) in rejected:
            if stop - 1 > start:
                yield Block(
                    number, range(first + start, first + stop - 1), times[start]
                )
            start = stop
            continue
        full = stop - start == size
        if stop == len(times) or full or times[stop] != times[start]:
            yield Block(number, range(first + start, first + stop), times[start])
            start = stop


def make_blocks(
    experiments: ExperimentList,
    block_width: float,
    rejected: Collection[tuple[int, int]] = (),
) -> list[Block]:
    """The blocks of all experiments, in their order; see ``experiment_blocks``."""
    return [
        block
        for number, experiment in enumerate(experiments)
        for block in experiment_blocks(number, experiment, block_width, rejected)
    ]


def limits_of(blocks: Sequence[Block]) -> np.ndarray:
    """Experiment, first array index and the one after the last of each block, (n, 3)."""
    limits = [
        (block.experiment, block.array_indices.start, block.array_indices.stop)
        for block in blocks
    ]
    return np.array(limits, dtype=np.int32).reshape(-1, 3)


def image_identity(experiment: Experiment, array_index: int) -> Hashable:
    """What is equal for the same image in any image set: its file and place in it.

    Args:
        experiment: The experiment.
        array_index: Array index of the image in its scan, 0 for a still without.
    """
    imageset = experiment.imageset
    number = image_number(experiment, array_index)
    in_file = int(imageset.indices()[number])
    path = imageset.get_path(number)
    if not os.path.isfile(path):  # images in memory have no name of their own
        return id(imageset.reader()), in_file
    single = imageset.reader().is_single_file_reader()
    return os.path.realpath(path), in_file if single else 0


def missing_images(experiments: ExperimentList) -> list[str]:
    """Paths of images that the experiments need and that are not there."""
    paths = []
    for experiment in experiments:
        imageset = experiment.imageset
        for array_index in images_of(experiment):
            paths.append(imageset.get_path(image_number(experiment, array_index)))
    return [path for path in dict.fromkeys(paths) if not os.path.isfile(path)]
