"""The ellipsoid fitted to simulated images, against the peaks that are in them.

Outside is the integral of the true peak, a Gaussian of σ along the scattering vector and
√(σ² + s²η²) across it, over all the excluded region does not hold. Lost are voxels that
the region holds wholly and the true region of 99.9 % does not.
"""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
from scipy.stats import chi2
from simulate_images import make_crystal, make_detector, memory_experiment
from truth_ladder import simulated_experiments, vary

from cctbx import sgtbx, uctbx
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse import symmetry
from dials_diffuse.bragg.ellipsoid import (
    Ellipsoid,
    FitSettings,
    b_matrix,
    data_sets,
    ellipsoid_of_spots,
    find_spots,
    fit_data_sets,
    fit_ellipsoid,
    peak_shape,
    symmetrized,
    unequal_semi_axes,
    warn_of_unequal_axes,
)
from dials_diffuse.bragg.spots import Spots
from dials_diffuse.bragg.widths import SpotMoments
from dials_diffuse.extraction.settings import (
    BraggSettings,
    covered_fraction,
    symmetric,
)
from dials_diffuse.simulation.bragg import PeakShape
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.simulate import Simulation

CELLS = {
    "P 2 3": (38, 38, 38, 90, 90, 90),
    "P 1 2 1": (34, 42, 38, 90, 105, 90),
    "P 1": (33, 37, 41, 82, 97, 104),
}
NDIV = 6  # voxels of a reciprocal cell, each way

SMALL = vary(
    SimulationSettings(),
    n_images=8,
    detector={"preset": "given", "size": (256, 256), "pixel": 0.172, "distance": 70.0},
)


def simulated(
    space_group: str,
    mode: str,
    mosaicity: float,
    halos: dict[str, float] | None = None,
    **detector: float,
) -> tuple[ExperimentList, PeakShape, FitSettings]:
    settings = vary(
        SMALL,
        mode=mode,
        crystal={
            "space_group": space_group,
            "unit_cell": uctbx.unit_cell(CELLS[space_group]),
        },
        bragg={"mosaicity": mosaicity, "sigma": 0.0015},
        diffuse=halos or {},
        scan={"orientations": "random" if mode == "stills" else "stepped"},
        detector=detector,
    )
    simulation = Simulation(settings)
    experiments = simulated_experiments(simulation, noise=True)
    mask = tuple(simulation.good_pixels())
    return experiments, simulation.sample.peak_shape, FitSettings(mask=mask)


def rotations(space_group: str) -> np.ndarray:
    group = sgtbx.space_group_info(space_group).group()
    return symmetry.rotation_matrices(symmetry.laue_group(group))


def lattice_points(b: np.ndarray, s_max: float, n: int, seed: int) -> np.ndarray:
    """Lattice points drawn evenly from the sphere."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(n, 3))
    direction /= np.linalg.norm(direction, axis=1)[:, None]
    s = s_max * np.cbrt(rng.random((n, 1)))
    hkl = np.rint(s * direction @ np.linalg.inv(b).T)
    return hkl[np.any(hkl != 0, axis=1)]


def outside(fit: Ellipsoid, true: PeakShape, b: np.ndarray, radial: bool) -> float:
    """Fraction of the intensity of peaks at all s that the region does not hold."""
    rng = np.random.default_rng(5)
    hkl = np.repeat(lattice_points(b, 1 / fit.d_min, 400, 3), 1000, axis=0)
    rlp = hkl @ b.T
    s = np.linalg.norm(rlp, axis=1)
    e = rlp / s[:, None]
    z = rng.normal(size=rlp.shape)
    along = np.sum(z * e, axis=1)[:, None] * e
    dq = true.across(s)[:, None] * (z - along) + true.sigma * along
    dh = dq @ np.linalg.inv(b).T
    return float(np.mean(~fit.is_inside(dh, hkl, s, radial)))


def lost(fit: Ellipsoid, true: PeakShape, b: np.ndarray, radial: bool) -> float:
    """Fraction of all voxels that the region holds and the true one does not."""
    axis = (np.arange(NDIV) - NDIV // 2) / NDIV
    centre = np.stack(np.meshgrid(axis, axis, axis), -1).reshape(-1, 1, 3)
    corner = np.stack(np.meshgrid(*[[-0.5, 0, 0.5]] * 3), -1).reshape(-1, 3) / NDIV
    dh = (centre + corner).reshape(-1, 3)
    dq = dh @ b.T
    c2 = chi2.ppf(0.999, 3)
    total = []
    for hkl in lattice_points(b, 1 / fit.d_min, 100, 4):
        s = np.linalg.norm(b @ hkl)
        along = dq @ (b @ hkl / s)
        across2 = np.sum(dq**2, axis=1) - along**2
        truly = along**2 / true.sigma**2 + across2 / true.across(s) ** 2 < c2
        found = fit.is_inside(
            dh, np.tile(hkl, (len(dh), 1)), np.full(len(dh), s), radial
        )
        whole = [a.reshape(len(centre), -1).all(axis=1) for a in (found, truly)]
        total.append(np.mean(whole[0] & ~whole[1]))
    return float(np.mean(total))


FAST = [("P 1", "stills", 0.02), ("P 1 2 1", "rotation", 0.3)]
ALL = [(c, m, s) for c in CELLS for m in ("stills", "rotation") for s in (0.02, 0.3)]


@pytest.mark.parametrize(
    "space_group, mode, mosaicity",
    [pytest.param(*p, marks=() if p in FAST else pytest.mark.slow) for p in ALL],
)
def test_holds_the_peaks_and_not_much_else(space_group, mode, mosaicity):
    experiments, true, settings = simulated(space_group, mode, mosaicity)
    group = rotations(space_group)
    numbers = range(len(experiments))
    fit = fit_ellipsoid(experiments, numbers, group, settings)
    b = b_matrix(experiments[0].crystal.get_unit_cell())
    figures = {
        r: (outside(fit, true, b, r), lost(fit, true, b, r)) for r in (False, True)
    }
    print(
        f"ellipsoid {space_group} {mode} {mosaicity}: sigma {fit.sigma:.5f}, spread "
        f"{fit.mosaic_spread:.3f}, growth {fit.growth:.1f}, tail {fit.tail:.2f}, "
        + ", ".join(f"outside {a:.3%} lost {x:.3%}" for a, x in figures.values())
    )
    assert fit.sigma == pytest.approx(true.sigma, rel=0.06)
    assert fit.mosaic_spread == pytest.approx(mosaicity, rel=0.15, abs=0.1)
    assert figures[False][0] < 0.001
    assert figures[True][0] < 0.0012
    assert figures[True][1] < 0.01
    if mosaicity < 0.1:  # else the region grows along s, where the peaks do not
        assert figures[False][1] < 0.01
    g = symmetric(fit.metric)
    np.testing.assert_allclose(symmetrized(g, group), fit.metric, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        group @ g @ np.swapaxes(group, 1, 2), np.broadcast_to(g, group.shape), atol=1e-6
    )
    assert np.linalg.eigvalsh(g).min() > 0 and fit.growth >= 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stills", "rotation"])
def test_hot_pixels_change_nothing(mode):
    fits = []
    for hot in (0.0, 0.01):
        experiments, true, settings = simulated("P 1 2 1", mode, 0.1, hot_fraction=hot)
        group = rotations("P 1 2 1")
        fits.append(
            fit_ellipsoid(experiments, range(len(experiments)), group, settings)
        )
    b = b_matrix(experiments[0].crystal.get_unit_cell())
    assert fits[1].sigma == pytest.approx(fits[0].sigma, rel=0.05)
    assert fits[1].mosaic_spread == pytest.approx(fits[0].mosaic_spread, abs=0.05)
    assert outside(fits[1], true, b, False) < 0.001
    assert lost(fits[1], true, b, True) < 0.01


def test_true_region_is_exact():
    """The region of the true widths holds 99.9 % in closed form, and loses nothing."""
    true = PeakShape(0.0013, math.radians(0.3))
    b = b_matrix(uctbx.unit_cell(CELLS["P 1"]))
    radius = true.sigma * math.sqrt(chi2.ppf(0.999, 3))
    g = b.T @ b / radius**2
    fit = Ellipsoid(
        metric=symmetrized(g, np.eye(3)[None]),
        growth=(true.mosaicity / true.sigma) ** 2,
        growth_radial=0.0,
        radius=radius,
        semi_axes=(0, 0, 0),
        semi_axes_per_angstrom=(0, 0, 0),
        mosaic_spread=0.3,
        sigma=true.sigma,
        tail=1.0,
        n_peaks=0,
        n_pixels=0,
        n_images=0,
        excluded_low=0,
        excluded_high=0,
        d_min=2.0,
    )
    assert outside(fit, true, b, True) == pytest.approx(0.001, rel=0.2)
    assert outside(fit, true, b, False) < 0.001
    assert lost(fit, true, b, True) == 0
    small = dataclasses.replace(
        fit, metric=tuple(1.5 * x for x in fit.metric), radius=radius / math.sqrt(1.5)
    )
    assert outside(small, true, b, True) > 0.005


@pytest.mark.parametrize("length", [1.0, 1.3, 3.0])
def test_elongated_peaks(length):
    """Widths of slices b·M b: a shape that is long along one direction, or nearly round."""
    rng = np.random.default_rng(7)
    n = 500
    long = np.array([0.6, 0.0, 0.8])
    true = np.eye(3) + (length**2 - 1) * np.outer(long, long)
    axes = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0][:, :2]
    moment = np.einsum("nki,ij,nkj->nk", axes, true, axes)
    moment *= rng.uniform(0.7, 1.3, (n, 2))
    ones, pixels = np.ones(n), np.zeros((n, 2, 4))
    spots = Spots(axes, ones, ones, ones, ones, axes, pixels, pixels[:, 0], ones)
    moments = SpotMoments(ones, axes[:, 0, :2], moment, ones, ones, ones, ones)
    found = peak_shape(spots, moments)
    if length < 2:
        np.testing.assert_array_equal(found, np.eye(3))
        return
    values, vectors = np.linalg.eigh(found)
    assert values[0] == pytest.approx(1)
    assert abs(vectors[:, 2] @ long) > 0.98
    assert np.sqrt(values[2]) > 2


def test_wrong_orientation_is_told():
    experiments, _, settings = simulated("P 1", "stills", 0.02)
    for i, e in enumerate(experiments):
        e.crystal = make_crystal("P 1", seed=50 + i, cell=CELLS["P 1"])
    with pytest.raises(ValueError, match="spots are near a reciprocal lattice point"):
        fit_ellipsoid(experiments, range(len(experiments)), np.eye(3)[None], settings)


def test_images_without_spots_get_the_default(caplog):
    detector = make_detector(size=(60, 50))
    rng = np.random.default_rng(7)
    experiments = ExperimentList(
        [
            memory_experiment(
                [[rng.poisson(3.0, (50, 60)).astype(np.int32)]],
                detector,
                make_crystal("P 41 21 2"),
                identifier=str(i),
            )
            for i in range(2)
        ]
    )
    group = rotations("P 41 21 2")
    with caplog.at_level(logging.INFO, "dials.diffuse.extract"):
        found = fit_data_sets(experiments, group)
    assert "reflections have strong spots in 2 image(s)" in caplog.text
    assert "its semi-axes are 0.25 of the reciprocal axes" in caplog.text
    assert [e.fitted for e in found] == [False, False]
    np.testing.assert_allclose(found[0].metric, (16, 16, 16, 0, 0, 0), atol=1e-9)
    assert found[0].excluded_low == pytest.approx(4 / 3 * math.pi / 64, abs=0.003)


def test_stills_make_one_data_set():
    detector = make_detector(size=(60, 50))
    image = [np.zeros((50, 60), np.int32)]
    experiments = ExperimentList(
        [
            memory_experiment([image], detector, make_crystal(), identifier=str(i))
            for i in range(3)
        ]
    )
    assert data_sets(experiments) == [[0, 1, 2]]


@pytest.mark.parametrize("symbol", ["P 4", "P 3", "P 2 3", "P 1"])
def test_symmetric_region_holds_all_equivalents(symbol):
    """Points on the surface of an elongated region and of its equivalents are inside."""
    group = symmetry.laue_group(sgtbx.space_group_info(symbol).group())
    rotations = symmetry.rotation_matrices(group)
    rng = np.random.default_rng(6)
    a = rng.normal(size=(3, 3))
    g = a.T @ a + 0.05 * np.eye(3)
    metric = symmetric(symmetrized(g, rotations))
    np.testing.assert_allclose(metric, rotations[-1] @ metric @ rotations[-1].T)
    x = rng.normal(size=(2000, 3))
    farthest = 0.0
    for r in rotations:
        own = np.einsum("ni,ij,nj->n", x, r @ g @ r.T, x)
        inside = np.einsum("ni,ij,nj->n", x, metric, x) / own
        farthest = max(farthest, inside.max())
    assert 0.9 < farthest <= 1 + 1e-9  # and no wider than it must be


def test_excluded_fraction_grows_with_s():
    metric = (1 / 0.2**2,) * 3 + (0.0, 0.0, 0.0)
    volume = 4 / 3 * math.pi * 0.2**3
    assert covered_fraction(metric) == pytest.approx(volume, abs=0.001)
    grown = volume * (1 + 5.0 * 0.3**2) ** 1.5
    assert covered_fraction(metric, 1 + 5.0 * 0.3**2) == pytest.approx(grown, abs=0.002)


def test_impossible_settings():
    with pytest.raises(ValueError, match="less than 1"):
        FitSettings(fraction=1.0)
    with pytest.raises(ValueError, match="at least one image"):
        FitSettings(n_images=0)


@pytest.mark.parametrize(
    "symbol, semi_axes, expected",
    [
        ("P 4", (0.2, 0.3, 0.4), [(0, 1)]),
        ("P 4", (0.2, 0.2, 0.4), []),
        ("P 6", (0.2, 0.3, 0.3), [(0, 1)]),
        ("P 2 3", (0.2, 0.2, 0.3), [(0, 1, 2)]),
        ("P 2 2 2", (0.2, 0.3, 0.4), []),
        ("P 1", (0.2, 0.3, 0.4), []),
    ],
)
def test_unequal_semi_axes(symbol, semi_axes, expected, caplog):
    """Told where the metric that is used is not that of the semi-axes."""
    group = rotations(symbol)
    assert unequal_semi_axes(semi_axes, group) == expected
    with caplog.at_level(logging.WARNING, "dials.diffuse.extract"):
        warn_of_unequal_axes(BraggSettings(semi_axes=semi_axes), group)
        warn_of_unequal_axes(BraggSettings("auto", semi_axes=semi_axes), group)
    assert len(caplog.records) == len(expected)
    if symbol == "P 4" and expected:
        assert "semi_axes=0.2,0.3 along a* and b*, which" in caplog.text
    cell = uctbx.unit_cell((10, 10, 10, 90, 90, 90))
    if symbol != "P 6":
        metric = BraggSettings(semi_axes=semi_axes).metric(cell, group)
        changed = not np.allclose(metric[:3], 1 / np.square(semi_axes))
        assert changed == bool(expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stills", "rotation"])
def test_halos_are_no_peaks(mode):
    """Strong halos: fitted to spots with their halos, the region takes 1.8 % too much."""
    experiments, true, settings = simulated(
        "P 1 2 1", mode, 0.02, halos={"halo_displacement": 0.8}
    )
    group = rotations("P 1 2 1")
    numbers = range(len(experiments))
    fit = fit_ellipsoid(experiments, numbers, group, settings)
    b = b_matrix(experiments[0].crystal.get_unit_cell())
    spots, _, n = find_spots(experiments, numbers, settings)
    cell = experiments[0].crystal.get_unit_cell()
    with_halos = ellipsoid_of_spots(spots, cell, group, settings, n)
    figures = [
        (outside(x, true, b, True), lost(x, true, b, True)) for x in (fit, with_halos)
    ]
    print(
        f"ellipsoid, strong halos, {mode}: (outside, lost) {figures}, {fit.n_halos} halos"
    )
    assert fit.sigma == pytest.approx(true.sigma, rel=0.06)
    assert fit.n_halos > 0.2 * fit.n_peaks
    assert figures[0][0] < 0.001
    assert figures[0][1] < 0.01 < figures[1][1]  # negative control
