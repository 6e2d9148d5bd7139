from __future__ import annotations

import json

import numpy as np
import pytest

from dials_diffuse.merging import statistics


def cc_half(s, x, y, n_shells=20):
    """Statistics of two halves without their isotropic parts."""
    mean = statistics.IsotropicMean(s.max(), ("x", "y"))
    mean.add(s, {"x": x, "y": y})
    shells = statistics.ShellSums(statistics.shell_edges(0.1, 0.5, n_shells))
    shells.add_pairs(s, x - mean.isotropic("x", s), y - mean.isotropic("y", s))
    return shells.statistics()


@pytest.fixture
def s():
    return np.cbrt(np.random.default_rng(7).uniform(0.1**3, 0.5**3, 40_000))


def test_cc_half_of_noise_on_an_isotropic_pattern_is_zero(s):
    rng = np.random.default_rng(8)
    isotropic = 1000 * np.exp(-5 * s)
    x, y = isotropic + rng.normal(size=(2, len(s)))
    result = cc_half(s, x, y)
    assert abs(result.overall.cc_half) < 4 / np.sqrt(len(s))
    for shell in result.shells:
        assert abs(shell.cc_half) < 4 / np.sqrt(shell.n_pairs)
    # ... and would be nearly one if the isotropic part were left in
    assert np.corrcoef(x, y)[0, 1] > 0.99


def test_cc_half_of_a_signal_is_one(s):
    rng = np.random.default_rng(8)
    x = 1000 * np.exp(-5 * s) + rng.normal(size=len(s))
    result = cc_half(s, x, x)
    assert result.overall.cc_half == pytest.approx(1)
    assert [shell.cc_half for shell in result.shells] == pytest.approx([1] * 20)


def test_cc_half_of_equal_signal_and_noise_is_one_half(s):
    rng = np.random.default_rng(8)
    signal = rng.normal(size=len(s))
    x, y = signal + rng.normal(size=(2, len(s)))
    assert cc_half(s, x, y).overall.cc_half == pytest.approx(0.5, abs=0.02)


def test_cc_half_equals_numpy(s):
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(2, len(s))) + rng.normal(size=len(s))
    x[::7] = np.nan
    edges = statistics.shell_edges(0.1, 0.5, 3)
    shells = statistics.ShellSums(edges)
    for part in (slice(0, 10_000), slice(10_000, None)):
        shells.add_pairs(s[part], x[part], y[part])
    for i, shell in enumerate(shells.statistics().shells):
        inside = (s >= edges[i]) & (s < edges[i + 1]) & np.isfinite(x)
        assert shell.n_pairs == inside.sum()
        expected = np.corrcoef(x[inside], y[inside])[0, 1]
        assert shell.cc_half == pytest.approx(expected, rel=1e-9)


def test_cc_half_is_not_defined_without_pairs_or_variation():
    s = np.full(5, 0.3)
    constant = np.full(5, 3.7)
    assert cc_half(s, constant, constant, 1).overall.cc_half is None
    assert cc_half(s[:2], np.arange(2.0), np.arange(2.0), 1).overall.cc_half is None


def test_shells_have_equal_volumes():
    edges = statistics.shell_edges(0.1, 0.5, 5)
    volumes = np.diff(edges**3)
    np.testing.assert_allclose(volumes, volumes[0])
    assert (edges[0], edges[-1]) == pytest.approx((0.1, 0.5))


def test_every_voxel_is_in_a_shell():
    edges = statistics.shell_edges(0.1, 0.5, 5)
    s = np.array([0.0999999, 0.1, *edges[1:-1], 0.5, 0.5000001])
    np.testing.assert_array_equal(
        statistics.shell_number(s, edges), [0, 0, 1, 2, 3, 4, 4, 4]
    )


def test_figures_of_a_shell():
    shells = statistics.ShellSums(statistics.shell_edges(0.1, 0.5, 2))
    shells.add_possible(np.full(8, 0.45))
    shells.add_observed(
        np.full(2, 0.45), np.array([1, 4]), np.array([3.0, 5.0]), np.array([1.0, 2.0])
    )
    empty, shell = shells.statistics().shells
    assert shell.completeness == 0.25
    assert shell.multiplicity == 2.5
    assert shell.mean_intensity == 4
    assert shell.mean_i_over_sigma == 2.75
    assert shell.d_min == pytest.approx(2)
    assert empty.completeness is None
    assert empty.mean_intensity is None


def test_empty_shells_can_be_printed_and_stored():
    shells = statistics.ShellSums(statistics.shell_edges(0.1, 0.5, 2))
    result = shells.statistics()
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["shells"]
    assert result.as_table().count("-  |") == 0
    assert " - |" in result.as_table()


def test_isotropic_mean_ignores_what_is_not_observed():
    mean = statistics.IsotropicMean(0.03, ("i",))
    mean.add(np.array([0.001, 0.002, 0.011]), {"i": np.array([2.0, np.nan, 5.0])})
    mean.add(np.array([0.003]), {"i": np.array([4.0])})
    np.testing.assert_array_equal(mean.mean("i"), [3, 5, np.nan, np.nan])
    np.testing.assert_allclose(mean.mean_s("i"), [0.002, 0.011, np.nan, np.nan])
