"""The forecast against the data set that it is of, counted and merged."""

from __future__ import annotations

import numpy as np
import pytest
from truth_ladder import (
    SMALL,
    extraction_settings,
    merged_map,
    simulated_experiments,
    vary,
)

from cctbx import uctbx

from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.io.maps import MapFile
from dials_diffuse.simulation.forecast import (
    EmptyImage,
    expected_means,
    forecast_shells,
)
from dials_diffuse.simulation.simulate import Simulation
from dials_diffuse.simulation.truth import true_voxels, truth_grid

SETTINGS = vary(
    SMALL,
    n_images=90,
    crystal={"unit_cell": uctbx.unit_cell((24, 26, 30, 90, 90, 90))},
    diffuse={"length": 8.0, "halo_length": 20.0},
    beam={"flux": 8e8},
    bragg={"on": True, "sigma": 0.0015, "mosaicity": 0.02},
    background={"solvent": 0.4, "air": 0.2},
    detector={"beamstop": 3.0, "beamstop_arm": 2.0, "modules": (2, 1), "gap": (4, 0)},
)


@pytest.fixture(scope="module")
def simulation():
    return Simulation(SETTINGS)


@pytest.fixture(scope="module")
def shells(simulation):
    return forecast_shells(simulation, n_shells=8)


@pytest.mark.slow
def test_forecast_comes_true(simulation, shells, tmp_path):
    experiments = simulated_experiments(simulation, noise=True)
    settings = extraction_settings(simulation, BraggSettings())
    path = merged_map(experiments, settings, tmp_path, n_shells=8)
    with MapFile(path) as merged:
        found = merged.table("shells")
        asu = merged.columns(["counts", "d"])
    total = sum(shell.counts * shell.n_voxels for shell in shells)
    for i, shell in enumerate(shells):
        assert shell.d_min == pytest.approx(found["d_min"][i])
        assert shell.n_possible == found["n_possible"][i]
        assert shell.n_voxels == found["n_voxels"][i]
        assert shell.completeness == pytest.approx(found["completeness"][i])
        assert shell.multiplicity == pytest.approx(found["multiplicity"][i])
        error = 1 / np.sqrt(found["n_pairs"][i])
        assert shell.cc_half == pytest.approx(found["cc_half"][i], abs=4 * error)
    assert max(shell.cc_half for shell in shells) > 0.1
    # all counts, those of voxels beyond the limits too
    inside = asu["d"] >= shells[-1].d_min
    assert total == pytest.approx(asu["counts"][inside].sum(), rel=0.02)


@pytest.mark.slow
def test_more_flux_is_seen_in_the_forecast(simulation, shells):
    brighter = forecast_shells(Simulation(vary(SETTINGS, beam={"flux": 8e9})), 8)
    for dim, bright in zip(shells, brighter):
        assert bright.counts == pytest.approx(10 * dim.counts, rel=0.02)  # not the air
        assert bright.n_voxels == dim.n_voxels
        assert bright.cc_half > dim.cc_half


def test_what_the_exclusion_leaves_of_a_voxel(simulation):
    """Without the middle of their halos the voxels on Bragg positions are weaker."""
    grid = truth_grid(SETTINGS, simulation.sample, simulation.series[0].experiments)
    index = np.array([[4, 4, 2], [5, 3, 2], [5, 3, 3]])
    whole = true_voxels(simulation.sample, grid, index)["intensity"]
    found = expected_means(simulation.sample, grid, index)
    assert found[0] < 0.98 * whole[0]
    np.testing.assert_allclose(found[1:], whole[1:])


def test_empty_images_have_the_size_of_the_panels(simulation):
    detector = simulation.series[0].experiments[0].detector
    (panel,) = EmptyImage(detector).get_raw_data()
    assert panel.focus() == detector[0].get_image_size()[::-1]
    assert set(panel) == {0}
