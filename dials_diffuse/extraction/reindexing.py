"""Bringing all crystals into one of several equivalent indexing settings.

Where the lattice has more symmetry than the Laue group, crystals that are indexed one by
one come in different settings, and merging them mixes voxels that are not equivalent. A
crystal is right in the setting h R of its indices h, with R one of the lattice's
operators, one for each coset of the Laue group H, in which its Bragg peaks agree with
those of the others (Brehm & Diederichs, 2014, Acta Cryst. D70, 101-109,
doi:10.1107/S1399004713025431). This is decided in three steps, from the contrasts of
``dials_diffuse.extraction.contrasts``, normalised in each crystal and resolution shell:

1. The agreement of each setting of each crystal of a sample with each setting of each
   other one is a matrix. From several starts, each crystal takes the setting that agrees
   best with those that the others have, until none changes (projected power iterations).
   The start that ends with the largest total agreement wins.
2. Every crystal is compared with the mean of all others, its own share left out, in each
   setting; again until none changes.
3. Operators that the data do not tell from no operator at all, because they are a
   symmetry of the crystal or its spots are too weak, are added to the group H, and all
   is done again with what is left.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Crystal, Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse import symmetry
from dials_diffuse.extraction.agreement import (
    Agreement,
    evidence_of,
    refine_choice,
    start,
)
from dials_diffuse.extraction.contrasts import Contrasts, measure_contrasts
from dials_diffuse.extraction.lattice_settings import (
    Operator,
    as_most_are,
    candidates,
    coset_operators,
    expanded,
    lattice_group,
    mean_evidence,
)
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.grid import Grid

# Evidence, in standard deviations, above which the setting of a crystal is sure.
SURE = 3.0


def crystal_units(experiments: ExperimentList) -> list[list[int]]:
    """Numbers of the experiments of each crystal; stills and sweeps mostly have one."""
    return sorted(
        sorted(map(int, experiments.indices(model))) for model in experiments.crystals()
    )


def telling_threshold(n: int, n_settings: int) -> float:
    """Mean evidence above which the data tell an operator from the identity.

    Pure noise, sorted as well as it can be, has 1.3 with two settings, 1.7 with four and
    2.4 with 24, and is the more scattered the fewer crystals there are.

    Args:
        n: Number of crystals.
        n_settings: Number of settings.
    """
    return 1.4 + 0.35 * math.log(n_settings) + 3 / math.sqrt(n)


@dataclasses.dataclass(frozen=True)
class Indexing:
    """The settings that were chosen.

    Attributes:
        operators: One for each setting, the identity first; after step 3 those that the
            data tell apart.
        units: Numbers of the experiments of each crystal.
        choice: Number of the operator of each crystal.
        evidence: How much better its setting agrees with the other crystals than the
            next best one, in standard deviations of what chance would give.
        n_contrasts: Number of reflections seen of each crystal.
        untold: Operators that the data do not tell from the identity.
        in_doubt: What crystals get whose setting is not sure: ``keep`` their own, the
            ``best`` one, or ``leave_out``.
    """

    operators: tuple[Operator, ...]
    units: tuple[tuple[int, ...], ...]
    choice: np.ndarray
    evidence: np.ndarray
    n_contrasts: np.ndarray
    untold: tuple[Operator, ...] = ()
    in_doubt: str = "keep"

    @property
    def is_telling(self) -> bool:
        """Whether the data tell any two settings apart."""
        return len(self.operators) > 1

    @property
    def is_sure(self) -> np.ndarray:
        """Whether the setting of each crystal is beyond doubt."""
        return self.evidence > SURE

    @property
    def applied(self) -> np.ndarray:
        """Number of the operator that each crystal is given."""
        if self.in_doubt == "best":
            return self.choice
        return np.where(self.is_sure, self.choice, 0)

    @property
    def ambiguous(self) -> list[int]:
        """Experiments of which the setting is in doubt while that of others is not."""
        if not self.is_telling:
            return []
        return self._experiments(~self.is_sure)

    @property
    def reindexed(self) -> list[int]:
        """Experiments that are given another operator than the identity."""
        return self._experiments(self.applied > 0)

    @property
    def left_out(self) -> list[int]:
        """Experiments that are not to be used."""
        return self.ambiguous if self.in_doubt == "leave_out" else []

    def _experiments(self, which: np.ndarray) -> list[int]:
        return [i for unit, yes in zip(self.units, which) if yes for i in unit]

    def as_dict(self) -> dict[str, Any]:
        """The decision for a JSON file."""
        names = [str(op) for op in self.operators]
        return {
            "operators": names,
            "not_told_apart": [str(op) for op in self.untold],
            "crystals": [
                {
                    "experiments": list(unit),
                    "operator": names[applied],
                    "best_operator": names[choice],
                    "evidence": round(float(evidence), 3),
                    "sure": bool(sure),
                    "n_reflections": int(n),
                }
                for unit, applied, choice, evidence, sure, n in zip(
                    self.units,
                    self.applied,
                    self.choice,
                    self.evidence,
                    self.is_sure,
                    self.n_contrasts,
                )
            ],
        }


def decide(
    contrasts: Sequence[Contrasts],
    units: Sequence[Sequence[int]],
    grid: Grid,
    in_doubt: str = "keep",
) -> Indexing:
    """Decide in which setting each crystal is.

    Args:
        contrasts: Those of each crystal.
        units: Numbers of the experiments of each crystal.
        grid: The voxel grid: its cell and Laue group say which settings there are.
        in_doubt: See ``Indexing``.
    """
    lattice, laue = lattice_group(grid), grid.laue_group
    sizes = np.array([len(c.value) for c in contrasts])
    while True:
        rotations = coset_operators(lattice, laue)
        operators = tuple(Operator(coset[0]) for coset in rotations)
        if len(operators) == 1:  # all that is left is the whole lattice's group
            choice, evidence = np.zeros(len(sizes), dtype=int), np.zeros(len(sizes))
            break
        agreement = Agreement(contrasts, grid, laue, operators)
        choice, scores, sigmas = refine_choice(agreement, *start(agreement, sizes))
        against = evidence_of(scores, sigmas)
        evidence = against.min(axis=0)
        told = mean_evidence(against, choice, rotations)
        told = told > telling_threshold(len(sizes), len(operators))
        if told.all():
            choice = as_most_are(choice, evidence > SURE, rotations, laue)
            break
        laue = expanded(laue, [op for op, yes in zip(operators, told) if not yes])
    group = {r.tobytes() for r in symmetry.rotation_matrices(laue)}
    untold = [op for op in candidates(grid)[1:] if op.rotation.tobytes() in group]
    return Indexing(
        operators=operators,
        units=tuple(map(tuple, units)),
        choice=choice,
        evidence=evidence,
        n_contrasts=sizes,
        untold=tuple(untold),
        in_doubt=in_doubt,
    )


def find_indexing(
    experiments: ExperimentList,
    grid: Grid,
    settings: ExtractionSettings,
    in_doubt: str = "keep",
) -> Indexing | None:
    """Decide from the images in which setting each crystal is.

    Args:
        experiments: Experiments with images and crystals.
        grid: The voxel grid.
        settings: The settings of extraction.
        in_doubt: See ``Indexing``.

    Returns:
        The settings, or None if there is one crystal or one setting only.

    Raises:
        ValueError: An image cannot be read.
    """
    units = crystal_units(experiments)
    if len(units) < 2 or len(candidates(grid)) < 2:
        return None
    contrasts = measure_contrasts(experiments, units, grid, settings)
    return decide(contrasts, units, grid, in_doubt)


def reindexed_crystal(crystal: Crystal, operator: Operator) -> Crystal:
    """The crystal with the indices h R.

    The space group stays in its place: in the right setting its axes are those of all
    others. Scan-varying crystals stay so.
    """
    result = crystal.change_basis(operator.change_of_basis)
    result.set_space_group(crystal.get_space_group())
    return result


def apply_to_experiments(
    experiments: ExperimentList, indexing: Indexing
) -> ExperimentList:
    """New experiments with their crystals in one setting, less those left out."""
    crystals = {}
    for unit, number in zip(indexing.units, indexing.applied):
        if number:
            operator = indexing.operators[number]
            crystal = reindexed_crystal(experiments[unit[0]].crystal, operator)
            crystals.update((i, crystal) for i in unit)
    left_out = set(indexing.left_out)
    return ExperimentList(
        [
            with_crystal(experiment, crystals.get(i, experiment.crystal))
            for i, experiment in enumerate(experiments)
            if i not in left_out
        ]
    )


def with_crystal(experiment: Experiment, crystal: Crystal) -> Experiment:
    """The same experiment with another crystal."""
    return Experiment(
        beam=experiment.beam,
        detector=experiment.detector,
        goniometer=experiment.goniometer,
        scan=experiment.scan,
        crystal=crystal,
        profile=experiment.profile,
        imageset=experiment.imageset,
        scaling_model=experiment.scaling_model,
        identifier=experiment.identifier,
    )


def apply_to_reflections(
    reflections: flex.reflection_table, indexing: Indexing
) -> flex.reflection_table:
    """The reflections of ``apply_to_experiments``' experiments, with their indices.

    Args:
        reflections: Table with ``id``, the number of the experiment before any was left
            out, and ``miller_index``.
        indexing: The settings.
    """
    result = reflections.copy()
    ids = flumpy.to_numpy(result["id"])
    indices = result["miller_index"].deep_copy()
    for unit, number in zip(indexing.units, indexing.applied):
        if number:
            rows = flumpy.from_numpy(np.flatnonzero(np.isin(ids, unit)).astype("u8"))
            cb_op = indexing.operators[number].change_of_basis
            indices.set_selected(rows, cb_op.apply(indices.select(rows)))
    result["miller_index"] = indices
    left_out = set(indexing.left_out)
    n_experiments = 1 + max(max(unit) for unit in indexing.units)
    return select_experiments(
        result, [i for i in range(n_experiments) if i not in left_out]
    )


def select_experiments(
    reflections: flex.reflection_table, kept: Sequence[int]
) -> flex.reflection_table:
    """The reflections of some experiments, with their place among these as ``id``."""
    ids = flumpy.to_numpy(reflections["id"])
    place = np.full(max(ids.max(initial=-1), *kept, 0) + 1, -1, dtype=np.int32)
    place[list(kept)] = np.arange(len(kept))
    result = reflections.select(flumpy.from_numpy(place[ids] >= 0))
    result["id"] = flumpy.from_numpy(place[ids][place[ids] >= 0])
    return result
