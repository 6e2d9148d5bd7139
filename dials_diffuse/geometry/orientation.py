"""Orientation of the crystal and the beam at one image.

Rotation data: rlp = S R(phi) F A h, with the setting rotation S, the rotation R by phi
about the datum axis and the fixed rotation F of the goniometer. A, s0, S come from the
scan-varying models at the middle of the image itself, never from an average over the
scan. Stills: rlp = A h, as in DIALS' stills predictors; goniometer and scan say nothing.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.spatial.transform import Rotation

from dxtbx.model import Crystal, Experiment
from scitbx import matrix


@dataclasses.dataclass(frozen=True)
class FrameModel:
    """Setting matrix and beam of one image.

    Attributes:
        setting: S R F A, shape (3, 3), Å⁻¹, laboratory frame.
        s0: Incident beam vector, Å⁻¹, laboratory frame.
        z: Centre of the image as array index + 1/2.
        rotation: Rotation of the sample from the start of the image to its end, as a
            vector along the axis in the laboratory frame, rad; zero for a still.
    """

    setting: np.ndarray
    s0: np.ndarray
    z: float
    rotation: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))

    def sweep(self) -> np.ndarray:
        """Change of the inverse setting matrix over the image, shape (3, 3), Å.

        A point rlp fixed in the laboratory, a pixel, has the indices

            h(t) = A^-1 R(-t ω) rlp,    -1/2 <= t <= 1/2,

        and h(1/2) - h(-1/2) = -2 sin(ω/2) A^-1 [n]x rlp, with the rotation by ω = ω n
        and the matrix [n]x of the cross product.
        """
        angle = float(np.linalg.norm(self.rotation))
        if angle == 0:
            return np.zeros((3, 3))
        x, y, z = self.rotation / angle
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        return -2 * np.sin(angle / 2) * inverse(self.setting) @ cross


def _midpoint(scan_points: int, at_scan_point, static, i: int) -> np.ndarray:
    """A model's value at the middle of image i, between scan points i and i + 1."""
    if scan_points == 0:
        return np.array(static(), dtype=float)
    if scan_points < i + 2:
        raise ValueError(
            f"a scan-varying model has {scan_points} scan points, too few for image "
            f"{i + 1} of the scan: refine with the images that are to be extracted"
        )
    # neighbouring scan points differ so little that the mean of the two is exact to
    # second order in their difference
    return 0.5 * (np.array(at_scan_point(i)) + np.array(at_scan_point(i + 1)))


def crystal_setting(crystal: Crystal, i: int) -> np.ndarray:
    """A = U B at the middle of image i of the scan, shape (3, 3), Å⁻¹."""
    a = _midpoint(
        crystal.num_scan_points, crystal.get_A_at_scan_point, crystal.get_A, i
    )
    return a.reshape(3, 3)


def frame_model(experiment: Experiment, array_index: int) -> FrameModel:
    """The models of an experiment at one image.

    Args:
        experiment: The experiment; needs a crystal.
        array_index: Array index of the image in the scan; ignored for a still without
            a scan.

    Raises:
        ValueError: A scan-varying model does not reach as far as the image.
    """
    beam, scan = experiment.beam, experiment.scan
    first = scan.get_array_range()[0] if scan else array_index
    i = array_index - first
    s0 = _midpoint(beam.num_scan_points, beam.get_s0_at_scan_point, beam.get_s0, i)
    setting = crystal_setting(experiment.crystal, i)
    if experiment.is_still():
        return FrameModel(setting, s0, array_index + 0.5)
    setting = goniometer_rotation(experiment, array_index) @ setting
    rotation = np.radians(scan.get_oscillation()[1]) * rotation_axis(experiment, i)
    return FrameModel(setting, s0, array_index + 0.5, rotation)


def setting_rotation(experiment: Experiment, i: int) -> np.ndarray:
    """Setting rotation S of the goniometer at image i of the scan, shape (3, 3)."""
    goniometer = experiment.goniometer
    return _midpoint(
        goniometer.num_scan_points,
        goniometer.get_setting_rotation_at_scan_point,
        goniometer.get_setting_rotation,
        i,
    ).reshape(3, 3)


def rotation_axis(experiment: Experiment, i: int) -> np.ndarray:
    """Rotation axis at image i of the scan, unit vector in the laboratory frame."""
    datum = np.array(experiment.goniometer.get_rotation_axis_datum())
    return setting_rotation(experiment, i) @ datum


def goniometer_rotation(experiment: Experiment, array_index: int) -> np.ndarray:
    """S R(phi) F at the middle of an image, shape (3, 3)."""
    goniometer, scan = experiment.goniometer, experiment.scan
    setting = setting_rotation(experiment, array_index - scan.get_array_range()[0])
    fixed = np.array(goniometer.get_fixed_rotation()).reshape(3, 3)
    axis = np.array(goniometer.get_rotation_axis_datum())
    phi = scan.get_angle_from_array_index(array_index + 0.5, deg=False)
    return setting @ Rotation.from_rotvec(phi * axis).as_matrix() @ fixed


def inverse(a: np.ndarray) -> np.ndarray:
    """Inverse of a 3 x 3 matrix.

    Not by numpy: its LAPACK wakes a team of threads, which then burns processor time
    for longer than the images of a block take.
    """
    return np.array(matrix.sqr(a.ravel()).inverse()).reshape(3, 3)
