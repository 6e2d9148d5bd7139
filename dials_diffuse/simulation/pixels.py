"""What the pixels of a simulated detector see, from the models of dxtbx and DIALS alone.

The simulation must not share the formulas of ``dials_diffuse.corrections``, or a wrong
one would not show. Directions come from the panels' own coordinate methods, polarization
and sensor efficiency from ``dials.algorithms.integration.Corrections``, the solid angle is
the exact one of a rectangle, and the attenuation of the air has a formula of its own.

What both have in common: the parallax strategy of dxtbx, the tables of attenuation in
cctbx, the interpolation between pixels (``geometry.interpolation``, tested against exact
values), linear interpolation between scan points, and that a pixel is taken at its centre.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cctbx.eltbx import attenuation_coefficient
from dxtbx import flumpy
from dxtbx.model import Beam, Detector, Experiment
from scitbx import matrix

from dials.algorithms.integration import Corrections, CorrectionsMulti
from dials.array_family import flex
from dials_diffuse.geometry.interpolation import PixelInterpolation
from dials_diffuse.simulation.settings import AirSettings

TOLERANCE = 1e-9  # of interpolated directions (radians) and normalisations (relative)


def air_attenuation(air: AirSettings, wavelength: float) -> float:
    """Attenuation coefficient of the gas, 1/mm: (μ/ρ) · ρ.

    The density is that of dry air at 0 °C and 101325 Pa, 1.2929 kg/m³, or helium, 0.1785
    kg/m³ (CRC Handbook of Chemistry and Physics), scaled by pressure and temperature; air
    has mass fractions of 0.7552 N, 0.2314 O, 0.0129 Ar.
    """
    if air.path == "vacuum":
        return 0.0
    if air.path == "helium":
        density, fractions = 0.1785e-3, {"He": 1.0}
    else:
        density, fractions = 1.2929e-3, {"N": 0.7552, "O": 0.2314, "Ar": 0.0129}
    density *= air.pressure / 101325.0 * 273.15 / air.temperature  # g/cm³
    mass_attenuation = sum(
        fraction
        * attenuation_coefficient.get_table(element).mu_rho_at_angstrom(wavelength)
        for element, fraction in fractions.items()
    )
    return density * mass_attenuation / 10


@dataclasses.dataclass(frozen=True)
class PanelPixels:
    """The pixels of a panel, flattened.

    Attributes:
        shape: (n_slow, n_fast).
        e: Unit vectors with parallax, shape (3, n), laboratory frame.
        normalisation: P · ΔΩ · ε · A_air, sr, shape (n,).
        solid_angle: ΔΩ, sr, shape (n,).
    """

    shape: tuple[int, int]
    e: np.ndarray
    normalisation: np.ndarray
    solid_angle: np.ndarray


def rectangle_solid_angle(
    x: np.ndarray, y: np.ndarray, width: float, height: float, distance: float
) -> np.ndarray:
    """Exact solid angle of rectangles in a plane at a distance from the sample.

        Ω = Σ± atan(x y / (D √(D² + x² + y²)))  over the corners (x, y)

    Args:
        x, y: Centres relative to the foot of the perpendicular from the sample, mm.
        width, height: Edges along x and y, mm.
        distance: Distance D of the plane, mm.

    Returns:
        sr, of the shape of x and y.
    """
    total = 0.0
    for sign_x in (-1, 1):
        for sign_y in (-1, 1):
            cx, cy = x + sign_x * width / 2, y + sign_y * height / 2
            root = np.sqrt(distance**2 + cx**2 + cy**2)
            total = total + sign_x * sign_y * np.arctan(cx * cy / (distance * root))
    return np.abs(total)


def _exact_values(
    detector: Detector, number: int, beam: Beam, mu_air: float, fast, slow
) -> np.ndarray:
    """e (3 components), P · ΔΩ · ε · A_air and ΔΩ, shape (5, len(slow), len(fast))."""
    panel = detector[number]
    px = np.stack(np.meshgrid(fast + 0.5, slow + 0.5), axis=-1).reshape(-1, 2)
    mm = panel.pixel_to_millimeter(flumpy.vec_from_numpy(np.ascontiguousarray(px)))
    ray = flumpy.to_numpy(panel.get_lab_coord(mm)).T
    e = ray / np.sqrt(np.sum(ray**2, axis=0))
    s1 = flumpy.vec_from_numpy(np.ascontiguousarray(e.T / beam.get_wavelength()))
    dials = CorrectionsMulti()
    dials.append(Corrections(beam, detector))
    # one detector has one entry: all directions belong to it
    lp = flumpy.to_numpy(dials.lp(flex.int(len(px), 0), s1))
    if panel.get_mu() * panel.get_thickness() > 0:
        numbers = flex.size_t(len(px), number)
        qe = flumpy.to_numpy(dials.qe(flex.int(len(px), 0), s1, numbers))
    else:  # a detector without a sensor counts all photons; for DIALS it counts none
        qe = 1.0
    size = np.array(panel.get_pixel_size())
    foot = matrix.col(panel.get_normal()) * panel.get_directed_distance()
    origin = matrix.col(panel.get_origin())
    centre = px * size + [
        (origin - foot).dot(matrix.col(axis))
        for axis in (panel.get_fast_axis(), panel.get_slow_axis())
    ]
    distance = abs(panel.get_directed_distance())
    solid = rectangle_solid_angle(*centre.T, *size, distance)
    path = np.sqrt(distance**2 + np.sum(centre**2, axis=1))
    weight = solid * qe / lp * np.exp(-mu_air * path)
    return np.concatenate([e, [weight], [solid]]).reshape(5, len(slow), len(fast))


def panel_pixels(experiment: Experiment, air: AirSettings) -> list[PanelPixels]:
    """The pixels of all panels of an experiment."""
    beam, detector = experiment.beam, experiment.detector
    mu = air_attenuation(air, beam.get_wavelength())
    result = []
    for number, panel in enumerate(detector):
        nfast, nslow = panel.get_image_size()

        def function(fast: np.ndarray, slow: np.ndarray, n: int = number) -> np.ndarray:
            return _exact_values(detector, n, beam, mu, fast, slow)

        middle = function(np.array([nfast // 2]), np.array([nslow // 2]))[3:, 0, 0]
        tolerance = TOLERANCE * np.array([1.0, 1.0, 1.0, *middle])
        values = PixelInterpolation(function, (nslow, nfast), tolerance).rows(
            slice(0, nslow)
        )
        values = np.ascontiguousarray(values).reshape(5, -1)
        result.append(PanelPixels((nslow, nfast), values[:3], values[3], values[4]))
    return result


@dataclasses.dataclass(frozen=True)
class Moment:
    """Crystal and beam at one moment of an exposure.

    Attributes:
        setting: S R(φ) F A, Å⁻¹, shape (3, 3), laboratory frame.
        s0: Incident beam, Å⁻¹, laboratory frame.
        goniometer: S R(φ) F, shape (3, 3).
    """

    setting: np.ndarray
    s0: np.ndarray
    goniometer: np.ndarray


def _between(model, n_points: int, getter: str, at_point: str, i: int, x: float):
    """A scan-varying property at the fraction x of image i, linear between its points."""
    if n_points == 0:
        return np.array(getattr(model, getter)())
    left, right = (np.array(getattr(model, at_point)(j)) for j in (i, i + 1))
    return (1 - x) * left + x * right


def moment(experiment: Experiment, i: int, x: float) -> Moment:
    """The models at a fraction x of the exposure of image i of an experiment.

    Args:
        experiment: A sweep or a still.
        i: Number of the image in the sweep, from 0.
        x: From 0 at the start to 1 at the end of the exposure.
    """
    crystal, beam = experiment.crystal, experiment.beam
    s0 = _between(beam, beam.num_scan_points, "get_s0", "get_s0_at_scan_point", i, x)
    a = np.zeros((3, 3))
    if crystal is not None:
        n_points = crystal.num_scan_points
        a = _between(crystal, n_points, "get_A", "get_A_at_scan_point", i, x)
        a = a.reshape(3, 3)
    scan, goniometer = experiment.scan, experiment.goniometer
    if scan is None or goniometer is None:
        return Moment(a, s0, np.eye(3))
    first, _ = scan.get_array_range()
    phi = scan.get_angle_from_array_index(first + i + x, deg=False)
    turn = matrix.col(
        goniometer.get_rotation_axis_datum()
    ).axis_and_angle_as_r3_rotation_matrix(phi)
    fixed = matrix.sqr(goniometer.get_fixed_rotation())
    setting = matrix.sqr(goniometer.get_setting_rotation())
    g = np.array(setting * turn * fixed).reshape(3, 3)
    return Moment(g @ a, s0, g)


def laboratory_axis(experiment: Experiment) -> np.ndarray | None:
    """Rotation axis in the laboratory frame, S m; None for a still."""
    if experiment.scan is None or experiment.goniometer is None:
        return None
    axis = matrix.col(experiment.goniometer.get_rotation_axis_datum())
    return np.array(matrix.sqr(experiment.goniometer.get_setting_rotation()) * axis)
