"""The coordinates of observations by which the terms of a scaling model go.

    phi          rotation angle, degrees; 0 for stills
    s            1/d of the voxel, Å⁻¹
    panel        number of the panel
    fast, slow   place on the panel, in units of its sides, 0 to 1
    u, v         direction of the scattered beam about the incident one: the equal-area
                 azimuthal projection of Lambert, 2 sin θ = √(u² + v²), u along the
                 horizontal of the laboratory frame as far as it can be

u and v do not depend on how a detector is cut into panels, or on its distance.
"""

from __future__ import annotations

import dataclasses
from typing import Mapping, Sequence

import numpy as np

from dxtbx.model import Detector, Experiment, Panel

from dials_diffuse.util.compat import oscillation_width

# What an observation must have for its coordinates.
COLUMNS = ("panel", "xyzobs.px.value", "d")

CORNERS = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0.5, 0.5]])


@dataclasses.dataclass(frozen=True)
class Extent:
    """What an experiment covers.

    Args:
        number: Number of the experiment.
        is_still: Whether it does not rotate.
        phi: Range of rotation, degrees.
        s: Range of 1/d, Å⁻¹.
        detector: Number of its detector among those that differ.
        n_panels: Panels of the detector.
        u: Range of u on the detector.
        v: Range of v.
    """

    number: int
    is_still: bool
    phi: tuple[float, float]
    s: tuple[float, float]
    detector: int
    n_panels: int
    u: tuple[float, float]
    v: tuple[float, float]


def project(directions: np.ndarray, beam: Sequence[float]) -> np.ndarray:
    """u and v of directions.

    Args:
        directions: Unit vectors in the laboratory frame, shape (..., 3).
        beam: Unit vector of the incident beam, the way it travels.

    Returns:
        Array of shape (..., 2).
    """
    along = np.asarray(beam) / np.linalg.norm(beam)
    # x of the laboratory is the rotation axis of most beamlines; never along the beam.
    start = np.eye(3)[0 if abs(along[0]) < 0.9 else 1]
    across = start - along * (start @ along)
    across /= np.linalg.norm(across)
    other = np.cross(along, across)
    cosine = directions @ along
    factor = np.sqrt(2 / np.maximum(1 + cosine, 1e-12))
    plane = np.stack([directions @ across, directions @ other], axis=-1)
    # |plane| = sin 2θ, and 2 sin θ = sin 2θ sqrt(2/(1 + cos 2θ)).
    return plane * factor[..., None]


def directions_of(panel: Panel, fraction: np.ndarray) -> np.ndarray:
    """Unit vectors from the sample to places on a panel, given in units of its sides."""
    size = np.array(panel.get_image_size_mm())
    places = fraction * size
    vectors = (
        np.array(panel.get_origin())
        + places[..., :1] * np.array(panel.get_fast_axis())
        + places[..., 1:] * np.array(panel.get_slow_axis())
    )
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def find_extents(
    experiments: Sequence[Experiment], s: tuple[float, float]
) -> list[Extent]:
    """What each experiment covers.

    Args:
        experiments: The experiments.
        s: Range of 1/d of the observations, Å⁻¹.
    """
    detectors: list[Detector] = []
    ranges: list[np.ndarray] = []
    result = []
    for number, experiment in enumerate(experiments):
        detector = experiment.detector
        for place, known in enumerate(detectors):
            if known is detector or known == detector:
                break
        else:
            place = len(detectors)
            detectors.append(detector)
            beam = experiment.beam.get_unit_s0()
            corners = np.concatenate(
                [project(directions_of(panel, CORNERS), beam) for panel in detector]
            )
            ranges.append(np.stack([corners.min(axis=0), corners.max(axis=0)]))
        (u_low, v_low), (u_high, v_high) = ranges[place]
        width = oscillation_width(experiment.scan)
        still = not width
        phi = (0.0, 0.0) if still else experiment.scan.get_oscillation_range()
        result.append(
            Extent(
                number=number,
                is_still=still,
                phi=(min(phi), max(phi)),
                s=s,
                detector=place,
                n_panels=len(detector),
                u=(float(u_low), float(u_high)),
                v=(float(v_low), float(v_high)),
            )
        )
    return result


class CoordinateFinder:
    """Coordinates of the observations of some experiments.

    Args:
        experiments: The experiments; observations name them by their places.
        extents: What they cover.
    """

    def __init__(
        self, experiments: Sequence[Experiment], extents: Sequence[Extent]
    ) -> None:
        self._detector = np.array([extent.detector for extent in extents])
        self._models = {}
        start, width = np.zeros(len(extents)), np.zeros(len(extents))
        for i, (experiment, extent) in enumerate(zip(experiments, extents)):
            self._models.setdefault(
                extent.detector, (experiment.detector, experiment.beam.get_unit_s0())
            )
            if not extent.is_still:
                phi0, width[i] = experiment.scan.get_oscillation()
                start[i] = phi0 - width[i] * experiment.scan.get_array_range()[0]
        self._start, self._width = start, width

    def find(
        self,
        experiment: np.ndarray,
        columns: Mapping[str, np.ndarray],
        names: set[str],
    ) -> dict[str, np.ndarray]:
        """The coordinates of some names.

        Args:
            experiment: Number of the experiment of each observation, shape (n,).
            columns: ``COLUMNS`` of the observations.
            names: Names of the coordinates.
        """
        result: dict[str, np.ndarray] = {}
        panel = columns["panel"].astype(np.int64)
        xyz = columns["xyzobs.px.value"]
        if "phi" in names:
            result["phi"] = (
                self._start[experiment] + self._width[experiment] * xyz[:, 2]
            )
        if "s" in names:
            d = columns["d"]  # 0 at the origin, as in DIALS
            result["s"] = np.divide(1, d, out=np.zeros(len(d)), where=d > 0)
        if "panel" in names:
            result["panel"] = panel
        if names & {"fast", "slow", "u", "v"}:
            places = self._places(experiment, panel, xyz[:, :2], names)
            result.update((name, places[name]) for name in names & set(places))
        return result

    def _places(
        self, experiment: np.ndarray, panel: np.ndarray, xy: np.ndarray, names: set[str]
    ) -> dict[str, np.ndarray]:
        fraction, plane = np.empty(xy.shape), np.empty(xy.shape)
        detector = self._detector[experiment]
        key = detector * (panel.max(initial=0) + 1) + panel
        for value in np.unique(key):
            mine = np.flatnonzero(key == value)
            model, beam = self._models[detector[mine[0]]]
            own = model[int(panel[mine[0]])]
            fraction[mine] = xy[mine] / own.get_image_size()
            if names & {"u", "v"}:
                plane[mine] = project(directions_of(own, fraction[mine]), beam)
        return {
            "fast": fraction[:, 0],
            "slow": fraction[:, 1],
            "u": plane[:, 0],
            "v": plane[:, 1],
        }
