"""One scale factor per experiment, from the ratio of counts that it should have seen.

The photons n = N - B of experiment e in the symmetry-unique voxel v, with normalisation
M, are Poisson counts of mean k_e M I_v. With the best intensities of the voxels,
I_v = N_v / Σ k_e M with N_v = Σ n, the logarithm of the likelihood in θ = log k is

    L = Σ_e θ_e Σ_v n_ev - Σ_v N_v log Σ_e M_ev exp(θ_e)

It is concave. Only voxels that several experiments saw say anything, and it has a finite
maximum within those groups of experiments that voxels link to and fro: from each
experiment a way leads to every other, each step of it from one with photons in a voxel to
another that saw the voxel (Ford 1957, https://doi.org/10.1080/00029890.1957.11989117).
The mean scale of each group is 1. Scales stand for flux and illuminated volume;
everything smooth within an experiment is left to scaling proper.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, Sequence

import numpy as np
from scipy import optimize, sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator

from dials_diffuse.io.observations import ROWS_PER_SLAB, ObservationFile
from dials_diffuse.merging import sums
from dials_diffuse.merging.observations import (
    ObservationTable,
    asu_voxels,
    lookup,
    usable_rows,
)
from dials_diffuse.util.text import shortened

logger = logging.getLogger("dials.diffuse.scale")

COLUMNS = (
    "miller_index",
    "id",
    "counts",
    "background.sum.value",
    "normalisation",
    "num_pixels.valid",
)
MAX_ROWS = 5_000_000  # of the tables, all those of a choice of voxels, are enough
MIN_ROWS = 100  # of each experiment, if it has so many
MAX_CYCLES = 200
CONVERGED = 1e-6  # relative difference of observed and expected photons
MAX_FILL = 8  # elements of the matrix of second derivatives for each pair
MAX_NAMES = 3  # of experiments in a warning


class Pairs(NamedTuple):
    """The sums of each pair of a voxel and an experiment that saw it.

    Args:
        voxel: Number of the symmetry-unique voxel, from 0, shape (n,).
        experiment: Number of the experiment, from 0.
        photons: N - B.
        weight: Normalisation M, s.sr.
    """

    voxel: np.ndarray
    experiment: np.ndarray
    photons: np.ndarray
    weight: np.ndarray

    def select(self, use: np.ndarray) -> Pairs:
        """Some of the pairs."""
        return self if use.all() else Pairs(*(column[use] for column in self))


class RelativeScales(NamedTuple):
    """Scale factors of experiments.

    Args:
        scale: k, of mean 1 in each group, 0 for blank experiments, shape (n,).
        group: Number of the group of linked experiments, -1 for blank ones.
    """

    scale: np.ndarray
    group: np.ndarray


def add_up_pairs(
    voxel: np.ndarray, experiment: np.ndarray, photons: np.ndarray, weight: np.ndarray
) -> Pairs:
    """The pairs of voxel and experiment, with the sums of their observations.

    Nothing is lost by it: the likelihood depends on these sums only.
    """
    shape = [int(x.max(initial=-1)) + 1 for x in (voxel, experiment)]
    # Sparse matrices add up what falls in one place; they keep sums that are zero.
    total, norm = (
        sparse.csr_matrix((column, (voxel, experiment)), shape)
        for column in (photons, weight)
    )
    rows = np.repeat(np.arange(shape[0]), np.diff(total.indptr))
    return Pairs(rows, total.indices, total.data, norm.data)


def relative_scales(pairs: Pairs, n_experiments: int) -> RelativeScales:
    """The scale factors of the greatest likelihood.

    An experiment that shares no voxel with others is a group of its own. Blank is one
    that has no photons in all the voxels where others have some.

    Args:
        pairs: The sums of each voxel and experiment.
        n_experiments: Number of experiments, those without pairs included.
    """
    n = n_experiments
    common = pairs.select(_is_common(pairs)[pairs.voxel])
    blank = np.bincount(common.experiment, common.photons, n) <= 0
    # Of those that have no common voxels nothing is known, unless they have no rows.
    blank &= np.bincount(common.experiment, minlength=n) > 0
    blank |= np.bincount(pairs.experiment, minlength=n) == 0
    linked, group = link(common, n)
    group[blank] = -1
    scale = np.where(blank, 0.0, 1.0)
    present, place = np.unique(linked.experiment, return_inverse=True)
    if len(present):
        _, voxel = np.unique(linked.voxel, return_inverse=True)
        theta = maximise_likelihood(linked._replace(voxel=voxel, experiment=place))
        _, member = np.unique(group[present], return_inverse=True)
        # The gauge: exp() of differences within a group is safe.
        k = np.exp(theta - (np.bincount(member, theta) / np.bincount(member))[member])
        scale[present] = k / (np.bincount(member, k) / np.bincount(member))[member]
    return RelativeScales(scale, group)


def _is_common(pairs: Pairs) -> np.ndarray:
    """Whether several experiments saw each voxel and it has photons, by its number."""
    several = np.bincount(pairs.voxel) > 1
    return several & (np.bincount(pairs.voxel, pairs.photons) > 0)


def link(pairs: Pairs, n_experiments: int) -> tuple[Pairs, np.ndarray]:
    """Groups of experiments whose relative scales are determined.

    They are the strongly connected components of the graph that leads from an experiment
    to the voxels where it has photons, and from a voxel to the experiments that saw it.

    Returns:
        The pairs within the groups, and the number of the group of each experiment.
    """
    group = np.arange(n_experiments)
    while len(pairs.voxel):
        n_nodes = n_experiments + int(pairs.voxel.max()) + 1
        node, bright = n_experiments + pairs.voxel, pairs.photons > 0
        begin = np.concatenate([pairs.experiment[bright], node])
        end = np.concatenate([node[bright], pairs.experiment])
        edges = (np.ones(len(begin), dtype=np.int8), (begin, end))
        graph = sparse.csr_matrix(edges, shape=(n_nodes, n_nodes))
        _, label = connected_components(graph, directed=True, connection="strong")
        group = label[:n_experiments]
        kept = pairs.select(group[pairs.experiment] == label[node])
        kept = kept.select(_is_common(kept)[kept.voxel])
        photons = np.bincount(kept.experiment, kept.photons, n_experiments)
        kept = kept.select(photons[kept.experiment] > 0)
        if len(kept.voxel) == len(pairs.voxel):
            break
        pairs = kept  # what went may have been a link
        group = np.arange(n_experiments)
    return pairs, group


class ProfileLikelihood:
    """Minus the logarithm of the likelihood of scales, its gradient and curvature.

    The argument is x = θ/error with θ = log k and error = 1/sqrt(photons), about that of
    θ: in units of it the curvature is about 1.

    Args:
        pairs: Of linked experiments; all numbers of voxels and experiments occur.
    """

    def __init__(self, pairs: Pairs) -> None:
        shape = (int(pairs.voxel.max()) + 1, int(pairs.experiment.max()) + 1)
        self.weight = sparse.csr_matrix(
            (pairs.weight, (pairs.voxel, pairs.experiment)), shape
        )
        self._transposed = self.weight.T.tocsr()
        self.photons = np.bincount(pairs.experiment, pairs.photons)
        self._total = np.bincount(pairs.voxel, pairs.photons)
        self.error = 1 / np.sqrt(self.photons)
        # Chains of experiments need many steps: a sparse matrix for them is small.
        fill = np.sum(np.diff(self.weight.indptr) ** 2.0)
        self._explicit = fill < MAX_FILL * self.weight.nnz
        self._known: dict[bytes, sparse.spmatrix | LinearOperator] = {}

    def start(self) -> np.ndarray:
        """Scales by the ratio of counts, for experiments that are all alike."""
        expected = self.weight @ np.ones(len(self.photons))
        k = self.photons / (self._transposed @ (self._total / expected))
        return np.log(k) / self.error

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """The value and the gradient."""
        k = np.exp(x * self.error)
        expected = self.weight @ k
        gradient = k * (self._transposed @ (self._total / expected)) - self.photons
        value = self._total @ np.log(expected) - self.photons @ (x * self.error)
        return value, gradient * self.error

    def curvature(self, x: np.ndarray, p: np.ndarray) -> np.ndarray:
        """The matrix of second derivatives at x, times p."""
        if x.tobytes() not in self._known:
            self._known = {x.tobytes(): self._matrix(x)}
        return self._known[x.tobytes()] @ p

    def _matrix(self, x: np.ndarray) -> sparse.spmatrix | LinearOperator:
        k = np.exp(x * self.error)
        expected = self.weight @ k
        slope = k * self.error**2 * (self._transposed @ (self._total / expected))
        scaled = sparse.diags(np.sqrt(self._total) / expected) @ self.weight
        scaled = scaled @ sparse.diags(k * self.error)
        if self._explicit:
            return (sparse.diags(slope) - scaled.T @ scaled).tocsr()
        mates = scaled.T.tocsr()
        return LinearOperator(
            (len(k), len(k)), matvec=lambda p: slope * p - mates @ (scaled @ p)
        )


def maximise_likelihood(pairs: Pairs) -> np.ndarray:
    """θ = log k of each experiment, up to one constant for each group.

    Newton's method; its equations are solved by conjugate gradients, so that no full
    matrix of experiments by experiments is needed.

    Args:
        pairs: Of linked experiments; all numbers of voxels and experiments occur.
    """
    likelihood = ProfileLikelihood(pairs)
    with np.errstate(over="ignore", invalid="ignore"):  # of steps too long, not taken
        result = optimize.minimize(
            likelihood,
            likelihood.start(),
            method="Newton-CG",
            jac=True,
            hessp=likelihood.curvature,
            options={"maxiter": MAX_CYCLES, "xtol": 1e-5},
        )
    misfit = np.max(np.abs(likelihood(result.x)[1]) * likelihood.error)
    # The line search may find no better value at the limit of the precision.
    if not (result.success or misfit < CONVERGED):
        logger.warning(
            "Warning: the scales of %d experiments did not converge in %d cycles; "
            "observed and expected photons differ by up to %.2g%%",
            len(likelihood.photons),
            result.nit,
            100 * misfit,
        )
    return result.x * likelihood.error


def collect_pairs(
    tables: Sequence[ObservationTable],
    numbers: Sequence[dict[int, int]],
    step: int,
) -> tuple[Pairs, np.ndarray]:
    """The sums of one in ``step`` symmetry-unique voxels, chosen by a hash.

    All observations of a voxel are in or none is.

    Args:
        tables: Observations on the same grid.
        numbers: For each table the number of each experiment by its ``id``.
        step: 1 for all voxels.

    Returns:
        The pairs, and the number of rows of each experiment among all voxels.

    Raises:
        ValueError: No table has rows that can be used.
    """
    voxels: list[np.ndarray] = []
    parts = []
    n_rows = np.zeros(sum(map(len, numbers)), dtype=np.int64)
    for table, number in zip(tables, numbers):
        names = [*COLUMNS, *{"flags"}.intersection(table.columns)]
        for start, stop in table.slabs(ROWS_PER_SLAB):
            rows = usable_rows(table.read(start, stop, names))
            if len(rows["id"]) == 0:
                continue
            experiment = lookup(number, rows["id"], table.path)
            n_rows += np.bincount(experiment, minlength=len(n_rows))
            unique = asu_voxels(rows["miller_index"], table.grid.laue_group)
            packed, voxel = np.unique(unique, return_inverse=True)
            photons = rows["counts"] - rows["background.sum.value"]
            columns = (voxel, experiment, photons, rows["normalisation"])
            if step > 1:
                chosen = sums.mix_bits(packed.view(np.uint64)) % np.uint64(step) == 0
                columns = tuple(column[chosen[voxel]] for column in columns)
            n_voxels = sum(map(len, voxels))
            voxels.append(packed)
            parts.append((columns[0] + n_voxels, *columns[1:]))
    if not parts:
        raise ValueError(
            f"{tables[0].path} has no usable observations: all of its rows are flagged "
            "as outliers or have no pixels"
        )
    voxel, *columns = (np.concatenate(column) for column in zip(*parts))
    _, number = np.unique(np.concatenate(voxels), return_inverse=True)
    return add_up_pairs(number[voxel], *columns), n_rows


def sample_pairs(
    tables: Sequence[ObservationTable], numbers: Sequence[dict[int, int]]
) -> Pairs:
    """The sums of enough voxels for the scale of every experiment.

    Args: as those of ``collect_pairs``.
    """
    step = -(-sum(table.n_rows for table in tables) // MAX_ROWS)
    while True:
        pairs, n_rows = collect_pairs(tables, numbers, step)
        n_pairs = np.bincount(pairs.experiment, minlength=len(n_rows))
        # Several rows may make one pair: without a choice all is taken as it is.
        if step == 1 or np.all(n_pairs >= np.minimum(n_rows, MIN_ROWS)):
            return pairs
        step = -(-step // 4) if step > 2 else 1


def warn_of_groups(
    names: Sequence[str], group: np.ndarray, blank_ones: str = "are left out"
) -> None:
    """Name experiments whose scale, or whose scale relative to others, is not known.

    Args:
        names: Identifiers of the experiments.
        group: As that of ``RelativeScales``.
        blank_ones: What becomes of experiments without photons.
    """
    blank = [name for name, g in zip(names, group) if g < 0]
    if blank:
        logger.warning(
            "Warning: %d of %d experiments %s, as they have no photons in voxels where "
            "others have some: %s",
            len(blank),
            len(names),
            blank_ones,
            shortened(blank, MAX_NAMES),
        )
    sizes = np.sort(np.unique(group[group >= 0], return_counts=True)[1])[::-1]
    if len(sizes) > 1:
        logger.warning(
            "Warning: no voxel with photons links the experiments of %d groups, so "
            "their relative scale is not known and each has a mean scale of 1. "
            "Experiments in each: %s",
            len(sizes),
            shortened(sizes),
        )


def scale_experiments(tables: Sequence[ObservationTable]) -> list[dict[int, float]]:
    """Scale factor of each experiment of each table, by its ``id``.

    Args:
        tables: Observations on the same grid.
    """
    numbers, names = [], []
    for table in tables:
        numbers.append({i: len(names) + n for n, i in enumerate(table.identifiers)})
        names.extend(table.identifiers.values())
    scale, group = relative_scales(sample_pairs(tables, numbers), len(names))
    warn_of_groups(names, group)
    return [{i: float(scale[n]) for i, n in number.items()} for number in numbers]


def put_on_one_scale(
    tables: Sequence[ObservationFile],
) -> tuple[Sequence[ObservationTable], dict[str, float]]:
    """Put experiments that have no scale yet on one scale.

    Returns:
        The tables with scales, and the scale of each experiment by its identifier; empty
        where the tables had scales.

    Raises:
        ValueError: Some tables have scales and others have none.
    """
    scaled = ["inverse_scale_factor" in table.columns for table in tables]
    if all(scaled):
        return tables, {}
    if any(scaled):
        raise ValueError(
            f"{tables[scaled.index(True)].path} has been scaled, "
            f"{tables[scaled.index(False)].path} has not: scale all files together or "
            "give them all unscaled. With scale_experiments=False they are merged as "
            "they are, unscaled ones with a scale of 1"
        )
    scales = scale_experiments(tables)
    by_identifier = {
        table.identifiers[i]: k
        for table, of_table in zip(tables, scales)
        for i, k in of_table.items()
    }
    values = np.array([k for k in by_identifier.values() if k > 0])
    logger.info(
        "Scales of %d experiments, from their counts in common voxels: %.3f to %.3f, "
        "rms deviation from 1 %.3f",
        len(values),
        values.min(),
        values.max(),
        np.sqrt(np.mean((values - 1) ** 2)),
    )
    return [ScaledTable(t, k) for t, k in zip(tables, scales)], by_identifier


class ScaledTable:
    """A table of observations with a scale factor for each experiment.

    Adds the column ``inverse_scale_factor``; the rest is that of the table.

    Args:
        table: Observations without that column.
        scales: Scale factor of each experiment, by its ``id``.
    """

    def __init__(self, table: ObservationFile, scales: dict[int, float]) -> None:
        self.path = table.path
        self.grid = table.grid
        self.identifiers = table.identifiers
        self.n_rows = table.n_rows
        self.slabs = table.slabs
        self.columns = (*table.columns, "inverse_scale_factor")
        self._table = table
        self._scale = np.ones(max(scales) + 1)
        self._scale[list(scales)] = list(scales.values())

    def read(self, start: int, stop: int, names: list[str]) -> dict[str, np.ndarray]:
        """Some columns of the rows from ``start`` up to ``stop``."""
        stored = [name for name in names if name != "inverse_scale_factor"]
        rows = self._table.read(start, stop, [*stored, "id"])
        if "inverse_scale_factor" in names:
            rows["inverse_scale_factor"] = self._scale[rows["id"]]
        return {name: rows[name] for name in names}
