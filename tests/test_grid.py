from __future__ import annotations

import numpy as np
import pytest

from cctbx import crystal, miller, sgtbx, uctbx

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid

TRICLINIC = (9.1, 10.3, 12.2, 75, 100, 110)


def box(grid: Grid) -> np.ndarray:
    return grid.index(np.arange(np.prod(grid.shape)))


@pytest.mark.parametrize("ndiv", [(1, 1, 1), (2, 2, 2), (3, 2, 5)])
def test_bragg_positions_are_voxel_centres(ndiv):
    grid = Grid(TRICLINIC, ndiv, " P 1", 2.0)
    hkl = np.array([[1, -2, 3], [0, 0, 0]])
    np.testing.assert_array_equal(grid.voxel_index(hkl), hkl * ndiv)
    for nudge in (-0.49, 0.49):
        np.testing.assert_array_equal(
            grid.voxel_index(hkl + nudge / np.array(ndiv)), hkl * ndiv
        )


def test_borders_of_voxels_are_not_cut_towards_zero():
    grid = Grid(TRICLINIC, (2, 2, 2), " P 1", 2.0)
    hkl = np.array([[-0.3, -0.25, 0.25], [-0.2, 0.2, -0.26]])
    np.testing.assert_array_equal(grid.voxel_index(hkl), [[-1, 0, 1], [0, 0, -1]])


def test_s_is_one_over_d_of_cctbx():
    grid = Grid(TRICLINIC, (2, 3, 4), " P 1", 2.0)
    index = np.random.default_rng(7).integers(-9, 10, (50, 3))
    lengths = [a * n for a, n in zip(TRICLINIC, grid.ndiv)]
    cell = uctbx.unit_cell((*lengths, *TRICLINIC[3:]))
    expected = [1 / cell.d(tuple(map(int, h))) for h in index]
    np.testing.assert_allclose(grid.s(index), expected)
    assert grid.s(np.zeros((1, 3))) == 0
    assert len(grid.s(np.zeros((0, 3)))) == 0


def test_s_does_not_depend_on_its_blocks(monkeypatch):
    grid = Grid(TRICLINIC, (2, 3, 4), " P 1", 2.0)
    index = np.random.default_rng(7).integers(-9, 10, (50, 3))
    expected = grid.s(index)
    monkeypatch.setattr("dials_diffuse.grid.S_BLOCK", 7)
    np.testing.assert_array_equal(grid.s(index), expected)


def test_key_numbers_the_box_without_gaps():
    grid = Grid(TRICLINIC, (1, 2, 1), " P 1", 3.0)
    n = np.prod(grid.shape)
    np.testing.assert_array_equal(grid.key(grid.index(np.arange(n))), np.arange(n))
    np.testing.assert_array_equal(grid.index([0]), [-np.array(grid.half_size)])
    # l is the fastest
    step = grid.key(np.array([[0, 0, 1]])) - grid.key(np.array([[0, 0, 0]]))
    np.testing.assert_array_equal(step, [1])


@pytest.mark.parametrize("cell", [TRICLINIC, (9.1, 9.1, 12.2, 90, 90, 120)])
def test_box_holds_the_sphere_and_is_no_larger(cell):
    grid = Grid(cell, (2, 2, 3), " P 1", 2.0)
    rng = np.random.default_rng(7)
    rlp = rng.normal(size=(200_000, 3))
    rlp /= grid.d_min * np.linalg.norm(rlp, axis=1, keepdims=True)
    # The point of the sphere that is farthest along h is that along the direct axis a
    axes = np.array(grid.cell.orthogonalization_matrix()).reshape(3, 3)
    farthest = (axes / np.linalg.norm(axes, axis=0)).T / grid.d_min
    index = np.abs(grid.voxel_index(np.vstack([rlp, 0.999999 * farthest]) @ axes))
    np.testing.assert_array_equal(index.max(axis=0), grid.half_size)


def test_axes_are_miller_indices():
    grid = Grid(TRICLINIC, (2, 3, 1), " P 1", 2.0)
    for axis, n, div in zip(grid.axes(), grid.shape, grid.ndiv):
        assert len(axis) == n
        assert axis[n // 2] == 0
        np.testing.assert_allclose(np.diff(axis), 1 / div)


def test_half_diagonal_bounds_the_distance_to_the_centre():
    grid = Grid(TRICLINIC, (2, 3, 1), " P 1", 2.0)
    corners = np.stack(np.meshgrid(*[(-0.5, 0.5)] * 3), axis=-1).reshape(-1, 3)
    basis = np.array(grid.cell.fractionalization_matrix()).reshape(3, 3)
    distance = np.linalg.norm(corners / grid.ndiv @ basis, axis=1)
    assert grid.half_diagonal == pytest.approx(distance.max())


@pytest.mark.parametrize(
    "grid",
    [
        Grid(TRICLINIC, (2, 3, 1), " P 1", 2.0),
        Grid((9.1, 10.3, 12.2, 90, 100, 90), (3, 2, 3), " C 2y", 2.0, 8.0),
        Grid((9.1, 9.1, 12.2, 90, 90, 120), (2, 2, 1), " R 3", 2.0),
        Grid((8, 8, 8, 90, 90, 90), (2, 2, 2), " I 4 2 3", 2.0, 8.0),
    ],
)
def test_asu_has_one_of_each_set_of_equivalents(grid):
    index = box(grid)
    index = index[grid.in_resolution_range(grid.s(index))]
    unique = np.unique(symmetry.map_to_asu(index, grid.laue_group), axis=0)
    asu = grid.asu_indices()
    np.testing.assert_array_equal(np.unique(asu, axis=0), unique)
    assert len(asu) == len(unique)


def test_asu_is_that_of_a_cctbx_miller_set():
    grid = Grid((9.1, 9.1, 12.2, 90, 90, 120), (2, 2, 1), " P 3", 2.02, 7.3)
    group = sgtbx.space_group(" -P 3")
    large = crystal.symmetry(
        unit_cell=(18.2, 18.2, 12.2, 90, 90, 120), space_group=group
    )
    expected = miller.build_set(large, False, d_min=2.02, d_max=7.3)
    assert set(map(tuple, grid.asu_indices())) == set(expected.indices())


def test_centred_cells_have_no_absent_voxels():
    primitive, centred = (
        Grid((9, 9, 9, 90, 90, 90), (2, 2, 2), group, 2.0) for group in (" P 4", " I 4")
    )
    np.testing.assert_array_equal(primitive.asu_indices(), centred.asu_indices())


def test_margin_adds_voxels_beyond_both_limits():
    grid = Grid(TRICLINIC, (2, 2, 2), " P 1", 2.0, 5.0)
    s = grid.s(grid.asu_indices(margin=0.05))
    assert 0.5 < s.max() <= 0.55 + 1e-6
    assert s.min() < 0.1
    within = np.sort(s[grid.in_resolution_range(s)])
    np.testing.assert_allclose(within, np.sort(grid.s(grid.asu_indices())))


def test_limits_belong_to_the_range_and_the_origin_does_not():
    grid = Grid((10, 10, 10, 90, 90, 90), (1, 1, 1), " P 1", 2.0, 5.0)
    s = np.array([0, 0.2 - 1e-12, 0.2, 0.5, 0.5 + 1e-12, 0.19, 0.51])
    np.testing.assert_array_equal(
        grid.in_resolution_range(s), [False, True, True, True, True, False, False]
    )
    unlimited = Grid((10, 10, 10, 90, 90, 90), (1, 1, 1), " P 1", 2.0)
    np.testing.assert_array_equal(
        unlimited.in_resolution_range(s), [False, *[True] * 5, False]
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ndiv": (2, 0, 2)}, "ndiv must be positive"),
        ({"d_max": 1.5}, "d_max=1.5 must be greater than d_min=2"),
        ({"ndiv": (2, 3, 2), "space_group": " P 4"}, "mixes the axes h and k"),
        ({"ndiv": (200, 200, 200)}, "voxels is too large"),
    ],
)
def test_grids_that_cannot_be(change, message):
    settings = {
        "unit_cell": (10, 10, 12, 90, 90, 90),
        "ndiv": (2, 2, 2),
        "space_group": " P 1",
        "d_min": 2.0,
    }
    with pytest.raises(ValueError, match=message):
        Grid(**{**settings, **change})
