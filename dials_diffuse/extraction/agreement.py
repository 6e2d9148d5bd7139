"""How well the Bragg peaks of crystals agree in each of their possible settings.

Contrasts are normalised in each crystal and resolution shell. The sum of the products of
those that two crystals have of the same reflections is their agreement.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np
import scipy.sparse

from cctbx import sgtbx

from dials_diffuse import symmetry
from dials_diffuse.extraction.contrasts import Contrasts
from dials_diffuse.extraction.lattice_settings import Operator
from dials_diffuse.grid import Grid

SAMPLE = 100  # crystals whose settings fix the first reference
ROUNDS = 50  # of iterations; they end long before
STARTS = 20  # of each kind
SHELLS = 10


class Agreement:
    """The normalised contrasts of all crystals in each setting.

    Attributes:
        n: Number of crystals.
        row: Crystal of each contrast, shape (n_contrasts,).
        z: Contrasts less their mean, over their deviation, per crystal and shell.
        columns: Number of the unique reflection of each contrast in each setting, shape
            (n_settings, n_contrasts).
    """

    def __init__(
        self,
        contrasts: Sequence[Contrasts],
        grid: Grid,
        laue: sgtbx.space_group,
        operators: Sequence[Operator],
    ) -> None:
        self.n = len(contrasts)
        sizes = [len(c.value) for c in contrasts]
        self.row = np.repeat(np.arange(self.n), sizes)
        hkl = np.concatenate([c.hkl for c in contrasts])
        cells = dataclasses.replace(grid, ndiv=(1, 1, 1))
        value = np.concatenate([c.value for c in contrasts])
        self.z = normalised(self.row, cells.s(hkl), value)
        unique = [symmetry.map_to_asu(hkl @ op.rotation, laue) for op in operators]
        key = _packed(np.concatenate(unique))
        _, columns = np.unique(key, return_inverse=True)
        self.columns = columns.reshape(len(operators), -1).astype(np.int32)
        self.n_columns = int(columns.max()) + 1 if len(columns) else 0

    def matrix(
        self, values: np.ndarray, columns: np.ndarray
    ) -> scipy.sparse.csr_matrix:
        """Sums over the contrasts of each crystal and unique reflection."""
        shape = (self.n, self.n_columns)
        return scipy.sparse.csr_matrix((values, (self.row, columns)), shape=shape)

    def pairs(self, sample: np.ndarray) -> np.ndarray:
        """Σ z z' of each two crystals in each two settings, zero for one crystal.

        Returns:
            Shape (n_sample, n_settings, n_sample, n_settings).
        """
        settings = [self.matrix(self.z, c)[sample] for c in self.columns]
        stacked = scipy.sparse.vstack(settings).tocsr()
        n, m = len(sample), len(self.columns)
        product = (stacked @ stacked.T).toarray().reshape(m, n, m, n)
        product = product.transpose(1, 0, 3, 2).copy()
        product[np.arange(n), :, np.arange(n), :] = 0.0
        return product

    def compare(
        self, choice: np.ndarray, members: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compare each crystal in each setting with the mean of the other members.

            reference(h) = Σ z / (n + κ),  κ = (1 - ρ) / ρ

        over the n contrasts of the reflection that the others have, with the mean
        correlation ρ of two contrasts of one reflection.

        Args:
            choice: The setting of each crystal.
            members: Whether it is a part of the mean.

        Returns:
            scores: Σ z reference of each setting, shape (n_settings, n).
            sigmas: Standard deviation of the difference of each setting's score to that
                of the best, were there no agreement, of the same shape.
        """
        column = self.columns[choice[self.row], np.arange(len(self.row))]
        used = members[self.row]
        own = self.matrix(self.z * used, column)
        own_n = self.matrix(used.astype(float), column)
        total = np.asarray(own.sum(axis=0)).ravel()
        total_n = np.asarray(own_n.sum(axis=0)).ravel()
        kappa = _shrinkage(own, own_n, total, total_n)
        reference = np.empty(self.columns.shape)
        for setting, at in enumerate(self.columns):
            here = np.asarray(own[self.row, at]).ravel()
            here_n = np.asarray(own_n[self.row, at]).ravel()
            reference[setting] = (total[at] - here) / (total_n[at] - here_n + kappa)
        scores = self._per_crystal(self.z * reference)
        best = scores.argmax(axis=0)[self.row]
        at_best = np.take_along_axis(reference, best[None], axis=0)
        variances = self._per_crystal((self.z * (reference - at_best)) ** 2)
        return scores, np.sqrt(variances)

    def _per_crystal(self, values: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(self.row, v, self.n) for v in values])


def _packed(hkl: np.ndarray) -> np.ndarray:
    """One number for each Miller index; faster to sort than rows."""
    size = 2 * int(np.abs(hkl).max(initial=0)) + 1
    h, k, l = (hkl.astype(np.int64) + size // 2).T
    return (h * size + k) * size + l


def normalised(number: np.ndarray, s: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Values less their mean, over their deviation, per crystal and shell."""
    edges = np.quantile(s, np.linspace(0, 1, SHELLS + 1)[1:-1]) if len(s) else []
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


def _shrinkage(
    own: scipy.sparse.csr_matrix,
    own_n: scipy.sparse.csr_matrix,
    total: np.ndarray,
    total_n: np.ndarray,
) -> float:
    """κ = (1 - ρ) / ρ, with ρ from the products of contrasts of different crystals."""
    products = np.sum(total**2) - own.multiply(own).sum()
    n_products = np.sum(total_n**2) - own_n.multiply(own_n).sum()
    rho = products / n_products if n_products > 0 else 0.0
    rho = min(max(rho, 0.01), 0.99)
    return (1 - rho) / rho


def first_choice(pairs: np.ndarray) -> np.ndarray:
    """The setting of each crystal of a sample by projected power iterations.

    Starts are all crystals as they are indexed, some crystals alone as the reference, and
    some at random.

    Args:
        pairs: Agreements, shape (n, n_settings, n, n_settings).
    """
    n, m = pairs.shape[:2]
    product = pairs.reshape(n * m, n * m)
    rng = np.random.default_rng(7)
    references = np.linspace(0, n - 1, min(n, STARTS)).astype(int)
    alone = pairs[:, :, references, 0].argmax(axis=1)  # (crystal, reference)
    alone[references, np.arange(len(references))] = 0
    random = rng.integers(m, size=(n, STARTS))
    choice = np.concatenate([np.zeros((n, 1), dtype=int), random, alone], axis=1)
    of_start = np.arange(choice.shape[1])
    for _ in range(ROUNDS):
        one_hot = np.zeros((n, m, len(of_start)))
        one_hot[np.arange(n)[:, None], choice, of_start] = 1.0
        score = (product @ one_hot.reshape(n * m, -1)).reshape(one_hot.shape)
        current = np.take_along_axis(score, choice[:, None], axis=1)[:, 0]
        # a tie changes nothing, nor does an improvement of rounding errors
        better = score.max(axis=1) > current + 1e-9
        if not better.any():
            break
        # changed all at once, two crystals could swap for ever
        better &= rng.random(better.shape) < 0.8
        choice = np.where(better, score.argmax(axis=1), choice)
    total = [_total_agreement(pairs, column) for column in choice.T]
    return choice[:, int(np.argmax(total))]


def _total_agreement(pairs: np.ndarray, choice: np.ndarray) -> float:
    i = np.arange(len(choice))
    return float(pairs[i[:, None], choice[:, None], i[None], choice[None]].sum())


def refine_choice(
    agreement: Agreement, choice: np.ndarray, members: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each crystal in the setting that agrees best with the mean of all others.

    Args:
        agreement: The contrasts.
        choice: The settings of the members.
        members: The crystals of the first mean; all are of the following ones.

    Returns:
        The choice, and scores and sigmas as of ``Agreement.compare``.
    """
    for _ in range(ROUNDS):
        scores, sigmas = agreement.compare(choice, members)
        best = scores.argmax(axis=0)
        if np.array_equal(best, choice) and members.all():
            break
        choice, members = best, np.ones_like(members)
    return scores.argmax(axis=0), scores, sigmas


def evidence_of(scores: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """(S_best - S) / σ of each setting, infinite for the best, shape (n_settings, n)."""
    gap = scores.max(axis=0) - scores
    result = np.divide(gap, sigmas, out=np.zeros_like(gap), where=sigmas > 0)
    result[scores.argmax(axis=0), np.arange(scores.shape[1])] = np.inf
    return result


def start(agreement: Agreement, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Settings of a sample of the crystals, and which crystals it holds."""
    n = agreement.n
    sample = np.arange(n)
    if n > SAMPLE:  # those that have the most to say
        rng = np.random.default_rng(7)
        seen = np.argsort(-sizes, kind="stable")[: max(SAMPLE, n // 2)]
        sample = np.sort(rng.choice(seen, SAMPLE, replace=False))
    choice = np.zeros(n, dtype=int)
    choice[sample] = first_choice(agreement.pairs(sample))
    members = np.zeros(n, dtype=bool)
    members[sample] = True
    return choice, members
