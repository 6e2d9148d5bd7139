"""Pixels to Miller indices, with DIALS' own predictors as oracle.

A reflection that DIALS predicts at (x, y, frame) must get its integer Miller index
there. The images are so narrow that the middle of an image is as good as any angle.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from simulate_images import (
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
    memory_experiment,
)

from dxtbx import flumpy
from dxtbx.model import Experiment
from scitbx.array_family import flex as scitbx_flex

from dials.array_family import flex
from dials_diffuse.extraction.settings import CorrectionSettings
from dials_diffuse.extraction.tables import panel_arrays
from dials_diffuse.geometry.orientation import crystal_setting, frame_model
from dials_diffuse.geometry.validation import index_residuals
from dials_diffuse.util.compat import miller_index_to_numpy

N_IMAGES = 500
WIDTH = 0.002
TOLERANCE = 1e-3


def make_experiment(
    goniometer="single", tilt=12.0, parallax=True, first=1, space_group="P 1"
) -> Experiment:
    detector = make_detector(2, (150, 280), 45.0, tilt, parallax)
    return memory_experiment(
        [[]] * (N_IMAGES if goniometer else 1),
        detector,
        make_crystal(space_group),
        scan=make_scan(N_IMAGES, WIDTH, first) if goniometer else None,
        goniometer=make_goniometer(goniometer) if goniometer else None,
    )


def predictions(experiment: Experiment) -> flex.reflection_table:
    """Reflections predicted by DIALS away from the edges of the panels."""
    table = flex.reflection_table.from_predictions(experiment, dmin=1.1)
    x, y, z = table["xyzcal.px"].parts()
    inside = scitbx_flex.bool(len(table), False)
    for number, panel in enumerate(experiment.detector):
        nfast, nslow = panel.get_image_size()
        inside |= (
            (table["panel"] == number)
            & ((x > 1) & (x < nfast - 1))
            & ((y > 1) & (y < nslow - 1))
        )
    if experiment.scan is not None:
        first, last = experiment.scan.get_array_range()
        inside &= (z > first) & (z < last)
    return table.select(inside)


def indices_at_predictions(experiment, table, pixel_centre=0.5) -> np.ndarray:
    """hkl by the directions of the pixels and the model of the frame, shape (n, 3)."""
    x, y, z = flumpy.to_numpy(table["xyzcal.px"]).T
    hkl = np.empty((len(x), 3))
    for number, panel in enumerate(experiment.detector):
        good = np.ones(panel.get_image_size()[::-1], dtype=bool)
        directions = panel_arrays(panel, experiment.beam, good, CorrectionSettings()).e
        for row in np.flatnonzero(flumpy.to_numpy(table["panel"]) == number):
            at = [[y[row] - pixel_centre], [x[row] - pixel_centre]]
            e = [map_coordinates(c.astype(float), at, order=1)[0] for c in directions]
            image = int(np.floor(z[row])) if experiment.scan else 0
            frame = frame_model(experiment, image)
            rlp = np.array(e) / np.linalg.norm(e) * np.linalg.norm(frame.s0) - frame.s0
            hkl[row] = np.linalg.solve(frame.setting, rlp)
    return hkl


def largest_error(experiment, table, **kwargs) -> float:
    hkl = indices_at_predictions(experiment, table, **kwargs)
    return float(np.abs(hkl - miller_index_to_numpy(table["miller_index"])).max())


@pytest.mark.parametrize("goniometer", ["single", "general", "multi", "kappa"])
@pytest.mark.parametrize("parallax", [False, True])
def test_predicted_reflections_get_their_indices(goniometer, parallax):
    experiment = make_experiment(goniometer, parallax=parallax)
    table = predictions(experiment)
    assert len(table) > 20
    assert set(table["panel"]) == {0, 1}
    assert largest_error(experiment, table) < TOLERANCE
    # negative control: pixel numbers in place of pixel centres
    assert largest_error(experiment, table, pixel_centre=0.0) > 5 * TOLERANCE


@pytest.mark.parametrize("parallax", [False, True])
def test_predicted_reflections_of_a_still_get_their_indices(parallax):
    """A still shows reflections that are turned by delta psi from the Ewald sphere."""
    experiment = make_experiment(None, parallax=parallax)
    table = predictions(experiment)
    assert len(table) > 20
    a = np.array(experiment.crystal.get_A()).reshape(3, 3)
    rlp = miller_index_to_numpy(table["miller_index"]) @ a.T
    turn = np.abs(flumpy.to_numpy(table["delpsical.rad"]))
    expected = turn * np.linalg.norm(rlp, axis=1)

    def excess(**kwargs):
        found = indices_at_predictions(experiment, table, **kwargs) @ a.T
        return np.abs(np.linalg.norm(found - rlp, axis=1) - expected).max()

    assert excess() < 3e-5  # 1/Angstrom, a thousandth of a*
    assert excess(pixel_centre=0.0) > 5e-4


@pytest.mark.parametrize("first", [1, 37])
def test_scan_that_starts_at_another_image(first):
    experiment = make_experiment("general", first=first)
    table = predictions(experiment)
    assert len(table) > 20
    assert largest_error(experiment, table) < TOLERANCE


def rotations(degrees: float, axis=(0.3, 0.8, -0.5)) -> list[np.ndarray]:
    """Rotation matrices at the scan points, from 0 to ``degrees``."""
    axis = np.array(axis) / np.linalg.norm(axis)
    angles = np.linspace(0, np.radians(degrees), N_IMAGES + 1)
    return [Rotation.from_rotvec(angle * axis).as_matrix() for angle in angles]


def vary_crystal(experiment, degrees=0.7):
    a = np.array(experiment.crystal.get_A()).reshape(3, 3)
    experiment.crystal.set_A_at_scan_points(
        [tuple((r @ a).ravel()) for r in rotations(degrees)]
    )


def vary_beam(experiment, degrees=0.3):
    s0 = np.array(experiment.beam.get_s0())
    points = [tuple(r @ s0) for r in rotations(degrees, (0.9, 0.2, 0.1))]
    experiment.beam.set_s0_at_scan_points(scitbx_flex.vec3_double(points))


def vary_goniometer(experiment, degrees=0.4):
    setting = np.array(experiment.goniometer.get_setting_rotation()).reshape(3, 3)
    points = [tuple((r @ setting).ravel()) for r in rotations(degrees, (0.1, 1, 0.3))]
    experiment.goniometer.set_setting_rotation_at_scan_points(
        scitbx_flex.mat3_double(points)
    )


@pytest.mark.parametrize("goniometer", ["general", "multi"])
@pytest.mark.parametrize(
    "vary",
    [
        [vary_crystal],
        [vary_crystal, vary_beam],
        [vary_crystal, vary_beam, vary_goniometer],
    ],
    ids=lambda functions: "+".join(f.__name__[5:] for f in functions),
)
def test_scan_varying_models_are_those_of_the_frame(goniometer, vary):
    experiment = make_experiment(goniometer)
    for function in vary:
        function(experiment)
    table = predictions(experiment)
    assert len(table) > 20
    assert largest_error(experiment, table) < TOLERANCE
    # negative control: the static crystal is another one
    experiment.crystal.reset_scan_points()
    assert largest_error(experiment, table) > 5 * TOLERANCE


def test_scan_varying_crystal_at_the_middle_of_an_image():
    experiment = make_experiment("single", first=11)
    vary_crystal(experiment, degrees=50)
    crystal = experiment.crystal
    for i in (0, 1, N_IMAGES - 1):
        a = crystal_setting(crystal, i)
        points = [np.array(crystal.get_A_at_scan_point(j)) for j in (i, i + 1)]
        np.testing.assert_allclose(a.ravel(), np.mean(points, axis=0), rtol=1e-12)
    with pytest.raises(ValueError, match="501 scan points, too few for image 501"):
        crystal_setting(crystal, N_IMAGES)


def test_frame_number_is_that_of_the_middle_of_the_image():
    experiment = make_experiment("single", first=11)
    assert frame_model(experiment, 10).z == 10.5
    experiment = make_experiment(None)
    assert frame_model(experiment, 0).z == 0.5


@pytest.mark.parametrize("goniometer", [False, True])
def test_stills_ignore_goniometer_and_scan(goniometer):
    """A still sequence (zero-width scan) is a still whatever its goniometer says."""
    experiment = make_experiment(None)
    if goniometer:
        experiment.goniometer = make_goniometer("general")
        experiment.scan = make_scan(1, 0.0, first=5)
    setting = frame_model(experiment, 4 if goniometer else 0).setting
    np.testing.assert_allclose(setting.ravel(), experiment.crystal.get_A(), rtol=1e-12)


@pytest.mark.parametrize("goniometer", ["single", "general", "kappa"])
def test_turning_a_crystal_is_the_same_as_turning_the_goniometer(goniometer):
    """R(phi + delta) A = R(phi) (F^-1 R(delta) F A): same setting matrix."""
    experiment = make_experiment(goniometer)
    reference = frame_model(experiment, 3).setting
    g = experiment.goniometer
    delta = 25.0
    turn = Rotation.from_rotvec(
        np.radians(delta) * np.array(g.get_rotation_axis_datum())
    )
    fixed = np.array(g.get_fixed_rotation()).reshape(3, 3)
    a = np.array(experiment.crystal.get_A()).reshape(3, 3)
    experiment.crystal.set_A(tuple((fixed.T @ turn.as_matrix() @ fixed @ a).ravel()))
    start, width = experiment.scan.get_oscillation()
    experiment.scan.set_oscillation((start - delta, width))
    np.testing.assert_allclose(
        frame_model(experiment, 3).setting, reference, atol=1e-12
    )


def test_residuals_of_indexed_spots():
    experiment = make_experiment("general")
    table = predictions(experiment)
    table["xyzobs.px.value"] = table["xyzcal.px"]
    assert np.abs(index_residuals(experiment, table)).max() < TOLERANCE
    x, y, z = table["xyzobs.px.value"].parts()
    table["xyzobs.px.value"] = scitbx_flex.vec3_double(x + 3, y, z)
    residuals = index_residuals(experiment, table)
    assert np.linalg.norm(residuals, axis=1).min() > 0.02
