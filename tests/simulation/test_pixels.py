from __future__ import annotations

import numpy as np
import pytest
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
)

from dxtbx.model import Crystal, Experiment

from dials_diffuse.corrections import gas_attenuation
from dials_diffuse.extraction.settings import CorrectionSettings
from dials_diffuse.extraction.tables import direction_and_normalisation
from dials_diffuse.geometry.orientation import frame_model
from dials_diffuse.simulation.pixels import (
    air_attenuation,
    laboratory_axis,
    moment,
    panel_pixels,
    rectangle_solid_angle,
)
from dials_diffuse.simulation.settings import AirSettings


def experiment(
    n_panels: int = 1, tilt: float = 0.0, parallax: bool = True
) -> Experiment:
    detector = make_detector(n_panels, (40, 31), 25.0, tilt, parallax)
    return Experiment(beam=make_beam(), detector=detector, crystal=make_crystal())


@pytest.mark.parametrize("parallax", [False, True])
@pytest.mark.parametrize("n_panels, tilt", [(1, 0.0), (3, 14.0)])
def test_two_roads_to_the_normalisation(n_panels, tilt, parallax):
    """By DIALS and the exact solid angle, and by the formulas of extraction."""
    e = experiment(n_panels, tilt, parallax)
    for panel, pixels in zip(e.detector, panel_pixels(e, AirSettings())):
        fast, slow = map(np.arange, panel.get_image_size())
        expected = direction_and_normalisation(
            panel, e.beam, CorrectionSettings(), fast, slow
        ).reshape(4, -1)
        np.testing.assert_allclose(pixels.e, expected[:3], atol=1e-8)
        # the solid angle of extraction is that of a small pixel
        np.testing.assert_allclose(pixels.normalisation, expected[3], rtol=5e-5)
        assert np.ptp(pixels.normalisation) > 0.1 * pixels.normalisation.max()


@pytest.mark.parametrize("path", ["air", "helium", "vacuum"])
@pytest.mark.parametrize("wavelength", [0.7, 0.9768, 1.5418])
def test_two_roads_to_the_attenuation_of_air(path, wavelength):
    """By density and mass fractions, and by the ideal gas and mole fractions."""
    found = air_attenuation(AirSettings(path, 300.0, 9e4), wavelength)
    expected = gas_attenuation(path, wavelength, 300.0, 9e4)
    assert found == pytest.approx(expected, rel=3e-3)


def test_attenuation_of_air_by_hand():
    """3.1e-4 /mm at 0.9768 Å, 1.18e-3 at 1.5418 Å."""
    assert air_attenuation(AirSettings(), 0.9768) == pytest.approx(3.1e-4, rel=0.02)
    assert air_attenuation(AirSettings(), 1.5418) == pytest.approx(1.18e-3, rel=0.02)


def test_solid_angles_add_up():
    """A rectangle is the sum of its parts, and an infinite plane is half a sphere."""
    x, y = np.meshgrid(np.arange(-9.5, 10), np.arange(-4.5, 5))
    parts = rectangle_solid_angle(x + 3.0, y - 1.0, 1.0, 1.0, 7.0)
    whole = rectangle_solid_angle(3.0, -1.0, 20.0, 10.0, 7.0)
    assert parts.sum() == pytest.approx(whole, rel=1e-12)
    plane = rectangle_solid_angle(0.0, 0.0, 1e9, 1e9, 7.0)
    assert plane == pytest.approx(2 * np.pi, rel=1e-6)
    small = rectangle_solid_angle(0.0, 0.0, 0.1, 0.1, 100.0)
    assert small == pytest.approx(1e-6, rel=1e-6)


def sweep(kind: str, scan_varying: bool = False) -> Experiment:
    crystal = make_crystal()
    scan = make_scan(5, 2.0)
    if scan_varying:
        a = np.array(crystal.get_A())
        crystal.set_A_at_scan_points([tuple(a * (1 + 0.01 * i**2)) for i in range(6)])
    e = Experiment(
        beam=make_beam(),
        detector=make_detector(),
        crystal=crystal,
        goniometer=make_goniometer(kind),
        scan=scan,
    )
    assert isinstance(e.crystal, Crystal)
    return e


@pytest.mark.parametrize("scan_varying", [False, True])
@pytest.mark.parametrize("kind", ["single", "general", "kappa", "multi"])
def test_middle_of_an_image_is_where_extraction_puts_it(kind, scan_varying):
    e = sweep(kind, scan_varying)
    first = e.scan.get_array_range()[0]
    for i in (0, 3):
        expected = frame_model(e, first + i)
        found = moment(e, i, 0.5)
        np.testing.assert_allclose(found.setting, expected.setting, atol=1e-12)
        np.testing.assert_allclose(found.s0, expected.s0, atol=1e-12)


@pytest.mark.parametrize("kind", ["single", "general", "kappa", "multi"])
def test_crystal_turns_about_the_laboratory_axis(kind):
    e = sweep(kind)
    start, end = moment(e, 1, 0.0), moment(e, 1, 1.0)
    axis = laboratory_axis(e)
    turn = end.goniometer @ np.linalg.inv(start.goniometer)
    np.testing.assert_allclose(turn @ axis, axis, atol=1e-12)
    assert np.trace(turn) == pytest.approx(1 + 2 * np.cos(np.radians(2.0)))
    # in the positive sense about it
    other = np.cross(axis, [0.3, 0.2, 0.7])
    assert np.dot(np.cross(other, turn @ other), axis) > 0


def test_still_does_not_turn():
    e = experiment()
    assert laboratory_axis(e) is None
    np.testing.assert_array_equal(moment(e, 0, 0.0).setting, moment(e, 0, 1.0).setting)
