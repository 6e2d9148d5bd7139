from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from truth_ladder import vary

from cctbx import uctbx
from dxtbx.model import Experiment, Panel

from dials.algorithms.integration import Corrections
from dials.array_family import flex
from dials_diffuse.corrections import gas_attenuation
from dials_diffuse.simulation.forecast import with_empty_images
from dials_diffuse.simulation.scales import Absorption, image_scales
from dials_diffuse.simulation.settings import (
    BackgroundSettings,
    BraggPeakSettings,
    CrystalSettings,
    DetectorSettings,
    DiffuseSettings,
    GoniometerSettings,
    ScaleSettings,
    ScanSettings,
    SimulationSettings,
)
from dials_diffuse.simulation.simulate import Simulation

CELL = (16.0, 17.0, 18.0)
WAVELENGTH = 0.9795
TINY = SimulationSettings(
    n_images=3,
    crystal=CrystalSettings(unit_cell=uctbx.unit_cell((*CELL, 90, 90, 90))),
    bragg=BraggPeakSettings(sigma=0.004, mosaicity=0.3),
    diffuse=DiffuseSettings(length=5.0, halo_length=8.0),
    background=BackgroundSettings(air=3.0e4, n_images=1),
    detector=DetectorSettings(
        preset="given",
        size=(24, 20),
        pixel=1.0,
        distance=30.0,
        beamstop=2.1,
        beamstop_arm=0.8,
    ),
    scan=ScanSettings(width=1.0, exposure=0.2),
    scale=ScaleSettings(variation=0.3, absorption=0.7),
)
STILL = vary(TINY, mode="stills", scan={"orientations": "random"})
# the axis is tilted, and nothing is the identity
GENERAL = GoniometerSettings((0.9, 0.1, -0.2), (10, 20, 30), (-5, 6, 7))


# The terms, from the models alone


def rays(panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Directions with parallax and positions (mm) of all pixels, shape (n, 3) each."""
    n_fast, n_slow = panel.get_image_size()
    centres = [(i + 0.5, j + 0.5) for j in range(n_slow) for i in range(n_fast)]
    seen = [panel.get_lab_coord(panel.pixel_to_millimeter(c)) for c in centres]
    # where the pixel itself is: get_pixel_lab_coord includes the parallax
    pixel = panel.get_pixel_size()
    position = [panel.get_lab_coord((x * pixel[0], y * pixel[1])) for x, y in centres]
    seen = np.array(seen)
    return seen / np.linalg.norm(seen, axis=1)[:, None], np.array(position)


def solid_angle(panel: Panel, position: np.ndarray, n: int = 8) -> np.ndarray:
    """∫ cos / r² over each pixel, by n x n points."""
    x = ((np.arange(n) + 0.5) / n - 0.5) * panel.get_pixel_size()[0]
    normal = np.array(panel.get_normal())
    total = np.zeros(len(position))
    for u, v in itertools.product(x, x):
        r = position + u * np.array(panel.get_fast_axis())
        r = r + v * np.array(panel.get_slow_axis())
        total += np.abs(r @ normal) / np.linalg.norm(r, axis=1) ** 3
    return total * (x[1] - x[0]) ** 2


def normalisation(panel: Panel, e: np.ndarray, position: np.ndarray) -> np.ndarray:
    """P · ΔΩ · ε · A_air; p = 0.999, normal along y, beam along -z."""
    p = 0.999
    polarization = (1 - 2 * p) * (1 - e[:, 1] ** 2) + p * (1 + e[:, 2] ** 2)
    through = panel.get_thickness() / np.abs(e @ np.array(panel.get_normal()))
    efficiency = 1 - np.exp(-panel.get_mu() * through) if panel.get_mu() else 1.0
    mu = gas_attenuation("air", WAVELENGTH, 293.15, 101325.0)
    path = np.linalg.norm(position, axis=1)
    omega = solid_angle(panel, position)
    return polarization * omega * efficiency * np.exp(-mu * path)


def bragg(simulation: Simulation, a: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Σ_H |F|²/V G(q - A H), over the lattice points around each q."""
    sample = simulation.sample
    sigma, eta = sample.peak_shape.sigma, sample.peak_shape.mosaicity
    nearest = np.rint(np.linalg.solve(a, q.T).T)
    total = np.zeros(len(q))
    for shift in itertools.product((-1, 0, 1), repeat=3):
        h = nearest + shift
        point = h @ a.T
        s = np.linalg.norm(point, axis=1)
        s = np.where(s > 0, s, 1.0)  # 000 has no intensity
        along = np.sum((q - point) * point, axis=1) / s
        across2 = np.sum((q - point) ** 2, axis=1) - along**2
        width2 = sigma**2 + (s * eta) ** 2
        norm = (2 * np.pi) ** 1.5 * sigma * width2
        shape = np.exp(-(along**2) / sigma**2 / 2 - across2 / width2 / 2) / norm
        total += sample.bragg.at(*h.T.astype(int)) * shape / np.prod(CELL)
    return total


def transmission(e: np.ndarray, turn: np.ndarray, number: int) -> np.ndarray:
    """exp(-a · [(1 + u·e)/2 + (1 - v·e0)/2] / 2), in the frame of the head."""
    vectors = Absorption(TINY, number)
    out, into = e @ turn @ vectors.u, (turn.T @ [0, 0, -1.0]) @ vectors.v
    return np.exp(-0.7 * ((1 + out) / 2 + (1 - into) / 2) / 2)


def air(e: np.ndarray) -> np.ndarray:
    """3e4 photons/s in 1 mm² at 30 mm, falling with 12 degrees, per sr."""
    return 3e4 * 30**2 * np.exp(-np.degrees(np.arccos(-e[:, 2])) / 12)


def shadow(e: np.ndarray) -> np.ndarray:
    x, y = (-30 * e[:, i] / e[:, 2] for i in (0, 1))
    dark = (x**2 + y**2 < 2.1**2) | ((np.abs(x) < 0.4) & (y > 0))
    return np.where(dark, 0.0, 1.0)


def photons(simulation: Simulation, series: int, i: int) -> np.ndarray:
    (panel,) = simulation.photons(simulation.series[series], i)
    return panel.ravel()


@pytest.mark.parametrize("thickness", [0.45, 0.0])
def test_still_by_hand(thickness):
    simulation = Simulation(vary(STILL, detector={"thickness": thickness}))
    experiment = simulation.series[0].experiments[1]
    panel = experiment.detector[0]
    e, position = rays(panel)
    a = np.array(experiment.crystal.get_A()).reshape(3, 3)
    q = (e - [0, 0, -1]) / WAVELENGTH
    s = np.linalg.norm(q, axis=1)
    sample = simulation.sample
    parts = {
        "diffuse": sample.diffuse(np.linalg.solve(a, q.T)),
        "bragg": bragg(simulation, a, q),
        "isotropic": sample.isotropic(s),
    }
    k = sample.power * image_scales(STILL, 1)[1]
    norm = 0.2 * shadow(e) * normalisation(panel, e, position)
    scattered = norm * k * transmission(e, np.eye(3), 1)
    expected = scattered * sum(parts.values()) + norm * air(e)
    found = photons(simulation, 0, 1)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    # every term can be seen
    for part in (*(scattered * x for x in parts.values()), norm * air(e)):
        assert part.sum() > 0.01 * expected.sum()


@pytest.mark.parametrize("goniometer", [GoniometerSettings(), GENERAL])
def test_rotation_by_hand(goniometer):
    """The mean over many angles, with matrices of our own."""
    settings = vary(
        TINY, goniometer=dataclasses.asdict(goniometer), scan={"width": 2.0}
    )
    simulation = Simulation(settings)
    experiment = simulation.series[0].experiments[0]
    panel = experiment.detector[0]
    e, position = rays(panel)
    q = (e - [0, 0, -1]) / WAVELENGTH
    u = np.array(experiment.crystal.get_A()).reshape(3, 3)

    def euler(angles) -> np.ndarray:
        return Rotation.from_euler("xyz", angles or (0, 0, 0), degrees=True).as_matrix()

    fixed = euler(goniometer.fixed_rotation)
    setting = euler(goniometer.setting_rotation)
    axis = np.array(goniometer.axis) / np.linalg.norm(goniometer.axis)

    def turn(phi: float) -> np.ndarray:
        return (
            setting @ Rotation.from_rotvec(np.radians(phi) * axis).as_matrix() @ fixed
        )

    image, n = 2, 400
    total = np.zeros(len(q))
    for phi in (image + (np.arange(n) + 0.5) / n) * 2.0:
        a = turn(phi) @ u
        total += simulation.sample.diffuse(np.linalg.solve(a, q.T)) / n
        total += bragg(simulation, a, q) / n
    total += simulation.sample.isotropic(np.linalg.norm(q, axis=1))
    k = simulation.sample.power * image_scales(settings, 1)[image]
    norm = 0.2 * shadow(e) * normalisation(panel, e, position)
    expected = norm * (k * transmission(e, turn(5.0), 1) * total + air(e))
    found = photons(simulation, 0, image)
    assert found.sum() == pytest.approx(expected.sum(), rel=3e-4)
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_without_crystal_only_air_scatters():
    for settings in (TINY, STILL):
        simulation = Simulation(settings)
        series = simulation.series[-1]
        assert series.is_background
        panel = series.experiments[0].detector[0]
        e, position = rays(panel)
        norm = 0.2 * shadow(e) * normalisation(panel, e, position)
        expected = norm * air(e)
        np.testing.assert_allclose(photons(simulation, 1, 0), expected, rtol=2e-5)
        brighter = Simulation(vary(settings, beam={"flux": 1e12}))
        np.testing.assert_array_equal(
            photons(brighter, 1, 0), photons(simulation, 1, 0)
        )
    nothing = Simulation(vary(TINY, background={"air": 0.0}))
    np.testing.assert_array_equal(photons(nothing, 1, 0), 0.0)


def test_photons_are_proportional_to_time_and_flux():
    common = {"scale": {"variation": 0.0}, "background": {"air": 0.0}}
    one = photons(Simulation(vary(TINY, **common)), 0, 0)
    longer = Simulation(vary(TINY, scan={"exposure": 0.6}, **common))
    np.testing.assert_allclose(photons(longer, 0, 0), 3 * one, rtol=1e-12)
    brighter = Simulation(vary(TINY, beam={"flux": 5e11}, **common))
    np.testing.assert_allclose(photons(brighter, 0, 0), 5 * one, rtol=1e-12)
    no_peaks = photons(Simulation(vary(TINY, bragg={"on": False}, **common)), 0, 0)
    assert np.all(no_peaks <= one) and no_peaks.sum() < 0.95 * one.sum()


def test_wide_image_is_the_mean_of_narrow_ones():
    """Halos and peaks sharper than the rotation: 1 degree, and 50 of 0.02 degrees."""
    settings = vary(
        TINY,
        n_images=1,
        crystal={"unit_cell": uctbx.unit_cell((36, 40, 44, 90, 90, 90))},
        bragg={"sigma": 0.0012},
        diffuse={"length": 8.0, "halo_length": 40.0},
        scale={"variation": 0.0},
        background={"air": 0.0},
        detector={"size": (80, 60), "pixel": 0.5},
    )
    wide = photons(Simulation(settings), 0, 0)
    fine = Simulation(vary(settings, n_images=50, scan={"width": 0.02}))
    narrow = np.array([photons(fine, 0, i) for i in range(50)])
    mean = narrow.mean(axis=0)
    assert wide.sum() == pytest.approx(mean.sum(), rel=1e-3)
    lit = mean > 0
    deviation = np.sqrt(np.mean((wide[lit] / mean[lit] - 1) ** 2))
    assert deviation < 0.005
    # a single narrow image is something else
    assert np.sqrt(np.mean((narrow[25][lit] / mean[lit] - 1) ** 2)) > 0.02


# Bragg peaks, summed over pixels and images

PEAKS = vary(
    TINY,
    n_images=40,
    crystal={"b_iso": 0.0, "unit_cell": uctbx.unit_cell((20, 20, 20, 90, 90, 90))},
    bragg={"sigma": 0.003, "mosaicity": 0.05},
    diffuse={"halo_displacement": 0.0},  # with b_iso = 0 there is no cloud either
    background={"solvent": 0.0, "compton": False, "air": 0.0, "n_images": 0},
    detector={
        "size": (180, 180),
        "pixel": 0.25,
        "distance": 70.0,
        "beamstop": 0.0,
        "beamstop_arm": 0.0,
    },
    scale={"variation": 0.0, "absorption": 0.0},
)


def summed_reflections(simulation: Simulation) -> dict[tuple[int, ...], float]:
    """Photons of all pixels and images, each given to the nearest lattice point."""
    e = simulation.series[0].experiments[0]
    ray, _ = rays(e.detector[0])
    q = (ray - [0, 0, -1]) / WAVELENGTH
    a = np.array(e.crystal.get_A()).reshape(3, 3)
    sums: dict[tuple[int, ...], float] = {}
    for i in range(PEAKS.n_images):
        turn = Rotation.from_euler("x", i + 0.5, degrees=True).as_matrix()
        nearest = np.rint(np.linalg.solve(turn @ a, q.T)).astype(int)
        index, place = np.unique(nearest.T, axis=0, return_inverse=True)
        total = np.bincount(place.ravel(), photons(simulation, 0, i))
        for h, counts in zip(map(tuple, index.tolist()), total):
            sums[h] = sums.get(h, 0.0) + counts
    return sums


def whole_reflections(e: Experiment) -> flex.reflection_table:
    """Predictions of peaks that are recorded whole, and their index only once."""
    table = flex.reflection_table.from_predictions(e, dmin=3.3)
    x, y, z = (np.array(v) for v in table["xyzcal.px"].parts())
    s1 = np.array(table["s1"])
    # six standard deviations in images of 1 degree, from the speed through the sphere
    speed = np.abs(np.cross(s1, [0, 0, -1])[:, 0])  # |m·(s1 x e0)|
    reach = np.degrees(6 * 0.003 / speed)
    inside = (x > 12) & (x < 168) & (y > 12) & (y < 168)
    inside &= (z - reach > 0) & (z + reach < PEAKS.n_images)
    index = [tuple(h) for h in table["miller_index"]]
    once = np.array([index.count(h) == 1 for h in index])
    return table.select(flex.bool((inside & once).tolist()))


@pytest.mark.parametrize("thickness, tolerance", [(0.01, 1e-3), (0.45, 0.01)])
@pytest.mark.slow
def test_summed_peaks_are_f_squared(thickness, tolerance):
    """|F|² = C · (lp/qe) · Δφ · V / (K · A_air · λ³), C per second and per image.

    DIALS' own Lorentz, polarization and efficiency corrections of each reflection. In a
    thick sensor the directions of neighbouring pixels are closer than the pixels are,
    since photons are counted behind the surface, and the sum is that much larger.
    """
    simulation = Simulation(vary(PEAKS, detector={"thickness": thickness}))
    # DIALS tells a sweep by its images
    (e,) = with_empty_images(simulation)
    table = whole_reflections(e)
    assert len(table) > 20
    corrections = Corrections(e.beam, e.goniometer, e.detector)
    sums = summed_reflections(simulation)
    mu = gas_attenuation("air", WAVELENGTH, 293.15, 101325.0)
    found, true = [], []
    for h, s1, position in zip(table["miller_index"], table["s1"], table["xyzcal.mm"]):
        distance = np.linalg.norm(e.detector[0].get_lab_coord(position[:2]))
        rate = sums[tuple(h)] / PEAKS.scan.exposure
        factor = corrections.lp(s1) / corrections.qe(s1, 0) * np.radians(1.0) * 20**3
        factor /= simulation.sample.power * np.exp(-mu * distance) * WAVELENGTH**3
        found.append(rate * factor)
        true.append(float(simulation.sample.bragg.at(*np.array(h)[:, None])[0]))
    found, true = np.array(found), np.array(true)
    strong = true > 0.1 * true.mean()
    assert strong.sum() > 15
    assert found.sum() / true.sum() == pytest.approx(1, abs=tolerance)
    np.testing.assert_allclose(found[strong] / true[strong], 1, atol=2 * tolerance)
