"""The images that share a detector, and the pixels of that detector in one flat array."""

from __future__ import annotations

import dataclasses
from typing import Hashable, Sequence

import numpy as np

from dxtbx.model import Detector, Experiment, Panel
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.blocks import image_identity, images_of
from dials_diffuse.extraction.tables import detector_numbers


@dataclasses.dataclass(frozen=True)
class Series:
    """All images of the experiments that share a detector.

    Attributes:
        experiments: The experiments.
        images: Experiment and array index of each image, each image once even if it
            shows several crystals, in the order of the experiments.
    """

    experiments: Sequence[Experiment]
    images: Sequence[tuple[Experiment, int]]

    @property
    def detector(self) -> Detector:
        return self.experiments[0].detector

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(n_slow, n_fast) of each panel."""
        return [panel.get_image_size()[::-1] for panel in self.detector]

    def chosen(self, max_images: int | None) -> list[tuple[Experiment, int]]:
        """At most so many of the images, evenly spread; None for all."""
        n_images = len(self.images)
        if max_images is None or n_images <= max_images:
            return list(self.images)
        return [self.images[i * n_images // max_images] for i in range(max_images)]


def make_series(experiments: ExperimentList) -> list[Series]:
    """The series of each detector, in the order of ``experiments.detectors()``."""
    numbers = detector_numbers(experiments)
    result = []
    for number in range(len(experiments.detectors())):
        own = [e for e, n in zip(experiments, numbers) if n == number]
        images: dict[Hashable, tuple[Experiment, int]] = {}
        for experiment in own:
            for i in images_of(experiment):
                images.setdefault(image_identity(experiment, i), (experiment, i))
        result.append(Series(own, list(images.values())))
    return result


def panel_name(panel: Panel, number: int) -> str:
    """How messages and pictures call a panel."""
    return panel.get_name() or f"panel {number}"


def flatten(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One array for each panel as one flat array of all pixels."""
    return np.concatenate([np.asarray(a).ravel() for a in arrays])


def split(values: np.ndarray, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Views of a flat array by panel, (n_slow, n_fast) each."""
    ends = np.cumsum([n_slow * n_fast for n_slow, n_fast in shapes])
    return [
        part.reshape(shape) for part, shape in zip(np.split(values, ends[:-1]), shapes)
    ]
