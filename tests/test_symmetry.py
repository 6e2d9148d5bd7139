from __future__ import annotations

import numpy as np
import pytest

from cctbx import sgtbx

from dials_diffuse import symmetry

# Space group and order of its Laue group, which is primitive
ORDERS = [
    ("P 1", 2),
    ("C 1 2 1", 4),
    ("I 1 2 1", 4),
    ("P 21 21 21", 8),
    ("P 41", 8),
    ("R 3 :R", 6),
    ("R 3 :H", 6),
    ("P 63 2 2", 24),
    ("F 2 3", 24),
    ("I 4 3 2", 48),
]


def group(symbol: str) -> sgtbx.space_group:
    return symmetry.laue_group(sgtbx.space_group_info(symbol).group())


@pytest.mark.parametrize("symbol, order", ORDERS)
def test_laue_group_is_centrosymmetric_and_primitive(symbol, order):
    matrices = symmetry.rotation_matrices(group(symbol))
    assert matrices.shape == (order, 3, 3)
    assert group(symbol).order_z() == order
    found = {tuple(m.ravel()) for m in matrices}
    assert tuple(-np.eye(3, dtype=int).ravel()) in found
    # closed under multiplication
    assert {tuple((a @ b).ravel()) for a in matrices for b in matrices} == found


@pytest.mark.parametrize("symbol, order", ORDERS)
def test_equivalents_share_one_representative(symbol, order):
    laue = group(symbol)
    index = np.random.default_rng(7).integers(-9, 10, (200, 3))
    representative = symmetry.map_to_asu(index, laue)
    for matrix in symmetry.rotation_matrices(laue):
        np.testing.assert_array_equal(
            symmetry.map_to_asu(index @ matrix, laue), representative
        )
    np.testing.assert_array_equal(
        symmetry.map_to_asu(representative, laue), representative
    )


@pytest.mark.parametrize("symbol", ["P 1", "R 3 :R", "I 4 3 2"])
def test_other_orbits_have_other_representatives(symbol):
    laue = group(symbol)
    index = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3), axis=-1).reshape(-1, 3)
    orbits = {
        frozenset(tuple(h @ m) for m in symmetry.rotation_matrices(laue)) for h in index
    }
    assert len(np.unique(symmetry.map_to_asu(index, laue), axis=0)) == len(orbits)


def test_operators_keep_the_length_of_vectors():
    # h' = h R from the right: the other side would not, in a hexagonal cell
    from dials_diffuse.grid import Grid

    grid = Grid((9.0, 9.0, 13.0, 90, 90, 120), (2, 2, 3), " P 3", 2.0)
    index = np.random.default_rng(7).integers(-9, 10, (50, 3))
    for matrix in symmetry.rotation_matrices(grid.laue_group):
        np.testing.assert_allclose(grid.s(index @ matrix), grid.s(index))


def test_no_voxels():
    assert symmetry.map_to_asu(np.zeros((0, 3), int), group("P 1")).shape == (0, 3)


@pytest.mark.parametrize(
    "symbol, ndiv",
    [
        ("P 1", (2, 3, 5)),
        ("P 21 21 21", (2, 3, 5)),
        ("P 4", (3, 3, 2)),
        ("P 3", (2, 2, 5)),
        ("I 4 3 2", (4, 4, 4)),
    ],
)
def test_subdivisions_that_symmetry_allows(symbol, ndiv):
    symmetry.check_subdivision(group(symbol), ndiv)


@pytest.mark.parametrize(
    "symbol, ndiv, axes",
    [
        ("P 4", (3, 2, 3), "h and k"),
        ("P 3", (3, 2, 3), "h and k"),
        ("I 4 3 2", (4, 4, 3), "h and l"),
        ("R 3 :R", (2, 3, 3), "h and k"),
    ],
)
def test_subdivisions_that_symmetry_forbids(symbol, ndiv, axes):
    with pytest.raises(ValueError, match=f"symmetry mixes the axes {axes}"):
        symmetry.check_subdivision(group(symbol), ndiv)


def test_subdivision_of_a_setting_that_mixes_two_axes_one_way():
    # P 1 2 1 with the axes a, a + b, c: the twofold axis takes b to b - 2a, but a to -a
    laue = symmetry.laue_group(sgtbx.space_group(" P 2y (x+y,y,z)"))
    mixed = np.any(symmetry.rotation_matrices(laue) != 0, axis=0)
    assert mixed[0, 1] != mixed[1, 0]
    symmetry.check_subdivision(laue, (2, 2, 3))
    with pytest.raises(ValueError, match="symmetry mixes the axes h and k"):
        symmetry.check_subdivision(laue, (2, 3, 3))
