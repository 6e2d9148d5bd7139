from __future__ import annotations

import numpy as np
import pytest

from dxtbx import flumpy
from scitbx.array_family import flex

from dials_diffuse.scaling.axes import DecayAxis, SmoothAxis, StepAxis
from dials_diffuse.scaling.components import Prior, TermComponent
from dials_diffuse.scaling.layout import Layout, Owner, contract

PRIOR = Prior(smoothness=0.3, size=2.0)
SWEEP = (SmoothAxis("phi", 0, 90, 20.0), DecayAxis(0.1, 0.5))
OTHER = (SmoothAxis("phi", 30, 60, 10.0, 3), DecayAxis(0.1, 0.5))
SURFACE = (StepAxis("panel", 2), *(SmoothAxis(x, 0, 1, 0.4, 2) for x in ("u", "v")))
STILL = ()

# Experiments 0 and 3 have the same axes, 1 and 5 share an owner, 4 does without.
OWNERS = [
    Owner("a", SWEEP),
    Owner("surface", SURFACE),
    Owner("b", OTHER),
    Owner("c", SWEEP),
    None,
    Owner("surface", SURFACE),
    Owner("d", STILL),
    Owner("e", STILL),
]


@pytest.fixture
def layout():
    return Layout(OWNERS)


def parameters(layout: Layout) -> np.ndarray:
    return np.random.default_rng(7).normal(0, 1, layout.n_params)


def all_cells(axes: tuple) -> dict[str, np.ndarray]:
    """The centres of all cells of a term, the last axis the fastest."""
    mesh = np.meshgrid(*(axis.centres() for axis in axes), indexing="ij")
    return {axis.coordinate: x.ravel() for axis, x in zip(axes, mesh)}


def test_numbers(layout):
    n = {axes: int(np.prod([a.n_params for a in axes])) for axes in (SWEEP, OTHER)}
    n_surface = 2 * SURFACE[1].n_params ** 2
    assert layout.n_params == 2 * n[SWEEP] + n[OTHER] + n_surface + 2
    n_cells = [np.prod([a.n_cells for a in axes]) for axes in (SWEEP, OTHER, SURFACE)]
    assert layout.n_cells == 1 + 2 * n_cells[0] + n_cells[1] + n_cells[2] + 2
    assert layout.coordinates == {"phi", "s", "panel", "u", "v"}
    assert layout.of_experiment(4) is None


def test_values_are_those_of_the_components_of_the_experiments(layout):
    p = parameters(layout)
    values = layout.values(p)
    assert values[0] == 0
    seen = [0]
    for number, owner in enumerate(OWNERS):
        n = int(np.prod([a.n_cells for a in owner.axes])) if owner else 1
        coordinates = all_cells(owner.axes) if owner else {}
        experiment = np.full(n, number)
        everything = {x: np.zeros(n) for x in layout.coordinates} | coordinates
        cell = layout.cell(experiment, everything)
        assert cell.dtype == np.int32
        if owner is None:
            assert cell == [0]
            continue
        axes, chosen = layout.of_experiment(number)
        assert axes == owner.axes
        initial = flumpy.from_numpy(p[chosen].copy())
        component = TermComponent(axes, initial, PRIOR)
        expected = np.log(component.values(coordinates, n))
        np.testing.assert_allclose(values[cell], expected, atol=1e-12)
        assert len(np.unique(cell)) == n
        seen += cell.tolist()
    assert sorted(set(seen)) == list(range(layout.n_cells))


def test_only_experiments_of_one_owner_share(layout):
    of = [layout.of_experiment(i) for i in range(len(OWNERS))]
    assert of[1] == of[5]
    places = [set(range(*x[1].indices(layout.n_params))) for x in of if x]
    del places[-3]  # of the second experiment of the surface
    assert sum(map(len, places)) == len(set().union(*places)) == layout.n_params


def test_experiments_are_told_apart_row_by_row(layout):
    rng = np.random.default_rng(8)
    n = 400
    experiment = rng.integers(0, len(OWNERS), n)
    coordinates = {
        "phi": rng.uniform(-10, 100, n),
        "s": rng.uniform(0.1, 0.5, n),
        "panel": rng.integers(0, 2, n),
        "u": rng.uniform(0, 1, n),
        "v": rng.uniform(0, 1, n),
    }
    together = layout.cell(experiment, coordinates)
    alone = [
        layout.cell(experiment[[i]], {k: v[[i]] for k, v in coordinates.items()})[0]
        for i in range(n)
    ]
    np.testing.assert_array_equal(together, alone)


def dense(layout: Layout) -> np.ndarray:
    """The matrix from parameters to cells."""
    return np.stack([layout.values(row) for row in np.eye(layout.n_params)], axis=1)


def test_gradient_is_the_transpose_of_values(layout):
    by_cell = np.random.default_rng(9).normal(0, 1, layout.n_cells)
    matrix = dense(layout)
    np.testing.assert_allclose(layout.gradient(by_cell), matrix.T @ by_cell, atol=1e-10)
    np.testing.assert_allclose(
        layout.curvature(by_cell), (matrix**2).T @ by_cell, atol=1e-10
    )


def test_differences_are_those_of_the_components(layout):
    p = parameters(layout)
    total = np.sum((layout.differences() @ p) ** 2)
    expected, seen = 0.0, set()
    for number, owner in enumerate(OWNERS):
        if owner is None or owner.key in seen:
            continue
        seen.add(owner.key)
        axes, chosen = layout.of_experiment(number)
        component = TermComponent(axes, flex.double(p[chosen]), PRIOR)
        expected += np.sum((component.difference_matrix() @ p[chosen]) ** 2)
    assert total == pytest.approx(expected)
    assert total > 10


def test_contract():
    rng = np.random.default_rng(10)
    values = rng.normal(size=(4, 2, 3))
    a, b = rng.normal(size=(5, 2)), rng.normal(size=(6, 3))
    expected = np.einsum("ij,kl,ojl->oik", a, b, values)
    np.testing.assert_allclose(contract([a, b], values), expected)
    np.testing.assert_array_equal(contract([], values), values)


@pytest.mark.parametrize("owners", [[], [None, None]])
def test_nobody_has_the_term(owners):
    layout = Layout(owners)
    assert (layout.n_params, layout.n_cells) == (0, 1)
    assert layout.differences().shape == (0, 0)
    np.testing.assert_array_equal(layout.values(np.empty(0)), [0])
