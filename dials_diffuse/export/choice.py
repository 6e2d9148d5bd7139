"""Observations for programs that hold a whole table in memory.

All rows of a symmetry-unique voxel are taken or none is, as scaling compares the
observations of a voxel with each other. The voxels are chosen by a hash of their indices:
the choice depends on nothing else, and that of fewer rows is contained in that of more.
The tables are read twice, slab by slab: to count, and to take what was chosen.
"""

from __future__ import annotations

import dataclasses
from typing import Iterator, NamedTuple, Sequence

import numpy as np

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ROWS_PER_SLAB
from dials_diffuse.merging import estimate, sums
from dials_diffuse.merging.observations import (
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    ObservationTable,
    usable_rows,
)

SHARE_BITS = 16  # of the hash: how finely the number of rows can be limited
N_SHARES = 1 << SHARE_BITS
PLACE_COLUMNS = ("panel", "xyzobs.px.value", "d")


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the first reading has counted.

    Attributes:
        n_rows: All rows of the tables.
        rows_of_share: Usable rows of the voxels of each share, shape (N_SHARES,).
        rate: Mean counts per unit of normalisation in shells of 0.01 Å⁻¹, 1/(s sr).
    """

    n_rows: int
    rows_of_share: np.ndarray
    rate: np.ndarray

    @property
    def n_usable(self) -> int:
        """Rows that are not flagged and have pixels."""
        return int(self.rows_of_share.sum())

    def shares_within(self, max_rows: int | None) -> int:
        """How many shares have no more rows than a limit together; at least one."""
        if max_rows is None:
            return N_SHARES
        total = np.cumsum(self.rows_of_share)
        return max(int(np.searchsorted(total, max_rows, side="right")), 1)


class Slab(NamedTuple):
    """Usable rows of a table.

    Attributes:
        rows: The columns.
        unique: The symmetry-unique voxel of each row, packed, shape (n,).
    """

    rows: dict[str, np.ndarray]
    unique: np.ndarray

    def select(self, use: np.ndarray) -> Slab:
        """Some of the rows."""
        rows = {name: values[use] for name, values in self.rows.items()}
        return Slab(rows, self.unique[use])


def unique_voxels_of_rows(index: np.ndarray, grid: Grid) -> np.ndarray:
    """The symmetry-unique voxel of each row, packed, shape (n,).

    Args:
        index: Voxel indices, shape (n, 3), equal ones adjacent.
        grid: The grid.
    """
    new = np.ones(len(index), dtype=bool)
    new[1:] = np.any(index[1:] != index[:-1], axis=1)
    asu = symmetry.map_to_asu(index[new], grid.laue_group)
    return sums.pack(asu)[np.cumsum(new) - 1]


def shares(unique: np.ndarray) -> np.ndarray:
    """The share, from 0 below N_SHARES, of each symmetry-unique voxel.

    Args:
        unique: Packed voxels.
    """
    shift = np.uint64(64 - SHARE_BITS)
    return (sums.mix_bits(unique.view(np.uint64)) >> shift).astype(np.int64)


def _slabs(table: ObservationTable, places: bool) -> Iterator[Slab]:
    """The usable rows of a table; the origin, which has no d-spacing, is left out."""
    names = [*REQUIRED_COLUMNS, *set(OPTIONAL_COLUMNS).intersection(table.columns)]
    names += PLACE_COLUMNS if places else ()
    for start, stop in table.slabs(ROWS_PER_SLAB):
        rows = usable_rows(table.read(start, stop, names))
        index = rows["miller_index"]
        yield Slab(rows, unique_voxels_of_rows(index, table.grid)).select(
            np.any(index != 0, axis=1)
        )


def survey(tables: Sequence[ObservationTable]) -> Survey:
    """Count the rows of each share, and the photons of each shell.

    Args:
        tables: Observations on the same grid.

    Raises:
        ValueError: No row can be used.
    """
    grid = tables[0].grid
    rows_of_share = np.zeros(N_SHARES, dtype=np.int64)
    # Crystals with a larger cell than the grid's reach a little beyond d_min.
    s_limit = 1 / grid.d_min + 2 * grid.half_diagonal
    shells = np.zeros((2, int(estimate.thin_shell(s_limit)) + 1))
    for table in tables:
        for rows, unique in _slabs(table, places=False):
            rows_of_share += np.bincount(shares(unique), minlength=N_SHARES)
            shell = estimate.thin_shell(grid.s(rows["miller_index"]))
            for total, column in zip(shells, (rows["counts"], scaled_weight(rows))):
                total += np.bincount(shell, column, minlength=len(total))
    if not rows_of_share.any():
        raise ValueError(
            f"{tables[0].path} has no usable observations: all of its rows are flagged "
            "as outliers or have no pixels"
        )
    n_rows = sum(table.n_rows for table in tables)
    return Survey(n_rows, rows_of_share, estimate.shell_rate(*shells))


def scaled_weight(rows: dict[str, np.ndarray]) -> np.ndarray:
    """g M, the normalisation of the intensity on the scale of the map, s sr."""
    return rows["normalisation"] * rows.get("inverse_scale_factor", 1.0)


def chosen_rows(table: ObservationTable, n_shares: int) -> Slab:
    """All rows of a table that belong to the first shares.

    Args:
        table: The table.
        n_shares: ``Survey.shares_within``.
    """
    parts = [
        slab if n_shares == N_SHARES else slab.select(shares(slab.unique) < n_shares)
        for slab in _slabs(table, places=True)
    ]
    names = parts[0].rows
    rows = {name: np.concatenate([p.rows[name] for p in parts]) for name in names}
    return Slab(rows, np.concatenate([p.unique for p in parts]))
