"""The sums for scaling in C++ against a slow numpy twin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from dxtbx import flumpy
from scitbx.array_family import flex

from dials_diffuse_ext import ScalingBlock

INNER, OUTER, ADDITIVE = range(3)
ROLES = (INNER, OUTER, ADDITIVE, INNER)
N_CELLS = (5, 7, 4, 2)
SIZES = (3, 1, 0, 6, 40, 2)  # of the groups: single rows and none at all, too


class Case(NamedTuple):
    start: np.ndarray
    photons: np.ndarray
    normalisation: np.ndarray
    weight: np.ndarray
    cells: list[np.ndarray]
    values: list[np.ndarray]
    reference: np.ndarray | None = None  # intensity and weight of each group

    def block(self) -> ScalingBlock:
        arrays = (self.start, self.photons, self.normalisation)
        block = ScalingBlock(*map(flumpy.from_numpy, arrays))
        for role, cell, n in zip(ROLES, self.cells, N_CELLS):
            block.add_term(role, flumpy.from_numpy(cell), n)
        block.set_weights(flumpy.from_numpy(self.weight))
        if self.reference is not None:
            block.set_reference(*map(flumpy.from_numpy, self.reference.copy()))
        return block

    def flex_values(self) -> list:
        return [flumpy.from_numpy(values) for values in self.values]


def make_case(with_reference: bool) -> Case:
    rng = np.random.default_rng(7)
    n = sum(SIZES)
    weight = rng.uniform(0.1, 2, n).astype(np.float32)
    weight[rng.random(n) < 0.2] = 0
    values = [rng.uniform(0.5, 2, n_cells) for n_cells in N_CELLS]
    values[2] -= 1.2  # offsets of either sign
    intensity = rng.uniform(1, 5, len(SIZES)).astype(np.float32)
    known = rng.uniform(0.5, 5, len(SIZES)).astype(np.float32)
    known[::2] = 0
    intensity[::4] = np.nan  # of no weight
    return Case(
        np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int32),
        rng.normal(4, 2, n).astype(np.float32),
        rng.uniform(0.5, 2, n).astype(np.float32),
        weight,
        [rng.integers(0, n_cells, n).astype(np.int32) for n_cells in N_CELLS],
        values,
        np.stack([intensity, known]) if with_reference else None,
    )


class Sums(NamedTuple):
    total: float
    intensity: np.ndarray
    response: np.ndarray
    offset: np.ndarray


def twin(case: Case) -> Sums:
    """f = Σ w (y - o - x I)², I from the normal equation of each group.

    The reference is one more row of y = R, x = 1, o = 0.
    """
    factors = [v[c] for v, c in zip(case.values, case.cells)]
    inner = factors[0] * factors[3]
    outer, additive = factors[1], factors[2]
    norm = case.normalisation.astype(float)
    x, o = norm * outer * inner, norm * outer * additive
    weight, total, intensity = case.weight.astype(float), 0.0, []
    for group, (a, b) in enumerate(zip(case.start[:-1], case.start[1:])):
        w, y, slope = weight[a:b], case.photons[a:b] - o[a:b], x[a:b]
        if case.reference is not None and case.reference[1, group] > 0:
            w = np.append(w, float(case.reference[1, group]))
            y = np.append(y, float(case.reference[0, group]))
            slope = np.append(slope, 1.0)
        root = np.sqrt(w)
        solution = np.linalg.lstsq((root * slope)[:, None], root * y, rcond=None)
        mean = solution[0][0] if len(w) else 0.0
        total += np.sum(w * (y - slope * mean) ** 2)
        intensity.append(mean)
    return Sums(total, np.array(intensity), x, o)


def shifted(case: Case, term: int, cell: int, step: float) -> Case:
    """Another value of a cell: of ln(value) for factors, of the value for offsets."""
    values = [v.copy() for v in case.values]
    if ROLES[term] == ADDITIVE:
        values[term][cell] += step
    else:
        values[term][cell] *= np.exp(step)
    return case._replace(values=values)


@pytest.mark.parametrize("with_reference", [False, True])
def test_functional_intensities_and_responses(with_reference):
    case = make_case(with_reference)
    block, expected = case.block(), twin(case)
    assert (block.n_rows, block.n_groups) == (sum(SIZES), len(SIZES))
    assert expected.total > 10
    assert block.evaluate(case.flex_values()) == pytest.approx(expected.total, rel=1e-9)
    found = flumpy.to_numpy(block.intensities())
    np.testing.assert_allclose(found, expected.intensity, rtol=1e-9)
    response, offset = block.responses(case.flex_values())
    np.testing.assert_allclose(flumpy.to_numpy(response), expected.response, 1e-6)
    np.testing.assert_allclose(flumpy.to_numpy(offset), expected.offset, 1e-6)


@pytest.mark.parametrize("with_reference", [False, True])
def test_gradient_is_that_of_the_functional(with_reference):
    """By differences of the twin, which finds the intensities anew each time."""
    case, step = make_case(with_reference), 1e-5
    block = case.block()
    block.evaluate(case.flex_values())
    for term, n_cells in enumerate(N_CELLS):
        found = flumpy.to_numpy(block.gradient(term))
        expected = [
            twin(shifted(case, term, cell, step)).total
            - twin(shifted(case, term, cell, -step)).total
            for cell in range(n_cells)
        ]
        expected = np.array(expected) / (2 * step)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_reference", [False, True])
def test_curvature_is_that_of_single_rows(with_reference):
    """2 Σ w t² (1 - w x²/(Σ w x² + v)), t the derivative of the expected photons."""
    case = make_case(with_reference)
    block, sums = case.block(), twin(case)
    block.evaluate(case.flex_values())
    weight, sizes = case.weight.astype(float), np.diff(case.start)
    group = np.repeat(np.arange(len(sizes)), sizes)
    share = weight * sums.response**2
    total = np.bincount(group, share, len(sizes))
    if with_reference:
        total += case.reference[1]
    share = share / np.maximum(total, 1e-30)[group]
    signal = sums.response * sums.intensity[group]
    slopes = {
        INNER: signal,
        OUTER: signal + sums.offset,
        ADDITIVE: case.normalisation * case.values[1][case.cells[1]],
    }
    for term, (role, n_cells) in enumerate(zip(ROLES, N_CELLS)):
        by_row = 2 * weight * slopes[role] ** 2 * (1 - share)
        expected = np.bincount(case.cells[term], by_row, n_cells)
        found = flumpy.to_numpy(block.curvature(term))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rows_without_weight_do_not_count():
    case = make_case(False)
    other = case.photons.copy()
    other[case.weight == 0] += 1000
    block = case._replace(photons=other).block()
    assert block.evaluate(case.flex_values()) == case.block().evaluate(
        case.flex_values()
    )


def test_an_evaluation_leaves_arrays_of_the_last_alone():
    case = make_case(False)
    block = case.block()
    block.evaluate(case.flex_values())
    before = block.gradient(0)
    kept = flumpy.to_numpy(before).copy()
    block.evaluate(shifted(case, 0, 0, 0.5).flex_values())
    np.testing.assert_array_equal(flumpy.to_numpy(before), kept)
    assert np.any(flumpy.to_numpy(block.gradient(0)) != kept)


def test_evaluation_without_curvatures():
    case = make_case(True)
    block, full = case.block(), case.block()
    total = full.evaluate(case.flex_values())
    assert block.evaluate(case.flex_values(), curvatures=False) == total
    for term in range(len(ROLES)):
        assert list(block.gradient(term)) == list(full.gradient(term))
    with pytest.raises(RuntimeError, match="without curvatures"):
        block.curvature(0)


# flex has its own memory: that of numpy must not be given back while an error is raised.
def ints(*values: int) -> flex.int:
    return flex.int(values)


def floats(*values: float) -> flex.float:
    return flex.float(values)


def small_block() -> ScalingBlock:
    return ScalingBlock(ints(0, 2), floats(1, 2), floats(1, 1))


@pytest.mark.parametrize(
    "start, photons, normalisation, message",
    [
        (ints(0, 3), floats(1, 2), floats(1, 1), "do not fit"),
        (ints(1, 2), floats(1, 2), floats(1, 1), "do not fit"),
        (ints(), floats(), floats(), "do not fit"),
        (ints(0, 2), floats(1, 2), floats(1), "do not fit"),
        (ints(0, 2, 1, 2), floats(1, 2), floats(1, 1), "must ascend"),
    ],
)
def test_wrong_rows(start, photons, normalisation, message):
    with pytest.raises(ValueError, match=message):
        ScalingBlock(start, photons, normalisation)


@pytest.mark.parametrize(
    "role, cells, message",
    [
        (3, ints(0, 1), "role of a term"),
        (0, ints(0), "a cell for each row"),
        (0, ints(0, 2), "a cell that its term has not"),
        (0, ints(0, -1), "a cell that its term has not"),
    ],
)
def test_wrong_terms(role, cells, message):
    with pytest.raises(ValueError, match=message):
        small_block().add_term(role, cells, 2)


def test_wrong_arrays():
    block = small_block()
    block.add_term(0, ints(0, 1), 2)
    with pytest.raises(ValueError, match="weight is needed for each row"):
        block.set_weights(floats(1))
    for arrays in (floats(1, 2), floats(1)), (floats(1), floats(1, 2)):
        with pytest.raises(ValueError, match="for each group"):
            block.set_reference(*arrays)
    with pytest.raises(ValueError, match="values are needed for each term"):
        block.evaluate([])
    one = flex.double(1, 1.0)
    with pytest.raises(ValueError, match="a value is needed for each cell"):
        block.evaluate([one])
    with pytest.raises(ValueError, match="a value is needed for each cell"):
        block.responses([one])


@pytest.mark.parametrize(
    "intensity, weight, message",
    [
        (1.0, np.nan, "weights must be finite"),
        (1.0, np.inf, "weights must be finite"),
        (1.0, -1.0, "weights must be finite"),
        (np.nan, 1.0, "intensities finite"),
    ],
)
def test_reference_that_would_spoil_all_sums(intensity, weight, message):
    block = make_case(False).block()
    values = np.ones((2, len(SIZES)), dtype=np.float32)
    values[:, 2] = intensity, weight
    arrays = [flumpy.from_numpy(x.copy()) for x in values]  # must outlive the error
    with pytest.raises(ValueError, match=message):
        block.set_reference(*arrays)
