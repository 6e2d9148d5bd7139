"""The images of all experiments in one row, for plots."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np

MOST_MARKS = 30  # of sweeps; more would cover the data


class ImageAxis:
    """The images of all experiments in one row, for plots.

    Experiments of one image each have their number as place, the images of a single
    sweep their own; those of several sweeps are counted through.

    Args:
        experiments: Lists ``first_image`` and ``n_images``, an element per experiment.
    """

    def __init__(self, experiments: Mapping[str, Sequence[int]]) -> None:
        self._first = np.array(experiments["first_image"])
        n_images = np.array(experiments["n_images"])
        self._offset = np.cumsum(n_images) - n_images
        self.label = "Image, all sweeps in their order"
        self.sweeps: list[int] = []  # where each sweep begins
        if len(n_images) == 1:
            self._offset = self._first.copy()
            self.label = "Image"
        elif n_images.max() == 1:
            self.label = "Experiment"
        else:
            self.sweeps = self._offset.tolist()

    def place(self, experiment: Sequence[int], image: Sequence[float]) -> np.ndarray:
        """Where images stand.

        Args:
            experiment: Numbers of the experiments.
            image: Numbers of the images, from 1 as in the names of files.
        """
        number = np.asarray(experiment, dtype=int)
        return self._offset[number] + np.asarray(image) - self._first[number]

    def marks(self) -> dict[str, list[dict[str, Any]]]:
        """Lines where sweeps begin and their numbers, for the layout of a plot."""
        if len(self.sweeps) > MOST_MARKS:
            return {}
        line = {"color": "#aaa", "width": 1}
        shapes: list[dict[str, Any]] = []
        texts: list[dict[str, Any]] = []
        for number, start in enumerate(self.sweeps):
            at = {"xref": "x", "yref": "paper"}
            ends = {"x0": start - 0.5, "x1": start - 0.5, "y0": 0, "y1": 1}
            shapes.append({"type": "line", "line": line, **ends, **at})
            text = {"text": str(number), "showarrow": False, "font": {"size": 10}}
            place = {"x": start - 0.5, "y": 1, "xanchor": "left", "yanchor": "bottom"}
            texts.append({**text, **place, **at})
        return {"shapes": shapes, "annotations": texts}
