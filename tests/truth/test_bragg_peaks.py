"""With Bragg peaks, whose pixels are left out: what remains of them in the map.

A voxel that the exclusion cuts has another mean than the whole one, so the bias is that
of voxels wholly outside it: *halo* voxels within the range of the halo kernel, *cloudy*
voxels beyond.

With the default exclusion of 0.25 cells, cells of 34-42 Å, images of 1° and s < 0.25 1/Å,
the peaks leave per cent of the diffuse intensity (of the same images without peaks):

    σ, 1/Å    s < 0.1    0.1-0.2    beyond    voxels without Bragg position, all s
    0.0017    1.8        0.4        0.15      0.12
    0.0010    < 0.001    < 0.001    < 0.001   < 0.001

The first σ is the default of the simulation for this detector. The shortest semi-axis,
0.25/42 = 0.0060 1/Å, is 3.6 σ of it; it takes 6 σ to cut off a strong peak.
"""

from __future__ import annotations

import numpy as np
import pytest
from truth_ladder import SMALL, climb, report, vary

from cctbx import uctbx

from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.simulation.comparison import Comparison
from dials_diffuse.simulation.settings import SimulationSettings

RADIUS = 0.21  # of the exclusion, reciprocal cells: peaks, and their way in an image
HALO = 0.5  # reciprocal cells that the halos reach

PEAKS = vary(
    SMALL,
    n_images=200,
    crystal={"unit_cell": uctbx.unit_cell((20, 20, 20, 90, 90, 90))},
    bragg={"on": True, "sigma": 0.0013, "mosaicity": 0.02},
    detector={"size": (360, 360), "pixel": 0.2},
    scan={"width": 0.5},
    grid={"ndiv": (6, 6, 6), "d_min": 2.2},
)


def nearest_corner(comparison: Comparison) -> np.ndarray:
    """Distance of the nearest part of each voxel from its Bragg position, cells."""
    ndiv = np.array(comparison.voxels.grid.ndiv)
    offset = np.abs((comparison.voxels.index + ndiv // 2) % ndiv - ndiv // 2) / ndiv
    return np.linalg.norm(np.maximum(offset - 0.5 / ndiv, 0), axis=1)


def farthest_corner(comparison: Comparison) -> np.ndarray:
    """Distance of the farthest part of each voxel from its Bragg position, cells."""
    ndiv = np.array(comparison.voxels.grid.ndiv)
    offset = np.abs((comparison.voxels.index + ndiv // 2) % ndiv - ndiv // 2) / ndiv
    return np.linalg.norm(np.minimum(offset + 0.5 / ndiv, 0.5), axis=1)


def bias(comparison: Comparison, chosen: np.ndarray) -> float:
    """Relative excess of the counts in some voxels."""
    voxels = comparison.voxels
    weight = voxels.normalisation[chosen]
    found = np.sum(voxels.intensity[chosen] * weight)
    return float(found / np.sum(comparison.expected[chosen] * weight) - 1)


@pytest.mark.slow
def test_excluded_peaks_leave_nothing_behind(tmp_path):
    exclusion = BraggSettings(semi_axes=(RADIUS,) * 3)
    comparison = climb(PEAKS, tmp_path, exclusion=exclusion)
    outside = nearest_corner(comparison) > RADIUS
    halo = outside & (nearest_corner(comparison) < HALO)
    cloudy = nearest_corner(comparison) > HALO
    report(
        "Bragg peaks excluded",
        halo_bias=f"{bias(comparison, halo):.4%}",
        cloudy_bias=f"{bias(comparison, cloudy):.4%}",
    )
    assert halo.sum() > 1000 and cloudy.sum() > 100
    assert bias(comparison, halo) == pytest.approx(0, abs=0.01)
    assert bias(comparison, cloudy) == pytest.approx(0, abs=0.001)


@pytest.mark.slow
def test_peaks_that_are_not_excluded_show(tmp_path):
    """Negative control."""
    settings = vary(PEAKS, n_images=60)
    nothing = climb(settings, tmp_path)
    peaks = farthest_corner(nothing) < RADIUS
    report("Bragg peaks not excluded", bias=bias(nothing, peaks))
    assert bias(nothing, peaks) > 10


USUAL = vary(
    SimulationSettings(),
    n_images=95,
    crystal={
        "space_group": "P 21 21 21",
        "unit_cell": uctbx.unit_cell((34, 38, 42, 90, 90, 90)),
    },
    detector={
        "preset": "given",
        "size": (256, 256),
        "pixel": 0.172,
        "distance": 85.0,
    },
    scan={"width": 1.0},
)


def left_behind(peaks: Comparison, none: Comparison, chosen: np.ndarray) -> float:
    """What Bragg peaks add to some voxels, relative to all else in them."""
    a, b = peaks.voxels, none.voxels
    total = np.sum((b.normalisation * b.intensity)[chosen])
    return float(np.sum((a.normalisation * a.intensity)[chosen]) / total - 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sigma, found, besides",
    [
        pytest.param(None, (0.0180, 0.0040, 0.0015), 0.0012, id="0.0017"),
        pytest.param(0.001, (0.0, 0.0, 0.0), 0.0, id="0.0010"),
    ],
)
def test_default_exclusion(tmp_path, sigma, found, besides):
    maps = []
    for on in (True, False):
        (tmp_path / str(on)).mkdir()
        settings = vary(USUAL, bragg={"on": on, "sigma": sigma})
        maps.append(climb(settings, tmp_path / str(on), exclusion=BraggSettings()))
    voxels = maps[0].voxels
    np.testing.assert_array_equal(voxels.index, maps[1].voxels.index)
    np.testing.assert_allclose(voxels.normalisation, maps[1].voxels.normalisation)
    shell = np.digitize(voxels.s, (0.1, 0.2))
    left = [left_behind(*maps, shell == i) for i in range(3)]
    outside = nearest_corner(maps[0]) > 0
    left_besides = left_behind(*maps, outside)
    report(
        f"default exclusion, sigma {sigma or 0.0017}",
        left=" ".join(f"{x:.4%}" for x in left),
        besides=f"{left_besides:.4%}",
    )
    assert left == pytest.approx(found, rel=0.2, abs=2e-5)
    assert left_besides == pytest.approx(besides, rel=0.2, abs=2e-5)
