from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from truth_ladder import vary

from cctbx import uctbx

from dials_diffuse.simulation import simulate
from dials_diffuse.simulation.forecast import coverage
from dials_diffuse.simulation.scales import image_scales
from dials_diffuse.simulation.settings import (
    BackgroundSettings,
    BraggPeakSettings,
    CrystalSettings,
    DetectorSettings,
    ScaleSettings,
    ScanSettings,
    SimulationSettings,
)
from dials_diffuse.simulation.simulate import (
    Simulation,
    log_simulation,
    series_scales,
    write_images,
)
from dials_diffuse.simulation.truth import series_truth, true_map, truth_grid

CELL = uctbx.unit_cell((20, 21, 22, 90, 90, 90))
SETTINGS = SimulationSettings(
    n_images=6,
    crystal=CrystalSettings(unit_cell=CELL),
    bragg=BraggPeakSettings(sigma=0.004),
    background=BackgroundSettings(air=100.0, n_images=8),
    detector=DetectorSettings(preset="given", size=(60, 50), pixel=0.5, distance=30.0),
    scan=ScanSettings(exposure=0.02),
    scale=ScaleSettings(variation=0.2),
)


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return Simulation(SETTINGS)


def all_images(simulation: Simulation, kind: str) -> np.ndarray:
    """Images, or expected photons, of the first series, shape (n_images, n_pixels)."""
    (series, *_) = simulation.series
    function = getattr(simulation, kind)
    return np.array([function(series, i)[0].ravel() for i in range(series.n_images)])


def test_counts_are_poisson_deviates_of_the_expected_photons(simulation):
    counts = all_images(simulation, "image")
    photons = all_images(simulation, "photons")
    assert counts.dtype == np.int32
    dark = photons == 0
    assert dark.any() and not counts[dark].any()
    counts, photons = counts[~dark], photons[~dark]
    pull = (counts - photons) / np.sqrt(photons)
    n = len(pull)
    assert n > 17000
    assert pull.mean() == pytest.approx(0, abs=4 / np.sqrt(n))
    # the variance of the square of a Poisson pull is 2 + 1/mean
    tolerance = 4 * np.sqrt(np.mean(2 + 1 / photons) / n)
    assert np.mean(pull**2) == pytest.approx(1, abs=tolerance)
    # the whole distribution: a random part of the step at the count makes it uniform
    step = np.random.default_rng(5).random(n)
    below = scipy.stats.poisson.cdf(counts - 1, photons)
    place = below + step * scipy.stats.poisson.pmf(counts, photons)
    assert scipy.stats.kstest(place, "uniform").pvalue > 1e-3
    rounded = np.rint(photons)
    assert scipy.stats.kstest((rounded - photons), "norm").pvalue < 1e-6


def test_noise_of_images_is_independent(simulation):
    counts = all_images(simulation, "image").astype(float)
    photons = all_images(simulation, "photons")
    lit = photons[0] > 0
    pull = ((counts - photons) / np.sqrt(np.where(photons > 0, photons, 1)))[:, lit]
    correlation = np.corrcoef(pull)[np.triu_indices(len(pull), 1)]
    assert np.abs(correlation).max() < 4 / np.sqrt(lit.sum())
    np.testing.assert_array_equal(counts, all_images(simulation, "image"))


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_images_come_in_their_order(simulation, monkeypatch, nproc):
    """The later ones are made faster than the earlier ones."""
    settings = dataclasses.replace(SETTINGS, nproc=nproc)
    monkeypatch.setattr(simulation, "settings", settings)
    with simulate._images(simulation, 0) as images:
        found = list(images)
    expected = all_images(simulation, "image")
    assert len(found) == 6
    for (image,), counts in zip(found, expected):
        np.testing.assert_array_equal(image.ravel(), counts)
    assert simulate._simulation is None
    assert not np.array_equal(expected[0], expected[1])


def test_an_error_in_an_image_is_passed_on(simulation, monkeypatch):
    def fails(*_):
        raise ValueError("no image")

    for nproc in (1, 2):
        settings = dataclasses.replace(SETTINGS, nproc=nproc)
        monkeypatch.setattr(simulation, "settings", settings)
        monkeypatch.setattr(simulation, "image", fails)
        with pytest.raises(ValueError, match="no image"):
            with simulate._images(simulation, 0) as images:
                list(images)
        assert simulate._simulation is None


def test_good_pixels_and_gaps():
    """Two modules with a gap of 3 pixels; a disc of 2 mm about the beam, no arm."""
    detector = {
        "modules": (2, 1),
        "gap": (3, 0),
        "beamstop": 2.0,
        "beamstop_arm": 0.0,
        "thickness": 0.45,
    }
    simulation = Simulation(vary(SETTINGS, detector=detector))
    (good,) = simulation.good_pixels()
    assert good.shape == (50, 60) and good.dtype == bool
    (image,) = simulation.image(simulation.series[0], 0)
    gap = ~good[0]
    assert gap.sum() == 3 and not good[:, gap].any()
    assert (image[:, gap] == -1).all() and (image[:, ~gap] >= 0).all()
    y, x = (np.mgrid[:50, :60] + 0.5 - np.array([25, 30])[:, None, None]) * 0.5
    outside = (np.hypot(x, y) > 2.1) & ~gap
    inside = (np.hypot(x, y) < 1.9) & ~gap
    assert good[outside].all() and not good[inside].any()
    assert not image[inside].any() and image[outside].mean() > 1


def test_images_without_crystal_have_no_scales(simulation):
    """There may be more of them than of the others."""
    scale = series_scales(SETTINGS, 1)
    np.testing.assert_array_equal(scale, image_scales(SETTINGS, 1))
    assert np.ptp(scale) > 0.1
    np.testing.assert_array_equal(series_scales(SETTINGS, 2), np.ones(8))
    background = simulation.series[1]
    assert simulation.exposure(background, 7).scale == 1
    assert simulation.exposure(simulation.series[0], 3).scale == scale[3]
    assert len(series_truth(SETTINGS, 2, ["x"]).scale) == 8
    stills = Simulation(vary(SETTINGS, mode="stills"))
    assert len(stills.photons(stills.series[1], 7)) == 1


def test_any_flux_saturates_and_no_more():
    settings = vary(SETTINGS, beam={"flux": 1e35}, detector={"count_cutoff": 5000})
    simulation = Simulation(settings)
    (image,) = simulation.image(simulation.series[0], 0)
    assert set(np.unique(image)) == {0, 5001}


def test_written_images(simulation, tmp_path):
    """All series, each with its images, in the order of the crystals."""
    experiments = write_images(simulation, tmp_path, "x")
    names = {f"x_1_{i:05d}.cbf" for i in range(1, 7)}
    names |= {f"x_background_{i:05d}.cbf" for i in range(1, 9)}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert [e.crystal is None for e in experiments] == [False, True]
    for e, series in zip(experiments, simulation.series):
        assert len(e.imageset) == series.n_images
        for i in (0, series.n_images - 1):
            (data,) = e.imageset.get_raw_data(i)
            (expected,) = simulation.image(series, i)
            np.testing.assert_array_equal(data.as_numpy_array(), expected)


# What the log says


def test_log(simulation, caplog):
    caplog.set_level(logging.INFO, "dials.diffuse.simulate")
    log_simulation(simulation)
    first, second, third = caplog.messages
    power = 1e13 * 2.8179403e-12**2 * (1e-3 / (20 * 21 * 22 * 1e-21))
    assert first.startswith("1 series of 6 images of a sweep, 1e+11 photons/s")
    assert float(re.search(r"power (\S+)", first)[1]) == pytest.approx(power, rel=1e-3)
    assert "20.00 21.00 22.00 90.00 90.00 90.00, space group P 21 21 21" in second
    assert re.search(r"C\d+ H\d+ N\d+ O\d+ per cell", second)
    assert (
        third == "Bragg peaks: standard deviation 4.00e-03 1/Å, mosaicity 0.05 degrees"
    )


def test_log_of_stills_without_peaks(caplog):
    caplog.set_level(logging.INFO, "dials.diffuse.simulate")
    settings = vary(SETTINGS, mode="stills", n_crystals=2, bragg={"on": False})
    log_simulation(Simulation(settings))
    assert caplog.messages[0].startswith("2 series of 6 stills,")
    assert len(caplog.messages) == 2


def test_peaks_that_overlap_are_told(caplog):
    """Three standard deviations must not reach half-way, 1/44 Å⁻¹, to the next."""
    for sigma, n_warnings in ((0.0075, 0), (0.0077, 1)):
        caplog.clear()
        log_simulation(Simulation(vary(SETTINGS, bragg={"sigma": sigma})))
        warnings = [m for m in caplog.messages if "overlap" in m]
        assert len(warnings) == n_warnings
    assert "cut off at 2.27e-02 1/Å" in warnings[0]


def test_images_of_an_earlier_simulation_are_told(simulation, tmp_path, caplog):
    for name in ("x_1_00006.cbf", "x_1_00007.cbf", "x_1_2_00007.cbf", "x_10_00001.cbf"):
        (tmp_path / name).touch()
    write_images(simulation, tmp_path, "x")
    (warning,) = [m for m in caplog.messages if m.startswith("Warning")]
    assert warning.startswith("Warning: 1 images of another simulation")
    assert str(Path("x_1_00007.cbf")) in warning


# The grid of the true map


def test_grid_reaches_the_largest_circle_on_the_detector(simulation):
    experiments = simulation.series[0].experiments
    grid = truth_grid(SETTINGS, simulation.sample, experiments)
    two_theta = np.arctan(25 * 0.5 / 30)  # the beam is 25 pixels from the nearest edge
    assert grid.d_min == pytest.approx(0.9795 / 2 / np.sin(two_theta / 2), rel=0.01)
    assert grid.ndiv == (2, 2, 2)


@pytest.mark.parametrize(
    "d_min, ndiv, match",
    [
        (0.5, 100, "too large .* smaller ndiv or a larger d_min"),
        (1000.0, 2, "No voxel lies within grid.d_min=1000: use a smaller"),
    ],
)
def test_impossible_grids(simulation, d_min, ndiv, match):
    settings = vary(SETTINGS, grid={"d_min": d_min, "ndiv": (ndiv,) * 3})
    experiments = simulation.series[0].experiments
    with pytest.raises(ValueError, match=match):
        true_map(
            simulation.sample, truth_grid(settings, simulation.sample, experiments)
        )


def test_true_map_that_no_detector_sees():
    with pytest.raises(ValueError, match="d_min=0.48 is less than half .*, 0.48975 Å"):
        Simulation(vary(SETTINGS, grid={"d_min": 0.48}))


def test_true_map_does_not_depend_on_the_detector():
    """Nor does it stop where the detector ends."""
    maps = []
    for distance in (30.0, 300.0):
        settings = vary(SETTINGS, grid={"d_min": 2.0}, detector={"distance": distance})
        simulation = Simulation(settings)
        grid = truth_grid(settings, simulation.sample, simulation.series[0].experiments)
        maps.append(true_map(simulation.sample, grid))
    assert simulation.detector.s_max < 0.1
    (index, parts, _), (other_index, other_parts, _) = maps
    np.testing.assert_array_equal(index, other_index)
    inside = grid.in_resolution_range(grid.s(index))
    for name, values in parts.items():
        scale = np.abs(values[inside]).mean()
        np.testing.assert_allclose(
            other_parts[name][inside] / scale, values[inside] / scale, 0.01, 0.01
        )
        assert values[inside].min() >= 0 and scale > 0


def test_forecast_of_a_detector_in_the_dark():
    simulation = Simulation(vary(SETTINGS, detector={"beamstop": 50.0}))
    grid = truth_grid(
        simulation.settings, simulation.sample, simulation.series[0].experiments
    )
    with pytest.raises(ValueError, match="beam stop, 50 mm in radius, hides the whole"):
        coverage(simulation, grid)
