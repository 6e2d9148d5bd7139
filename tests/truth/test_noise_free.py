"""Without noise, Bragg peaks and background the map is the truth to 1e-3 in each shell.

Voxels are a quarter of a reciprocal cell. Where they are coarse beside the features of
the map and the distance to the rotation axis, the pixels do not sample a voxel evenly and
its mean differs from that over the volume: 0.3 % at low angles with half a cell.
"""

from __future__ import annotations

import numpy as np
import pytest
from truth_ladder import SMALL, climb, vary

from cctbx import sgtbx, uctbx

ORTHORHOMBIC = uctbx.unit_cell((15, 18, 21, 90, 90, 90))
L1 = vary(SMALL, crystal={"unit_cell": ORTHORHOMBIC}, grid={"ndiv": (4, 4, 4)})
STILLS = {"mode": "stills", "scan": {"exposure": 1.0}}

CELLS = {
    "P 1": (14, 16, 18, 82, 97, 104),
    "C 1 2 1": (22, 15, 17, 90, 107, 90),
    "I 1 2 1": (22, 15, 17, 90, 97, 90),
    "P 2 21 21": (15, 18, 21, 90, 90, 90),
    "I 41": (17, 17, 24, 90, 90, 90),
    "P 41 21 2": (17, 17, 24, 90, 90, 90),
    "R 3 :H": (24, 24, 26, 90, 90, 120),
    "P 61": (17, 17, 24, 90, 90, 120),
    "F 4 3 2": (28, 28, 28, 90, 90, 90),
    "I 21 3": (24, 24, 24, 90, 90, 90),
}


def assert_is_truth(comparison) -> None:
    for shell in comparison.shells:
        assert shell.n_voxels > 20
        assert shell.ratio == pytest.approx(1, abs=1e-3)
    assert comparison.overall.cc_anisotropic > 0.995


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="rotation"),
        pytest.param({**STILLS}, id="stills, stepped"),
        pytest.param(
            {**STILLS, "scan": {"exposure": 1.0, "orientations": "random"}},
            id="stills, random",
        ),
        pytest.param({"detector": {"two_theta": 20.0}}, id="tilted detector"),
        pytest.param(
            {"detector": {"size": (85, 85), "panels": (2, 2), "panel_tilt": 25.0}},
            id="four panels",
        ),
        pytest.param(
            {
                "goniometer": {
                    "axis": (0.3, 0.9, 0.1),
                    "fixed_rotation": (10.0, 20.0, 30.0),
                    "setting_rotation": (5.0, -8.0, 12.0),
                }
            },
            id="goniometer",
        ),
        pytest.param(
            {"background": {"solvent": 0.5, "compton": False}}, id="solvent ring"
        ),
        pytest.param(
            {
                "n_crystals": 2,
                "n_images": 90,
                "scan": {"width": 2.0},
                "crystal": {"cell_spread": 0.002},
            },
            id="two crystals",
        ),
    ],
)
def test_map_is_the_truth(tmp_path, changes):
    assert_is_truth(climb(vary(L1, **changes), tmp_path, n_shells=6))


SLOW = ("I 41", "R 3 :H", "P 61", "F 4 3 2", "I 21 3")


@pytest.mark.parametrize(
    "symbol",
    [pytest.param(s, marks=[pytest.mark.slow] if s in SLOW else []) for s in CELLS],
)
def test_space_groups(tmp_path, symbol):
    changes = {
        "crystal": {"space_group": symbol, "unit_cell": uctbx.unit_cell(CELLS[symbol])}
    }
    assert (
        sgtbx.space_group_info(symbol)
        .group()
        .is_compatible_unit_cell(changes["crystal"]["unit_cell"])
    )
    assert_is_truth(climb(vary(L1, **changes), tmp_path, n_shells=6))


def test_compton_scattering(tmp_path):
    pytest.importorskip("xraylib")
    settings = vary(L1, background={"compton": True})
    assert_is_truth(climb(settings, tmp_path, n_shells=6))


def test_scan_varying_crystal(tmp_path):
    """The cell grows and the crystal turns during the sweep; the truth does not care."""

    def drift(simulation) -> None:
        for series in simulation.series:
            (e,) = series.experiments
            a = np.array(e.crystal.get_A()).reshape(3, 3)
            points = []
            for x in np.linspace(0, 1, series.n_images + 1):
                turn = np.eye(3) + 0.05 * x * np.cross(np.eye(3), [0.6, 0.48, 0.64])
                u, _, v = np.linalg.svd(turn)
                points.append(tuple((u @ v @ a / (1 + 0.02 * x)).ravel()))
            e.crystal.set_A_at_scan_points(points)

    settings = vary(L1)
    assert_is_truth(climb(settings, tmp_path, prepare=drift, n_shells=6))

    def forget(experiments) -> None:
        for e in experiments:
            e.crystal.reset_scan_points()

    (tmp_path / "static").mkdir()
    static = climb(
        settings, tmp_path / "static", prepare=drift, spoil=forget, n_shells=6
    )
    assert static.overall.cc_anisotropic < 0.99
