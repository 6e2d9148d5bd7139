"""Bragg intensities from the pixels that the diffuse map leaves out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from truth_ladder import SMALL, vary

from cctbx import uctbx

from dials_diffuse import symmetry
from dials_diffuse.bragg.points import PointGrid
from dials_diffuse.bragg.sums import add_surroundings
from dials_diffuse.extraction.loop import SUMS
from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.grid import Grid
from dials_diffuse.simulation.simulate import Simulation
from dials_diffuse.simulation.structure import BraggIntensities

GRID = Grid((9.0, 11.0, 13.0, 90, 90, 90), (3, 2, 4), "C 2 2 (x,y,z)", d_min=2.0)
SPHERE = BraggSettings(semi_axes=(0.0105,) * 3, unit="inverse_angstrom")


def test_points_follow_the_voxels():
    points = PointGrid(GRID)
    hkl = np.stack(np.indices(points.shape), axis=-1).reshape(-1, 3)
    hkl -= np.array(points.half_size)
    keys = points.key(hkl)
    assert keys[0] == np.prod(GRID.shape)
    np.testing.assert_array_equal(np.diff(keys), 1)
    np.testing.assert_array_equal(points.hkl(keys), hkl)
    corner = np.array([GRID.half_size])
    assert np.all(points.nearest(corner) <= points.half_size)


def test_absent_points_are_those_of_the_centring_and_of_screw_axes():
    points = PointGrid(GRID)
    hkl = points.hkl(points.n_voxels + np.arange(np.prod(points.shape)))
    np.testing.assert_array_equal(points.is_absent(), hkl[:, :2].sum(axis=1) % 2 == 1)
    screw = PointGrid(dataclasses.replace(GRID, space_group="P 2ac 2ab"))
    axis = hkl[screw.is_absent()]
    assert len(axis) > 0
    assert np.all(np.count_nonzero(axis, axis=1) == 1)
    assert np.all(axis.sum(axis=1) % 2 == 1)


def row(key, counts, normalisation, background=0.0):
    result = np.zeros(1, dtype=SUMS)
    result["key"], result["n_pixels"] = key, 1
    result["counts"], result["normalisation"] = counts, normalisation
    result["background"] = background
    return result


def test_surroundings_are_those_of_the_same_cell():
    points = PointGrid(GRID)
    hkl = np.array([[1, 1, 1], [2, 0, 0], [3, 1, 0]])
    near, far = np.array([[4, 2, 4]]), np.array([[4, 2, 6]])  # of 1 1 1: dh 1/3, 1/2
    other = np.array([[6, 1, 0]])  # of 2 0 0 or 2 1 0
    rows = np.concatenate(
        [
            row(GRID.key(near), 50.0, 10.0, background=10.0),
            row(GRID.key(far), 900.0, 10.0),
            row(GRID.key(other), 20.0, 10.0),
            *(row(key, 100.0, 2.0, background=1.0) for key in points.key(hkl)),
        ]
    )
    found = rows.copy()
    metric = (36.0, 36.0, 36.0, 0.0, 0.0, 0.0)
    add_surroundings(found, points, metric)
    np.testing.assert_array_equal(found[:3], rows[:3])
    assert found["background"][3] == pytest.approx(1.0 + 2.0 * (50.0 - 10.0) / 10.0)
    assert found["background_variance"][3] == pytest.approx(50.0 / 10.0**2 * 2.0**2)
    assert np.isnan(found["background"][5])  # nothing around 3 1 0
    found = rows.copy()
    add_surroundings(found, points)
    assert found["background"][3] == pytest.approx(1.0 + 2.0 * 940.0 / 20.0)


PEAKS = vary(
    SMALL,
    n_images=360,
    crystal={"unit_cell": uctbx.unit_cell((20, 21, 22, 90, 90, 90))},
    bragg={"on": True, "sigma": 0.0024, "mosaicity": 0.02},
    detector={"size": (360, 360), "pixel": 0.2},
    scan={"width": 0.5},
    grid={"ndiv": (4, 4, 4), "d_min": 2.4},
)


def true_intensities(simulation: Simulation, grid: Grid, hkl: np.ndarray):
    """K |F|² of the simulation."""
    index, f2 = BraggIntensities.all(simulation.sample.contents, grid.d_min)
    unique = symmetry.map_to_asu(index, grid.laue_group)
    known = {tuple(h): value for h, value in zip(unique, f2)}
    wanted = symmetry.map_to_asu(hkl, grid.laue_group)
    return simulation.sample.power * np.array(
        [known.get(tuple(h), np.nan) for h in wanted]
    )
