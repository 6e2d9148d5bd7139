"""The equivalent settings in which a crystal may be indexed.

They are the cosets of the Laue group in the point group of the lattice: reindexing by an
operator of the lattice keeps the cell, by one of the Laue group the intensities too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Sequence

import numpy as np

from cctbx import crystal, sgtbx
from cctbx.sgtbx import cosets, lattice_symmetry

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid

LATTICE_TOLERANCE = 2.0  # degrees, Le Page delta


@dataclasses.dataclass(frozen=True)
class Operator:
    """A reindexing operator.

    Attributes:
        rotation: Integer matrix R of the new indices h' = h R, shape (3, 3).
    """

    rotation: np.ndarray

    @property
    def change_of_basis(self) -> sgtbx.change_of_basis_op:
        """The operator as cctbx applies it to crystals and indices."""
        r = sgtbx.rt_mx(sgtbx.rot_mx(tuple(map(int, self.rotation.ravel()))))
        return sgtbx.change_of_basis_op(r).inverse()

    def __str__(self) -> str:
        return self.change_of_basis.as_hkl()


def rotation_of(op: sgtbx.rt_mx) -> np.ndarray:
    """The rotation part of a symmetry operator, shape (3, 3)."""
    return np.array(op.r().as_double()).reshape(3, 3).round().astype(np.int32)


def lattice_group(grid: Grid) -> sgtbx.space_group:
    """The point group of the lattice of the reference cell, in the cell's setting."""
    group = sgtbx.space_group(grid.space_group)
    symmetry_of_crystal = crystal.symmetry(
        unit_cell=grid.unit_cell,
        space_group=group.build_derived_patterson_group(),
        assert_is_compatible_unit_cell=False,
    )
    to_minimum = symmetry_of_crystal.change_of_basis_op_to_minimum_cell()
    minimum_cell = symmetry_of_crystal.unit_cell().change_basis(to_minimum)
    lattice = lattice_symmetry.group(minimum_cell, max_delta=LATTICE_TOLERANCE)
    return lattice.change_basis(to_minimum.inverse()).build_derived_laue_group()


def coset_operators(
    lattice: sgtbx.space_group, laue: sgtbx.space_group
) -> list[list[np.ndarray]]:
    """The proper rotations of the cosets R H of a Laue group H, that of H itself first.

    The indices of one coset are equivalent: h R and h R R' for R' of H. Each coset
    begins with the rotation that is the easiest to read.
    """
    partitions = cosets.left_decomposition(g=lattice, h=laue).partitions
    rotations = [[rotation_of(op) for op in p] for p in partitions]
    # improper ones would turn the axes of a crystal into a left-handed system
    proper = [[r for r in coset if np.linalg.det(r) > 0] for coset in rotations]
    return [sorted(coset, key=_complexity) for coset in proper]


@functools.lru_cache(maxsize=8)
def candidates(grid: Grid) -> tuple[Operator, ...]:
    """One operator for each setting that a crystal may be in, the identity first."""
    cosets_ = coset_operators(lattice_group(grid), grid.laue_group)
    return tuple(Operator(coset[0]) for coset in cosets_)


def _complexity(r: np.ndarray) -> tuple:
    """The identity before all others, then few terms, then twofold axes."""
    is_identity = np.array_equal(r, np.eye(3))
    is_twofold = np.array_equal(r @ r, np.eye(3))
    return not is_identity, np.abs(r).sum(), not is_twofold, tuple(-r.ravel())


def expanded(
    laue: sgtbx.space_group, operators: Sequence[Operator]
) -> sgtbx.space_group:
    """The group with more operators."""
    group = sgtbx.space_group(laue)
    for op in operators:
        group.expand_smx(
            sgtbx.rt_mx(sgtbx.rot_mx(tuple(map(int, op.rotation.ravel()))))
        )
    return group


def _relative(rotations: Sequence[Sequence[np.ndarray]], choice: int) -> np.ndarray:
    """Coset of R⁻¹ R_j for each setting j, with R that of the choice.

    It takes indices that are right to those that setting j would give them.
    """
    inverse = np.rint(np.linalg.inv(rotations[choice][0])).astype(np.int32)
    of = {r.tobytes(): i for i, coset in enumerate(rotations) for r in coset}
    return np.array([of[(inverse @ coset[0]).tobytes()] for coset in rotations])


def mean_evidence(
    evidence: np.ndarray, choice: np.ndarray, rotations: Sequence[Sequence[np.ndarray]]
) -> np.ndarray:
    """Mean evidence of all crystals against each operator in the reference's setting.

    Returns:
        Shape (n_settings,), infinite for the identity.
    """
    relative = np.array([_relative(rotations, i) for i in range(len(rotations))])
    total = np.zeros(len(rotations))
    np.add.at(total, relative[choice].T, np.where(np.isinf(evidence), 0.0, evidence))
    total /= len(choice)
    total[0] = np.inf
    return total


def as_most_are(
    choice: np.ndarray,
    is_sure: np.ndarray,
    rotations: Sequence[Sequence[np.ndarray]],
    laue: sgtbx.space_group,
) -> np.ndarray:
    """The same choice with the reference in the setting that most crystals have.

    Which of the settings is the right one no data can say. Only operators that leave
    the Laue group in its place may move the reference.
    """
    group = {r.tobytes() for r in symmetry.rotation_matrices(laue)}
    best, most = choice, -1
    for coset in rotations:
        r = coset[0]
        inverse = np.rint(np.linalg.inv(r)).astype(np.int32)
        conjugate = {
            (r @ np.frombuffer(x, np.int32).reshape(3, 3) @ inverse).tobytes()
            for x in group
        }
        if conjugate != group:
            continue
        of = {x.tobytes(): i for i, c in enumerate(rotations) for x in c}
        moved = np.array([of[(c[0] @ inverse).tobytes()] for c in rotations])[choice]
        n_here = np.count_nonzero(is_sure & (moved == 0))
        if n_here > most:
            best, most = moved, n_here
    return best
