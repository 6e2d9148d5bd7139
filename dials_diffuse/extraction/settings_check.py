"""Whether stills are indexed in the same one of several equivalent settings.

Where the lattice has more symmetry than the Laue group, independently indexed crystals
come in different settings, and merging them mixes voxels that are not equivalent. The
Bragg peaks tell: for a sample of the stills, the pixels within an ellipsoid about each
reciprocal lattice point are compared with those around it, which leaves out everything
smooth, and for each pair of stills the agreement of these contrasts as indexed is
compared with the one after reindexing one of the two (Brehm & Diederichs, 2014, Acta
Cryst. D70, 101-109, doi:10.1107/S1399004713025431). The preferences of the pairs make a
matrix whose leading eigenvector sorts the stills into two groups.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np
import scipy.sparse

from cctbx import crystal, sgtbx
from cctbx.sgtbx import cosets, lattice_symmetry
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

import dials_diffuse_ext as ext
from dials_diffuse import symmetry
from dials_diffuse.extraction.blocks import Block
from dials_diffuse.extraction.loop import accumulate_block
from dials_diffuse.extraction.settings import BraggSettings, ExtractionSettings
from dials_diffuse.extraction.tables import PanelTable
from dials_diffuse.grid import Grid

MAX_STILLS = 100
SHELLS = 20
LATTICE_TOLERANCE = 2.0  # degrees, Le Page delta
RADIUS = 0.25  # of the ellipsoid, in fractional indices
SIGNIFICANT = 4.0  # standard deviations


@dataclasses.dataclass(frozen=True)
class SettingCheck:
    """Outcome for one reindexing operator.

    Attributes:
        operator: The operator, as h,k,l.
        numbers: Numbers of the experiments that were compared.
        is_other: Which of them are in the smaller group.
        evidence: Sum of each one's preferences for its own group, in standard
            deviations of what chance would give.
    """

    operator: str
    numbers: np.ndarray
    is_other: np.ndarray
    evidence: np.ndarray

    @property
    def is_telling(self) -> bool:
        """Whether the data tell the settings apart at all."""
        return bool(np.mean(self.evidence) > SIGNIFICANT)

    @property
    def others(self) -> list[int]:
        """Experiments that are surely in another setting than the larger group."""
        sure = self.is_other & (self.evidence > SIGNIFICANT)
        return list(map(int, self.numbers[sure])) if self.is_telling else []


def reindexing_operators(grid: Grid) -> list[sgtbx.rt_mx]:
    """Operators of the lattice that are not in the Laue group, one per coset."""
    group = sgtbx.space_group(grid.space_group)
    symmetry_of_crystal = crystal.symmetry(
        unit_cell=grid.unit_cell,
        space_group=group.build_derived_patterson_group(),
        assert_is_compatible_unit_cell=False,
    )
    to_minimum = symmetry_of_crystal.change_of_basis_op_to_minimum_cell()
    minimum_cell = symmetry_of_crystal.unit_cell().change_basis(to_minimum)
    lattice = lattice_symmetry.group(minimum_cell, max_delta=LATTICE_TOLERANCE)
    lattice = lattice.change_basis(to_minimum.inverse()).build_derived_laue_group()
    partitions = cosets.left_decomposition(g=lattice, h=grid.laue_group).partitions
    return [partition[0] for partition in partitions[1:]]


def stills_to_compare(experiments: ExperimentList, grid: Grid) -> frozenset[int]:
    """A reproducible sample of stills; empty where their settings cannot differ."""
    stills = [i for i, e in enumerate(experiments) if e.is_still()]
    if len(stills) < 3 or not reindexing_operators(grid):
        return frozenset()
    if len(stills) > MAX_STILLS:
        stills = np.random.default_rng(7).choice(stills, MAX_STILLS, replace=False)
    return frozenset(map(int, stills))


@dataclasses.dataclass(frozen=True)
class Contrasts:
    """Bragg peaks against their surroundings in one still.

    Attributes:
        hkl: Miller indices, shape (n, 3).
        value: Logarithm of the ratio of the mean intensities in and around the peak.
    """

    hkl: np.ndarray
    value: np.ndarray


def bragg_contrasts(
    block: Block,
    experiment: Experiment,
    tables: Sequence[PanelTable],
    grid: Grid,
    settings: ExtractionSettings,
) -> Contrasts:
    """The contrast of each Bragg peak that a still cuts.

    The sums over whole reciprocal cells less those with the peaks left out are the sums
    over the peaks.
    """
    cells = dataclasses.replace(grid, ndiv=(1, 1, 1))
    accumulators: list[ext.Accumulator] = []
    sums = []
    for exclusion in ("none", "ellipsoid"):
        bragg = BraggSettings(exclusion=exclusion, semi_axes=(RADIUS,) * 3)
        rows = accumulate_block(
            block,
            experiment,
            tables,
            accumulators,
            cells,
            dataclasses.replace(settings, ndiv=cells.ndiv, bragg=bragg),
        )
        keys, inverse = np.unique(rows["key"], return_inverse=True)
        columns = ("n_pixels", "counts", "normalisation")
        sums.append((keys, [np.bincount(inverse, rows[name]) for name in columns]))
    (keys, inside), (keys_around, around) = sums
    common, at, at_around = np.intersect1d(keys, keys_around, return_indices=True)
    inside = [column[at] for column in inside]
    around = [column[at_around] for column in around]
    inside = [a - b for a, b in zip(inside, around)]
    use = np.all([column > 0 for column in (*inside, *around)], axis=0)
    (_, counts, weight), (_, counts_around, weight_around) = (
        [column[use] for column in columns] for columns in (inside, around)
    )
    value = np.log(counts / weight * weight_around / counts_around)
    return Contrasts(cells.index(common[use]), value)


def _normalised(number: np.ndarray, s: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Values less their mean, over their deviation, per still and shell."""
    edges = np.quantile(s, np.linspace(0, 1, SHELLS + 1)[1:-1])
    shell = number.astype(np.int64) * SHELLS + np.searchsorted(edges, s)
    n = np.maximum(np.bincount(shell), 1)
    mean = np.bincount(shell, value) / n
    deviation = np.sqrt(np.bincount(shell, (value - mean[shell]) ** 2) / n)
    return np.divide(
        value - mean[shell],
        deviation[shell],
        out=np.zeros_like(value),
        where=deviation[shell] > 0,
    )


def _preferences(
    number: np.ndarray, hkl: np.ndarray, z: np.ndarray, grid: Grid, op: sgtbx.rt_mx
) -> np.ndarray:
    """How much better each pair agrees as indexed than after reindexing one of the two.

    Returns:
        Σ z_i z_j over the common reflections, as indexed less reindexed, over its
        standard deviation if there were no agreement; shape (n_stills, n_stills).
    """
    rotation = np.array(op.r().as_double()).reshape(3, 3).round().astype(np.int32)
    as_indexed = symmetry.map_to_asu(hkl, grid.laue_group)
    reindexed = symmetry.map_to_asu(hkl @ rotation, grid.laue_group)
    _, column = np.unique(
        np.concatenate([as_indexed, reindexed]), axis=0, return_inverse=True
    )
    here, there = np.split(column.ravel(), 2)
    # a reflection that the operator maps onto itself tells nothing
    z = np.where(here != there, z, 0.0)
    shape = (int(number.max()) + 1, int(column.max()) + 1)

    def matrix(values: np.ndarray, columns: np.ndarray) -> scipy.sparse.csr_matrix:
        return scipy.sparse.csr_matrix((values, (number, columns)), shape=shape)

    product = matrix(z, here) @ (matrix(z, here) - matrix(z, there)).T
    variance = matrix(z**2, here) @ (matrix(z**2, here) + matrix(z**2, there)).T
    deviation = np.sqrt(variance.toarray())
    result = np.divide(
        product.toarray(), deviation, out=np.zeros(deviation.shape), where=deviation > 0
    )
    np.fill_diagonal(result, 0.0)
    return 0.5 * (result + result.T)


def _grouping(preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which stills are in the smaller group, and how sure that is for each."""
    sign = np.where(np.linalg.eigh(preference)[1][:, -1] < 0, -1, 1)
    for _ in range(len(sign)):  # until every still is in the group that it prefers
        preferred = np.where(preference @ sign < 0, -1, 1)
        if np.array_equal(preferred, sign):
            break
        sign = preferred
    if sign.sum() < 0:
        sign = -sign
    n_pairs = np.maximum(np.count_nonzero(preference, axis=1), 1)
    return sign < 0, sign * (preference @ sign) / np.sqrt(n_pairs)


def check_settings(contrasts: dict[int, Contrasts], grid: Grid) -> list[SettingCheck]:
    """Compare the settings of stills, one result per reindexing operator.

    Args:
        contrasts: Bragg contrasts of some experiments, by their number.
        grid: The voxel grid.
    """
    contrasts = {i: c for i, c in sorted(contrasts.items()) if len(c.value)}
    if len(contrasts) < 3:
        return []
    numbers = np.array(list(contrasts))
    sizes = [len(c.value) for c in contrasts.values()]
    number = np.repeat(np.arange(len(numbers)), sizes)
    hkl = np.concatenate([c.hkl for c in contrasts.values()])
    value = np.concatenate([c.value for c in contrasts.values()])
    cells = dataclasses.replace(grid, ndiv=(1, 1, 1))
    z = _normalised(number, cells.s(hkl), value)
    results = []
    for op in reindexing_operators(grid):
        is_other, evidence = _grouping(_preferences(number, hkl, z, grid, op))
        results.append(SettingCheck(op.r().as_hkl(), numbers, is_other, evidence))
    return results
