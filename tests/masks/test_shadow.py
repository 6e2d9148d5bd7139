from __future__ import annotations

import numpy as np
import pytest
from simulate_images import make_beam
from truth_ladder import SMALL, simulated_experiments, vary

from dxtbx.model import Detector, Panel

from dials_diffuse.masks.make import make_mask
from dials_diffuse.masks.rings import make_rings
from dials_diffuse.masks.series import flatten, make_series
from dials_diffuse.masks.settings import MaskSettings
from dials_diffuse.masks.shadow import find_beamstop, reference_profile
from dials_diffuse.simulation.shadows import shadow
from dials_diffuse.simulation.simulate import Simulation


def test_reference_without_a_shadow_is_the_profile():
    smooth = 100 * np.exp(-np.linspace(0, 6, 80))
    np.testing.assert_array_equal(reference_profile(smooth, 0.5), smooth)
    np.testing.assert_array_equal(reference_profile(smooth[::-1], 0.5), smooth[::-1])


def test_reference_of_shadowed_rings_is_that_outside():
    profile = np.full(40, 100.0)
    profile[:10] = 3
    profile[5] = np.nan
    reference = reference_profile(profile, 0.5)
    np.testing.assert_array_equal(reference, np.full(40, 100.0))


def test_reference_passes_over_a_ring_of_peaks():
    """The level falls smoothly to the beam; a ring of peaks is no edge of a shadow."""
    profile = np.linspace(1, 8, 40)
    profile[20:23] *= 8
    reference = reference_profile(profile, 0.5)
    np.testing.assert_array_equal(reference[:20], profile[:20])


def one_panel(size: int = 200) -> Detector:
    panel = Panel()
    panel.set_frame((1, 0, 0), (0, -1, 0), (-size * 0.05, size * 0.05, -100))
    panel.set_pixel_size((0.1, 0.1))
    panel.set_image_size((size, size))
    detector = Detector()
    detector.add_panel(panel)
    return detector


BEAM = make_beam()
BEAM.set_direction((0, 0, 1))


def find(mean: np.ndarray, good: np.ndarray | None = None, border: int = 2):
    rings = make_rings(one_panel(), BEAM)
    good = np.ones(mean.size, bool) if good is None else good.ravel()
    shapes = [mean.shape]
    found = find_beamstop(
        mean.ravel(), mean.ravel() / 10, good, rings, shapes, 0.5, border
    )
    return found.reshape(mean.shape)


def smooth_image(counts: float = 50.0) -> np.ndarray:
    y, x = np.indices((200, 200)) - 99.5
    rng = np.random.default_rng(7)
    return rng.poisson(10 * counts * np.exp(-np.hypot(x, y) / 60)) / 10


def test_stop_and_arm_behind_a_gap():
    image, truth = smooth_image(), np.zeros((200, 200), dtype=bool)
    truth[85:115, 90:108] = True
    truth[:85, 97:101] = True
    good = np.ones_like(truth)
    good[40:52] = False
    image[truth] *= 0.05
    found = find(image, good)
    assert (found & truth & good).sum() >= 0.97 * (truth & good).sum()
    assert (found & ~truth & good).sum() < 0.003 * good.sum()


def test_soft_edge_is_taken_in_as_far_as_asked():
    image = smooth_image(500)
    image[85:115, 85:115] *= 0.05
    image[85:115, 115:117] *= 0.8
    assert find(image, border=3)[87:113, 115:117].mean() > 0.95
    assert not find(image, border=0)[87:113, 116].any()


@pytest.mark.parametrize("place", [(20, 30), (150, 150)])
def test_dark_regions_away_from_the_beam_are_no_beamstop(place):
    image = smooth_image()
    image[place[0] : place[0] + 25, place[1] : place[1] + 25] = 0
    assert not find(image).any()


def test_too_few_counts_decide_nothing():
    image = np.zeros((200, 200))
    image[::17, ::13] = 0.1
    assert not find(image).any()


def test_split_panels_have_the_same_shadow():
    """Four panels and one of the same size: the arm goes on from panel to panel."""
    shadowed = []
    for panels, size in (((1, 1), (120, 120)), ((2, 2), (60, 60))):
        settings = vary(
            SMALL,
            n_images=12,
            detector={
                "panels": panels,
                "size": size,
                "beamstop": 5.0,
                "beamstop_arm": 3.0,
            },
        )
        simulation = Simulation(settings)
        experiments = simulated_experiments(simulation, noise=True)
        (series,) = make_series(experiments)
        made = make_mask(series, MaskSettings())
        truth = flatten(shadow(settings, series.detector)) == 0
        found = flatten(made.layers["beamstop"])
        assert (found & truth).sum() >= 0.95 * truth.sum()
        assert (found & ~truth).sum() < 0.02 * truth.size
        shadowed.append(truth.sum())
    assert shadowed[0] == pytest.approx(shadowed[1], rel=0.1)


def test_a_dark_half_of_the_detector_is_no_beamstop():
    simulation = Simulation(vary(SMALL, n_images=4))

    def half(series, i):
        counts = np.maximum(simulation.image(series, i)[0], 5)
        counts[:, :100] = 0
        return [counts]

    (series,) = make_series(simulated_experiments(simulation, image=half))
    made = make_mask(series, MaskSettings(find=()))
    assert not made.layers["beamstop"][0].any()
    assert any("no beam stop" in warning for warning in made.warnings)


def test_dark_corner_beside_a_hole_for_the_beam_is_no_beamstop():
    """The beam passes a hole; what is nearest to it is dark on one side only."""
    image = smooth_image()
    y, x = np.indices(image.shape) - 99.5
    good = np.hypot(x, y) > 30
    corner = (x > 0) & (abs(y) < 12) & (x < 60)
    image[corner] *= 0.2
    assert not find(image, good).any()
    image[np.hypot(x, y) < 45] *= 0.2  # a stop that is wider than the hole
    assert find(image, good)[good & (np.hypot(x, y) < 44)].mean() > 0.95


def test_stop_through_which_the_beam_shines():
    """Detectors behind a thin stop see the attenuated beam: bright in the dark."""
    image = smooth_image()
    y, x = np.indices(image.shape) - 99.5
    r = np.hypot(x, y)
    image[r < 14] *= 0.1
    image[r < 4.5] = 2000
    found = find(image)
    assert found[r < 13].all()
    assert found[r > 17].sum() == 0


@pytest.mark.parametrize("coverage", [0.6, 0.9])
def test_low_order_peaks_about_the_stop_are_not_its_edge(coverage):
    """Many crystals have the same first reflections: spots of a ring, all around.

    The level falls towards the beam, as behind solvent; the stop has a radius of 8.
    """
    y, x = np.indices((200, 200)) - 99.5
    r = np.hypot(x, y)
    rng = np.random.default_rng(7)
    image = rng.poisson(60 * (0.06 * r + 0.1)) / 60
    spots = (abs(r - 16) < 2) & (np.cos(40 * np.arctan2(y, x)) > 1 - 2 * coverage)
    image[spots] += rng.poisson(15, np.count_nonzero(spots))
    image[r < 8] = 0
    found = find(image)
    assert found[r < 8].all()
    assert not found[r > 8 + 4].any()
