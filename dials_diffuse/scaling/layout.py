"""Where the parameters and cells of a term are, for all experiments together.

Experiments of one owner share parameters: an experiment owns its scale, all images of a
detector have its sensitivity in common. Owners whose axes are alike form a block, in
which the parameters are an array of shape (owners, parameters of the axes ...), and the
cells another. So 20 000 stills are evaluated as one array, and several sweeps as a few.
"""

from __future__ import annotations

import math
from typing import Hashable, Mapping, NamedTuple, Sequence

import numpy as np
from scipy import sparse

from dials_diffuse.scaling.axes import Axis, differences_along


class Owner(NamedTuple):
    """Who has a set of parameters of a term, and the axes of the term for him."""

    key: Hashable
    axes: tuple[Axis, ...]


class Block:
    """Owners with the same axes.

    Args:
        axes: The axes.
        first_parameter: Place of the first parameter of the block.
        first_cell: Place of its first cell.
    """

    def __init__(self, axes: tuple[Axis, ...], first_parameter: int, first_cell: int):
        self.axes = axes
        self.n_owners = 0
        self.first_parameter, self.first_cell = first_parameter, first_cell
        self.parameter_shape = tuple(axis.n_params for axis in axes)
        self.cell_shape = tuple(axis.n_cells for axis in axes)
        self.weights = [axis.weights(axis.centres()) for axis in axes]
        # Transposed once: a refinement asks for derivatives at each step.
        self.transposed = [matrix.T.tocsr() for matrix in self.weights]
        self.squares = [matrix.power(2) for matrix in self.transposed]

    @property
    def n_params(self) -> int:
        """Parameters of each owner."""
        return math.prod(self.parameter_shape)

    @property
    def n_cells(self) -> int:
        """Cells of each owner."""
        return math.prod(self.cell_shape)

    @property
    def parameters(self) -> slice:
        """Of the block among those of the term."""
        stop = self.first_parameter + self.n_owners * self.n_params
        return slice(self.first_parameter, stop)

    @property
    def cells(self) -> slice:
        """Of the block among those of the term."""
        return slice(self.first_cell, self.first_cell + self.n_owners * self.n_cells)


def contract(matrices: Sequence[sparse.spmatrix], values: np.ndarray) -> np.ndarray:
    """Apply one matrix to each axis of an array but the first.

    Args:
        matrices: Of shapes (n_i, m_i).
        values: Shape (owners, m_1, m_2, ...).

    Returns:
        Shape (owners, n_1, n_2, ...).
    """
    for i, matrix in enumerate(matrices, start=1):
        rows = np.moveaxis(values, i, 0)
        result = matrix @ rows.reshape(len(rows), -1)
        values = np.moveaxis(result.reshape(-1, *rows.shape[1:]), 0, i)
    return values


class Layout:
    """Parameters and cells of one term.

    Cell 0 belongs to the experiments that do without the term.

    Args:
        owners: For each experiment the owner of its parameters, or None.
    """

    def __init__(self, owners: Sequence[Owner | None]) -> None:
        by_axes: dict[tuple[Axis, ...], dict[Hashable, int]] = {}
        for owner in filter(None, owners):
            keys = by_axes.setdefault(owner.axes, {})
            keys.setdefault(owner.key, len(keys))
        self.blocks: list[Block] = []
        self.n_params, self.n_cells = 0, 1
        for axes, keys in by_axes.items():
            block = Block(axes, self.n_params, self.n_cells)
            block.n_owners = len(keys)
            self.n_params, self.n_cells = block.parameters.stop, block.cells.stop
            self.blocks.append(block)
        numbers = {axes: i for i, axes in enumerate(by_axes)}
        self.block = np.array([-1 if o is None else numbers[o.axes] for o in owners])
        self.place = np.array(
            [0 if o is None else by_axes[o.axes][o.key] for o in owners]
        )

    @property
    def coordinates(self) -> set[str]:
        """Names of the coordinates that the axes go by."""
        return {axis.coordinate for block in self.blocks for axis in block.axes}

    def cell(
        self, experiment: np.ndarray, coordinates: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """The cell of each observation, int32.

        Args:
            experiment: Number of the experiment of each, shape (n,).
            coordinates: Those that the axes go by, each of shape (n,).
        """
        result = np.zeros(len(experiment), dtype=np.int32)
        block_of_row = self.block[experiment]
        for number, block in enumerate(self.blocks):
            mine = block_of_row == number
            mine = slice(None) if mine.all() else np.flatnonzero(mine)
            cell = self.place[experiment[mine]].astype(np.int64)
            for axis, n in zip(block.axes, block.cell_shape):
                cell = cell * n + axis.cell(coordinates[axis.coordinate][mine])
            result[mine] = block.first_cell + cell
        return result

    def values(self, parameters: np.ndarray) -> np.ndarray:
        """The weighted sum of the parameters in each cell, 0 in cell 0."""
        result = np.zeros(self.n_cells)
        for block in self.blocks:
            array = parameters[block.parameters].reshape(-1, *block.parameter_shape)
            result[block.cells] = contract(block.weights, array).ravel()
        return result

    def gradient(self, by_cell: np.ndarray) -> np.ndarray:
        """Derivatives by the parameters, from those by the values of the cells."""
        return self._collect(by_cell, [block.transposed for block in self.blocks])

    def curvature(self, by_cell: np.ndarray) -> np.ndarray:
        """Second derivatives by the parameters; cells are independent of each other."""
        return self._collect(by_cell, [block.squares for block in self.blocks])

    def _collect(
        self, by_cell: np.ndarray, transposed: Sequence[Sequence[sparse.csr_matrix]]
    ) -> np.ndarray:
        result = np.zeros(self.n_params)
        for block, matrices in zip(self.blocks, transposed):
            array = by_cell[block.cells].reshape(-1, *block.cell_shape)
            result[block.parameters] = contract(matrices, array).ravel()
        return result

    def differences(self) -> sparse.csr_matrix:
        """Second differences along all smooth axes, a row for each."""
        parts = [
            sparse.kron(
                sparse.identity(block.n_owners),
                differences_along(block.axes),
                format="csr",
            )
            for block in self.blocks
        ]
        if not parts:
            return sparse.csr_matrix((0, self.n_params))
        return sparse.block_diag(parts, format="csr")

    def cells_of(self, number: int) -> slice:
        """The cells of an experiment."""
        if self.block[number] < 0:
            return slice(0, 1)
        block = self.blocks[self.block[number]]
        start = block.first_cell + int(self.place[number]) * block.n_cells
        return slice(start, start + block.n_cells)

    def of_experiment(self, number: int) -> tuple[tuple[Axis, ...], slice] | None:
        """Axes of the term for an experiment, and where its parameters are."""
        if self.block[number] < 0:
            return None
        block = self.blocks[self.block[number]]
        start = block.first_parameter + int(self.place[number]) * block.n_params
        return block.axes, slice(start, start + block.n_params)
