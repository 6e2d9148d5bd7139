from __future__ import annotations

import math

import numpy as np
import pytest
from truth_ladder import vary

from cctbx import uctbx

from dials_diffuse.simulation import isotropic
from dials_diffuse.simulation.sample import Sample
from dials_diffuse.simulation.settings import (
    CrystalSettings,
    DetectorSettings,
    SimulationSettings,
)
from dials_diffuse.simulation.simulate import Simulation
from dials_diffuse.simulation.structure import BraggIntensities, make_contents

S_MAX = 0.4
SETTINGS = SimulationSettings(
    n_images=2,
    crystal=CrystalSettings(unit_cell=uctbx.unit_cell((12, 13, 14, 90, 90, 90))),
    detector=DetectorSettings(preset="given", size=(24, 20), pixel=1.0, distance=40.0),
)


def sample(**changes) -> Sample:
    settings = vary(SETTINGS, **changes)
    return Sample(settings, make_contents(settings), S_MAX)


def test_scattering_power():
    """1e11 photons/s on 0.01 mm², 1e-3 mm³ of cells of 2184 Å³, r_e = 2.818e-15 m."""
    found = sample()
    assert found.volume == pytest.approx(12 * 13 * 14)
    expected = 1e11 / 0.01 * 2.8179403e-12**2 * (1e-3 / 2184e-21)
    assert found.power == pytest.approx(expected, rel=1e-6)


def test_tables_of_isotropic_scattering():
    found = sample()
    s = np.random.default_rng(2).uniform(0, S_MAX, 200)
    solvent = isotropic.solvent_ring(s, 0.3, found.map.isotropic)
    # The table leaves out what xraylib's own table does: S = 0 below s = 0.002 Å⁻¹.
    s_compton = np.maximum(s, 0.01)
    compton = isotropic.compton(found.contents.composition, s_compton, 0.9795)
    np.testing.assert_allclose(found.solvent(s), solvent, rtol=1e-5)
    np.testing.assert_allclose(found.compton(s_compton), compton, rtol=1e-4)
    np.testing.assert_allclose(
        found.isotropic(s), found.solvent(s) + found.compton(s), rtol=1e-12
    )
    assert found.solvent(s).min() > 0 and compton.max() > 100


def test_parts_that_are_switched_off():
    s = np.linspace(0, S_MAX, 50)
    off = sample(background={"solvent": 0.0, "compton": False})
    np.testing.assert_array_equal(off.isotropic(s), 0.0)
    still = sample(crystal={"b_iso": 0.0}, diffuse={"halo_displacement": 0.0})
    np.testing.assert_array_equal(
        still.diffuse(np.random.default_rng(3).normal(size=(3, 9))), 0
    )


def test_reflections_beyond_the_limit_have_intensity():
    """Halos and peaks whose centres are a little outside still reach inside."""
    found = sample()
    farther = BraggIntensities(found.contents, 1 / (2 * S_MAX))
    h, k, l = (np.arange(-n, n + 1) for n in (6, 6, 6))
    index = np.stack(np.meshgrid(h, k, l)).reshape(3, -1)
    s = np.linalg.norm(index / [[12], [13], [14]], axis=0)
    near = (s > S_MAX) & (s < S_MAX + 1 / 12)
    expected = farther.at(*index[:, near])
    np.testing.assert_allclose(
        found.bragg.at(*index[:, near]), expected, atol=0.01 * expected.mean()
    )
    assert expected.max() > 0


@pytest.mark.parametrize(
    "diffuse, longest",
    [
        ({"halo_length": 40.0}, 40),
        ({"halo_length": 5.0, "length": 30.0}, 30),
        ({"halo_displacement": 0.0}, 8),
    ],
)
def test_sharpest_feature(diffuse, longest):
    assert sample(diffuse=diffuse).sharpness == pytest.approx(2 * math.pi * longest)


def test_width_of_peaks():
    default = sample(bragg={"mosaicity": 0.1}).peak_shape
    assert default.sigma == pytest.approx(0.8 * 1.0 / 40 / 0.9795)
    assert default.mosaicity == pytest.approx(math.radians(0.1))
    assert sample(bragg={"sigma": 0.004}).peak_shape.sigma == 0.004


def test_true_map_beyond_the_detector():
    """The tables reach as far as the true map does, not only to the detector."""
    simulation = Simulation(vary(SETTINGS, grid={"d_min": 1.0}))
    assert simulation.detector.s_max < 0.5
    found, s = simulation.sample, np.array([0.6, 0.8, 1.0])
    composition = found.contents.composition
    expected = isotropic.compton(composition, s, 0.9795)
    np.testing.assert_allclose(found.compton(s), expected, rtol=1e-4)
    ring = isotropic.solvent_ring(s, 0.3, found.map.isotropic)
    np.testing.assert_allclose(found.solvent(s), ring, rtol=1e-3, atol=1e-6)
    assert found.bragg.at(*np.array([[12], [1], [1]])) > 0
