from __future__ import annotations

import gemmi
import numpy as np
import pytest

from dials_diffuse.export.ccp4 import map_cell, write_ccp4
from dials_diffuse.grid import Grid

GRID = Grid((8.1, 9.3, 11.2, 75, 100, 110), (2, 3, 1), " P 1", 2.5)
VOXELS = [(0, 0, 0), (3, -2, 1), (-5, 4, -3)]


@pytest.fixture
def written(tmp_path):
    """A map with the values 1, 2, 3 at three voxels, read back with gemmi."""
    box = np.zeros(GRID.shape, dtype=np.float32)
    for i, voxel in enumerate(VOXELS):
        box[tuple(np.add(voxel, GRID.half_size))] = i + 1
    path = tmp_path / "map.ccp4"
    write_ccp4(path, GRID, box, 100, ["first line", "x" * 200])
    return path, box


def test_header_places_the_origin_at_the_middle(written):
    found = gemmi.read_ccp4_map(str(written[0]))
    columns = [found.header_i32(word) for word in range(1, 11)]
    assert tuple(columns[:3]) == GRID.shape
    assert columns[3] == 2  # single precision
    assert tuple(columns[4:7]) == tuple(-n for n in GRID.half_size)
    assert tuple(columns[7:10]) == GRID.shape
    assert [found.header_i32(word) for word in (17, 18, 19)] == [1, 2, 3]
    assert found.header_i32(23) == 1
    np.testing.assert_allclose(
        found.grid.unit_cell.parameters, map_cell(GRID, 100), rtol=1e-6
    )


def test_labels_are_in_the_header(written):
    found = gemmi.read_ccp4_map(str(written[0]))
    labels = [found.header_str(57 + 20 * i, 80).strip("\0 ") for i in range(3)]
    assert labels[1] == "first line"
    assert labels[2] == "x" * 80


@pytest.mark.parametrize("scale", [1, 100])
def test_voxels_lie_at_their_reciprocal_vectors(tmp_path, scale):
    # Against the reciprocal vectors of gemmi: the lengths and mutual angles of the
    # positions, which do not depend on the Cartesian frame
    box = np.zeros(GRID.shape, dtype=np.float32)
    for i, voxel in enumerate(VOXELS):
        box[tuple(np.add(voxel, GRID.half_size))] = i + 1
    path = tmp_path / "map.ccp4"
    write_ccp4(path, GRID, box, scale)
    found = gemmi.read_ccp4_map(str(path))
    start = [found.header_i32(word) for word in (5, 6, 7)]
    values = np.array(found.grid, copy=True)
    cell = found.grid.unit_cell

    fraction = np.array(gemmi.UnitCell(*GRID.unit_cell).frac.mat.tolist())
    for i, voxel in enumerate(VOXELS):
        place = np.argwhere(values == i + 1)[0]
        fractional = (place + start) / np.array(values.shape)
        position = np.array(cell.orthogonalize(gemmi.Fractional(*fractional)).tolist())
        rlp = fraction.T @ (np.array(voxel) / GRID.ndiv)
        assert np.linalg.norm(position) == pytest.approx(
            scale * np.linalg.norm(rlp), rel=1e-5, abs=1e-9
        )
        # Components along the direct axes: rlp . a = h in any frame
        if i == 1:
            other = VOXELS[2]
            place = np.argwhere(values == 3)[0]
            fractional = (place + start) / np.array(values.shape)
            second = cell.orthogonalize(gemmi.Fractional(*fractional)).tolist()
            expected = rlp @ fraction.T @ (np.array(other) / GRID.ndiv)
            assert position @ np.array(second) == pytest.approx(
                scale**2 * expected, rel=1e-5
            )


def test_first_reciprocal_axis_is_along_x(written):
    cell = gemmi.read_ccp4_map(str(written[0])).grid.unit_cell
    along = cell.orthogonalize(gemmi.Fractional(1, 0, 0)).tolist()
    a_star = GRID.cell.reciprocal().parameters()[0]
    np.testing.assert_allclose(
        along, [100 * a_star * GRID.shape[0] / GRID.ndiv[0], 0, 0], rtol=1e-5
    )


def test_values_return_with_cctbx(written):
    map_reader = pytest.importorskip("iotbx.map_manager")
    path, box = written
    found = map_reader.map_manager(str(path))
    data = found.map_data()
    for i, voxel in enumerate(VOXELS):
        assert data[voxel] == i + 1
    assert data.origin() == tuple(-n for n in GRID.half_size)
