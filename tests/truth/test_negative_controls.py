"""Faults that must show: each makes a stated figure worse than the faultless map has."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from truth_ladder import SMALL, climb, vary

from cctbx import sgtbx, uctbx
from dxtbx.model import SimplePxMmStrategy

from dials_diffuse.simulation.settings import SimulationSettings

L1: SimulationSettings = vary(
    SMALL,
    crystal={"unit_cell": uctbx.unit_cell((15, 18, 21, 90, 90, 90))},
    diffuse={"length": 6.0, "halo_length": 16.0},
    detector={"size": (250, 250), "pixel": 0.36, "thickness": 1.0},
    grid={"ndiv": (4, 4, 4)},
)


@pytest.fixture(scope="module")
def faultless(tmp_path_factory):
    return climb(L1, tmp_path_factory.mktemp("faultless"))


def test_faultless(faultless):
    assert faultless.overall.rms_deviation < 0.01
    assert faultless.overall.cc_anisotropic > 0.999


def shift_half_a_pixel(experiments) -> None:
    for panel in experiments[0].detector:
        fast, slow = panel.get_fast_axis(), panel.get_slow_axis()
        size = panel.get_pixel_size()
        origin = np.array(panel.get_origin()) - 0.5 * (
            np.array(fast) * size[0] + np.array(slow) * size[1]
        )
        panel.set_frame(fast, slow, tuple(origin))


def forget_parallax(experiments) -> None:
    for panel in experiments[0].detector:
        panel.set_px_mm_strategy(SimplePxMmStrategy())


def turn_a_crystal(experiments) -> None:
    crystal = experiments[-1].crystal
    turn = Rotation.from_rotvec(np.radians(0.3) * np.array([0.6, 0.0, 0.8]))
    a = turn.as_matrix() @ np.array(crystal.get_A()).reshape(3, 3)
    crystal.set_A(tuple(a.ravel()))


@pytest.mark.parametrize("spoil", [shift_half_a_pixel, forget_parallax])
def test_wrong_geometry(tmp_path, faultless, spoil):
    spoilt = climb(L1, tmp_path, spoil=spoil)
    assert spoilt.overall.rms_deviation > 1.5 * faultless.overall.rms_deviation
    assert spoilt.overall.cc_anisotropic < faultless.overall.cc_anisotropic


@pytest.mark.slow
def test_crystal_turned_by_a_third_of_a_degree(tmp_path):
    """It takes a larger cell with sharp halos to show."""
    settings = vary(
        SMALL,
        n_images=90,
        crystal={"unit_cell": uctbx.unit_cell((30, 30, 30, 90, 90, 90))},
        diffuse={"halo_length": 30.0},
        detector={"size": (300, 300), "pixel": 0.24},
        grid={"ndiv": (5, 5, 5), "d_min": 2.2},
    )
    deviations = []
    for name, spoil in (("right", lambda _: None), ("turned", turn_a_crystal)):
        (tmp_path / name).mkdir()
        comparison = climb(settings, tmp_path / name, spoil=spoil)
        deviations.append(comparison.overall.rms_deviation)
    assert deviations[1] > 1.5 * deviations[0]


def test_wrong_polarization_plane(tmp_path, faultless):
    spoilt = climb(L1, tmp_path, corrections={"polarization_normal": (1.0, 0.0, 0.0)})
    assert spoilt.overall.rms_deviation > 10 * faultless.overall.rms_deviation


def test_wrong_gain(tmp_path, faultless):
    def halve(experiments) -> None:
        for panel in experiments[0].detector:
            panel.set_gain(2.0)

    spoilt = climb(L1, tmp_path, spoil=halve)
    assert spoilt.overall.ratio == pytest.approx(0.5 * faultless.overall.ratio)
    assert dataclasses.asdict(spoilt.overall)["cc"] == pytest.approx(
        faultless.overall.cc
    )


@pytest.mark.slow
def test_wrong_space_group(tmp_path):
    """A monoclinic crystal with a cell of right angles, merged as orthorhombic."""
    settings = vary(L1, crystal={"space_group": "P 1 2 1"})

    def add_axes(experiments) -> None:
        group = sgtbx.space_group_info("P 2 2 2").group()
        experiments[0].crystal.set_space_group(group)

    deviations = []
    for name, spoil in (("right", lambda _: None), ("wrong", add_axes)):
        (tmp_path / name).mkdir()
        comparison = climb(
            settings, tmp_path / name, spoil=spoil, truth_on_grid_of_map=True
        )
        deviations.append(comparison.overall.rms_deviation)
    assert deviations[1] > 5 * deviations[0]
