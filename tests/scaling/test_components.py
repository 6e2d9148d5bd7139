from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import sparse

from dxtbx import flumpy
from scitbx.array_family import flex

from dials_diffuse.scaling import components
from dials_diffuse.scaling.axes import DecayAxis, SmoothAxis, StepAxis
from dials_diffuse.scaling.components import (
    JointComponent,
    Prior,
    TermComponent,
    component_from_dict,
)
from dials_diffuse.scaling.layout import Layout, Owner

PRIOR = Prior(smoothness=0.3, size=2.0)
AXES = {
    "number": (),
    "line": (SmoothAxis("phi", 0, 90, 20.0),),
    "decay": (SmoothAxis("phi", 0, 90, 30.0), DecayAxis(0.1, 0.5)),
    "surface": (
        StepAxis("panel", 2),
        SmoothAxis("u", -1, 1, 0.5),
        SmoothAxis("v", 0, 1, 0.4),
    ),
}
UNITS = [None, 3.0]
N_POINTS = 30


def coordinates(n: int = N_POINTS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "phi": rng.uniform(0, 90, n),
        "s": rng.uniform(0.1, 0.5, n),
        "panel": rng.integers(0, 2, n).astype(float),
        "u": rng.uniform(-1, 1, n),
        "v": rng.uniform(0, 1, n),
    }


def make(name: str, unit: float | None = None) -> TermComponent:
    axes = AXES[name]
    n = int(np.prod([axis.n_params for axis in axes]))
    values = np.random.default_rng(8).normal(0, 0.3, n)
    component = TermComponent(axes, flumpy.from_numpy(values), PRIOR, unit=unit)
    own = {axis.coordinate for axis in axes}
    points = coordinates()
    component.data = {name: flumpy.from_numpy(points[name]) for name in own}
    component.data["id"] = flex.double(range(N_POINTS))
    return component


def moved(component, p: np.ndarray):
    component.parameters = flex.double(p)
    return component


@pytest.mark.parametrize("name, unit", itertools.product(AXES, UNITS))
def test_derivatives(name, unit):
    component, step = make(name, unit), 1e-6
    component.update_reflection_data()
    scales, derivatives = component.calculate_scales_and_derivatives()
    assert component.n_refl == [N_POINTS]
    np.testing.assert_allclose(scales, component.calculate_scales())
    np.testing.assert_allclose(scales, component.values(coordinates(), N_POINTS))
    found = derivatives.as_dense_matrix().as_numpy_array()
    p = np.array(component.parameters)
    for i, direction in enumerate(step * np.eye(len(p))):
        above = np.array(moved(component, p + direction).calculate_scales())
        below = np.array(moved(component, p - direction).calculate_scales())
        np.testing.assert_allclose(found[:, i], (above - below) / (2 * step), atol=1e-7)
    assert np.abs(found).max() > 0.01


@pytest.mark.parametrize("name", AXES)
def test_selections_of_reflections(name):
    component = make(name)
    component.update_reflection_data()
    everything = np.array(component.calculate_scales())
    chosen = np.arange(N_POINTS) % 3 == 0
    component.update_reflection_data(selection=flumpy.from_numpy(chosen))
    np.testing.assert_array_equal(component.calculate_scales(), everything[chosen])
    blocks = [np.array([3, 1, 4]), np.array([2, 7])]
    component.update_reflection_data(
        block_selections=[flex.size_t(block.tolist()) for block in blocks]
    )
    assert component.n_refl == [3, 2]
    for i, block in enumerate(blocks):
        np.testing.assert_array_equal(component.calculate_scales(i), everything[block])


def joint(unit: float | None) -> JointComponent:
    axes = AXES["line"]
    component = JointComponent(Layout([Owner(0, axes), Owner(1, axes)]), PRIOR, unit)
    values = np.random.default_rng(9).normal(0, 0.3, component.n_params)
    return moved(component, values)


EVERY = [
    *(lambda unit, name=name: make(name, unit) for name in AXES),
    joint,
]


@pytest.mark.parametrize("maker, unit", itertools.product(EVERY, UNITS))
def test_restraints(maker, unit):
    """Gradient and curvature by differences of the sum of the terms."""
    component, step = maker(unit), 1e-3 if unit is None else 1e-6

    def total(p):
        return sum(moved(component, p).calculate_restraints()[0])

    p = np.array(component.parameters)
    expected = np.sum((component.difference_matrix() @ p) ** 2) / 0.3**2
    expected += np.sum(p**2) / 2.0**2
    if unit is not None:
        expected += np.sum(np.minimum(p, 0) ** 2) / components.NEGATIVE**2
    assert total(p) == pytest.approx(expected)
    gradient = np.array(moved(component, p).calculate_restraints()[1])
    shifts = step * np.eye(len(p))
    above = np.array([total(p + shift) for shift in shifts])
    below = np.array([total(p - shift) for shift in shifts])
    np.testing.assert_allclose(gradient, (above - below) / (2 * step), rtol=1e-3)
    if unit is None:
        curvature = (above - 2 * total(p) + below) / step**2
        found = component.restraint_curvature()
        np.testing.assert_allclose(found, curvature, rtol=1e-5)


@pytest.mark.parametrize("name", AXES)
def test_restraints_for_engines_of_full_matrices(name):
    """DIALS wants as many terms as parameters: Σ w r² and 2 Jᵀ w r must be the same."""
    component = make(name)
    terms, gradient = component.calculate_restraints()
    residuals, jacobian, weights = component.calculate_jacobian_restraints()
    assert len(terms) == len(residuals) == jacobian.n_rows == component.n_params
    residuals, weights = np.array(residuals), np.array(weights)
    assert np.sum(weights * residuals**2) == pytest.approx(sum(terms))
    matrix = jacobian.as_dense_matrix().as_numpy_array()
    np.testing.assert_allclose(2 * matrix.T @ (weights * residuals), gradient)
    np.testing.assert_allclose(matrix @ np.array(component.parameters), residuals)


@pytest.mark.parametrize("unit", UNITS)
def test_derivatives_of_joint_components(unit):
    """Of an arbitrary function of the cells, by ln(factor) or by the offset."""
    component, step = joint(unit), 1e-6
    by_cell = np.random.default_rng(10).normal(size=component.layout.n_cells)

    def function(p):
        values = moved(component, p).cell_values()
        return by_cell @ (np.log(values) if unit is None else values)

    p = np.array(component.parameters)
    expected = [
        (function(p + d) - function(p - d)) / (2 * step) for d in step * np.eye(len(p))
    ]
    np.testing.assert_allclose(component.gradient(by_cell), expected, rtol=1e-6)
    component.update_reflection_data()
    assert component.n_refl == [component.layout.n_cells]
    np.testing.assert_array_equal(component.calculate_scales(), component.cell_values())


def test_no_effect_at_first():
    layout = Layout([Owner(0, AXES["line"])])
    assert np.all(JointComponent(layout, PRIOR).cell_values() == 1)
    assert np.all(JointComponent(layout, PRIOR, 5.0).cell_values() == 0)


@pytest.mark.parametrize("name, unit", itertools.product(AXES, UNITS))
def test_serialisation(name, unit):
    component = make(name, unit)
    values, esds = list(component.parameters), [0.1] * component.n_params
    again = component_from_dict(component.as_dict(), values, esds)
    assert again.axes == component.axes
    assert again.prior == component.prior
    assert (again.additive, again.unit) == (component.additive, component.unit)
    assert list(again.parameter_esds) == esds
    points = coordinates()
    np.testing.assert_array_equal(
        again.values(points, N_POINTS), component.values(points, N_POINTS)
    )


def test_row_products():
    """Also where a row has no elements, or the matrix none."""
    rng = np.random.default_rng(11)
    a = rng.random((6, 4)) * (rng.random((6, 4)) < 0.5)
    b = rng.random((6, 3)) * (rng.random((6, 3)) < 0.5)
    a[2], b[4] = 0, 0
    expected = np.einsum("ij,ik->ijk", a, b).reshape(6, 12)
    found = components._row_products(sparse.csr_matrix(a), sparse.csr_matrix(b))
    np.testing.assert_allclose(found.toarray(), expected)
    assert np.count_nonzero(expected) > 10
    found = components._row_products(
        sparse.csr_matrix(np.zeros((6, 4))), sparse.csr_matrix(b)
    )
    assert found.shape == (6, 12)
    assert found.nnz == 0
