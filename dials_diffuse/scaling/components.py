"""Components of the scaling model, of DIALS' family of scale components.

A factor is exp(Σ w p) of its parameters p, so that it is positive whatever they are; an
offset is unit · Σ w p. The weights w are those of the axes (``axes``). There are two
forms: that of all experiments together, which the refinement of ``dials.diffuse_scale``
has, with a value for each cell of the term; and that of one experiment, which the
scaling model of ``.expt`` files has, with a value for each reflection, as DIALS' own
components. Restraints are expectations in the sense of Bayes: second differences of the
parameters along smooth axes are taken to be distributed with the standard deviation
``smoothness``, the parameters themselves with ``size`` about 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, Sequence

import numpy as np
from scipy import sparse as scipy_sparse

from dxtbx import flumpy
from scitbx import sparse

from dials.algorithms.scaling.model.components.scale_components import (
    ScaleComponentBase,
)
from dials.array_family import flex
from dials_diffuse.scaling.axes import Axis, axis_from_dict, differences_along
from dials_diffuse.scaling.layout import Layout
from dials_scaling_ext import row_multiply

# Standard deviation of offsets below zero, in their unit: they are pushed up to it.
NEGATIVE = 1e-3


@dataclasses.dataclass(frozen=True)
class Prior:
    """What is expected of the parameters of a term.

    Args:
        smoothness: Standard deviation of second differences between knots.
        size: Standard deviation of the parameters themselves.
    """

    smoothness: float
    size: float


class DiffuseComponent(ScaleComponentBase):
    """What all components of the model have in common.

    Attributes:
        additive: Whether the component is an offset, which must not be multiplied.
    """

    null_parameter_value = 0.0
    additive = False
    prior: Prior
    unit = 1.0

    def __init__(
        self, initial_values: flex.double, parameter_esds: flex.double | None = None
    ) -> None:
        super().__init__(initial_values, parameter_esds)
        self._difference_matrix: scipy_sparse.csr_matrix | None = None

    def difference_matrix(self) -> scipy_sparse.csr_matrix:
        """Second differences of the parameters, a row for each."""
        raise NotImplementedError

    def calculate_restraints(self) -> tuple[flex.double, flex.double]:
        """Terms of the functional, and its gradient by the parameters."""
        p = flumpy.to_numpy(self._parameters)
        if self._difference_matrix is None:
            self._difference_matrix = self.difference_matrix()
        rough = self._difference_matrix @ p / self.prior.smoothness
        small = p / self.prior.size
        gradient = 2 * (
            self._difference_matrix.T @ rough / self.prior.smoothness
            + small / self.prior.size
        )
        terms = [rough**2, small**2]
        if self.additive:
            negative = np.minimum(p, 0) / NEGATIVE
            terms.append(negative**2)
            gradient += 2 * negative / NEGATIVE
        return flumpy.from_numpy(np.concatenate(terms)), flumpy.from_numpy(gradient)

    def restraint_curvature(self) -> np.ndarray:
        """Diagonal of the second derivatives of the restraints."""
        if self._difference_matrix is None:
            self._difference_matrix = self.difference_matrix()
        squares = self._difference_matrix.power(2).sum(axis=0).A1
        return 2 * (squares / self.prior.smoothness**2 + 1 / self.prior.size**2)


class JointComponent(DiffuseComponent):
    """A term for all experiments, with a value for each of its cells.

    Args:
        layout: Where parameters and cells are.
        prior: What is expected of the parameters.
        unit: Of offsets, photons s⁻¹ sr⁻¹; None for factors.
    """

    def __init__(self, layout: Layout, prior: Prior, unit: float | None = None) -> None:
        super().__init__(flex.double(layout.n_params, 0.0))
        self.layout, self.prior = layout, prior
        self.additive = unit is not None
        self.unit = 1.0 if unit is None else unit

    def difference_matrix(self) -> scipy_sparse.csr_matrix:
        return self.layout.differences()

    def cell_values(self) -> np.ndarray:
        """Factors, or offsets in photons s⁻¹ sr⁻¹, of all cells."""
        sums = self.layout.values(flumpy.to_numpy(self._parameters))
        return self.unit * sums if self.additive else np.exp(sums)

    def gradient(self, by_cell: np.ndarray) -> np.ndarray:
        """By the parameters, from that by ln(factor) or by the offset of each cell."""
        return self.unit * self.layout.gradient(by_cell)

    def curvature(self, by_cell: np.ndarray) -> np.ndarray:
        """Diagonal of the second derivatives, from that of the cells."""
        return self.unit**2 * self.layout.curvature(by_cell)

    # The interface of DIALS' scale components, cell by cell.

    def update_reflection_data(
        self, selection: Any = None, block_selections: Any = None
    ) -> None:
        self._n_refl = [self.layout.n_cells]

    def calculate_scales(self, block_id: int = 0) -> flex.double:
        return flumpy.from_numpy(self.cell_values())


class TermComponent(DiffuseComponent):
    """A term of the model of one experiment, with a value for each reflection.

    Args:
        axes: The axes of the term.
        initial_values: The parameters; the last axis is the fastest.
        prior: What is expected of them.
        parameter_esds: Their standard errors.
        unit: Of offsets, photons s⁻¹ sr⁻¹; None for factors.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        initial_values: flex.double,
        prior: Prior,
        parameter_esds: flex.double | None = None,
        unit: float | None = None,
    ) -> None:
        super().__init__(initial_values, parameter_esds)
        self.axes = tuple(axes)
        self.prior = prior
        self.additive = unit is not None
        self.unit = 1.0 if unit is None else unit
        self._weights: list[sparse.matrix] = []
        self._root: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of parameters along each axis."""
        return tuple(axis.n_params for axis in self.axes)

    def difference_matrix(self) -> scipy_sparse.csr_matrix:
        return differences_along(self.axes)

    def _restraint_root(self) -> np.ndarray:
        """Upper triangular U, so that the restraints of a factor are |U p|²."""
        if self._root is None:
            rough = self.difference_matrix().toarray() / self.prior.smoothness
            small = np.identity(self.n_params) / self.prior.size**2
            self._root = np.linalg.cholesky(rough.T @ rough + small).T
        return self._root

    def calculate_restraints(self) -> tuple[flex.double, flex.double]:
        terms, gradient = super().calculate_restraints()
        if not self.additive:
            # The engines of full matrices want as many terms as there are parameters.
            residuals = self._restraint_root() @ flumpy.to_numpy(self._parameters)
            terms = flumpy.from_numpy(residuals**2)
        return terms, gradient

    def calculate_jacobian_restraints(
        self,
    ) -> tuple[flex.double, sparse.matrix, flex.double]:
        """Residuals, their derivatives and weights, for the engines of full matrices."""
        root = self._restraint_root()
        residuals = flumpy.from_numpy(root @ flumpy.to_numpy(self._parameters))
        jacobian = _as_scitbx(scipy_sparse.csr_matrix(root))
        return residuals, jacobian, flex.double(self.n_params, 1.0)

    def weights(
        self, coordinates: Mapping[str, np.ndarray], n: int
    ) -> scipy_sparse.csr_matrix:
        """The weight of each parameter for each of n points, shape (n, n_params)."""
        product = scipy_sparse.csr_matrix(np.ones((n, 1)))
        for axis in self.axes:
            product = _row_products(product, axis.weights(coordinates[axis.coordinate]))
        return product

    def values(self, coordinates: Mapping[str, np.ndarray], n: int) -> np.ndarray:
        """Factors, or offsets in photons s⁻¹ sr⁻¹, at n points."""
        sums = self.weights(coordinates, n) @ flumpy.to_numpy(self._parameters)
        return self.unit * sums if self.additive else np.exp(sums)

    def update_reflection_data(
        self, selection: flex.bool | None = None, block_selections: Any = None
    ) -> None:
        data = {name: flumpy.to_numpy(values) for name, values in self.data.items()}
        n = len(data["id"])
        if selection is not None:
            selections = [flumpy.to_numpy(selection)]
        elif block_selections:
            selections = [flumpy.to_numpy(chosen) for chosen in block_selections]
        else:
            selections = [np.arange(n)]
        self._weights, self._n_refl = [], []
        for chosen in selections:
            points = {name: values[chosen] for name, values in data.items()}
            weights = self.weights(points, len(points["id"]))
            self._weights.append(_as_scitbx(weights))
            self._n_refl.append(weights.shape[0])

    def calculate_scales(self, block_id: int = 0) -> flex.double:
        sums = self._weights[block_id] * self._parameters
        return self.unit * sums if self.additive else flex.exp(sums)

    def calculate_scales_and_derivatives(
        self, block_id: int = 0
    ) -> tuple[flex.double, sparse.matrix]:
        values = self.calculate_scales(block_id)
        slope = flex.double(len(values), self.unit) if self.additive else values
        return values, row_multiply(self._weights[block_id], slope)

    def as_dict(self) -> dict[str, Any]:
        """What ``component_from_dict`` needs beside parameters and errors."""
        return {
            "axes": [axis.as_dict() for axis in self.axes],
            "prior": dataclasses.asdict(self.prior),
            "unit": self.unit if self.additive else None,
        }


def component_from_dict(
    config: Mapping[str, Any],
    parameters: Sequence[float],
    esds: Sequence[float] | None = None,
) -> TermComponent:
    """The component that ``TermComponent.as_dict`` described."""
    return TermComponent(
        [axis_from_dict(values) for values in config["axes"]],
        flex.double(parameters),
        Prior(**config["prior"]),
        flex.double(esds) if esds else None,
        config["unit"],
    )


def _row_products(
    a: scipy_sparse.csr_matrix, b: scipy_sparse.csr_matrix
) -> scipy_sparse.csr_matrix:
    """Row by row all products of an element of a and one of b, those of b fastest."""
    n_a, n_b = np.diff(a.indptr), np.diff(b.indptr)
    counts = n_a * n_b
    row = np.repeat(np.arange(a.shape[0]), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    i = a.indptr[row] + place // n_b[row]
    j = b.indptr[row] + place % n_b[row]
    column = a.indices[i].astype(np.int64) * b.shape[1] + b.indices[j]
    limits = np.concatenate([[0], np.cumsum(counts)])
    shape = (a.shape[0], a.shape[1] * b.shape[1])
    return scipy_sparse.csr_matrix((a.data[i] * b.data[j], column, limits), shape)


def _as_scitbx(matrix: scipy_sparse.csr_matrix) -> sparse.matrix:
    """The same matrix for scitbx, which stores it by columns."""
    columns = matrix.tocsc()
    elements = []
    for start, stop in zip(columns.indptr[:-1], columns.indptr[1:]):
        rows = columns.indices[start:stop].tolist()
        elements.append(dict(zip(rows, columns.data[start:stop].tolist())))
    return sparse.matrix(*matrix.shape, elements)
