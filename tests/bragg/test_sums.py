"""Bragg intensities from the pixels that the diffuse map leaves out."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
)
from truth_ladder import (
    SMALL,
    extraction_settings,
    report,
    simulated_experiments,
    vary,
)

from cctbx import sgtbx, uctbx
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.bragg.points import PointGrid, is_absent
from dials_diffuse.bragg.sums import (
    PeakIntensities,
    add_surroundings,
    exclusion_regions,
    peak_intensities,
    surroundings,
    swept_volume,
)
from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.loop import SUMS
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import BraggSettings, ExtractionSettings
from dials_diffuse.geometry.directions import lab_coordinates
from dials_diffuse.geometry.orientation import rotation_axis
from dials_diffuse.grid import Grid
from dials_diffuse.simulation.simulate import Simulation

GRID = Grid((9.0, 11.0, 13.0, 90, 90, 90), (3, 2, 4), "C 2 2 (x,y,z)", d_min=2.0)


def test_points_follow_the_voxels():
    points = PointGrid(GRID)
    hkl = np.stack(np.indices(points.shape), axis=-1).reshape(-1, 3)
    hkl -= np.array(points.half_size)
    keys = points.key(hkl)
    assert keys[0] == np.prod(GRID.shape)
    np.testing.assert_array_equal(np.diff(keys), 1)
    np.testing.assert_array_equal(points.hkl(keys), hkl)
    corner = np.array([GRID.half_size])
    assert np.all(points.nearest(corner) <= points.half_size)


def test_absent_points_are_those_of_the_centring_and_of_screw_axes():
    points = PointGrid(GRID)
    hkl = points.hkl(points.n_voxels + np.arange(np.prod(points.shape)))
    np.testing.assert_array_equal(points.is_absent(), hkl[:, :2].sum(axis=1) % 2 == 1)
    screw = PointGrid(dataclasses.replace(GRID, space_group="P 2ac 2ab"))
    axis = hkl[screw.is_absent()]
    assert len(axis) > 0
    assert np.all(np.count_nonzero(axis, axis=1) == 1)
    assert np.all(axis.sum(axis=1) % 2 == 1)


@pytest.mark.parametrize(
    "symbol",
    ["P 1", "P 43 21 2", "C 1 2/c 1", "P 61 2 2", "R 3 c :H", "F d d 2", "I a -3 d"]
    + ["P 31 1 2", "I 41/a c d :2", "F d -3 c :2", "C m c a", "P 63/m c m"],
)
def test_absent_points_of_a_box_agree_with_cctbx(symbol):
    info = sgtbx.space_group_info(symbol)
    cell = info.any_compatible_unit_cell(1000.0).parameters()
    hall = info.type().hall_symbol()
    points = PointGrid(Grid(cell, (6, 6, 6), hall, 1.6))
    hkl = points.hkl(points.n_voxels + np.arange(np.prod(points.shape)))
    absent = is_absent(hkl, info.group())
    assert symbol == "P 1" or absent.any()
    np.testing.assert_array_equal(points.is_absent(), absent)


@pytest.mark.parametrize(
    "symbol, allowed",
    [
        ("P 2 2 2", lambda h, k, l: h == h),
        ("A 1 2 1", lambda h, k, l: (k + l) % 2 == 0),
        ("I 2 2 2", lambda h, k, l: (h + k + l) % 2 == 0),
        ("F 2 2 2", lambda h, k, l: ((h + k) % 2 == 0) & ((k + l) % 2 == 0)),
        ("R 3 :H", lambda h, k, l: (-h + k + l) % 3 == 0),
    ],
)
def test_reflection_conditions_of_international_tables(symbol, allowed):
    hkl = np.stack(np.indices((9, 9, 9)), axis=-1).reshape(-1, 3) - 4
    absent = is_absent(hkl, sgtbx.space_group_info(symbol).group())
    np.testing.assert_array_equal(absent, ~allowed(*hkl.T))


def row(key, counts, normalisation, background=0.0):
    result = np.zeros(1, dtype=SUMS)
    result["key"], result["n_pixels"] = key, 1
    result["counts"], result["normalisation"] = counts, normalisation
    result["background"] = background
    return result


def test_surroundings_are_those_of_the_same_cell():
    points = PointGrid(GRID)
    hkl = np.array([[1, 1, 1], [2, 0, 0], [3, 1, 0]])
    near, far = np.array([[4, 2, 4]]), np.array([[4, 2, 5]])  # of 1 1 1
    other = np.array([[6, 1, 0]])  # of 2 0 0 or 2 1 0
    rows = np.concatenate(
        [
            row(GRID.key(near), 50.0, 10.0, background=10.0),
            row(GRID.key(far), 900.0, 10.0),
            row(GRID.key(other), 20.0, 10.0),
            *(row(key, 100.0, 2.0, background=1.0) for key in points.key(hkl)),
        ]
    )
    found = rows.copy()
    metric = (30.0, 30.0, 30.0, 0.0, 0.0, 0.0)  # 1.8 and 2.3 radii away
    add_surroundings(found, points, metric)
    np.testing.assert_array_equal(found[:3], rows[:3])
    assert found["background"][3] == pytest.approx(1.0 + 2.0 * (50.0 - 10.0) / 10.0)
    assert found["background_variance"][3] == pytest.approx(50.0 / 10.0**2 * 2.0**2)
    assert np.isnan(found["background"][5])  # nothing around 3 1 0
    found = rows.copy()
    add_surroundings(found, points)
    assert found["background"][3] == pytest.approx(1.0 + 2.0 * 940.0 / 20.0)


def test_voxels_half_way_are_around_both_points():
    points = PointGrid(GRID)  # ndiv 3, 2, 4
    index = np.array([[3, 1, 0], [3, 1, 2], [4, 2, 3]])
    voxel, hkl = points.around(index)
    found = [hkl[voxel == i].tolist() for i in range(3)]
    assert sorted(found[0]) == [[1, 0, 0], [1, 1, 0]]
    assert sorted(found[1]) == [[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert found[2] == [[1, 1, 1]]


def test_every_voxel_is_around_the_nearest_points():
    points = PointGrid(GRID)
    index = GRID.index(np.arange(np.prod(GRID.shape)))
    voxel, hkl = points.around(index)
    assert len(np.unique(np.column_stack([voxel, hkl]), axis=0)) == len(voxel)
    assert np.all(np.abs(hkl) <= points.half_size)
    offset = index[voxel] / np.array(GRID.ndiv) - hkl
    assert np.abs(offset).max() == 0.5
    np.testing.assert_array_equal(np.unique(voxel), np.arange(len(index)))


@pytest.mark.parametrize("gain", [1.0, 3.0])
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_variance_is_that_of_one_more_voxel(tau, gain):
    """Intensities that vary by tau, counts of some gain: pulls of what is below peaks.

    The last of the voxels is the peak, without any Bragg intensity.
    """
    rng = np.random.default_rng(11)
    n_cells, n_around = 4000, 8
    m = rng.uniform(20, 40, (n_cells, n_around + 1))
    level = rng.uniform(0.5, 5.0, (n_cells, 1))
    intensity = level * (1 + tau * rng.uniform(-(3**0.5), 3**0.5, m.shape))
    counts = gain * rng.poisson(intensity * m / gain)
    cell = np.repeat(np.arange(n_cells), n_around)
    voxels = np.zeros(len(cell), dtype=SUMS)
    voxels["counts"], voxels["normalisation"] = (
        counts[:, :-1].ravel(),
        m[:, :-1].ravel(),
    )
    mean, noise, spread = surroundings(voxels, cell, n_cells)
    m_peak, n_peak = m[:, -1], counts[:, -1]

    def pulls(variance):
        return (n_peak - mean * m_peak) / np.sqrt(n_peak + 1 + variance * m_peak**2)

    found, counting = np.std(pulls(noise + spread)), np.std(pulls(noise))
    report(f"surroundings, tau {tau}, gain {gain}", rms=found, counting=counting)
    assert 0.85 < found < 1.15
    assert np.mean(pulls(noise + spread) < -3) < 0.01
    if tau or gain > 1:
        assert counting > 1.3


def test_one_voxel_alone_takes_the_spread_of_the_others():
    rows = np.concatenate([row(0, n, 1.0) for n in (90.0, 110.0, 80.0, 120.0, 400.0)])
    mean, noise, spread = surroundings(rows, np.array([0, 0, 1, 1, 2]), 4)
    np.testing.assert_allclose(mean[:3], [100, 100, 400])
    np.testing.assert_allclose(noise[:3], [50, 50, 400])
    # Q - Q0 = 200 - 100 and 800 - 100; the largest is left out of the pool; D = 1
    assert spread[2] == pytest.approx(100 / 100**2 * 400**2 * 2)
    assert spread[0] == pytest.approx(100 * 1.5)
    assert np.isnan(mean[3])


def test_parts_of_whole_points_give_what_all_rows_give():
    """So that the rows can be summed slab by slab."""
    models = {"beam": make_beam(), "detector": make_detector(2)}
    sweep = Experiment(
        **models,
        crystal=make_crystal(),
        goniometer=make_goniometer(),
        scan=make_scan(20),
        identifier="sweep",
    )
    still = Experiment(**models, crystal=make_crystal(seed=8), identifier="still")
    experiments = ExperimentList([still, sweep])
    grid = Grid(sweep.crystal.get_unit_cell().parameters(), (2, 2, 2), "P 1", d_min=5.0)
    settings = ExtractionSettings(d_min=5.0)
    points = PointGrid(grid)
    rng = np.random.default_rng(7)
    n = 600
    rows = np.zeros(n, dtype=SUMS)
    rows["key"] = np.sort(points.n_voxels + rng.integers(0, 60, n))
    rows["id"], rows["panel"] = rng.integers(0, 2, (2, n))
    rows["n_pixels"] = rng.integers(1, 9, n)
    rows["counts"] = rng.poisson(50, n)
    rows["normalisation"] = rng.uniform(1, 2, n)
    for axis in "xyz":
        rows[axis] = rng.uniform(0, 20, n) * rows["n_pixels"]
    regions = exclusion_regions(experiments, grid, settings)
    whole = peak_intensities(rows, experiments, grid, settings, regions)
    cuts = np.searchsorted(rows["key"], points.n_voxels + np.array([0, 11, 12, 40]))
    parts = [
        peak_intensities(part, experiments, grid, settings, regions)
        for part in np.split(rows, cuts)
    ]
    assert 100 < len(whole.id) < n
    assert np.all(np.diff(points.key(whole.hkl)) >= 0)
    for field in dataclasses.fields(PeakIntensities):
        together = np.concatenate([getattr(part, field.name) for part in parts])
        np.testing.assert_array_equal(together, getattr(whole, field.name))


def seen_volume(s: tuple[float, float], axis_to_beam: float, wavelength: float):
    """Volume of a shell of reciprocal space that meets the Ewald sphere in a rotation.

    Of the points at s = 2 sin(theta)/wavelength, those with a fraction cos(theta)
    |m2 x e0| of all directions, whatever the angle between axis and beam: the rest is
    in the blind region.

        V = 4 pi |m2 x e0| int s^2 sqrt(1 - (a s)^2) ds,    a = wavelength/2

    Args:
        s: Limits of the shell, 1/Å.
        axis_to_beam: |m2 x e0|.
        wavelength: Å.
    """
    x = np.array(s) * wavelength / 2
    integral = (x * np.sqrt(1 - x**2) * (2 * x**2 - 1) + np.arcsin(x)) / 8
    return 4 * np.pi * axis_to_beam * np.diff(integral)[0] * (2 / wavelength) ** 3


@pytest.mark.parametrize("kind", ["single", "general", "kappa"])
@pytest.mark.parametrize("turn", [(0, 0, 0), (12, -9, 30)], ids=["flat", "tilted"])
def test_a_whole_rotation_sweeps_the_seen_volume_twice(kind, turn):
    """The Lorentz factor of volumes: every point meets the Ewald sphere twice."""
    n_images, n, pixel, distance = 3, 720, 0.1, 20.0
    detector = make_detector(1, (n, n), distance, pixel=(pixel, pixel))
    rotation = Rotation.from_euler("xyz", turn, True)
    corner = (-n * pixel / 2, n * pixel / 2, -distance)
    detector[0].set_frame(*(rotation.apply(v) for v in ((1, 0, 0), (0, -1, 0), corner)))
    experiment = Experiment(
        beam=make_beam(),
        detector=detector,
        goniometer=make_goniometer(kind),
        scan=make_scan(n_images, 360 / n_images),
        crystal=make_crystal(),
    )
    centre = np.arange(n) + 0.5
    x, y, z = np.meshgrid(centre, centre, np.arange(n_images) + 0.5, indexing="ij")
    xyz = np.stack([x.ravel(), y.ravel(), z.ravel()], axis=-1)
    volume, zeta = swept_volume(detector[0], experiment, xyz)
    r = lab_coordinates(detector[0], centre - 0.5, centre - 0.5, parallax=False)
    e0 = np.array(experiment.beam.get_unit_s0())
    e = (r / np.linalg.norm(r, axis=0)).reshape(3, -1)
    wavelength = experiment.beam.get_wavelength()
    s = np.linalg.norm(e - e0[:, None], axis=0) / wavelength
    per_pixel = volume.reshape(n, n, n_images).sum(axis=2).T.ravel()  # slow, fast
    axis = rotation_axis(experiment, 0)
    for shell in ((0.2, 0.45), (0.45, 0.7)):
        inside = (s >= shell[0]) & (s < shell[1])
        found = per_pixel[inside].sum()
        across = np.linalg.norm(np.cross(axis, e0))
        expected = 2 * seen_volume(shell, across, wavelength)
        assert found == pytest.approx(expected, rel=1e-3)
        print(f"swept volume over that of the shell: {found / expected - 1:+.5f}")
    assert np.all((zeta >= 0) & (zeta < 1 + 1e-12))


def merged_intensities(
    peaks: PeakIntensities, experiments: ExperimentList
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean |F|² of each reflection, without regard to symmetry.

    Rotation peaks that are complete count alike; the sums of stills are added up.

    Returns:
        Miller indices, |F|² and variances.
    """
    is_still = np.array([e.is_still() for e in experiments], dtype=bool)[peaks.id]
    use = peaks.complete | is_still
    hkl, group = np.unique(peaks.hkl[use], axis=0, return_inverse=True)
    group = group.ravel()
    weight = peaks.weight[use]
    total = np.bincount(group, weight)
    mean = np.bincount(group, peaks.intensity[use] * weight) / total
    variance = np.bincount(group, peaks.variance[use] * weight**2) / total**2
    return hkl, mean, variance


PEAKS = vary(
    SMALL,
    n_images=120,
    crystal={"unit_cell": uctbx.unit_cell((20, 21, 22, 90, 90, 90))},
    bragg={"on": True, "sigma": 0.0018, "mosaicity": 0.02},
    # no pixel is overloaded: it would be missing in the sum of its peak
    detector={"size": (360, 360), "pixel": 0.2, "count_cutoff": 2_000_000_000},
    scan={"width": 0.5, "exposure": 1.0},
    grid={"ndiv": (4, 4, 4), "d_min": 2.3},
)
# All the way round: a point that the stills leave before they have seen all of it has
# too low an intensity, by 5 % in the mean over those within 60 degrees.
STILLS = vary(PEAKS, mode="stills", n_images=360, scan={"width": 1.0})
WHOLE = 0.42  # 1/Å: peaks farther out are cut by the limit of the grid


class Images:
    """The expected photons of a simulation, extracted as they are or as counts."""

    def __init__(self, settings) -> None:
        self.simulation = Simulation(settings)
        self.series = self.simulation.series[0]
        self.photons = [
            self.simulation.photons(self.series, i) for i in range(self.series.n_images)
        ]

    def peaks(self, folder, radius=0.0105, flux=None):
        """Bragg intensities, per unit of the flux of the simulation.

        Args:
            folder: For files.
            radius: Of the exclusion, 1/Å.
            flux: Of Poisson counts, as a fraction of that of the simulation; None for
                expected photons.
        """
        rng = np.random.default_rng(7)

        def image(series, i):
            if flux is None:
                return self.photons[i]
            return [rng.poisson(p * flux).astype(np.int32) for p in self.photons[i]]

        experiments = simulated_experiments(self.simulation, image=image)
        bragg = BraggSettings(semi_axes=(radius,) * 3, unit="inverse_angstrom")
        settings = extraction_settings(self.simulation, bragg)
        grid = make_grid(experiments, settings)
        parts = []
        path = folder / "extracted.refl"
        extract(experiments, grid, settings, path, take_peaks=parts.append)
        (peaks,) = parts
        k = flux or 1.0
        scaled = {
            name: getattr(peaks, name) / k**power
            for name, power in (("intensity", 1), ("background", 1), ("variance", 2))
        }
        return dataclasses.replace(peaks, **scaled), experiments, grid


def true_intensities(simulation: Simulation, grid: Grid, hkl: np.ndarray):
    """K |F|² of the simulation."""
    values = simulation.sample.bragg.at(*hkl.T)
    return simulation.sample.power * values.astype(float)


class Merged(NamedTuple):
    """Merged |F|², variances, and true values, of reflections inside ``WHOLE``."""

    found: np.ndarray
    variance: np.ndarray
    true: np.ndarray

    def ratio(self, weak: bool = False) -> float:
        """Ratio of the sums; of the weaker half of the reflections alone, or all."""
        use = self.true <= np.median(self.true) if weak else slice(None)
        return float(np.sum(self.found[use]) / np.sum(self.true[use]))


def merged(images: Images, peaks, experiments, grid) -> Merged:
    hkl, found, variance = merged_intensities(peaks, experiments)
    true = true_intensities(images.simulation, grid, hkl)
    whole = Grid(grid.unit_cell, (1, 1, 1), grid.space_group, grid.d_min)
    use = (whole.s(hkl) < WHOLE) & (true > 0)
    assert np.count_nonzero(use) > 500
    return Merged(found[use], variance[use], true[use])


def without_subtraction(peaks):
    """What is found if nothing is taken off for the scattering under the peaks."""
    return dataclasses.replace(peaks, intensity=peaks.intensity + peaks.background)


@pytest.fixture(scope="module", params=["rotation", "stills"])
def images(request):
    return Images(PEAKS if request.param == "rotation" else STILLS)


@pytest.mark.slow
def test_intensities_are_the_true_ones(images, tmp_path):
    """Weighted mean within 2 %; controls: surroundings, radius, exposure of stills."""
    mode = images.simulation.settings.mode
    right = images.peaks(tmp_path)
    found = merged(images, *right)
    report(f"Bragg, {mode}", ratio=found.ratio(), weak=found.ratio(weak=True))
    assert found.ratio() == pytest.approx(1.0, abs=0.02)
    assert found.ratio(weak=True) == pytest.approx(1.0, abs=0.05)

    peaks, experiments, grid = right
    control = merged(images, without_subtraction(peaks), experiments, grid)
    report(
        f"control, Bragg without subtraction, {mode}",
        ratio=control.ratio(),
        weak=control.ratio(weak=True),
    )
    assert control.ratio(weak=True) > 1.2
    narrow = merged(images, *images.peaks(tmp_path, radius=0.0035))
    report(f"control, Bragg with a narrow exclusion, {mode}", ratio=narrow.ratio())
    assert narrow.ratio() < 0.9


@pytest.mark.slow
def test_errors_of_intensities_are_those_of_counting(images, tmp_path):
    """Counts against expected photons of the same images: pulls of unit variance."""
    expected = merged(images, *images.peaks(tmp_path))
    noisy = merged(images, *images.peaks(tmp_path, flux=1e-4))
    np.testing.assert_array_equal(noisy.true, expected.true)
    pulls = (noisy.found - expected.found) / np.sqrt(noisy.variance)
    mode = images.simulation.settings.mode
    report(
        f"Bragg with noise, {mode}",
        ratio=noisy.ratio(),
        mean_pull=np.mean(pulls),
        rms_pull=np.std(pulls),
        counts=np.median(expected.found / np.sqrt(noisy.variance)),
    )
    assert noisy.ratio() == pytest.approx(1.0, abs=0.02)
    assert abs(np.mean(pulls)) < 0.2
    assert 0.85 < np.std(pulls) < 1.15


@pytest.mark.slow
def test_halos_are_in_the_errors(tmp_path):
    """Halos without peaks: what they pretend to be peaks is less sure than counting says.

    The halo under a peak is higher than around it, which biases |F|² and is beyond any
    variance; but its slope around the peak shows how far the background may be off.
    """
    settings = vary(
        STILLS,
        n_images=30,
        scan={"width": 7.0},
        bragg={"on": False},
        diffuse={"halo_displacement": 0.8, "halo_length": 20.0},
    )
    halos = Images(settings)
    peaks, _, _ = halos.peaks(tmp_path, flux=0.3)
    pulls = peaks.intensity / np.sqrt(peaks.variance)
    low = np.mean(pulls < -3)
    report(
        "Bragg of halos alone", below_3_sigma=low, rms_pull=np.sqrt(np.mean(pulls**2))
    )
    assert low < 0.005
    assert np.sqrt(np.mean(pulls**2)) < 20  # 107 by counting alone
