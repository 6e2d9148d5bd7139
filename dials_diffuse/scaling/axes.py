"""Axes along which a term of the scaling model varies.

An axis knows which coordinate of an observation it goes by, how many parameters it has,
and the weight of each at any point. A term of several axes has the product of their
weights. To save time a refinement looks at the cells of an axis only: every observation
takes the value at the middle of its cell.
"""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar, Mapping, Sequence

import numpy as np
from scipy import sparse

from dxtbx import flumpy

from dials.algorithms.scaling.model.components.smooth_scale_components import (
    GaussianSmoother1D,
    SmoothMixin,
)

POINTS_PER_CALL = 1 << 16  # bounds the memory of the dense weights


class Axis(abc.ABC):
    """Parameters along one coordinate.

    Attributes:
        coordinate: Name of the coordinate of observations (see ``coordinates``).
        n_params: Number of parameters.
        n_cells: Number of cells.
    """

    kind: ClassVar[str]
    coordinate: str
    n_params: int
    n_cells: int

    @abc.abstractmethod
    def weights(self, x: np.ndarray) -> sparse.csr_matrix:
        """The weight of each parameter at points, shape (len(x), n_params)."""

    @abc.abstractmethod
    def cell(self, x: np.ndarray) -> np.ndarray:
        """The cell of each point, int32; points beyond the ends are in the last cells."""

    @abc.abstractmethod
    def centres(self) -> np.ndarray:
        """The coordinate of the middle of each cell."""

    def differences(self) -> sparse.csr_matrix:
        """Second differences of the parameters, which are small if the term is smooth."""
        return sparse.csr_matrix((0, self.n_params))

    @property
    def is_partition(self) -> bool:
        """Whether the weights at each point add up to 1."""
        return True

    @abc.abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """What ``axis_from_dict`` needs."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Axis) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().items()))


class RangeAxis(Axis):
    """An axis with cells of equal width between two limits.

    Attributes:
        low: Lower limit of the coordinate.
        high: Upper limit.
    """

    low: float
    high: float

    def cell(self, x: np.ndarray) -> np.ndarray:
        place = (np.asarray(x) - self.low) * (self.n_cells / (self.high - self.low))
        return np.clip(place, 0, self.n_cells - 1).astype(np.int32)

    def centres(self) -> np.ndarray:
        width = (self.high - self.low) / self.n_cells
        return self.low + width * (np.arange(self.n_cells) + 0.5)


class SmoothAxis(RangeAxis):
    """Knots at equal distances with the Gaussian smoother of DIALS between them.

    Args:
        coordinate: Name of the coordinate.
        low: Beginning of the range.
        high: End of the range.
        interval: Greatest distance of knots; it is adapted to the range.
        cells_per_interval: Number of cells between two knots.
    """

    kind = "smooth"

    def __init__(
        self,
        coordinate: str,
        low: float,
        high: float,
        interval: float,
        cells_per_interval: int = 8,
    ) -> None:
        if not (high > low and interval > 0):
            raise ValueError(
                f"a smooth axis of {coordinate} needs a range and a positive interval, "
                f"not {low:g} to {high:g} by {interval:g}"
            )
        self.coordinate = coordinate
        self.low, self.high = float(low), float(high)
        self.n_intervals = max(1, math.ceil((high - low) / interval - 1e-6))
        self.cells_per_interval = cells_per_interval
        # Two or three knots at and between the ends, else one more beyond either end.
        self.n_params = self.n_intervals + (1 if self.n_intervals < 3 else 2)
        assert SmoothMixin.nparam_to_val(self.n_params) == self.n_intervals
        self.n_cells = self.n_intervals * cells_per_interval

    @property
    def _step(self) -> float:
        return (self.high - self.low) / self.n_intervals

    def weights(self, x: np.ndarray) -> sparse.csr_matrix:
        smoother = GaussianSmoother1D((0, self.n_intervals), self.n_intervals)
        unused = flumpy.from_numpy(np.zeros(self.n_params))
        scaled = np.clip((np.asarray(x) - self.low) / self._step, 0, self.n_intervals)
        n = len(scaled)
        if n % POINTS_PER_CALL == 1:  # the smoother wants two points at least
            scaled = np.append(scaled, scaled[-1])
        parts = []
        for start in range(0, len(scaled), POINTS_PER_CALL):
            points = flumpy.from_numpy(scaled[start : start + POINTS_PER_CALL].copy())
            _, weight, total = smoother.multi_value_weight(points, unused)
            dense = weight.as_dense_matrix().as_numpy_array()
            parts.append(sparse.csr_matrix(dense / flumpy.to_numpy(total)[:, None]))
        if not parts:
            return sparse.csr_matrix((0, self.n_params))
        return sparse.vstack(parts, format="csr")[:n]

    def differences(self) -> sparse.csr_matrix:
        n = self.n_params
        if n < 3:
            return sparse.csr_matrix((0, n))
        return sparse.diags([1.0, -2.0, 1.0], [0, 1, 2], shape=(n - 2, n), format="csr")

    def knots(self) -> np.ndarray:
        """The coordinate of each parameter."""
        smoother = GaussianSmoother1D((0, self.n_intervals), self.n_intervals)
        return self.low + self._step * np.array(smoother.positions())

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "coordinate": self.coordinate,
            "low": self.low,
            "high": self.high,
            "interval": self._step,
            "cells_per_interval": self.cells_per_interval,
        }


class StepAxis(Axis):
    """One parameter for each value of a coordinate of whole numbers from 0.

    Args:
        coordinate: Name of the coordinate.
        n: Number of values.
    """

    kind = "steps"

    def __init__(self, coordinate: str, n: int) -> None:
        self.coordinate = coordinate
        self.n_params = self.n_cells = n

    def weights(self, x: np.ndarray) -> sparse.csr_matrix:
        cell = self.cell(x)
        limits = np.arange(len(cell) + 1)
        shape = (len(cell), self.n_params)
        return sparse.csr_matrix((np.ones(len(cell)), cell, limits), shape)

    def cell(self, x: np.ndarray) -> np.ndarray:
        return np.clip(np.asarray(x), 0, self.n_cells - 1).astype(np.int32)

    def centres(self) -> np.ndarray:
        return np.arange(self.n_cells, dtype=float)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "coordinate": self.coordinate, "n": self.n_cells}


class DecayAxis(RangeAxis):
    """One parameter B with the weight (s² - s₀²)/2, so that its factor is exp(B s²/2).

    The sign is that of the relative B of DIALS' own models. The centre s₀² keeps B
    independent of the scale.

    Args:
        low: Smallest s = 1/d, Å⁻¹.
        high: Largest s, Å⁻¹.
    """

    kind = "decay"
    coordinate = "s"
    n_params = 1
    n_cells = 64

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = float(low), float(high)

    def weights(self, x: np.ndarray) -> sparse.csr_matrix:
        # The mean of s² over a sphere's volume up to the upper limit.
        centre = 0.6 * (self.high**5 - self.low**5) / (self.high**3 - self.low**3)
        return sparse.csr_matrix(((np.asarray(x) ** 2 - centre) / 2)[:, None])

    @property
    def is_partition(self) -> bool:
        return False

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "low": self.low, "high": self.high}


def differences_along(axes: Sequence[Axis]) -> sparse.csr_matrix:
    """Second differences of parameters of shape (n_1, n_2, ...) along all axes.

    Returns:
        A row for each, shape (n, n_1 n_2 ...).
    """
    parts = []
    for i in range(len(axes)):
        product: sparse.spmatrix = sparse.identity(1)
        for j, axis in enumerate(axes):
            own = axis.differences() if i == j else sparse.identity(axis.n_params)
            product = sparse.kron(product, own, format="csr")
        parts.append(product)
    if not parts:
        return sparse.csr_matrix((0, 1))
    return sparse.vstack(parts, format="csr")


def axis_from_dict(values: Mapping[str, Any]) -> Axis:
    """The axis that ``as_dict`` described.

    Raises:
        ValueError: The kind is not known: a newer version wrote it.
    """
    arguments = {name: value for name, value in values.items() if name != "kind"}
    for axis in (SmoothAxis, StepAxis, DecayAxis):
        if axis.kind == values["kind"]:
            return axis(**arguments)
    raise ValueError(
        f"a scaling model has an axis of the unknown kind {values['kind']}"
    )
