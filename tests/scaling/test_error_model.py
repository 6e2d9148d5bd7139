from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import truncnorm

from dials.algorithms.scaling.model.model import KBScalingModel
from dials_diffuse.scaling import error_model
from dials_diffuse.scaling.error_model import (
    ErrorModel,
    Rows,
    chi_square_bins,
    collect_residuals,
    normal_probability,
    refine_error_model,
    residuals,
    truncated_variance,
)
from dials_diffuse.scaling.outliers import find_outliers
from dials_diffuse.scaling.reference import Reference


def simulate(multiplicity, low, high, a=1.0, b=0.0, n_rows=200_000):
    """Rows with the error model of a and b; means are evenly spread in logarithm."""
    rng = np.random.default_rng(7)
    start = np.arange(n_rows // multiplicity + 1) * multiplicity
    n = start[-1]
    x = rng.lognormal(0.0, 0.3, n)
    mean = np.exp(rng.uniform(np.log(low), np.log(high), len(start) - 1))
    signal = np.repeat(mean, multiplicity) * x
    base = 0.3 * low * x * rng.uniform(0.5, 1.5, n)
    variance = (0.05 * base) ** 2
    seen = base + signal * (1 + a * b * rng.normal(size=n))
    seen += a * rng.normal(size=n) * np.sqrt(variance)
    # Poisson counts in units of a²: variance a² times the counts.
    counts = a**2 * rng.poisson(np.maximum(seen, 0) / a**2)
    return counts.astype(float), x, base, variance, start


def assert_chi_square_is_1(bins):
    """To 4 standard errors, and to 3 % in bins of so many rows that these are less."""
    error = np.sqrt((2 + 1 / bins.expected) / bins.n_rows)
    deviation = np.abs(bins.after - 1)
    assert np.all(deviation < 4 * error + 0.01)
    assert np.all(deviation[error < 0.01] < 0.03)


@pytest.mark.parametrize("multiplicity", [3, 8, 30])
@pytest.mark.parametrize("a, b", [(1.0, 0.03), (1.2, 0.05), (0.8, 0.05), (1.3, 0.04)])
def test_model_comes_back_and_makes_chi_square_1(multiplicity, a, b):
    rows = simulate(multiplicity, 10, 3000, a, b)
    model = refine_error_model(*rows)
    assert model.a == pytest.approx(a, rel=0.02)
    assert model.b == pytest.approx(b, rel=0.1)
    assert abs(model.a - a) < 4 * model.sigma_a < 0.1
    assert abs(model.b - b) < 4 * model.sigma_b < 0.02
    bins = chi_square_bins(*rows, model)
    assert np.sum(bins.n_rows > 20_000) >= 6 and bins.n_rows.sum() == len(rows[0])
    assert_chi_square_is_1(bins)
    # Negative control.
    assert bins.before[-1] > 1.5


@pytest.mark.parametrize("multiplicity", [2, 3, 8, 30])
@pytest.mark.parametrize("mean", [0.1, 1.0, 5.0])
def test_few_poisson_counts_need_no_model(multiplicity, mean):
    rows = simulate(multiplicity, mean / 2, mean * 2)
    model = refine_error_model(*rows)
    assert abs(model.a - 1) < 3.5 * model.sigma_a < 0.02
    assert model.b == 0 and model.limit_of_i_over_sigma is None
    assert_chi_square_is_1(chi_square_bins(*rows, model))


def test_rejected_outliers_make_no_difference():
    rows = simulate(8, 10, 3000, 1.2, 0.05)
    before = refine_error_model(*rows)
    outliers = find_outliers(*rows, error_model=before)
    assert 20 < outliers.sum() < 1e-3 * len(outliers)
    after = refine_error_model(*rows, outliers=outliers)
    assert after.a == pytest.approx(before.a, rel=2e-3)
    assert after.b == pytest.approx(before.b, rel=1e-2)


@pytest.mark.parametrize("factor", [10, 1e5])
def test_outliers_that_are_left_in_do_little(factor):
    counts, *others = simulate(8, 10, 3000, 1.2, 0.05)
    counts[::1000] *= factor
    model = refine_error_model(counts, *others)
    assert model.a == pytest.approx(1.2, rel=0.03)
    assert model.b == pytest.approx(0.05, rel=0.1)
    # Negative control: the mean square without limits.
    assert chi_square_bins(counts, *others, model).after.max() > 2


def test_model_is_left_alone_where_nothing_is_known(caplog):
    few = simulate(2, 10, 3000, 1.5, 0.1, n_rows=400)
    singles = simulate(1, 10, 3000, 1.5, 0.1, n_rows=1000)
    nothing = tuple(np.empty(0) for _ in range(4)) + (np.array([0]),)
    dark = (np.zeros(3000), np.ones(3000), np.zeros(3000), np.zeros(3000))
    for rows in (few, singles, nothing, (*dark, np.arange(0, 3001, 3))):
        caplog.clear()
        model = refine_error_model(*rows)
        assert model.parameters == [1.0, 0.0] and not model.is_refined
        assert "error model cannot be refined" in caplog.text
    assert len(chi_square_bins(*singles, ErrorModel()).n_rows) == 0
    assert len(normal_probability(*nothing, ErrorModel()).observed) == 0
    assert refine_error_model(*simulate(2, 10, 3000, 1.5, 0.1, 2000)).is_refined


def test_a_wrong_gain_is_told(caplog):
    model = refine_error_model(*simulate(8, 10, 300, 0.3))
    assert model.a == error_model.MIN_A
    assert "the gain of the detector may be wrong" in caplog.text


def test_variance_of_residuals_is_unbiased():
    """The mean over many groups alike, of unequal rows, some of them nearly empty."""
    n_groups, n = 40_000, 4
    rng = np.random.default_rng(7)
    x = np.tile([0.5, 1.0, 2.0, 0.1], n_groups)
    base = np.tile([0.0, 0.4, 0.1, 3.0], n_groups)
    v = np.tile([0.0, 0.2, 0.0, 0.5], n_groups)
    counts = rng.poisson(0.7 * x + base) + rng.normal(size=len(x)) * np.sqrt(v)
    group = np.repeat(np.arange(n_groups), n)
    found = residuals(Rows(counts, x, base, v, group))
    square = (found.deviation**2).reshape(-1, n)
    error = square.std(axis=0) / np.sqrt(n_groups)
    expected = found.counting.reshape(-1, n).mean(axis=0)
    assert np.all(np.abs(square.mean(axis=0) - expected) < 4 * error)
    # The leverage counts.
    assert abs((0.7 * x + base + v)[2] - expected[2]) > 20 * error[2]
    assert np.all(found.counting_scale > 0)


def test_fractional_part_of_residuals_is_unbiased():
    n_groups, n = 40_000, 3
    x = np.tile([0.5, 1.0, 2.0], n_groups)
    counts = np.random.default_rng(7).poisson(4.0 * x).astype(float)
    zero = np.zeros(len(x))
    found = residuals(Rows(counts, x, zero, zero, np.repeat(np.arange(n_groups), n)))
    square, h = (4.0 * x[:3]) ** 2, x[:3] / 3.5
    expected = (1 - 2 * h) * square + h**2 * square.sum()
    mean = found.fractional.reshape(-1, n).mean(axis=0)
    assert mean == pytest.approx(expected, rel=0.02)


def against_a_map(multiplicity, a, b, f, response=20.0, n_rows=200_000):
    """Rows of a and b, and a map of their voxels with errors of its own.

    Args:
        multiplicity: Rows of each voxel.
        a, b: Error model of the rows.
        f: Fractional error of the map.
        response: Of the map; that of a row is about 1.
        n_rows: Number of rows.
    """
    rng = np.random.default_rng(3)
    n = n_rows // multiplicity
    group = np.repeat(np.arange(n), multiplicity)
    truth = np.exp(rng.uniform(np.log(30), np.log(3000), n))
    x = rng.lognormal(0.0, 0.3, len(group))
    base = 10 * x
    seen = truth[group] * x * (1 + a * b * rng.normal(size=len(group))) + base
    counts = a**2 * rng.poisson(np.maximum(seen, 0) / a**2)
    sigma = np.sqrt(truth / response + 2 + (f * truth) ** 2)
    values = (truth + sigma * rng.normal(size=n), response, 2.0, f**2)
    known = Reference(np.arange(n), *(np.broadcast_to(v, n) for v in values))
    start = np.arange(n + 1) * multiplicity
    return (counts.astype(float), x, base, 0.1 * base, start), known


@pytest.mark.parametrize("multiplicity", [1, 2])
@pytest.mark.parametrize("a, b, f", [(1.0, 0.0, 0.0), (1.3, 0.05, 0.0), (0.8, 0, 0.02)])
def test_model_of_rows_comes_back_by_a_map(multiplicity, a, b, f):
    """The errors of the map are given, and no part of a and b."""
    (counts, x, base, v, start), known = against_a_map(multiplicity, a, b, f)
    columns = (counts, x, base, 0 * v, start)
    model = refine_error_model(*columns, reference=known)
    assert model.a == pytest.approx(a, abs=0.02)
    assert model.b == pytest.approx(b, abs=0.004)
    assert_chi_square_is_1(chi_square_bins(*columns, model, reference=known))
    expected, observed = normal_probability(*columns, model, reference=known)
    middle = np.abs(expected) < 2.5
    assert np.abs(observed - expected)[middle].max() < 0.1
    # Control: with half the errors of the map.
    sharp = dataclasses.replace(
        known,
        response=known.response * 4,
        base=known.base / 4,
        fractional=known.fractional / 4,
    )
    if f > 0:
        wrong = refine_error_model(*columns, reference=sharp)
        assert abs(wrong.b - b) > 0.01
    if multiplicity == 1:
        assert not refine_error_model(*columns).is_refined


def test_a_map_of_something_else_gives_no_error_model(caplog):
    (counts, x, base, v, start), known = against_a_map(1, 1.0, 0.0, 0.0, n_rows=3000)
    other = dataclasses.replace(
        known, intensity=known.intensity + 1e6, response=known.response * 1e6
    )
    model = refine_error_model(counts, x, base, v, start, reference=other)
    assert not model.is_refined and (model.a, model.b) == (1, 0)
    assert "all observations disagree" in caplog.text


def test_variance_of_residuals_with_a_map_is_unbiased():
    """Few counts, a weak map of some of the voxels with an error of all three kinds."""
    n, rate = 200_000, 0.7
    rng = np.random.default_rng(5)
    x, base = np.tile([0.5, 1.5], n), np.tile([0.4, 0.1], n)
    counts = rng.poisson(rate * x + base).astype(float)
    m, v, f = 2.0, 0.1, 0.3
    photons = rng.poisson(m * rate * np.maximum(1 + f * rng.normal(size=n), 0))
    seen = photons / m + np.sqrt(v) * rng.normal(size=n)
    has = np.arange(n) % 2 == 0
    values = (seen, m, v, f**2)
    known = Reference(np.arange(n), *(np.where(has, value, 0.0) for value in values))
    group = np.repeat(np.arange(n), 2)
    rows = Rows(counts, x, base, 0 * x, group, known.select(group))
    found = residuals(rows)
    square, expected = found.deviation**2, found.expectation(ErrorModel())
    for one_of_4 in range(4):
        chosen = slice(one_of_4, None, 4)
        difference = square[chosen] - expected[chosen]
        error = difference.std() / np.sqrt(n / 2)
        assert abs(difference.mean()) < 4 * error
        given = found.given[chosen].mean()
        assert given > 5 * error if one_of_4 < 2 else given == 0
    assert np.all(found.scale(ErrorModel()) > 0)
    # A map alone with one row.
    one = residuals(rows.select(group * 2 == np.arange(2 * n)))
    assert len(one.deviation) == np.count_nonzero(has)


def test_voxels_all_alike_do_not_tell_a_and_b_apart():
    n = 6000
    counts = np.tile([5.0, 9.0, 7.0], n // 3)
    rows = (counts, np.ones(n), np.zeros(n), np.zeros(n), np.arange(0, n + 1, 3))
    model = refine_error_model(*rows)
    # Sample variance 4 of counts of mean 7.
    assert model.a == pytest.approx(np.sqrt(4 / 7), rel=1e-3)
    assert model.b == 0


def test_a_choice_of_rows_is_of_whole_groups():
    rows = simulate(8, 10, 300, 1.2, 0.05)
    found = collect_residuals(*rows, max_rows=50_000)
    assert len(found.leverage) == pytest.approx(50_000, rel=0.05)
    h = found.leverage.reshape(-1, 8)
    assert h.sum(axis=1) == pytest.approx(1)
    assert error_model.fit_error_model(found).a == pytest.approx(1.2, rel=0.02)


def test_normal_probability_is_a_straight_line_with_the_right_model():
    rows = simulate(8, 100, 3000, 1.3, 0.05)
    expected, observed = normal_probability(*rows, ErrorModel(1.3, 0.05))
    assert 500 < len(expected) <= 1000
    assert np.all(np.diff(expected) > 0) and np.all(np.diff(observed) >= 0)
    assert expected[-1] > 4 and expected[0] == pytest.approx(-expected[-1])
    centre = np.abs(expected) < 2
    assert observed[centre] == pytest.approx(expected[centre], abs=0.05)
    # Negative control.
    _, uncorrected = normal_probability(*rows, ErrorModel())
    slope = np.polyfit(expected[centre], uncorrected[centre], 1)[0]
    assert slope > 1.3


def test_normal_probability_is_of_rows_with_enough_counts():
    rows = simulate(8, 0.5, 5)
    assert len(normal_probability(*rows, ErrorModel()).observed) == 0
    assert len(normal_probability(*rows, ErrorModel(), min_counts=0).observed) > 100


def test_model_as_an_object_of_dials():
    variance, signal = np.array([1.0, 50.0]), np.array([2.0, 400.0])
    for model in (ErrorModel(1.2, 0.05), ErrorModel(0.9, 0.0)):
        native = model.as_dials()
        assert list(native.parameters) == model.parameters
        expected = native.update_variances(variance, signal)
        assert model.variance(variance, signal) == pytest.approx(expected)
        scaling = KBScalingModel.from_dict(
            {
                "__id__": "KB",
                "is_scaled": True,
                "scale": {"n_parameters": 1, "parameters": [1.0]},
                "configuration_parameters": {"corrections": ["scale"]},
            }
        )
        scaling.set_error_model(native)
        assert scaling.configdict["error_model_type"] == "BasicErrorModel"
        assert scaling.configdict["error_model_parameters"] == model.parameters


def test_figures_by_name():
    figures = ErrorModel(2.0, 0.05, 0.1, 0.01, 7).as_dict()
    assert figures["limit_of_i_over_sigma"] == pytest.approx(10)
    assert figures["a"] == 2.0 and figures["n_rows"] == 7
    bins = chi_square_bins(*simulate(3, 10, 300, n_rows=9000), ErrorModel()).as_dict()
    assert len(bins["limits"]) == len(bins["after"]) + 1 > 3
    assert isinstance(bins["n_rows"][0], int)


@pytest.mark.parametrize("limit", [1.0, 3.0, 5.0])
def test_variance_of_what_is_within_limits(limit):
    assert truncated_variance(limit) == pytest.approx(truncnorm(-limit, limit).var())


def test_impossible_parameters_are_refused():
    with pytest.raises(ValueError, match="a = 0 of an error model must be positive"):
        ErrorModel(0, 0.1)
    with pytest.raises(ValueError, match="b = -0.1 of an error model"):
        ErrorModel(1.0, -0.1)


def test_flags_of_other_rows_are_refused():
    rows = simulate(3, 10, 300, n_rows=300)
    with pytest.raises(ValueError, match="7 flags of outliers for 300 rows"):
        refine_error_model(*rows, outliers=np.zeros(7, dtype=bool))
