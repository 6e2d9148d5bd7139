"""Which experiments are crystals in the same image.

An image is known by its path and, in a file with several images, by its number there, so
that image sets that are separate objects count as the same. Images in memory are known by
the object that holds them.
"""

from __future__ import annotations

import dataclasses
from typing import Hashable

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.blocks import image_identity, images_of


@dataclasses.dataclass(frozen=True)
class SharedImages:
    """Another experiment that has images of an experiment.

    Attributes:
        experiment: Its number in the list.
        shift: To be added to an array index of the one for that of the other.
    """

    experiment: int
    shift: int


def shared_images(experiments: ExperimentList) -> list[list[SharedImages]]:
    """For each experiment, the others that have an image of its own.

    Experiments whose images are the same in another order are told by the first image
    that they share.
    """
    owners: dict[Hashable, list[tuple[int, int]]] = {}
    shifts: list[dict[int, int]] = [{} for _ in experiments]
    for number, experiment in enumerate(experiments):
        for i in images_of(experiment):
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
