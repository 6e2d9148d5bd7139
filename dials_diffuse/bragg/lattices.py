"""Which experiments are crystals in the same image.

An image is known by its path and, in a file with several images, by its number there, so
that image sets that are separate objects count as the same. Images in memory are known by
the object that holds them.
"""

from __future__ import annotations

import dataclasses
from typing import Hashable

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.blocks import image_number


@dataclasses.dataclass(frozen=True)
class SharedImages:
    """Another experiment that has images of an experiment.

    Attributes:
        experiment: Its number in the list.
        shift: To be added to an array index of the one for that of the other.
    """

    experiment: int
    shift: int


def array_indices(experiment: Experiment) -> range:
    """Array indices of the images of an experiment; 0 for a still without scan."""
    return range(*experiment.scan.get_array_range()) if experiment.scan else range(1)


def image_identity(experiment: Experiment, array_index: int) -> Hashable:
    """What is equal for the same image in any image set.

    Args:
        experiment: The experiment.
        array_index: Array index of the image in its scan, 0 for a still without.
    """
    imageset = experiment.imageset
    number = image_number(experiment, array_index)
    path = imageset.get_path(number)
    reader = imageset.reader()
    in_file = int(imageset.indices()[number])
    if not path:
        return id(reader), in_file
    return path, in_file if reader.is_single_file_reader() else 0


def shared_images(experiments: ExperimentList) -> list[list[SharedImages]]:
    """For each experiment, the others that have an image of its own.

    Experiments whose images are the same in another order are told by the first image
    that they share.
    """
    owners: dict[Hashable, list[tuple[int, int]]] = {}
    shifts: list[dict[int, int]] = [{} for _ in experiments]
    for number, experiment in enumerate(experiments):
        for i in array_indices(experiment):
            owned = owners.setdefault(image_identity(experiment, i), [])
            for other, j in owned:
                if other != number:
                    shifts[number].setdefault(other, j - i)
                    shifts[other].setdefault(number, i - j)
            owned.append((number, i))
    return [
        [SharedImages(other, shift) for other, shift in sorted(partners.items())]
        for partners in shifts
    ]


def lattices_of_image(experiments: ExperimentList) -> list[list[int]]:
    """For each experiment, the numbers of the others whose image is the same."""
    return [
        [partner.experiment for partner in partners]
        for partners in shared_images(experiments)
    ]
