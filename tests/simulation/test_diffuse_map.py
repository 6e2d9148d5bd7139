from __future__ import annotations

import copy
import functools
import itertools

import numpy as np
import pytest
from scipy.integrate import trapezoid

from cctbx import sgtbx

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid
from dials_diffuse.simulation import diffuse_map
from dials_diffuse.simulation.diffuse_map import DiffuseMap, HaloKernel, Modulation
from dials_diffuse.simulation.settings import DiffuseSettings
from dials_diffuse.simulation.structure import (
    BraggIntensities,
    CellContents,
    form_factor,
    random_contents,
)

CELLS = {
    "P 1": (23.0, 27.0, 31.0, 82.0, 97.0, 104.0),
    "P 1 1 21": (24.0, 28.0, 31.0, 90.0, 90.0, 106.0),
    "I 1 2 1": (24.0, 31.0, 28.0, 90.0, 96.0, 90.0),
    "P 1 n 1": (24.0, 31.0, 28.0, 90.0, 106.0, 90.0),
    "P 21 21 21": (26.0, 31.0, 52.0, 90.0, 90.0, 90.0),
    "P 41": (25.0, 25.0, 34.0, 90.0, 90.0, 90.0),
    "R 3 :R": (26.0, 26.0, 26.0, 82.0, 82.0, 82.0),
    "P 61": (24.0, 24.0, 33.0, 90.0, 90.0, 120.0),
    "F 2 3": (42.0, 42.0, 42.0, 90.0, 90.0, 90.0),
}


@functools.lru_cache(maxsize=None)
def make_contents(symbol: str, b_iso: float) -> tuple[CellContents, BraggIntensities]:
    contents = random_contents(symbol, CELLS[symbol], 0.8, b_iso, 3)
    return contents, BraggIntensities(contents, 2.5)


def make_map(
    symbol: str, seed: int = 5, b_iso: float = 20.0, **settings: float
) -> DiffuseMap:
    contents, bragg = make_contents(symbol, b_iso)
    return DiffuseMap(contents, bragg, DiffuseSettings(**settings), seed)


def make_grid(symbol: str, ndiv: tuple[int, int, int]) -> Grid:
    group = sgtbx.space_group_info(symbol).type().hall_symbol()
    return Grid(CELLS[symbol], ndiv, group, d_min=4.0)


def reciprocal_vectors(symbol: str) -> np.ndarray:
    """Columns a*, b*, c* from a, b, c, without cctbx."""
    a, b, c, *angles = CELLS[symbol]
    alpha, beta, gamma = np.radians(angles)
    x = (np.cos(alpha) - np.cos(beta) * np.cos(gamma)) / np.sin(gamma)
    z = np.sqrt(1 - np.cos(beta) ** 2 - x**2)
    direct = np.array(
        [
            [a, 0, 0],
            [b * np.cos(gamma), b * np.sin(gamma), 0],
            [c * np.cos(beta), c * x, c * z],
        ]
    )
    return np.linalg.inv(direct)


def near_lattice_points(n: int, distance: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.integers(-6, 7, (3, n)) + rng.uniform(-distance, distance, (3, n))


@pytest.mark.parametrize("symbol", CELLS)
def test_map_has_the_laue_symmetry(symbol):
    diffuse = make_map(symbol)
    hkl = near_lattice_points(300)
    laue = symmetry.laue_group(sgtbx.space_group_info(symbol).group())
    cloud, halo = diffuse.cloud(hkl), diffuse.halo(hkl)
    assert np.count_nonzero(halo) > 10
    for rotation in symmetry.rotation_matrices(laue):
        turned = np.einsum("in,ij->jn", hkl, rotation)
        np.testing.assert_allclose(diffuse.cloud(turned), cloud, rtol=1e-10)
        np.testing.assert_allclose(diffuse.halo(turned), halo, rtol=1e-8)


def test_map_has_no_more_than_the_laue_symmetry():
    diffuse = make_map("P 1 1 21")
    hkl = near_lattice_points(300)
    for part in (diffuse.cloud, diffuse.halo):
        values = part(hkl)
        np.testing.assert_allclose(part(hkl * [[-1], [-1], [1]]), values)
        assert not np.allclose(part(hkl * [[-1], [1], [-1]]), values, rtol=0.1)


@pytest.mark.parametrize("symbol", CELLS)
def test_parts_are_positive_and_deviate_as_much_as_they_should(symbol):
    diffuse = make_map(symbol, contrast=0.9)
    hkl = np.random.default_rng(7).uniform(-6, 6, (3, 20000))
    modulation = diffuse.modulation.at(hkl)
    assert np.abs(modulation).max() <= 1
    assert modulation.std() > 0.1
    assert diffuse.modulation.at(np.zeros((3, 1)))[0] == pytest.approx(1.0)
    assert np.all(diffuse.cloud(hkl) > 0)
    assert np.all(diffuse.halo(hkl) >= 0)
    s = np.linalg.norm(reciprocal_vectors(symbol) @ hkl, axis=0)
    np.testing.assert_allclose(
        diffuse.cloud(hkl), diffuse.isotropic(s) * (1 + 0.9 * modulation), rtol=1e-6
    )
    np.testing.assert_allclose(
        diffuse.intensity(hkl), diffuse.cloud(hkl) + diffuse.halo(hkl), rtol=1e-12
    )


@pytest.mark.parametrize("symbol", CELLS)
def test_modulation_is_a_mean_over_equivalent_vectors(symbol):
    modulation = make_map(symbol).modulation
    hkl = np.random.default_rng(7).uniform(-6, 6, (3, 50))
    u = modulation.frequencies * modulation.steps  # fractional
    expected = modulation.weights @ np.cos(2 * np.pi * u @ hkl)
    np.testing.assert_allclose(modulation.at(hkl), expected, atol=1e-13)
    # The vectors come in whole orbits, with the length that was asked for.
    orbits = u.reshape(5, -1, 3)
    group = sgtbx.space_group_info(symbol).group().build_derived_point_group()
    for orbit, weights in zip(orbits, modulation.weights.reshape(5, -1)):
        assert np.ptp(weights) == 0
        for op in group.all_ops():
            turned = np.array([op * tuple(v) for v in orbit])
            for v in np.concatenate([turned, -turned]):
                assert np.abs(orbit - v).max(axis=1).min() < 1e-12
    lengths = np.linalg.norm(u @ np.linalg.inv(reciprocal_vectors(symbol)), axis=1)
    assert lengths.mean() == pytest.approx(8.0)
    assert modulation.weights.sum() == pytest.approx(1)
    assert modulation.weights.min() > 0


def test_isotropic_part_is_what_independent_displacements_take_from_bragg_peaks():
    diffuse = make_map("P 1", b_iso=0.0)
    assert diffuse.isotropic(np.array([0.5]))[0] == 0
    contents = random_contents("P 1", CELLS["P 1"], 0.5, 20.0, 3)
    scatterers = contents.structure.scatterers()
    for i, atom in enumerate(scatterers):
        atom.u_iso = 0.05 + 0.01 * (i % 37)
    diffuse = DiffuseMap(
        CellContents(contents.structure, 300.0),
        BraggIntensities(contents, 4.0),
        DiffuseSettings(),
        5,
    )
    s = np.array([[0.003, 0.02, 0.11], [0.49, 0.83, 1.37]])
    expected = np.zeros(s.shape)
    for atom in scatterers:
        # <|F|²> - |<F>|² of a Gaussian with the variance u_iso along each direction
        bragg = np.abs(np.exp(-0.5 * (2 * np.pi * s) ** 2 * atom.u_iso)) ** 2
        expected += form_factor(atom.scattering_type, s) ** 2 * (1 - bragg)
    np.testing.assert_allclose(
        diffuse.isotropic(s), expected, rtol=1e-6, atol=1e-7 * 6e3
    )


def test_table_of_the_isotropic_part_does_not_depend_on_its_range():
    s = np.linspace(0.01, 0.3, 50)
    first, second = make_map("P 1"), make_map("P 1")
    second.isotropic(np.array([2.0]))
    np.testing.assert_allclose(first.isotropic(s), second.isotropic(s), rtol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"contrast": 0.0}, {"n_terms": 0}, {"length": 0.0}]
)
def test_cloud_without_features_is_isotropic(settings):
    diffuse = make_map("P 61", halo_displacement=0.0, **settings)
    hkl = near_lattice_points(100)
    s = np.linalg.norm(reciprocal_vectors("P 61") @ hkl, axis=0)
    np.testing.assert_allclose(diffuse.intensity(hkl), diffuse.isotropic(s), rtol=1e-6)
    means = diffuse.voxel_means(make_grid("P 61", (2, 2, 2)), np.array([[1, 2, 3]]))
    assert means["halo"] == [0.0] and means["cloud"][0] > 0


def test_more_terms_than_unique_vectors():
    with pytest.raises(ValueError, match="n_terms=99 is too large: .* unique vectors"):
        make_map("F 2 3", n_terms=99)


def box_means(modulation: Modulation, hkl: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Means of the polynomial over boxes of some width, shape (3,), about hkl, (3, n).

    <cos(2π h·u)> = cos(2π h·u) Π_i sinc(width_i u_i),    sinc x = sin(πx)/(πx)
    """
    u = modulation.frequencies * modulation.steps
    smoothed = modulation.weights * np.prod(np.sinc(width * u), axis=1)
    return smoothed @ np.cos(2 * np.pi * (u @ hkl))


@pytest.mark.parametrize("symbol, ndiv", [("P 1", (2, 3, 1)), ("P 61", (2, 2, 3))])
def test_means_of_the_modulation_in_closed_form(symbol, ndiv, monkeypatch):
    diffuse = make_map(symbol, length=14.0)
    # A constant isotropic part leaves the polynomial alone.
    monkeypatch.setattr(diffuse._isotropic, "at_s_squared", np.ones_like)
    grid = make_grid(symbol, ndiv)
    index = np.random.default_rng(7).integers(-9, 10, (200, 3))
    mean = box_means(diffuse.modulation, (index / ndiv).T, 1 / np.array(ndiv))
    cloud = diffuse.voxel_means(grid, index)["cloud"]
    np.testing.assert_allclose(cloud, 1 + 0.6 * mean, atol=1e-6)
    # The mean is not the value at the centre.
    centre = 1 + 0.6 * diffuse.modulation.at((index / ndiv).T)
    assert np.abs(cloud - centre).max() > 0.01


@pytest.mark.parametrize("symbol", ["P 1", "P 61"])
@pytest.mark.parametrize("b_iso", [5.0, 80.0])
def test_cloud_means_have_converged(symbol, b_iso):
    diffuse = make_map(symbol, b_iso=b_iso, length=14.0)
    grid = make_grid(symbol, (1, 1, 1))
    index = np.random.default_rng(7).integers(-9, 10, (60, 3))
    index[0] = 0
    chosen = diffuse.voxel_means(grid, index)["cloud"]
    many = diffuse.voxel_means(grid, index, nodes=16)["cloud"]
    np.testing.assert_allclose(chosen, many, rtol=1e-5)
    few = diffuse.voxel_means(grid, index, nodes=1)["cloud"]
    assert np.abs(few / many - 1).max() > 1e-3


def test_halo_is_that_of_liquid_like_motions():
    diffuse = make_map("P 1", halo_displacement=0.3, halo_length=25.0)
    b = reciprocal_vectors("P 1")
    hkl = near_lattice_points(400)
    nearest = np.rint(hkl)
    q = np.linalg.norm(b @ (hkl - nearest), axis=0)
    s = np.linalg.norm(b @ hkl, axis=0)
    gamma = 8 * np.pi * 25.0**3 / (1 + 4 * np.pi**2 * 25.0**2 * q**2) ** 2
    cutoff = 0.5 / 31.0
    taper = np.where(q < cutoff, (1 - (q / cutoff) ** 2) ** 2, 0.0)
    intensity = diffuse._bragg.at(*nearest.astype(int))
    expected = 4 * np.pi**2 * 0.3**2 * s**2 * intensity * gamma * taper
    expected *= np.linalg.det(b)  # 1/V
    assert np.count_nonzero(expected) > 50 and np.any(taper == 0)
    np.testing.assert_allclose(diffuse.halo(hkl), expected, rtol=1e-6)


@pytest.mark.parametrize("symbol", ["P 1", "I 1 2 1", "P 61"])
def test_halos_of_two_lattice_points_do_not_meet(symbol):
    kernel = make_map(symbol).halo_kernel
    b = reciprocal_vectors(symbol)
    hkl = np.random.default_rng(7).uniform(-0.5, 0.5, (3, 20000))
    shifts = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
    q = np.linalg.norm(b @ (hkl - shifts[:, :, None]), axis=1)
    inside = q < kernel.cutoff
    assert inside.sum(axis=0).max() == 1
    assert np.array_equal(shifts[inside.any(axis=1)], [[0, 0, 0]])


def panels(half: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-half, half], finer towards the middle."""
    edges = half * np.array([0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
    edges = np.concatenate([-edges[:0:-1], edges])
    x, w = np.polynomial.legendre.leggauss(6)
    width = np.diff(edges)[:, None]
    nodes = (edges[:-1, None] + width * (x + 1) / 2).ravel()
    return nodes, (width * w / 2 / (2 * half)).ravel()


@pytest.mark.parametrize("symbol", ["P 1", "P 61"])
@pytest.mark.parametrize("length", [5.0, 40.0])
@pytest.mark.parametrize("ndiv", [1, 2, 3])
def test_halo_means_by_brute_force(symbol, length, ndiv):
    diffuse = make_map(symbol, halo_length=length)
    grid = make_grid(symbol, (ndiv, ndiv, ndiv))
    # Around the lattice point (1 -2 2), also half-way to the next ones
    index = ndiv * np.array([1, -2, 2]) + [[0, 0, 0], [0, 1, 0], [1, 0, -1], [-1, 1, 1]]
    means = diffuse.voxel_means(grid, index)["halo"]
    x, w = panels(0.5 / ndiv)
    offsets = np.stack(np.meshgrid(x, x, x, indexing="ij")).reshape(3, -1)
    weights = np.einsum("i,j,k->ijk", w, w, w).ravel()
    expected = [diffuse.halo(n[:, None] / ndiv + offsets) @ weights for n in index]
    np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5 * max(expected))


def test_halo_of_one_reflection_is_shared_by_the_voxels_around_it():
    diffuse = make_map("P 1", halo_length=30.0)
    values = np.zeros_like(diffuse._bragg.values)
    values[tuple(np.array(values.shape) // 2 + [2, 1, -1])] = 1e6
    diffuse._bragg = copy.copy(diffuse._bragg)
    diffuse._bragg.values = values

    def total(ndiv: int) -> float:
        index = np.stack(np.meshgrid(*[np.arange(-3, 4) * ndiv] * 3, indexing="ij"))
        index = index.reshape(3, -1).T
        around = np.arange(ndiv) - ndiv // 2
        offsets = np.stack(np.meshgrid(around, around, around)).reshape(3, 1, -1)
        voxels = (index.T[:, :, None] + offsets).reshape(3, -1).T
        means = diffuse.voxel_means(make_grid("P 1", (ndiv,) * 3), voxels)["halo"]
        assert 0 < np.count_nonzero(means) <= (ndiv + 1) ** 3
        return means.sum() / ndiv**3

    for ndiv in (2, 3, 4):
        assert total(ndiv) == pytest.approx(total(1), rel=1e-5)


@pytest.mark.parametrize("length", [1.0, 30.0, 300.0, 3000.0])
def test_cell_average_of_the_halo_is_a_radial_integral(length):
    contents, _ = make_contents("P 1", 20.0)
    kernel = HaloKernel(contents, 0.25, length)
    means = kernel.box_moments(np.array([2, 3, 4]))
    # Voxels half-way between lattice points count once for each of them.
    sums = means.sum(axis=(0, 1, 2)) / (24 * contents.volume)
    # A fine trapezoidal rule in log q
    log_q = np.linspace(np.log(1e-9), np.log(kernel.cutoff), 400001)
    q = np.exp(log_q)
    integrand = 4 * np.pi * q**3 * kernel.at(q**2)
    assert sums[0] == pytest.approx(trapezoid(integrand, log_q), rel=1e-5)
    assert sums[4] == pytest.approx(trapezoid(integrand * q**2, log_q), rel=1e-5)
    np.testing.assert_allclose(sums[1:4], 0.0, atol=1e-6 * sums[0] * kernel.cutoff)
    # Most of a long correlation is in the voxel of the lattice point itself.
    share = means[1, 1, 2, 0] / means[..., 0].sum()
    assert (share > 0.9) == (length >= 300)


def test_moments_of_the_halo_have_converged():
    contents, _ = make_contents("P 61", 20.0)
    for length in (1.0, 40.0, 1000.0):
        kernel = HaloKernel(contents, 0.25, length)
        few = kernel.box_moments(np.array([1, 1, 2]))
        many = kernel.box_moments(np.array([1, 1, 2]), 40)
        q = kernel.cutoff
        scale = many[..., 0].max() * np.array([1, q, q, q, q * q])
        np.testing.assert_allclose(few / scale, many / scale, atol=5e-6)


@pytest.mark.parametrize(
    "symbol, ndiv", [("P 41", (2, 2, 3)), ("P 61", (2, 2, 1)), ("R 3 :R", (1, 1, 1))]
)
def test_equivalent_voxels_have_the_same_merged_mean(symbol, ndiv):
    diffuse = make_map(symbol, length=14.0)
    grid = make_grid(symbol, ndiv)
    index = np.random.default_rng(7).integers(-5, 6, (40, 3))
    merged = diffuse.merged_voxel_means(grid, index)
    single = [
        diffuse.voxel_means(grid, index @ rotation) for rotation in grid.rotations
    ]
    for name, means in merged.items():
        every = np.array([s[name] for s in single])
        tolerance = 1e-5 * means.mean()
        np.testing.assert_allclose(means, every.mean(axis=0), atol=tolerance)
        # Only hexagonal voxels are turned into others of another shape.
        same = np.ptp(every, axis=0).max() < tolerance
        assert same == (symbol != "P 61")
        turned = diffuse.merged_voxel_means(grid, index @ grid.rotations[3])
        np.testing.assert_allclose(turned[name], means, atol=tolerance)


def test_map_follows_from_the_seed():
    hkl = near_lattice_points(50)
    values = make_map("P 41", seed=1).cloud(hkl)
    np.testing.assert_array_equal(make_map("P 41", seed=1).cloud(hkl), values)
    assert not np.allclose(make_map("P 41", seed=2).cloud(hkl), values, rtol=0.05)


def test_points_may_have_any_shape_and_number():
    diffuse = make_map("P 1")
    hkl = near_lattice_points(2 * diffuse_map.CHUNK + 6)
    values = diffuse.intensity(hkl)
    folded = diffuse.intensity(hkl.reshape(3, 2, -1))
    assert folded.shape == (2, diffuse_map.CHUNK + 3)
    np.testing.assert_array_equal(folded.ravel(), values)
    some = [0, diffuse_map.CHUNK, 2 * diffuse_map.CHUNK + 5]
    one_by_one = [diffuse.intensity(hkl[:, [i]])[0] for i in some]
    np.testing.assert_allclose(values[some], one_by_one, rtol=1e-12)
    assert diffuse.intensity(np.zeros((3, 0))).shape == (0,)


def test_voxels_in_chunks(monkeypatch):
    diffuse = make_map("P 1")
    grid = make_grid("P 1", (2, 2, 2))
    index = np.random.default_rng(7).integers(-9, 10, (50, 3))
    whole = diffuse.voxel_means(grid, index)
    monkeypatch.setattr(diffuse_map, "VOXEL_CHUNK", 7)
    parts = diffuse.voxel_means(grid, index)
    for name in ("cloud", "halo"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-12)
    nothing = diffuse.voxel_means(grid, np.empty((0, 3), dtype=int))
    assert nothing["cloud"].shape == nothing["halo"].shape == (0,)
