"""Check of the geometry: where indexed spots fall in the frame of the pixel loop."""

from __future__ import annotations

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment

from dials.array_family import flex
from dials_diffuse.geometry.directions import pixel_to_millimeter
from dials_diffuse.geometry.orientation import frame_model, inverse
from dials_diffuse.util.compat import miller_index_to_numpy


def index_residuals(
    experiment: Experiment, reflections: flex.reflection_table
) -> np.ndarray:
    """Distance of observed spots from their Bragg positions in fractional indices.

        Δh = (S R F A)⁻¹ (s1 - s0) - h

    with s1 from the observed pixel and the models of the image that holds the centroid.

    Args:
        experiment: The experiment.
        reflections: Its indexed reflections, with ``xyzobs.px.value``.

    Returns:
        Δh, shape (n, 3).
    """
    xyz = flumpy.to_numpy(reflections["xyzobs.px.value"]).reshape(-1, 3)
    panel = flumpy.to_numpy(reflections["panel"])
    e = np.empty((len(xyz), 3))
    for number in np.unique(panel):
        rows = panel == number
        model = experiment.detector[int(number)]
        mm = pixel_to_millimeter(model, xyz[rows, :2])
        d = np.array(model.get_d_matrix()).reshape(3, 3)
        e[rows] = np.c_[mm, np.ones(len(mm))] @ d.T
    e /= np.linalg.norm(e, axis=1)[:, None]
    image = np.floor(xyz[:, 2]).astype(int)
    if experiment.scan is None:
        image[:] = 0
    elif len(image):
        first, last = experiment.scan.get_array_range()
        image = np.clip(image, first, last - 1)
    h = np.empty((len(xyz), 3))
    for array_index in np.unique(image):
        rows = image == array_index
        frame = frame_model(experiment, int(array_index))
        rlp = e[rows] * np.linalg.norm(frame.s0) - frame.s0
        h[rows] = rlp @ inverse(frame.setting).T
    return h - miller_index_to_numpy(reflections["miller_index"])
