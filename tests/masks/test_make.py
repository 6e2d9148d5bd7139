"""Faulty pixels and the beam stop of simulated images are found, and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from truth_ladder import SMALL, simulated_experiments, vary

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.masks.make import MadeMask, log_mask, make_mask
from dials_diffuse.masks.series import make_series
from dials_diffuse.masks.settings import DYNAMIC_LAYERS, MaskSettings
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.shadows import gap_mask, shadow
from dials_diffuse.simulation.simulate import Simulation

# About one count per pixel, and strong Bragg peaks.
FAULTY = vary(
    SMALL,
    n_images=60,
    beam={"flux": 1e9},
    bragg={"on": True},
    background={"solvent": 0.3},
    detector={
        "size": (240, 200),
        "modules": (3, 3),
        "gap": (5, 7),
        "beamstop": 5.0,
        "beamstop_arm": 2.0,
        "hot_fraction": 0.002,
        "dead_fraction": 0.002,
    },
)
ENOUGH = 30.0  # expected photons of a pixel, of which a dead one is told


class Case(NamedTuple):
    """What is known of a simulation, and the mask that was made of it."""

    settings: SimulationSettings
    simulation: Simulation
    experiments: ExperimentList
    made: MadeMask

    @property
    def active(self) -> np.ndarray:
        return gap_mask(self.settings)[0]

    @property
    def shadow(self) -> np.ndarray:
        return (
            shadow(self.settings, self.experiments[0].detector)[0] == 0
        ) & self.active

    def defects(self, name: str) -> np.ndarray:
        """Faulty pixels outside gaps and shadow."""
        result = np.zeros(self.active.size, dtype=bool)
        result[getattr(self.simulation.defects[0], name)] = True
        return result.reshape(self.active.shape) & self.active & ~self.shadow

    @property
    def good(self) -> np.ndarray:
        faulty = [self.defects(name) for name in ("hot", "flickering", "dead")]
        return self.active & ~self.shadow & ~np.logical_or.reduce(faulty)

    def layer(self, name: str) -> np.ndarray:
        return self.made.layers[name][0]

    @property
    def faulty(self) -> np.ndarray:
        return np.logical_or.reduce([self.layer(name) for name in DYNAMIC_LAYERS])


def make_case(settings: SimulationSettings, **options: Any) -> Case:
    simulation = Simulation(settings)
    experiments = simulated_experiments(simulation, noise=True)
    (series,) = make_series(experiments)
    made = make_mask(series, MaskSettings(**options))
    return Case(settings, simulation, experiments, made)


def expected_photons(case: Case) -> np.ndarray:
    """Of each pixel in the whole series."""
    (series,) = case.simulation.series
    clean = (case.simulation.photons(series, i)[0] for i in range(series.n_images))
    return sum(clean)


@pytest.fixture(scope="module", params=["rotation", "stills"])
def case(request) -> Case:
    variation = {"rotation": 0.2, "stills": 0.35}[request.param]
    settings = vary(FAULTY, mode=request.param, scale={"variation": variation})
    return make_case(settings)


def test_images_are_weak_and_have_strong_peaks(case):
    assert np.nanmean(case.made.mean[0]) == pytest.approx(1, rel=0.2)
    (series,) = case.simulation.series
    raw = np.array([case.simulation.image(series, i)[0] for i in range(10)])
    assert np.count_nonzero(raw[:, case.good] > 30) > 20


def test_gaps(case):
    np.testing.assert_array_equal(case.layer("gaps"), ~case.active)


@pytest.mark.parametrize("name", ["hot", "flickering"])
def test_hot_pixels_are_found(case, name):
    truth = case.defects(name)
    assert truth.sum() > 35
    assert (case.layer(name) & truth).sum() >= 0.99 * truth.sum()


def test_dead_pixels_are_found(case):
    truth = case.defects("dead") & (expected_photons(case) > ENOUGH)
    assert truth.sum() > 30
    dead = case.layer("dead") | case.layer("beamstop")  # at its edge
    assert (dead & truth).sum() >= 0.99 * truth.sum()


def test_good_pixels_are_not_called_faulty(case):
    assert (case.faulty & case.good).sum() < 1e-4 * case.good.sum()


def test_beamstop_is_found(case):
    found = case.layer("beamstop")
    assert (found & case.shadow).sum() >= 0.95 * case.shadow.sum()
    assert (found & case.good).sum() < 5e-3 * case.good.sum()


@pytest.mark.slow
def test_no_beamstop_and_no_faulty_pixels_where_there_are_none():
    sound = {"beamstop": 0.0, "beamstop_arm": 0.0}
    sound |= {"hot_fraction": 0.0, "dead_fraction": 0.0}
    for flux, air in ((1e9, 1e2), (1e11, 1e4)):
        case = make_case(
            vary(
                FAULTY,
                n_images=30,
                beam={"flux": flux},
                detector=sound,
                background={"air": air},
            )
        )
        assert not case.layer("beamstop").any()
        assert case.faulty.sum() < 1e-4 * case.good.sum()


def test_beamstop_in_few_bright_images():
    case = make_case(
        vary(FAULTY, n_images=2, beam={"flux": 1e11}, background={"air": 1e4})
    )
    assert (case.layer("beamstop") & case.shadow).sum() >= 0.95 * case.shadow.sum()
    assert (case.layer("beamstop") & case.good).sum() < 5e-3 * case.good.sum()
    assert not make_case(case.settings, beamstop=False).layer("beamstop").any()


def test_peaks_of_a_crystal_at_rest_are_not_hot():
    """The same still again and again, as in a grid scan: only peaks stay in place."""
    simulation = Simulation(vary(FAULTY, mode="stills", n_images=6))
    (series,) = simulation.series
    rng = np.random.default_rng(7)
    mean = simulation.photons(series, 0)[0]
    active = gap_mask(simulation.settings)[0]
    experiments = simulated_experiments(
        simulation,
        image=lambda *_: [np.where(active, rng.poisson(mean), -1).astype(np.int32)],
    )
    (own,) = make_series(experiments)
    made = make_mask(own, MaskSettings())
    faulty = np.logical_or.reduce([made.layers[n][0] for n in DYNAMIC_LAYERS])
    assert np.count_nonzero(mean > 20) > 20
    # peaks of a single pixel look like hot ones
    assert faulty.sum() <= 5e-4 * active.sum()


def test_few_images_are_reported(caplog):
    caplog.set_level("INFO", logger="dials.diffuse.mask")
    case = make_case(vary(FAULTY, n_images=2))
    (warning,) = case.made.warnings
    assert "cannot be told from Bragg peaks in fewer than 3 images" in warning
    assert warning in caplog.text
    assert "scatter of the pixels is not judged" in caplog.text
    assert not case.layer("hot").any()
    assert not case.layer("flickering").any()


@pytest.mark.slow
def test_result_does_not_depend_on_processes():
    settings = vary(FAULTY, n_images=11)
    one, two = (make_case(settings, nproc=n).made for n in (1, 2))
    for name, panels in one.layers.items():
        np.testing.assert_array_equal(panels[0], two.layers[name][0])
    np.testing.assert_array_equal(one.mean[0], two.mean[0])


def test_only_layers_asked_for(case):
    (series,) = make_series(case.experiments)
    made = make_mask(series, MaskSettings(find=("dead",)))
    assert "hot" not in made.layers
    np.testing.assert_array_equal(made.layers["dead"][0], case.layer("dead"))


def test_numbers_of_pixels(case, caplog):
    caplog.set_level("INFO", logger="dials.diffuse.mask")
    log_mask(case.made, 1)
    counts = {x["name"]: x for x in case.made.summary()["layers"]}
    layers = case.made.layers
    others = [panels[0] for name, panels in layers.items() if name != "gaps"]
    only = layers["gaps"][0] & ~np.logical_or.reduce(others)
    assert counts["gaps"]["n_pixels"] == layers["gaps"][0].sum()
    assert counts["gaps"]["n_only"] == only.sum()
    total = np.count_nonzero(~case.made.good[0])
    assert case.made.summary()["n_masked"] == total
    assert f"{total} |" in caplog.text


def test_images_are_chosen_evenly(case):
    (series,) = make_series(case.experiments)
    assert len(series.chosen(7)) == 7
    assert series.chosen(None) == series.chosen(60) == list(series.images)
    numbers = [series.images.index(image) for image in series.chosen(7)]
    assert set(np.diff(numbers)) <= {8, 9}
