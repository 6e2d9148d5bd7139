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
import json
from typing import Mapping, NamedTuple, Sequence

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


class View(NamedTuple):
    """A detector as seen along a beam.

    Args:
        number: Of the detector among those that differ.
        detector: The detector.
        beam: Unit vector of the incident beam.
    """

    number: int
    detector: Detector
    beam: tuple[float, float, float]


def find_views(experiments: Sequence[Experiment]) -> tuple[list[View], list[int]]:
    """The views that differ, and the place of that of each experiment among them.

    Most experiments share both models with the one before. Detectors of the same numbers,
    read from different files, are the same; ``==`` of detectors has tolerances, so that
    what is equal would depend on the order.
    """
    detectors: dict[str, int] = {}
    views: dict[tuple[int, tuple[float, float, float]], int] = {}
    models, places = [], []
    last: Detector | None = None
    number = -1
    for experiment in experiments:
        detector = experiment.detector
        if detector is not last:
            key = json.dumps(detector.to_dict(), sort_keys=True)
            number = detectors.setdefault(key, len(detectors))
            last = detector
        beam = tuple(experiment.beam.get_unit_s0())
        place = views.setdefault((number, beam), len(views))
        if place == len(models):
            models.append(View(number, detector, beam))
        places.append(place)
    return models, places


def find_extents(
    experiments: Sequence[Experiment], s: tuple[float, float]
) -> list[Extent]:
    """What each experiment covers.

    Args:
        experiments: The experiments.
        s: Range of 1/d of the observations, Å⁻¹.
    """
    views, places = find_views(experiments)
    ranges = [_range_of_directions(view) for view in views]
    result = []
    for number, (experiment, place) in enumerate(zip(experiments, places)):
        still = not oscillation_width(experiment.scan)
        phi = (0.0, 0.0) if still else experiment.scan.get_oscillation_range()
        u, v = ranges[place]
        result.append(
            Extent(
                number=number,
                is_still=still,
                phi=(min(phi), max(phi)),
                s=s,
                detector=views[place].number,
                n_panels=len(experiment.detector),
                u=u,
                v=v,
            )
        )
    return result


def _range_of_directions(view: View) -> list[tuple[float, float]]:
    """The ranges of u and v on a detector."""
    corners = np.concatenate(
        [project(directions_of(panel, CORNERS), view.beam) for panel in view.detector]
    )
    low, high = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return list(zip(low, high))


class CoordinateFinder:
    """Coordinates of the observations of some experiments.

    Args:
        experiments: The experiments; observations name them by their places.
        extents: What they cover.
    """

    def __init__(
        self, experiments: Sequence[Experiment], extents: Sequence[Extent]
    ) -> None:
        self._views, places = find_views(experiments)
        self._view = np.array(places)
        self._n_panels = np.array([extent.n_panels for extent in extents])
        start, width = np.zeros(len(extents)), np.zeros(len(extents))
        for i, (experiment, extent) in enumerate(zip(experiments, extents)):
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

        Raises:
            ValueError: An observation is on a panel that its detector does not have.
        """
        result: dict[str, np.ndarray] = {}
        panel = columns["panel"].astype(np.int64)
        self._check_panels(experiment, panel)
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

    def _check_panels(self, experiment: np.ndarray, panel: np.ndarray) -> None:
        unknown = np.flatnonzero(panel >= self._n_panels[experiment])
        if len(unknown):
            number = int(np.asarray(experiment)[unknown[0]])
            raise ValueError(
                f"observations of experiment {number} are on panel {panel[unknown[0]]}, "
                f"but its detector has {self._n_panels[number]} panels: give the "
                "experiments that the observations were extracted with"
            )

    def _places(
        self, experiment: np.ndarray, panel: np.ndarray, xy: np.ndarray, names: set[str]
    ) -> dict[str, np.ndarray]:
        fraction, plane = np.empty(xy.shape), np.empty(xy.shape)
        view = self._view[experiment]
        key = view * (panel.max(initial=0) + 1) + panel
        order = np.argsort(key, kind="stable")
        for mine in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            if len(mine) == 0:
                continue
            _, detector, beam = self._views[view[mine[0]]]
            own = detector[int(panel[mine[0]])]
            fraction[mine] = xy[mine] / own.get_image_size()
            if names & {"u", "v"}:
                plane[mine] = project(directions_of(own, fraction[mine]), beam)
        return {
            "fast": fraction[:, 0],
            "slow": fraction[:, 1],
            "u": plane[:, 0],
            "v": plane[:, 1],
        }
