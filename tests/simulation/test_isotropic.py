from __future__ import annotations

import sys

import numpy as np
import pytest

from dials_diffuse.simulation.isotropic import compton, solvent_ring
from dials_diffuse.simulation.structure import form_factor, random_contents


def test_solvent_ring_has_its_height_at_its_maximum():
    s = np.linspace(0, 1.2, 120001)

    def isotropic(s):
        return 1e4 * np.exp(-3 * s)

    ring = solvent_ring(s, 0.3, isotropic)
    top = np.argmax(ring)
    assert s[top] == pytest.approx(1 / 3.2, abs=2e-4)
    assert ring[top] == pytest.approx(0.3 * isotropic(s[top]), rel=1e-4)
    assert np.all(ring >= 0)
    # Weak at low angles, nothing at high ones
    assert 0.02 < ring[0] / ring[top] < 0.2
    assert ring[-1] < 1e-6 * ring[top]
    above = s[ring > ring[top] / 2]
    assert above[-1] - above[0] == pytest.approx(0.12, abs=0.01)
    np.testing.assert_array_equal(solvent_ring(s, 0.0, isotropic), 0.0)


@pytest.mark.parametrize(
    "d, share", [(10.0, 0.008), (3.5, 0.07), (2.0, 0.22), (1.2, 0.50)]
)
def test_share_of_compton_in_a_protein_crystal(d, share):
    pytest.importorskip("xraylib")
    contents = random_contents("P 43 21 2", (78, 78, 37, 90, 90, 90), 0.4, 20.0, 3)
    s = np.array([1 / d])
    incoherent = compton(contents.composition, s, 1.0)
    coherent = sum(n * form_factor(e, s) ** 2 for e, n in contents.composition.items())
    total = incoherent + coherent
    assert (incoherent / total)[0] == pytest.approx(share, rel=0.04)


def test_compton_of_hydrogen_is_what_its_coherent_scattering_lacks():
    pytest.importorskip("xraylib")
    s = np.linspace(0, 1.4, 29).reshape(1, 29)
    wavelength = 1.1
    two_theta = 2 * np.arcsin(wavelength * s / 2)
    ratio = 1 / (1 + 12.39842 / wavelength / 511 * (1 - np.cos(two_theta)))
    expected = 3 * ratio**2 * (1 - form_factor("H", s) ** 2)
    found = compton({"H": 3.0}, s, wavelength)
    assert found.shape == s.shape
    # The tabulated form factor is not quite 1 at the origin.
    np.testing.assert_allclose(found, expected, atol=4e-3)
    assert ratio.min() < 0.98


def test_compton_is_that_of_the_table():
    xraylib = pytest.importorskip("xraylib")
    s = np.array([0.0137, 0.111, 0.3333, 0.9571, 1.7011])
    wavelength = 0.7
    expected = np.array([2 * xraylib.SF_Compt(6, x / 2) for x in s])
    expected += [0.5 * xraylib.SF_Compt(16, x / 2) for x in s]
    expected /= (1 + 12.39842 * wavelength * s**2 / 2 / 511) ** 2
    found = compton({"C": 2.0, "S": 0.5}, s, wavelength)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_compton_has_no_dip_at_the_beginning_of_the_table():
    pytest.importorskip("xraylib")
    s = np.linspace(0, 0.02, 500)
    values = compton({"C": 1.0}, s, 1.0)
    assert values[0] == 0 and np.all(values >= 0)
    assert np.all(np.diff(values[100:]) > 0)


def test_compton_of_nothing():
    pytest.importorskip("xraylib")
    assert compton({"C": 1.0}, np.zeros((3, 0)), 1.0).shape == (3, 0)


def test_missing_xraylib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xraylib", None)
    with pytest.raises(ValueError, match="install the Python package xraylib or set"):
        compton({"C": 1.0}, np.array([0.5]), 1.0)
