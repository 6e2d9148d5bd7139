from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dials_diffuse.simulation.scales import (
    Absorption,
    image_scales,
    scattering_power,
)
from dials_diffuse.simulation.settings import (
    BeamSettings,
    CrystalSettings,
    ScaleSettings,
    SimulationSettings,
)


def settings(**kwargs) -> SimulationSettings:
    return SimulationSettings(**kwargs)


def test_scattering_power_by_hand():
    """1e12 photons/s on 0.01 mm², 1e-3 mm³ of cells of 1e5 Å³, r_e = 2.818e-15 m."""
    found = scattering_power(settings(beam=BeamSettings(flux=1e12)), 1e5)
    n_cells = 1e-3 / (1e5 * 1e-21)
    assert found == pytest.approx(1e14 * (2.818e-12) ** 2 * n_cells, rel=1e-4)


def test_beam_smaller_than_the_crystal():
    """The same photons in a quarter of the area, through a quarter of the cells."""
    whole = scattering_power(settings(beam=BeamSettings(flux=1e12)), 1e5)
    small = settings(beam=BeamSettings(size=0.05, flux=1e12))
    assert scattering_power(small, 1e5) == pytest.approx(whole)
    large = settings(beam=BeamSettings(size=0.2, flux=1e12))
    assert scattering_power(large, 1e5) == pytest.approx(whole / 4)
    thin = settings(beam=BeamSettings(flux=1e12), crystal=CrystalSettings(size=0.05))
    assert scattering_power(thin, 1e5) == pytest.approx(whole / 8)


def test_stills_have_lognormal_scales():
    s = settings(mode="stills", n_images=4000, scale=ScaleSettings(variation=0.35))
    logarithm = np.log(image_scales(s, 1))
    assert np.std(logarithm) == pytest.approx(0.35, rel=0.05)
    assert np.mean(logarithm) == pytest.approx(0, abs=0.03)
    np.testing.assert_array_equal(image_scales(s, 1), image_scales(s, 1))
    assert not np.allclose(image_scales(s, 1), image_scales(s, 2))


def test_sweeps_have_smooth_scales():
    s = settings(n_images=400, scale=ScaleSettings(variation=0.2))
    scale = image_scales(s, 1)
    assert np.std(np.log(scale)) == pytest.approx(0.2, rel=0.01)
    assert np.abs(np.diff(np.log(scale))).max() < 0.02
    np.testing.assert_array_equal(image_scales(settings(), 1), 1.0)


def test_absorption_is_fixed_to_the_crystal():
    absorption = Absorption(settings(scale=ScaleSettings(absorption=0.8)), 1)
    rng = np.random.default_rng(5)
    e = rng.normal(size=(3, 2000))
    e /= np.linalg.norm(e, axis=0)
    s0 = np.array([0.0, 0.0, -1.0])
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    t = absorption.transmission(e, s0, np.eye(3))
    np.testing.assert_allclose(absorption.transmission(turn @ e, turn @ s0, turn), t)
    assert not np.allclose(absorption.transmission(e, s0, turn), t)
    assert np.exp(-0.8) < t.min() and t.max() < 1
    # the way out alone makes half of the exponent
    assert np.log(t.max() / t.min()) == pytest.approx(0.4, rel=0.01)
    off = dataclasses.replace(settings(), scale=ScaleSettings())
    assert Absorption(off, 1).transmission(e, s0, np.eye(3)) == 1.0
