"""Radial profiles and smooth corrections against the truth of simulated images.

``pytest -rP`` shows the figures that docs/background.md states.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from simulated_background import (
    STILLS,
    background_settings,
    brighter,
    crystals_and_blanks,
    first_pixels,
    flat,
    make_model,
    pixel_values,
)
from truth_ladder import report, simulated_experiments, vary

from dials_diffuse.background.pixels import near_bragg
from dials_diffuse.background.settings import ProfileSettings
from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.geometry.orientation import frame_model
from dials_diffuse.simulation.simulate import Simulation

N_SHELLS = 8
QUANTILE_ERROR = 1.25  # of a median, relative to that of a mean


class Deviations(NamedTuple):
    """Relative deviation of the model from the truth.

    Attributes:
        bias: Of each shell, all images together.
        error: Its standard error by counting.
        overall: Of all shells together.
        pulls: Of each point of each profile.
    """

    bias: np.ndarray
    error: np.ndarray
    overall: float
    pulls: np.ndarray


def deviations(settings, **changes) -> Deviations:
    """Deviations of radial profiles.

    The truth of an image is the sum of all but its Bragg peaks in a shell, away from
    Bragg positions. The shells run to the largest whole circle.
    """
    simulation = Simulation(settings)
    clean = Simulation(vary(settings, bragg={"on": False}))
    experiments, _ = crystals_and_blanks(simulation)
    own = background_settings(simulation, **changes)
    model = make_model(experiments, own)
    pixels = first_pixels(experiments, own)
    whole = 0.72 * pixels.s.max()  # of the square detector, its corners left out
    shell = np.minimum((N_SHELLS * pixels.s / whole).astype(int), N_SHELLS)
    bins = np.rint(pixels.s / own.profile.step).astype(int)
    many = np.bincount(bins) > 200
    totals, pulls = [], []
    for i, e in enumerate(experiments):
        value, variance = pixel_values(model, (e.identifier, 0), pixels)
        truth = flat(clean.photons(clean.series[0], i), pixels)
        keep = ~near_bragg(
            pixels.e, frame_model(e, 0), e, background_settings(simulation)
        )
        sums = [np.bincount(shell[keep], x[keep])[:N_SHELLS] for x in (value, truth)]
        totals.append(sums)
        error = np.bincount(bins, np.sqrt(variance))  # a point's pixels err together
        pulls.append((np.bincount(bins, value - truth)[many] / error[many]))
    model_sum, truth_sum = np.sum(totals, axis=0)
    error = QUANTILE_ERROR / np.sqrt(truth_sum)
    overall = model_sum.sum() / truth_sum.sum() - 1
    return Deviations(model_sum / truth_sum - 1, error, overall, np.concatenate(pulls))


@pytest.mark.parametrize("factor, group", [(3, 1), (30, 1), (3, 4)])
def test_radial_profile_is_the_truth(factor, group):
    """1 and 10 counts per pixel on the average."""
    found = deviations(
        brighter(STILLS, factor / 2.6), profile=ProfileSettings(group=group)
    )
    report(
        f"radial, {factor / 3:g} counts, group of {group}",
        bias_percent=" ".join(f"{100 * x:.2f}" for x in found.bias),
        error_percent=" ".join(f"{100 * x:.2f}" for x in found.error),
        overall_percent=100 * found.overall,
        pull_mean=found.pulls.mean(),
        pull_sd=found.pulls.std(),
    )
    assert np.all(np.abs(found.bias) < np.maximum(0.02, 3 * found.error))
    assert abs(found.overall) < 0.0075
    if group == 1:  # images of a group have errors in common
        assert found.pulls.std() == pytest.approx(1, abs=0.15)


def test_bragg_peaks_left_in_raise_the_profile():
    settings = brighter(STILLS, 10)
    clean = deviations(settings)
    spoilt = deviations(
        settings,
        bragg=BraggSettings(exclusion="none"),
        profile=ProfileSettings(spot_margin=-1),
    )
    assert spoilt.overall > 0.02 > 4 * abs(clean.overall)


def test_surroundings_of_spots_replace_most_of_the_exclusion():
    """For images that were not indexed."""
    settings = brighter(STILLS, 10)
    none = BraggSettings(exclusion="none")
    without = deviations(settings, bragg=none, profile=ProfileSettings(spot_margin=-1))
    found = deviations(settings, bragg=none)
    assert found.overall < 0.6 * without.overall


def _off_centre(shape, level):
    """Air that scatters off the beam's axis, behind a shadow with a wide edge."""
    y, x = np.indices(shape) / shape[0]
    return (
        level * np.exp(-((x - 0.62) ** 2 + (y - 0.35) ** 2) / (2 * 0.35**2)),
        1 - 0.5 / (1 + np.exp((x - 0.3) * 16)),
    )


@pytest.mark.parametrize("factor", [1, 10])
def test_modal_background_need_not_be_round(factor):
    settings = brighter(STILLS, factor)
    simulation = Simulation(settings)
    clean = Simulation(
        vary(
            settings,
            bragg={"on": False},
            diffuse={"contrast": 0.0, "halo_displacement": 0.0},
        )
    )
    extra, shadow = _off_centre((360, 360), 1.2 * factor)
    rng = np.random.default_rng(7)

    def image(series, i):
        photons = simulation.photons(series, i)[0]
        return [rng.poisson((photons + extra) * shadow).astype(np.int32)]

    experiments = simulated_experiments(simulation, image=image)
    found = {}
    for spacing in (None, 40):
        own = background_settings(
            simulation,
            method="modal" if spacing else "radial",
            profile=ProfileSettings(spacing=spacing),
        )
        model = make_model(experiments, own)
        pixels = first_pixels(experiments, own)
        fast, slow = pixels.places(0)
        window = (slow // 60).astype(int) * 6 + (fast // 60).astype(int)
        ratios, pulls = [], []
        for i, e in enumerate(experiments):
            value, variance = pixel_values(model, (e.identifier, 0), pixels)
            photons = (clean.photons(clean.series[0], i)[0] + extra) * shadow
            truth = flat([photons], pixels)
            ratios.append(np.bincount(window, value) / np.bincount(window, truth) - 1)
            pulls.append((value - truth) / np.sqrt(variance))
        found[spacing] = np.mean(ratios, axis=0)
        report(
            f"modal, {np.mean(truth):.2g} counts, spacing {spacing}",
            bias_percent=100 * found[spacing].mean(),
            rms_of_windows_percent=100 * np.sqrt(np.mean(found[spacing] ** 2)),
            worst_percent=100 * np.abs(found[spacing]).max(),
            pull_sd=np.std(pulls),
        )
    assert abs(found[40].mean()) < 0.01
    assert np.sqrt(np.mean(found[40] ** 2)) < 0.02
    assert np.abs(found[None]).max() > 0.2  # a round one cannot


def test_result_does_not_depend_on_nproc():
    simulation = Simulation(vary(STILLS, n_images=3))
    experiments, _ = crystals_and_blanks(simulation)
    models = [
        make_model(
            experiments,
            background_settings(
                simulation,
                method="modal",
                nproc=nproc,
                profile=ProfileSettings(group=2, spacing=64),
            ),
        )
        for nproc in (1, 2)
    ]
    for key, terms in models[0].images.items():
        other = models[1].images[key]
        np.testing.assert_array_equal(terms.profile, other.profile)
        np.testing.assert_array_equal(terms.grids[0], other.grids[0])
        np.testing.assert_array_equal(terms.grid_variances[0], other.grid_variances[0])


def test_all_panels_share_one_profile():
    """Cutting the detector into panels changes nothing but the rounding of directions."""
    one = vary(STILLS, n_images=1, bragg={"on": False})
    four = vary(one, detector={"size": (180, 180), "panels": (2, 2)})
    profiles = []
    for settings in (one, four):
        simulation = Simulation(settings)
        experiments = simulated_experiments(simulation, image=simulation.photons)
        # expected photons, made large: no rounding to whole counts
        own = background_settings(simulation, gain=1e-3)
        profiles.append(
            make_model(experiments, own).of_image(experiments[0].identifier, 0).profile
        )
    np.testing.assert_allclose(profiles[0][8:-8], profiles[1][8:-8], rtol=2e-3)


def test_no_pixel_left_is_one_clear_line():
    simulation = Simulation(vary(STILLS, n_images=1))
    experiments, _ = crystals_and_blanks(simulation)
    own = background_settings(simulation, trusted_range=(1e6, 2e6))
    with pytest.raises(ValueError, match="No pixel of image 1 .* check the mask"):
        make_model(experiments, own)
