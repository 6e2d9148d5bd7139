"""With Bragg peaks, whose pixels are left out: what remains of them in the map.

A voxel that the exclusion cuts has another mean than the whole one, so the bias is that
of voxels wholly outside it: *halo* voxels within the range of the halo kernel, *cloudy*
voxels beyond.
"""

from __future__ import annotations

import numpy as np
import pytest
from truth_ladder import SMALL, climb, vary

from cctbx import uctbx

from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.simulation.comparison import Comparison

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
    assert halo.sum() > 1000 and cloudy.sum() > 100
    assert bias(comparison, halo) == pytest.approx(0, abs=0.01)
    assert bias(comparison, cloudy) == pytest.approx(0, abs=0.001)


@pytest.mark.slow
def test_peaks_that_are_not_excluded_show(tmp_path):
    """Negative control."""
    settings = vary(PEAKS, n_images=60)
    nothing = climb(settings, tmp_path)
    peaks = farthest_corner(nothing) < RADIUS
    assert bias(nothing, peaks) > 10
