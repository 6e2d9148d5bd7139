from __future__ import annotations

import numpy as np
import pytest
from truth_ladder import SMALL, vary

from cctbx import uctbx

from dials_diffuse.grid import Grid
from dials_diffuse.simulation.sample import Sample
from dials_diffuse.simulation.structure import make_contents
from dials_diffuse.simulation.truth import true_map, true_voxels, truth_grid

SETTINGS = vary(
    SMALL,
    crystal={"unit_cell": uctbx.unit_cell((15, 18, 21, 90, 90, 90))},
    diffuse={"halo_length": 8.0},
    background={"solvent": 0.5, "compton": True},
)


@pytest.fixture(scope="module")
def sample():
    pytest.importorskip("xraylib")
    return Sample(SETTINGS, make_contents(SETTINGS), 0.6)


def brute_force(sample: Sample, grid: Grid, index: np.ndarray, n: int = 24) -> dict:
    """Means over n³ points of each voxel."""
    across = (np.arange(n) + 0.5) / n - 0.5
    points = np.stack(np.meshgrid(across, across, across), axis=-1).reshape(-1, 3)
    means = {name: [] for name in ("cloud", "halo", "solvent", "compton")}
    reciprocal = grid.cell.reciprocal()
    for voxel in index:
        hkl = (voxel + points) / np.array(grid.ndiv)
        metric = np.array(reciprocal.metrical_matrix())[[0, 3, 4, 3, 1, 5, 4, 5, 2]]
        s = np.sqrt(np.einsum("ni,ij,nj->n", hkl, metric.reshape(3, 3), hkl))
        means["cloud"].append(sample.map.cloud(hkl.T).mean())
        means["halo"].append(sample.map.halo(hkl.T).mean())
        means["solvent"].append(sample.solvent(s).mean())
        means["compton"].append(sample.compton(s).mean())
    return {name: np.array(values) for name, values in means.items()}


@pytest.mark.parametrize("ndiv", [1, 2, 3, 4])
def test_voxel_means_of_all_parts(sample, ndiv):
    grid = Grid((15.0, 18.0, 21.0, 90.0, 90.0, 90.0), (ndiv,) * 3, "P 2 2", 2.0)
    rng = np.random.default_rng(3)
    index = rng.choice(grid.asu_indices(), 12, replace=False)
    found = true_voxels(sample, grid, index)
    expected = brute_force(sample, grid, index)
    total = sum(expected.values())
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=3e-4 * total.mean())
    np.testing.assert_allclose(found["intensity"], total, rtol=1e-3)
    # negative control: the value at the centre is not the mean
    if ndiv == 1:
        assert np.abs(found["solvent"] / sample.solvent(grid.s(index)) - 1).max() > 0.01


def test_no_voxel(sample):
    grid = Grid((15.0, 18.0, 21.0, 90.0, 90.0, 90.0), (1, 1, 1), "P 2 2", 40.0)
    with pytest.raises(ValueError, match="No voxel lies within grid.d_min=40"):
        true_map(sample, grid)


def test_isotropic_tables_reach_beyond_the_last_voxels(sample):
    """A voxel at d_min sticks out by half its diagonal."""
    grid = truth_grid(vary(SETTINGS, grid={"d_min": 1 / 0.6}), sample, [])
    s = np.linspace(0.55, 1 / grid.d_min + 2 * grid.half_diagonal, 20)
    fine = Sample(SETTINGS, make_contents(SETTINGS), 1.0)
    np.testing.assert_allclose(sample.solvent(s), fine.solvent(s), rtol=1e-6)
    np.testing.assert_allclose(sample.compton(s), fine.compton(s), rtol=1e-6)
