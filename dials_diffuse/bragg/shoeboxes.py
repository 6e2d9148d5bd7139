"""Rectangles about the Bragg reflections of each image.

Either the boxes of a reflection table (x0, x1, y0, y1, z0, z1 of integrated or strong
spots), or boxes of one size about predicted reflections: DIALS' own prediction for
rotation data; for stills, all lattice points within an angle of the Ewald sphere, each by
the model of its own still. Boxes of all lattices in an image apply to each of them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials.algorithms.spot_prediction import ray_intersection
from dials.array_family import flex
from dials_diffuse.bragg.lattices import shared_images
from dials_diffuse.bragg.points import is_absent
from dials_diffuse.extraction.blocks import images_of
from dials_diffuse.geometry.orientation import frame_model, rotation_axis
from dials_diffuse.util.compat import miller_index_to_numpy

QUANTILE = 0.95  # of the sizes of spots in a table


class SpotSize(NamedTuple):
    """Half the extents of boxes about predicted reflections.

    Attributes:
        fast, slow: Pixels.
        angle: Rotation in degrees by which the crystal may be away from the reflecting
            position.
    """

    fast: float
    slow: float
    angle: float


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Boxes of reflections, x0 <= x < x1 and so on.

    Attributes:
        experiment: Number of the experiment, shape (n,).
        panel: Number of the panel, shape (n,).
        box: x0, x1, y0, y1, z0, z1 in pixels and array indices, int32, shape (n, 6).
    """

    experiment: np.ndarray
    panel: np.ndarray
    box: np.ndarray


def _without_absences(table: flex.reflection_table, experiments: ExperimentList):
    """Reflections of a table that the space groups of their crystals allow."""
    keep = np.ones(len(table), dtype=bool)
    numbers = flumpy.to_numpy(table["id"])
    hkl = miller_index_to_numpy(table["miller_index"])
    for number, experiment in enumerate(experiments):
        own = np.flatnonzero(numbers == number)
        keep[own] = ~is_absent(hkl[own], experiment.crystal.get_space_group())
    return table.select(flex.bool(list(map(bool, keep))))


def spot_size(
    table: flex.reflection_table,
    experiments: ExperimentList,
    angle: float | None = None,
) -> SpotSize:
    """Size of the spots in a table that nearly all of them have at most.

    Args:
        table: With the columns id and bbox.
        experiments: Its experiments.
        angle: Half the rotation range of reflections in degrees; None takes it from the
            boxes, or from delpsical.rad for stills.

    Raises:
        ValueError: There are no spots, or nothing tells the angle.
    """
    if len(table) == 0 or "bbox" not in table:
        raise ValueError("Spots with boxes are needed to find their size")
    x0, x1, y0, y1, z0, z1 = (flumpy.to_numpy(c) for c in table["bbox"].parts())
    fast, slow = (float(np.quantile(a, QUANTILE)) / 2 for a in (x1 - x0, y1 - y0))
    if angle is None and "delpsical.rad" in table:
        psi = np.abs(flumpy.to_numpy(table["delpsical.rad"]))
        angle = math.degrees(float(np.quantile(psi, QUANTILE)))
    elif angle is None:
        widths = {
            i: abs(e.scan.get_oscillation()[1])
            for i, e in enumerate(experiments)
            if not e.is_still()
        }
        if not widths:
            raise ValueError(
                "The boxes of stills do not tell how far their crystals are from the "
                "reflecting position: give reflections with the column delpsical.rad, as "
                "dials.refine writes them"
            )
        of_sweep = np.array([i in widths for i in table["id"]])
        width = np.array([widths.get(i, 0.0) for i in table["id"]])
        turn = ((z1 - z0) * width)[of_sweep]
        angle = float(np.quantile(turn, QUANTILE)) / 2
    return SpotSize(fast, slow, angle)


def _lattice_points(experiment: Experiment, d_min: float) -> np.ndarray:
    """All Miller indices within the resolution limit, shape (n, 3)."""
    cell = experiment.crystal.get_unit_cell()
    most = cell.max_miller_indices(d_min)
    axes = [np.arange(-n, n + 1) for n in most]
    hkl = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    b = np.array(cell.fractionalization_matrix()).reshape(3, 3).T
    s = np.linalg.norm(hkl @ b.T, axis=1)
    return hkl[(s > 0) & (s <= 1 / d_min)]


def predict_still(
    experiment: Experiment, d_min: float, angle: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reflections of a still: lattice points that a small rotation takes to the sphere.

    The rotation is about the axis perpendicular to s0 and the lattice point, in their
    plane, as in DIALS' ΔΨ prediction for stills.

    Args:
        experiment: The still.
        d_min: Resolution limit, Å.
        angle: Largest rotation, degrees.

    Returns:
        Miller indices (n, 3), panels (n,) and pixel coordinates (n, 2).
    """
    model = frame_model(experiment, images_of(experiment)[0])
    hkl = _lattice_points(experiment, d_min)
    rlp = hkl @ model.setting.T
    s = np.linalg.norm(rlp, axis=1)
    length = np.linalg.norm(model.s0)
    e0 = model.s0 / length
    # on the sphere s·e0 = -s²/(2|s0|)
    parallel = rlp @ e0
    wanted = -(s**2) / (2 * length)
    possible = np.abs(wanted) < s
    now = np.arccos(np.clip(parallel / s, -1, 1))
    then = np.arccos(np.clip(wanted / s, -1, 1))
    keep = possible & (np.abs(now - then) <= math.radians(angle))
    hkl, rlp, s, parallel, wanted = (a[keep] for a in (hkl, rlp, s, parallel, wanted))
    across = rlp - parallel[:, None] * e0
    across /= np.maximum(np.linalg.norm(across, axis=1), 1e-12)[:, None]
    radius = np.sqrt(np.maximum(s**2 - wanted**2, 0.0))
    s1 = wanted[:, None] * e0 + radius[:, None] * across + model.s0
    table = flex.reflection_table()
    table["number"] = flex.int(range(len(s1)))
    table["s1"] = flumpy.vec_from_numpy(np.ascontiguousarray(s1))
    table["phi"] = flex.double(len(s1), 0.0)
    table["panel"] = flex.size_t(len(s1), 0)
    hit = ray_intersection(experiment.detector, table)
    table = table.select(hit)
    number = flumpy.to_numpy(table["number"])
    panel = flumpy.to_numpy(table["panel"]).astype(np.int32)
    xy = flumpy.to_numpy(table["xyzcal.mm"])[:, :2]
    px = np.array(
        [
            experiment.detector[int(p)].millimeter_to_pixel(tuple(m))
            for p, m in zip(panel, xy)
        ]
    ).reshape(-1, 2)
    return hkl[number], panel, px


def _predict_sweep(
    number: int,
    experiments: ExperimentList,
    d_min: float,
    size: SpotSize,
    absences: bool,
) -> Boxes:
    """Boxes of a sweep's reflections; they are longer near the rotation axis."""
    one = experiments[number : number + 1]
    experiment = experiments[number]
    table = flex.reflection_table.from_predictions_multi(
        one, dmin=d_min, padding=size.angle
    )
    if not absences:
        table = _without_absences(table, one)
    xyz = flumpy.to_numpy(table["xyzcal.px"]).reshape(-1, 3)
    s1 = flumpy.to_numpy(table["s1"]).reshape(-1, 3)
    axis = rotation_axis(experiment, 0)
    normal = np.cross(s1, np.array(experiment.beam.get_s0()))
    normal /= np.maximum(np.linalg.norm(normal, axis=1), 1e-12)[:, None]
    zeta = np.maximum(np.abs(normal @ axis), 0.05)
    width = abs(experiment.scan.get_oscillation()[1])
    half = np.stack(
        [np.full(len(xyz), size.fast), np.full(len(xyz), size.slow)]
        + [size.angle / zeta / width],
        axis=1,
    )
    panel = flumpy.to_numpy(table["panel"]).astype(np.int32)
    return Boxes(np.full(len(xyz), number, np.int32), panel, boxes_about(xyz, half))


def boxes_about(centre: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Boxes of whole pixels that contain centre ± half, int32, shape (n, 6)."""
    low, high = np.floor(centre - half), np.ceil(centre + half)
    return np.stack([low, high], axis=2).reshape(-1, 6).astype(np.int32)


def predicted_boxes(
    experiments: ExperimentList, d_min: float, size: SpotSize, absences: bool = False
) -> Boxes:
    """Boxes about the predicted reflections of all experiments.

    Args:
        experiments: Experiments with crystals.
        d_min: Resolution limit, Å.
        size: Of the boxes.
        absences: Whether systematically absent reflections have boxes too.
    """
    parts = []
    for number, e in enumerate(experiments):
        if not e.is_still():
            parts.append(_predict_sweep(number, experiments, d_min, size, absences))
            continue
        hkl, panel, px = predict_still(e, d_min, size.angle)
        if not absences and len(hkl):
            allowed = ~is_absent(hkl, e.crystal.get_space_group())
            panel, px = panel[allowed], px[allowed]
        z = images_of(e)[0] + 0.5
        xyz = np.column_stack([px, np.full(len(px), z)])
        half = np.broadcast_to([size.fast, size.slow, 0.5], xyz.shape)
        parts.append(
            Boxes(np.full(len(px), number, np.int32), panel, boxes_about(xyz, half))
        )
    return Boxes(
        *(
            np.concatenate([getattr(p, f.name) for p in parts])
            for f in dataclasses.fields(Boxes)
        )
    )


class Shoeboxes:
    """The boxes of each image, of all lattices in it.

    Args:
        experiments: The experiments.
        boxes: Their boxes.
        margin: Pixels by which to enlarge the boxes in x and y.
    """

    def __init__(
        self, experiments: ExperimentList, boxes: Boxes, margin: int = 0
    ) -> None:
        self._n_panels = [len(e.detector) for e in experiments]
        self._partners = shared_images(experiments)
        order = np.lexsort((boxes.box[:, 4], boxes.experiment))
        self._panel = boxes.panel[order]
        self._box = boxes.box[order].copy()
        self._box[:, [0, 2]] -= margin
        self._box[:, [1, 3]] += margin
        numbers = np.arange(len(experiments) + 1)
        self._start = np.searchsorted(boxes.experiment[order], numbers)
        depth = self._box[:, 5] - self._box[:, 4]
        self._depth = [
            int(depth[a:b].max(initial=0))
            for a, b in zip(self._start[:-1], self._start[1:])
        ]

    def __len__(self) -> int:
        return len(self._box)

    def _of_lattice(self, number: int, array_index: int) -> np.ndarray:
        """Rows of the boxes of one experiment in an image."""
        start, stop = self._start[number : number + 2]
        z0 = self._box[start:stop, 4]
        first = np.searchsorted(z0, array_index - self._depth[number] + 1)
        last = np.searchsorted(z0, array_index, side="right")
        rows = np.arange(start + first, start + last)
        return rows[self._box[rows, 5] > array_index]

    def boxes_of_image(self, number: int, array_index: int) -> list[np.ndarray]:
        """Boxes of all lattices in an image of an experiment.

        Args:
            number: Number of the experiment.
            array_index: Array index of the image; 0 for a still without scan.

        Returns:
            For each panel x0, x1, y0, y1, int32, shape (n, 4), x0 <= x < x1.
        """
        rows = [self._of_lattice(number, array_index)]
        for partner in self._partners[number]:
            rows.append(
                self._of_lattice(partner.experiment, array_index + partner.shift)
            )
        rows = np.concatenate(rows)
        panel = self._panel[rows]
        return [self._box[rows[panel == i], :4] for i in range(self._n_panels[number])]
