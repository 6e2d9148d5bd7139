from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from simulate_images import make_beam, make_detector

from dxtbx import flumpy
from dxtbx.model import Beam, Detector, Panel

from dials.algorithms.integration import Corrections, CorrectionsMulti
from dials.array_family import flex
from dials_diffuse import corrections
from dials_diffuse.extraction.settings import CorrectionSettings
from dials_diffuse.extraction.tables import (
    correction_factors,
    normalisation,
    panel_arrays,
    pixel_vectors,
)
from dials_diffuse.geometry import directions

OFF = CorrectionSettings(
    polarization=False, solid_angle=False, efficiency=False, path="vacuum"
)


def positions(panel: Panel) -> np.ndarray:
    fast, slow = map(np.arange, panel.get_image_size())
    return directions.lab_coordinates(panel, fast, slow, parallax=False)


def unit(r: np.ndarray) -> np.ndarray:
    return r / np.linalg.norm(r, axis=0)


def random_directions(n: int = 200) -> np.ndarray:
    return unit(np.random.default_rng(5).normal(size=(3, n)))


def beams() -> list[Beam]:
    beam, tilted = make_beam(), make_beam(1.7)
    # of unit length: DIALS takes it as it is
    tilted.set_polarization_normal(tuple(unit(np.array([0.3, 0.9, 0.1]))))
    tilted.set_polarization_fraction(0.7)
    return [beam, tilted]


@pytest.mark.parametrize("beam", beams(), ids=["plane", "tilted"])
def test_polarization_is_that_of_dials(beam):
    """lp() of DIALS without a goniometer is the multiplier 1/P."""
    detector = make_detector()
    e = random_directions()
    found = corrections.polarization(
        e,
        beam.get_s0(),
        beam.get_polarization_normal(),
        beam.get_polarization_fraction(),
    )
    s1 = (e / beam.get_wavelength()).T
    single = Corrections(beam, detector)
    expected = [1 / single.lp(tuple(s)) for s in s1]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    multi = CorrectionsMulti()
    multi.append(single)
    lp = multi.lp(flex.int(len(s1), 0), flumpy.vec_from_numpy(np.ascontiguousarray(s1)))
    np.testing.assert_allclose(found, 1 / flumpy.to_numpy(lp), rtol=1e-12)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.95, 1.0])
def test_azimuthal_mean_of_the_polarization(fraction):
    two_theta, phi = np.radians(37.0), np.radians(np.arange(0.5, 360))
    e = np.stack(
        [
            np.sin(two_theta) * np.cos(phi),
            np.sin(two_theta) * np.sin(phi),
            np.full_like(phi, -np.cos(two_theta)),
        ]
    )
    p = corrections.polarization(e, (0, 0, -1.02), (0, 2, 0), fraction)
    assert np.mean(p) == pytest.approx((1 + np.cos(two_theta) ** 2) / 2, rel=1e-12)
    # polarized in the horizontal plane: none along x at 90 degrees, all along y
    if fraction == 1.0:
        p = corrections.polarization(np.eye(3), (0, 0, -1), (0, 1, 0), fraction)
        np.testing.assert_allclose(p, [0, 1, 1], atol=1e-15)


def rectangle_solid_angle(panel: Panel) -> float:
    """Solid angle of the whole panel: sum over corners of ± atan(ab/(D sqrt(...)))."""
    d = panel.get_distance()
    nfast, nslow = panel.get_image_size()
    fast, slow = panel.get_pixel_size()
    foot = panel.get_normal_origin()  # where the normal through the sample meets it, mm
    a = np.array([0, nfast * fast]) - foot[0]
    b = np.array([0, nslow * slow]) - foot[1]
    total = 0.0
    for i in range(2):
        for j in range(2):
            r = np.sqrt(d**2 + a[i] ** 2 + b[j] ** 2)
            total += (-1) ** (i + j) * np.arctan(a[i] * b[j] / (d * r))
    return float(total)


@pytest.mark.parametrize("tilt", [0.0, 14.0])
def test_solid_angles_add_up_to_that_of_the_panel(tilt):
    for panel in make_detector(2, (140, 120), 30, tilt, pixel=(0.3, 0.25)):
        found = corrections.solid_angle(
            positions(panel), panel.get_normal(), panel.get_pixel_size()
        )
        # the midpoint rule is off by (pixel/distance)^2
        assert found.sum() == pytest.approx(rectangle_solid_angle(panel), rel=1e-5)


def test_solid_angle_straight_ahead():
    found = corrections.solid_angle(
        np.array([[0.0], [0.0], [-200.0]]), (0, 0, -1), (0.172, 0.2)
    )
    assert found == pytest.approx(0.172 * 0.2 / 200**2, rel=1e-14)


@pytest.mark.parametrize("parallax", [False, True])
def test_efficiency_is_that_of_dials(parallax):
    detector = make_detector(2, (20, 16), 12, 14.0, parallax)
    single = Corrections(make_beam(), detector)
    for number, panel in enumerate(detector):
        e = unit(positions(panel)).reshape(3, -1)
        found = corrections.sensor_efficiency(
            e, panel.get_normal(), panel.get_mu(), panel.get_thickness()
        )
        expected = [single.qe(tuple(v), number) for v in e.T]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert np.ptp(found) > 0.01


@pytest.mark.parametrize("beam", beams(), ids=["plane", "tilted"])
def test_factors_of_all_panels_are_those_of_dials(beam):
    """CorrectionsMulti with the panel of each pixel: lp is 1/P, qe is the efficiency."""
    detector = make_detector(4, (20, 16), 12, 9.0, parallax=True)
    thickness = (0.1, 0.32, 0.45, 1.0)
    for panel, value in zip(detector, thickness):
        panel.set_thickness(value)
    factors, directions_of, numbers = [], [], []
    for number, panel in enumerate(detector):
        fast, slow = map(np.arange, panel.get_image_size())
        position, e = pixel_vectors(panel, fast, slow)
        factors.append(
            correction_factors(panel, beam, position, e, CorrectionSettings())
        )
        directions_of.append(e.reshape(3, -1).T)
        numbers.append(np.full(fast.size * slow.size, number))
    found = {
        name: np.concatenate([f[name].ravel() for f in factors]) for name in factors[0]
    }
    s1 = np.concatenate(directions_of) / beam.get_wavelength()
    number = np.concatenate(numbers)
    multi = CorrectionsMulti()
    multi.append(Corrections(beam, detector))
    first = flex.int(len(number), 0)
    s1 = flumpy.vec_from_numpy(np.ascontiguousarray(s1))
    lp = flumpy.to_numpy(multi.lp(first, s1))
    np.testing.assert_allclose(found["polarization"], 1 / lp, rtol=1e-12)

    def qe(number: np.ndarray) -> np.ndarray:
        panels = flumpy.from_numpy(number.astype(np.uint64))
        return flumpy.to_numpy(multi.qe(first, s1, panels))

    np.testing.assert_allclose(found["efficiency"], qe(number), rtol=1e-12)
    # the panels differ: those of another panel are others
    assert np.all(np.abs(qe((number + 1) % 4) / found["efficiency"] - 1) > 0.01)


def test_factors_that_are_switched_off_are_missing():
    panel, beam = make_detector(1, (30, 25), 12, 11.0)[0], make_beam()
    position, e = pixel_vectors(panel, np.arange(30), np.arange(25))

    def names(settings: CorrectionSettings) -> set[str]:
        return set(correction_factors(panel, beam, position, e, settings))

    everything = {"polarization", "solid_angle", "efficiency", "path"}
    assert names(CorrectionSettings()) == everything
    assert names(OFF) == set()
    for name in everything:
        off = "vacuum" if name == "path" else False
        without = dataclasses.replace(CorrectionSettings(), **{name: off})
        assert names(without) == everything - {name}


@pytest.mark.parametrize("mu, thickness", [(0.0, 0.3), (3.9, 0.0)])
def test_sensor_without_material_counts_all(mu, thickness):
    assert corrections.sensor_efficiency(
        np.eye(3), (0, 0, 1), mu, thickness
    ) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "medium, wavelength, expected, rel",
    [
        ("air", 0.9768, 3.1e-4, 0.02),
        ("air", 1.5418, 1.18e-3, 0.02),
        ("vacuum", 1.0, 0.0, 0),
        # NIST: 0.2933 cm2/g at 8 keV times the density 1.664e-4 g/cm3
        ("helium", 12.39842 / 8.0, 0.2933 * 1.664e-4 / 10, 0.02),
    ],
)
def test_attenuation_of_gases(medium, wavelength, expected, rel):
    found = corrections.gas_attenuation(medium, wavelength, 293.15, 101325.0)
    assert found == pytest.approx(expected, rel=rel)


def test_attenuation_goes_with_the_density():
    reference = corrections.gas_attenuation("air", 1.0, 300.0, 1e5)
    assert corrections.gas_attenuation("air", 1.0, 150.0, 3e5) == pytest.approx(
        6 * reference
    )
    assert corrections.gas_attenuation("air", 1.0, 300.0, 0.0) == 0


def test_transmission_of_the_path():
    r = np.array([[30.0, 0], [0, -100.0], [40.0, 0]])
    found = corrections.gas_transmission(r, 0.002)
    np.testing.assert_allclose(found, [np.exp(-0.1), np.exp(-0.2)])


def test_normalisation_is_the_product_of_its_factors():
    panel, beam = make_detector(1, (30, 25), 12, 11.0)[0], make_beam()
    r = positions(panel)
    e = unit(r)
    everything = normalisation(panel, beam, r, e, CorrectionSettings())
    product = np.ones_like(everything)
    for name in ("polarization", "solid_angle", "efficiency", "path"):
        value = "air" if name == "path" else True
        factor = normalisation(
            panel, beam, r, e, dataclasses.replace(OFF, **{name: value})
        )
        assert np.ptp(factor) > 0, name
        without = CorrectionSettings(**{name: "vacuum" if name == "path" else False})
        np.testing.assert_allclose(
            normalisation(panel, beam, r, e, without) * factor, everything, rtol=1e-12
        )
        product *= factor
    np.testing.assert_allclose(product, everything, rtol=1e-12)
    assert np.all(normalisation(panel, beam, r, e, OFF) == 1)


def test_polarization_of_the_settings_goes_before_that_of_the_beam():
    panel, beam = make_detector(1, (30, 25), 12, 11.0)[0], make_beam()
    r = positions(panel)
    e = unit(r)
    only = dataclasses.replace(OFF, polarization=True)
    given = dataclasses.replace(
        only, polarization_fraction=0.0, polarization_normal=(1.0, 0.0, 0.0)
    )
    expected = corrections.polarization(e, beam.get_s0(), (1, 0, 0), 0.0)
    np.testing.assert_allclose(normalisation(panel, beam, r, e, given), expected)
    assert not np.allclose(normalisation(panel, beam, r, e, only), expected)


def turned(detector: Detector, turn: Rotation) -> Detector:
    result = make_detector(len(detector), detector[0].get_image_size())
    for old, new in zip(detector, result):
        new.set_mu(old.get_mu())
        new.set_thickness(old.get_thickness())
        new.set_pixel_size(old.get_pixel_size())
        new.set_frame(
            *(
                turn.apply(v)
                for v in (old.get_fast_axis(), old.get_slow_axis(), old.get_origin())
            )
        )
    return result


def test_normalisation_does_not_depend_on_the_laboratory_frame():
    turn = Rotation.from_euler("xyz", [70, -130, 33], True)
    detector, beam = make_detector(2, (30, 25), 15, 9.0), make_beam()
    beam_turned = make_beam()
    beam_turned.set_s0(turn.apply(beam.get_s0()))
    beam_turned.set_polarization_normal(turn.apply(beam.get_polarization_normal()))
    good = np.ones((25, 30), dtype=bool)
    for one, two in zip(detector, turned(detector, turn)):
        a = panel_arrays(one, beam, good, CorrectionSettings())
        b = panel_arrays(two, beam_turned, good, CorrectionSettings())
        np.testing.assert_allclose(
            b.weight * b.weight_unit, a.weight * a.weight_unit, rtol=1e-8
        )
        np.testing.assert_allclose(
            b.e.reshape(3, -1), turn.apply(a.e.reshape(3, -1).T).T, atol=3e-7
        )


def test_weights_are_the_normalisation_to_nine_digits():
    panel, beam = make_detector(1, (30, 25), 12, 11.0)[0], make_beam()
    good = np.random.default_rng(3).random((25, 30)) < 0.8
    arrays = panel_arrays(panel, beam, good, CorrectionSettings())
    r = positions(panel)
    expected = normalisation(panel, beam, r, unit(r), CorrectionSettings())
    np.testing.assert_allclose(
        (arrays.weight * arrays.weight_unit)[good], expected[good], rtol=2e-9
    )
    assert np.all(arrays.weight[~good] == 0)
    assert np.all(arrays.weight[good] > 0)


def test_splitting_a_panel_changes_nothing():
    whole = make_detector(1, (40, 24), 15, 12.0, parallax=True)[0]
    left, right = make_detector(2, (20, 24), 15, 0, parallax=True)
    fast, slow = np.array(whole.get_fast_axis()), whole.get_slow_axis()
    origin = np.array(whole.get_origin())
    left.set_frame(fast, slow, origin)
    right.set_frame(fast, slow, origin + fast * 20 * whole.get_pixel_size()[0])
    arrays = [
        panel_arrays(
            panel,
            make_beam(),
            np.ones(panel.get_image_size()[::-1], dtype=bool),
            CorrectionSettings(),
        )
        for panel in (whole, left, right)
    ]
    weights = [a.weight * a.weight_unit for a in arrays]
    # the parallax is interpolated between other pixels
    np.testing.assert_allclose(np.hstack(weights[1:]), weights[0], rtol=1e-6)
    both = np.concatenate([arrays[1].e, arrays[2].e], axis=2)
    np.testing.assert_allclose(both, arrays[0].e, atol=2e-5)  # 1e-3 pixels
