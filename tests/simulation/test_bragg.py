from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from dials_diffuse.simulation.bragg import PeakShape, path_mean, peak_intensity

VOLUME = 40.0 * 50.0 * 60.0
SETTING = np.diag([1 / 40, 1 / 50, 1 / 60])
SHAPE = PeakShape(sigma=4e-4, mosaicity=0.001)


class OneReflection:
    """|F|² = 100 for (3, 2, 1), 0 for all others."""

    def at(self, h, k, l):
        return np.where((h == 3) & (k == 2) & (l == 1), 100.0, 0.0)


def intensity(hkl, axis=None, width=0.0, setting=SETTING):
    return peak_intensity(
        np.atleast_2d(hkl).T, setting, axis, width, OneReflection(), SHAPE, VOLUME
    )


def box(n: int = 61, half: float = 0.2) -> tuple[np.ndarray, float]:
    """Points about (3, 2, 1), and the part of a reciprocal cell that each stands for."""
    x = (np.arange(n) + 0.5) / n * 2 * half - half
    grid = np.stack(np.meshgrid(x, x, x), axis=-1).reshape(-1, 3)
    return grid + [3, 2, 1], (2 * half / n) ** 3


@pytest.mark.parametrize("axis", [None, (0.0, 0.0, 1.0), (0.6, 0.8, 0.0)])
def test_mean_over_the_cell_is_f_squared(axis):
    hkl, part = box()
    width = 0.0 if axis is None else 0.01
    found = intensity(hkl, axis and np.array(axis), width)
    assert np.sum(found) * part == pytest.approx(100.0, rel=1e-4)


@pytest.mark.parametrize("offset, length", [(0.0, 1.0), (0.7, 0.3), (-2.0, 5.0)])
def test_mean_over_a_path_is_the_integral(offset, length):
    expected, _ = quad(
        lambda x: np.exp(-(x**2) / 2 / 0.8**2), offset - length / 2, offset + length / 2
    )
    found = path_mean(*(np.array([x]) for x in (offset, length, 0.8)))
    np.testing.assert_allclose(found, expected / length, rtol=1e-9)


def test_path_of_no_length_is_the_value_itself():
    found = path_mean(np.array([0.5]), np.array([0.0]), np.array([1.0]))
    np.testing.assert_allclose(found, np.exp(-0.125), rtol=1e-6)


def test_rotation_is_the_mean_over_many_small_ones():
    axis, width = np.array([0.0, 0.6, 0.8]), 0.02
    rng = np.random.default_rng(3)
    rlp = SETTING @ (rng.normal(0, 0.03, (300, 3)) + [3, 2, 1]).T
    total = np.zeros(300)
    angles = (np.arange(200) + 0.5) / 200 * width - width / 2
    for angle in angles:
        # the crystal turns under a scattering vector that stays
        cross = np.cross(np.eye(3), axis)
        turn = np.eye(3) - np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        setting = turn @ SETTING
        total += intensity((np.linalg.inv(setting) @ rlp).T, setting=setting)
    found = intensity((np.linalg.inv(SETTING) @ rlp).T, axis, width)
    strong = found > 1e-3 * found.max()
    np.testing.assert_allclose(found[strong], total[strong] / 200, rtol=0.02)
    assert found.sum() == pytest.approx(total.sum() / 200, rel=1e-3)


def test_mosaic_spread_widens_across_the_lattice_vector_only():
    rlp = SETTING @ [3, 2, 1]
    along = rlp / np.linalg.norm(rlp)
    across = np.cross(along, [0, 0, 1.0])
    across /= np.linalg.norm(across)
    top = intensity([3, 2, 1])[0]
    for direction, sigma in (
        (along, SHAPE.sigma),
        (across, np.hypot(SHAPE.sigma, SHAPE.mosaicity * np.linalg.norm(rlp))),
    ):
        hkl = np.linalg.inv(SETTING) @ (rlp + sigma * direction)
        assert intensity(hkl)[0] == pytest.approx(top * np.exp(-0.5), rel=1e-9)


def test_nothing_at_the_origin_and_far_from_the_peak():
    assert intensity([0.0, 0.0, 0.0])[0] == 0
    assert intensity([3.4, 2.0, 1.0])[0] == 0
    assert intensity([3.0, 2.0, 1.0])[0] > 1e4
