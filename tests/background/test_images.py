"""Backgrounds from images without the crystal, against the true air scattering."""

from __future__ import annotations

import numpy as np
import pytest
from simulate_images import make_beam, make_detector, memory_experiment, random_images
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
from truth_ladder import report, vary

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.background.images import (
    BlankImage,
    bin_of_phi,
    check_same_detector,
    exposure_time,
    phi_bins,
)
from dials_diffuse.background.pixels import make_pixels
from dials_diffuse.background.settings import BackgroundSettings, ImagesSettings
from dials_diffuse.simulation.simulate import Simulation

SWEEP = vary(
    brighter(STILLS, 2),
    mode="rotation",
    n_images=3,
    background={"n_images": 6},
    detector={"size": (200, 200), "pixel": 0.31},
    scan={"width": 1.0, "exposure": 0.5},
)


@pytest.mark.parametrize("smoothing", [1, 5])
@pytest.mark.parametrize("mode", ["stills", "rotation"])
def test_background_is_the_air(mode, smoothing):
    """Shells within 3 standard errors; pulls N(0, 1) to 5 %."""
    simulation = Simulation(vary(SWEEP, mode=mode))
    data, blanks = crystals_and_blanks(simulation)
    ratio = 1.0 if mode == "stills" else None
    own = background_settings(
        simulation,
        method="images",
        images=ImagesSettings(
            smoothing=smoothing, exposure_ratio=ratio, phi_width=360.0
        ),
    )
    model = make_model(data, own, blanks)
    pixels = first_pixels(data, own)
    value, variance = pixel_values(model, (data[0].identifier, 0), pixels)
    air = simulation.photons(simulation.series[1], 0)
    # the mean of six images, or its sixth part where no exposure time is known
    truth = flat(air, pixels)
    residual = truth - value
    shell = (10 * pixels.s / pixels.s.max()).clip(0, 9).astype(int)
    # the background has 6 times the counts of an image
    error = np.sqrt(np.bincount(shell, truth) / 6)
    in_shells = np.bincount(shell, residual) / error
    # pulls of neighbours are alike if they share counts: one of each square
    fast, slow = (x.astype(int) for x in pixels.places(0))
    apart = (fast % smoothing == 0) & (slow % smoothing == 0)
    many = apart & (variance > 0)
    pulls = residual[many] / np.sqrt(variance[many])
    report(
        f"images, {mode}, smoothing {smoothing}",
        worst_shell_in_sigma=np.abs(in_shells).max(),
        bias_percent=100 * (value.sum() / truth.sum() - 1),
        pull_mean=pulls.mean(),
        pull_sd=pulls.std(),
    )
    assert np.abs(in_shells).max() < 3
    true_pulls = residual[apart] / np.sqrt(
        variance[apart].mean() * truth[apart] / truth[apart].mean()
    )
    if smoothing > 1:
        assert abs(pulls.mean()) < 0.15  # skewed: sigma follows the counts
        assert pulls.std() == pytest.approx(1, abs=0.05)
    else:
        assert true_pulls.std() == pytest.approx(1, abs=0.05)


def test_smoothing_without_the_reference_shape_would_be_biased():
    """Negative control: a plain mean over the square, on expected photons."""
    simulation = Simulation(vary(SWEEP, mode="stills", background={"n_images": 1}))
    _, blanks = crystals_and_blanks(simulation, image=simulation.photons)
    own = background_settings(
        simulation,
        method="images",
        images=ImagesSettings(smoothing=15, exposure_ratio=1.0),
    )
    data, _ = crystals_and_blanks(simulation, image=simulation.photons)
    model = make_model(data, own, blanks)
    pixels = first_pixels(data, own)
    value, _ = pixel_values(model, (data[0].identifier, 0), pixels)
    truth = flat(simulation.photons(simulation.series[1], 0), pixels)
    assert np.abs(value / truth - 1).max() < 0.01
    near = pixels.s < 0.1
    assert abs(value[near].sum() / truth[near].sum() - 1) < 1e-3


def test_angles_choose_their_own_base():
    """A background that is brighter from image to image."""
    simulation = Simulation(SWEEP)
    factor = iter(range(1, 7))

    def image(series, i):
        photons = simulation.photons(series, i)
        blank = series.experiments[0].crystal is None
        return [p * next(factor) for p in photons] if blank else photons

    data, blanks = crystals_and_blanks(simulation, image=image)
    own = background_settings(
        simulation,
        method="images",
        images=ImagesSettings(phi_width=2.0, smoothing=1, scale=0.5),
    )
    model = make_model(data, own, blanks)
    assert len(model.bases) == 3
    pixels = first_pixels(data, own)
    truth = flat(simulation.photons(simulation.series[1], 0), pixels)
    for i, mean in enumerate((1.5, 1.5, 3.5)):  # images 1+2, 1+2, 3+4
        value, _ = pixel_values(model, (data[0].identifier, i), pixels)
        np.testing.assert_allclose(value, 0.5 * mean * truth, rtol=1e-9)


def test_one_base_serves_experiments_with_masks_of_their_own():
    """Each experiment has a background wherever its own mask is good."""
    simulation = Simulation(vary(SWEEP, mode="stills", background={"n_images": 1}))
    data, blanks = crystals_and_blanks(simulation, image=simulation.photons)
    (good,) = simulation.good_pixels()
    masks = {}
    for i, experiment in enumerate(data):
        mask = good.copy()
        mask[:, (70 * (i % 2)) : (70 * (i % 2) + 70)] = False
        mask[:, :3] = False
        masks[experiment.identifier] = (mask,)
    own = background_settings(
        simulation,
        method="images",
        images=ImagesSettings(smoothing=1, exposure_ratio=1.0),
        mask=None,
        masks=masks,
    )
    assert len(data) > 1
    model = make_model(data, own, blanks)
    for experiment in data[:2]:
        pixels = make_pixels(experiment, own)
        assert len(pixels.flat) == np.count_nonzero(masks[experiment.identifier][0])
        value, _ = pixel_values(model, (experiment.identifier, 0), pixels)
        assert np.isfinite(value).all()
    # no experiment asks for these
    assert not np.isfinite(model.bases[0][0][:, :3]).any()


def test_untrusted_pixels_add_nothing():
    detector = make_detector(size=(40, 30))
    images = random_images(3, detector, mean=50.0)
    images[0][0][10, 20] = -5  # in one image of three
    for image in images:
        image[0][5, 5] = -5  # in all
    blanks = ExperimentList(
        [
            memory_experiment([im], detector, None, identifier=str(i))
            for i, im in enumerate(images)
        ]
    )
    data = ExperimentList([memory_experiment([images[0]], detector, None)])
    own = BackgroundSettings(
        method="images",
        images=ImagesSettings(smoothing=1, exposure_ratio=2.0, scale=0.7),
    )
    model = make_model(data, own, blanks)
    terms = model.of_image("0", 0)
    assert terms.rate_scale == pytest.approx(1.4)
    rate, variance = model.bases[0][0], model.base_variances[0][0]
    assert rate[10, 20] == pytest.approx(
        (images[1][0][10, 20] + images[2][0][10, 20]) / 2
    )
    total = sum(image[0][3, 7] for image in images)
    assert rate[3, 7] == pytest.approx(total / 3)
    assert variance[3, 7] == pytest.approx(total / 9)
    assert np.isnan(rate[5, 5])
    assert np.isnan(rate).sum() == 1


@pytest.mark.parametrize(
    "phi, expected", [(0.0, 0), (359.99, 359), (-0.5, 359), (361, 1)]
)
def test_angles_are_equal_modulo_a_turn(phi, expected):
    assert bin_of_phi(phi, 360) == expected


def test_blank_images_make_one_base():
    detector = make_detector()
    blanks = ExperimentList(
        [memory_experiment(random_images(1, detector), detector, None)]
    )
    images = [BlankImage(0, 0, 1.0)]
    (only,) = phi_bins(blanks, images, 1.0)
    assert only.phi is None
    assert only.images == tuple(images)
    assert exposure_time(blanks[0], 0) is None


def test_other_detectors_are_refused():
    def experiment(beam=None, **detector):
        made = make_detector(**detector)
        return memory_experiment(random_images(1, made), made, None, beam)

    data = experiment()
    check_same_detector(data, experiment(distance=20.5))
    with pytest.raises(ValueError, match="another detector: 2 panel"):
        check_same_detector(data, experiment(n_panels=2))
    with pytest.raises(ValueError, match="stands elsewhere .* by 25 %"):
        check_same_detector(data, experiment(distance=25.0))
    with pytest.raises(ValueError, match="wavelength of 1.1000 Å"):
        check_same_detector(data, experiment(make_beam(1.1)))


def test_scan_that_does_not_reach_the_data_is_refused():
    simulation = Simulation(SWEEP)
    data, blanks = crystals_and_blanks(simulation)
    scan = blanks[0].scan
    scan.set_oscillation((90.0, 1.0))
    own = background_settings(simulation, method="images")
    with pytest.raises(ValueError, match="does not reach the angle 0.50° of image 1"):
        make_model(data, own, blanks)


def test_unknown_exposure_time_is_refused():
    simulation = Simulation(vary(SWEEP, mode="stills"))
    data, blanks = crystals_and_blanks(simulation)
    own = background_settings(simulation, method="images")
    with pytest.raises(ValueError, match="exposure time of the background image"):
        make_model(data, own, blanks)


def test_no_blank_images_is_refused():
    simulation = Simulation(vary(SWEEP, mode="stills", n_images=1))
    data, _ = crystals_and_blanks(simulation)
    own = background_settings(simulation, method="images")
    with pytest.raises(ValueError, match="needs images without the crystal"):
        make_model(data, own)
