"""Error model: how much observations scatter beyond their counting statistics.

A row is one observation, N counts of a voxel, expected to be x·I + base. Rows of a group
have the intensity I in common, which their sums give: I = Σ(N - base) / Σx. Deviations
of rows from their groups are compared with what counting explains, and the rest goes
into the model of dials.scale (Evans & Murshudov 2013,
https://doi.org/10.1107/S0907444913000061), here written for counts:

    σ'² = a² (σ² + (b x I)²)        σ² = x I + base + v

σ² holds expected counts, never those of the row itself, and the variance v of the base.
The expectation of the square of a deviation is known however few the counts are: for
Poisson counts, given their sum T in a group, it is T p (1 - p) with the row's share p.

A map to scale to (``reference``) is one more row of each group that it knows, and a single
row can be compared with it. Its errors are given: they enter the expectations as they are,
without a and b, and its own deviations are not asked for.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, Iterator, NamedTuple

import numpy as np
from scipy.stats import norm

if TYPE_CHECKING:
    from dials.algorithms.scaling.error_model.error_model import BasicErrorModel
    from dials_diffuse.scaling.reference import Reference

logger = logging.getLogger("dials.diffuse.scale")

ROWS_PER_BLOCK = 1 << 18
MAX_ROWS = 1_000_000  # enough for a and b, and for a plot
MIN_DEGREES = 250  # of freedom, to determine a model or to make a bin; as in DIALS
MAX_GIVEN = 1.0  # of a map, over the variance of counting: more tells nothing of a
MIN_A = 0.4  # as in DIALS: less is no scatter of counts, but a wrong gain
MIN_SIGNIFICANCE = 3.0  # of b², in standard errors
NORMAL_COUNTS = 20.0  # of so many expected counts the tails are nearly normal
LIMIT_NORMAL = 3.0  # standard deviations; more is taken for an outlier
LIMIT_FEW = 5.0  # the same where few counts are expected: nearly no limit
MAX_CYCLES = 100
CONVERGED = 1e-5
FINE_BINS = np.geomspace(1e-3, 1e9, 241)  # photons; 20 for each factor of 10
MIN_PLOT_COUNTS = 25.0  # as min_Ih of DIALS


@dataclasses.dataclass(frozen=True)
class ErrorModel:
    """The basic error model of DIALS, σ'² = a² (σ² + (b I)²).

    Args:
        a: Factor of the standard deviations.
        b: Standard deviation of a bright row relative to its signal.
        sigma_a: Standard error of a; None if it has not been refined.
        sigma_b: Standard error of b; None if it has not been refined, or is zero
            because b² was less than 3 standard errors.
        n_rows: Number of rows from which it was refined.
    """

    a: float = 1.0
    b: float = 0.0
    sigma_a: float | None = None
    sigma_b: float | None = None
    n_rows: int = 0

    def __post_init__(self) -> None:
        if not (self.a > 0 and np.isfinite(self.a)):
            raise ValueError(f"a = {self.a} of an error model must be positive")
        if not (self.b >= 0 and np.isfinite(self.b)):
            raise ValueError(f"b = {self.b} of an error model must not be negative")

    @property
    def parameters(self) -> list[float]:
        """[a, b], as those of the error models of DIALS."""
        return [self.a, self.b]

    @property
    def is_refined(self) -> bool:
        """Whether there were enough rows to refine it."""
        return self.sigma_a is not None

    @property
    def limit_of_i_over_sigma(self) -> float | None:
        """1/(a b), the I/σ that no row exceeds; None if b is zero."""
        return 1 / (self.a * self.b) if self.b > 0 else None

    def variance(self, variance: np.ndarray, signal: np.ndarray) -> np.ndarray:
        """a² (σ² + (b x I)²), photons².

        Args:
            variance: σ² = x I + base + v, from expected counts, photons².
            signal: x I, photons.
        """
        return self.a**2 * (variance + (self.b * signal) ** 2)

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            **dataclasses.asdict(self),
            "limit_of_i_over_sigma": self.limit_of_i_over_sigma,
        }

    def as_dials(self) -> BasicErrorModel:
        """The same model as an object of DIALS, for ``set_error_model``."""
        from dials.algorithms.scaling.error_model.error_model import BasicErrorModel

        model = BasicErrorModel()
        # Its constructor takes b = 0 for "not given" and puts 0.02 in its place.
        model.parameters = self.parameters
        return model


class Rows(NamedTuple):
    """Rows of whole groups; all of shape (n,), float64.

    Args:
        counts: N, photons.
        response: x, expected signal per intensity, s·sr.
        base: Expected photons that are not signal.
        variance: v, variance of the base, photons².
        group: Number of the group, ascending.
        reference: What a map says of the group of each row.
    """

    counts: np.ndarray
    response: np.ndarray
    base: np.ndarray
    variance: np.ndarray
    group: np.ndarray
    reference: Reference | None = None

    def select(self, use: np.ndarray) -> Rows:
        """Some of the rows."""
        known = None if self.reference is None else self.reference.select(use)
        return Rows(*(column[use] for column in self[:5]), known)

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum of the values over the group of each row."""
        return np.bincount(self.group, weights=values)[self.group]

    def size(self) -> np.ndarray:
        """Number of rows in the group of each row."""
        return np.bincount(self.group)[self.group]

    @property
    def known(self) -> np.ndarray:
        """Whether a map has the voxel of each row."""
        if self.reference is None:
            return np.zeros(len(self.group), dtype=bool)
        return self.reference.known

    def of_map(self) -> tuple[np.ndarray, ...]:
        """The map as a row of the group of each row, zeros where it says nothing.

        Returns:
            m I and m, photons less base and the response; the base, as many photons as
            have the variance of what is not signal; and the square of the relative error.
        """
        known = self.reference
        if known is None:
            return (np.zeros(len(self.group)),) * 4
        base = known.response**2 * known.base
        return known.photons, known.response, base, known.fractional


def ranges_of_groups(start: np.ndarray, max_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole groups of about ``max_rows`` rows at the most, in turn.

    Args:
        start: First row of each group and, last, the number of rows.
        max_rows: A group that has more is a range by itself.
    """
    first, n_groups = 0, len(start) - 1
    while first < n_groups:
        last = int(np.searchsorted(start, start[first] + max_rows, side="right")) - 1
        last = max(first + 1, last)
        yield first, last
        first = last


def blocks_of_rows(
    counts: np.ndarray,
    response: np.ndarray,
    base: np.ndarray,
    variance: np.ndarray,
    start: np.ndarray,
    reference: Reference | None = None,
) -> Iterator[tuple[slice, Rows]]:
    """Some whole groups at a time: their place among all rows, and the rows.

    Args:
        counts, response, base, variance: Columns of ``Rows``, sorted by group.
        start: First row of each group and, last, the number of rows, int64.
        reference: What a map says of each group.

    Raises:
        ValueError: Columns of different lengths, limits that do not fit them, or a
            response that is not positive.
    """
    columns = [np.asarray(c) for c in (counts, response, base, variance)]
    start = np.asarray(start)
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"Columns of rows differ in length: {lengths}")
    sizes = np.diff(start)
    if not len(start) or start[0] or start[-1] != len(columns[0]) or np.any(sizes < 0):
        raise ValueError("The limits of the groups do not fit the number of rows")
    for first, last in ranges_of_groups(start, ROWS_PER_BLOCK):
        place = slice(int(start[first]), int(start[last]))
        group = np.repeat(np.arange(last - first), sizes[first:last])
        known = None if reference is None else reference.select(first + group)
        own = (column[place].astype(np.float64) for column in columns)
        rows = Rows(*own, group, known)
        if not np.all(rows.response > 0):
            raise ValueError(
                "The response of each row (normalisation times inverse scale factor) "
                f"must be positive, but one is {rows.response.min():g}: leave such "
                "rows out"
            )
        if len(group):
            yield place, rows


class Residuals(NamedTuple):
    """Deviations of rows from their groups, all of shape (n,).

    Args:
        deviation: N - base - x I with the I of the group, photons.
        counting: Estimate of its variance from counting and that of the base, photons².
        fractional: Estimate of what b² adds to it, photons².
        counting_scale: ``counting`` as it should be, positive, for weights.
        fractional_scale: The same of ``fractional``.
        expected: Counts N that are expected, positive, photons.
        variance: σ² = expected + v, photons².
        leverage: x / Σx, the share of the row in I.
        given: Estimate of what the errors of a map add to the variance, photons².
        given_scale: The same as it should be, not negative.
    """

    deviation: np.ndarray
    counting: np.ndarray
    fractional: np.ndarray
    counting_scale: np.ndarray
    fractional_scale: np.ndarray
    expected: np.ndarray
    variance: np.ndarray
    leverage: np.ndarray
    given: np.ndarray
    given_scale: np.ndarray

    def select(self, use: np.ndarray) -> Residuals:
        """Some of the residuals."""
        return Residuals(*(column[use] for column in self))

    def expectation(self, model: ErrorModel) -> np.ndarray:
        """Unbiased estimate of the square of each deviation, photons²."""
        own = self.counting + model.b**2 * self.fractional
        return model.a**2 * own + self.given

    def scale(self, model: ErrorModel) -> np.ndarray:
        """The same as it should be, positive, for weights."""
        own = self.counting_scale + model.b**2 * self.fractional_scale
        return model.a**2 * own + self.given_scale


def residuals(rows: Rows) -> Residuals:
    """Deviations of rows from their groups, of those of several rows or with a map.

    I is a sum over the group, the row itself included, with h = x / Σx:

        var(N_i - base_i - x_i I) = (1 - 2 h_i) var(N_i) + h_i² Σ var(N)

    The sums are over a map too, whose share h_i² var of the variance is ``given``.

    The estimates of the variance are linear in the counts and unbiased, but may be zero,
    where a group has no counts, or even negative. For weights and bins, which need
    something positive, no group is taken to be weaker than one photon.
    """
    rows = rows.select((rows.size() > 1) | rows.known)
    map_photons, map_response, map_base, map_fractional = rows.of_map()
    total = rows.total(rows.response) + map_response
    h, map_h = rows.response / total, map_response / total
    photons = rows.total(rows.counts - rows.base) + map_photons

    def of_residual(variance: np.ndarray) -> np.ndarray:
        return (1 - 2 * h) * variance + h**2 * rows.total(variance)

    signal, positive = h * photons, h * np.maximum(photons, 1.0)
    variance = signal + rows.base + rows.variance
    map_signal = map_h * photons
    of_map = map_signal + map_base
    # The square of an estimate is too large by its variance.
    excess = rows.total(variance) + of_map + map_fractional * map_signal**2
    square, map_square = signal**2 - h**2 * excess, map_signal**2 - map_h**2 * excess
    map_positive = map_h * np.maximum(photons, 1.0)
    map_scale = map_positive + map_base + map_fractional * map_positive**2
    expected = positive + np.maximum(rows.base, 0.0)
    return Residuals(
        deviation=rows.counts - rows.base - signal,
        counting=of_residual(variance),
        fractional=of_residual(square),
        counting_scale=of_residual(expected + rows.variance),
        fractional_scale=of_residual(positive**2),
        expected=expected,
        variance=expected + rows.variance,
        leverage=h,
        given=h**2 * (of_map + map_fractional * map_square),
        given_scale=h**2 * map_scale,
    )


def _blocks_of_residuals(
    columns: tuple[np.ndarray, ...],
    outliers: np.ndarray | None,
    max_rows: int | None,
    reference: Reference | None,
) -> Iterator[Residuals]:
    """The residuals of all groups, or of a random choice of about ``max_rows`` rows."""
    rng = np.random.default_rng(7)
    share = 1.0 if max_rows is None else max_rows / max(len(columns[0]), 1)
    for place, rows in blocks_of_rows(*columns, reference):
        use = np.ones(len(rows.group), dtype=bool)
        if outliers is not None:
            use &= ~np.asarray(outliers[place], dtype=bool)
        if share < 1:
            use &= (rng.random(rows.group[-1] + 1) < share)[rows.group]
        yield residuals(rows.select(use))


def collect_residuals(
    counts: np.ndarray,
    response: np.ndarray,
    base: np.ndarray,
    variance: np.ndarray,
    start: np.ndarray,
    outliers: np.ndarray | None = None,
    max_rows: int | None = MAX_ROWS,
    reference: Reference | None = None,
) -> Residuals:
    """The residuals of whole groups, of about ``max_rows`` rows chosen at random.

    Args:
        counts, response, base, variance, start: As those of ``blocks_of_rows``.
        outliers: Rows that are left out; None for no row.
        max_rows: None for all rows.
        reference: What a map says of each group.

    Raises:
        ValueError: Flags of outliers for another number of rows.
    """
    if outliers is not None and len(outliers) != len(counts):
        raise ValueError(f"{len(outliers)} flags of outliers for {len(counts)} rows")
    columns = (counts, response, base, variance, start)
    parts = list(_blocks_of_residuals(columns, outliers, max_rows, reference))
    if not parts:
        return Residuals(*(np.empty(0) for _ in Residuals._fields))
    return Residuals(*(np.concatenate(column) for column in zip(*parts)))


def refine_error_model(
    counts: np.ndarray,
    response: np.ndarray,
    base: np.ndarray,
    variance: np.ndarray,
    start: np.ndarray,
    outliers: np.ndarray | None = None,
    warn: bool = True,
    reference: Reference | None = None,
) -> ErrorModel:
    """The model by which the squares of deviations are on average what they should be.

    Their squares are fitted by a² times the variance of counting plus (a b)² times that
    of the fractional error plus what a map gives, by weighted least squares. Deviations
    above 3 standard deviations (5 for few counts) are taken for outliers that are left in,
    and the mean square of the rest is corrected for their loss, so that it makes no
    difference whether outliers have been rejected before. b is zero unless b² exceeds 3
    standard errors.

    Args: as those of ``collect_residuals``, and
        warn: Whether to warn of too few rows and too little scatter.
        reference: What a map says of each group; where its errors are larger than those
            of counting, deviations are left out.

    Returns:
        The model; a = 1 and b = 0 if there are too few rows that agree.
    """
    columns = (counts, response, base, variance, start)
    found = collect_residuals(*columns, outliers, reference=reference)
    if reference is not None:
        found = found.select(found.given_scale <= MAX_GIVEN * found.counting_scale)
    # Where no count is, there is nothing to scatter.
    counted = np.clip(found.counting / found.counting_scale, 0, 1)
    degrees = float(np.sum((1 - found.leverage) * counted))
    level = logging.WARNING if warn else logging.DEBUG
    if degrees < MIN_DEGREES:
        logger.log(
            level,
            "Warning: the error model cannot be refined: only %d observations of voxels "
            "seen several times%s, of %d in all; sigmas stay those of counting",
            len(found.leverage),
            "" if reference is None else " or known as well from the map",
            len(counts),
        )
        return ErrorModel()
    model = fit_error_model(found)
    _log_doubts(model, level)
    return model


def _log_doubts(model: ErrorModel, level: int) -> None:
    """What is strange about a model."""
    if not model.is_refined:
        logger.log(
            level,
            "Warning: the error model cannot be refined: all observations disagree with "
            "what else is known of their voxels",
        )
    if model.a <= MIN_A:
        logger.log(
            level,
            "Warning: counts scatter less than Poisson counts by more than a factor of "
            "%g: the gain of the detector may be wrong",
            MIN_A,
        )


def fit_error_model(found: Residuals) -> ErrorModel:
    """The error model of residuals, see ``refine_error_model``; not refined if all deviate.

    It starts from the variance of counting, so that groups with gross outliers, where
    everything deviates, are left out from the beginning.
    """
    few = found.variance < NORMAL_COUNTS
    square = found.deviation**2 / np.where(
        few, truncated_variance(LIMIT_FEW), truncated_variance(LIMIT_NORMAL)
    )
    terms = np.stack([found.counting, found.fractional])
    scales = np.stack([found.counting_scale, found.fractional_scale])
    x = np.array([1.0, 0.0])  # a², (a b)²
    for _ in range(MAX_CYCLES):
        var = x @ scales + found.given_scale
        use = _is_within(found, var, x[0], few)
        if not use.any():
            return ErrorModel()
        # Variance of the square of a deviation; 1/σ² is the excess of a Poisson one.
        weighted = scales * use / (var**2 * (2 + 1 / found.variance))
        last, x = x, _solve(weighted @ terms.T, weighted @ (square - found.given))
        if np.all(np.abs(x - last) <= CONVERGED * np.maximum(x, CONVERGED)):
            break
    # Residuals of a group depend on one another: there are fewer than their number.
    inverse = np.mean(1 - found.leverage) * (weighted @ scales.T)
    # Of voxels all alike, nothing tells a and b apart.
    alike = inverse[0, 1] ** 2 >= (1 - 1e-9) * inverse[0, 0] * inverse[1, 1]
    covariance = np.diag([np.inf, np.inf]) if alike else np.linalg.inv(inverse)
    if x[1] <= MIN_SIGNIFICANCE * np.sqrt(covariance[1, 1]):
        alpha = (weighted[0] @ (square - found.given)) / (weighted[0] @ terms[0])
        x = np.array([max(alpha, MIN_A**2), 0.0])
        covariance = np.diag([1 / inverse[0, 0], 0.0])
    return _model_of(x, covariance, int(np.sum(use)))


def truncated_variance(limit: float) -> float:
    """Variance of a standard normal deviate, given that it is within ± limit."""
    within = norm.cdf(limit) - norm.cdf(-limit)
    return float(1 - 2 * limit * norm.pdf(limit) / within)


def _is_within(
    found: Residuals, var: np.ndarray, alpha: float, few: np.ndarray
) -> np.ndarray:
    """Whether deviations are within the limits beyond which they are outliers.

    The limits are those of a Poisson deviate in the order of Cornish & Fisher (1938,
    https://doi.org/10.2307/1400905): skewness shifts both by (limit² - 1)/6 photons.
    Where counts are few, there is a lower limit only for negative counts.
    """
    limit = np.where(few, LIMIT_FEW, LIMIT_NORMAL)
    skew = alpha * (1 - 2 * found.leverage) * found.expected / found.variance
    shift = (limit**2 - 1) / 6 * skew
    width = limit * np.sqrt(var)
    above = found.deviation - shift <= width
    return above & (found.deviation - np.where(few, 0.0, shift) >= -width)


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solution of two linear equations, a² and (a b)², within its limits."""
    x = np.linalg.lstsq(matrix, right, rcond=1e-12)[0]
    if x[1] < 0:
        x = np.array([right[0] / matrix[0, 0], 0.0])
    if x[0] < MIN_A**2:
        x = np.array([MIN_A**2, (right[1] - matrix[1, 0] * MIN_A**2) / matrix[1, 1]])
    return np.maximum(x, [MIN_A**2, 0.0])


def _model_of(x: np.ndarray, covariance: np.ndarray, n_rows: int) -> ErrorModel:
    """The model with x = a², (a b)², and its standard errors."""
    a = float(np.sqrt(x[0]))
    sigma_a = float(np.sqrt(covariance[0, 0]) / (2 * a))
    if x[1] == 0:
        return ErrorModel(a, 0.0, sigma_a, None, n_rows)
    b = float(np.sqrt(x[1] / x[0]))
    gradient = b / 2 * np.array([-1 / x[0], 1 / x[1]])
    sigma_b = float(np.sqrt(gradient @ covariance @ gradient))
    return ErrorModel(a, b, sigma_a, sigma_b, n_rows)


@dataclasses.dataclass(frozen=True)
class ChiSquareBins:
    """Squares of deviations over their variances, in bins of expected counts.

    Both are relative to one scale, the variance with at least one photon in each group,
    and summed: few counts have no variance of their own to divide by.

    Args:
        limits: Limits of the bins, ascending, photons, shape (n + 1,).
        n_rows: Number of rows in each, shape (n,).
        expected: Mean of the expected counts, photons.
        before: With the variance of counting; 1 for Poisson counts.
        after: With the variance of the error model.
    """

    limits: np.ndarray
    n_rows: np.ndarray
    expected: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, as lists."""
        return {
            field.name: getattr(self, field.name).tolist()
            for field in dataclasses.fields(self)
        }


def chi_square_bins(
    counts: np.ndarray,
    response: np.ndarray,
    base: np.ndarray,
    variance: np.ndarray,
    start: np.ndarray,
    model: ErrorModel,
    outliers: np.ndarray | None = None,
    n_bins: int = 10,
    reference: Reference | None = None,
) -> ChiSquareBins:
    """Squares of deviations over their variances, before and after an error model.

    Bins are about equal in the logarithm of the expected counts and hold at least 250
    rows and 1 % of all, fewer if all rows are few.

    Args: as those of ``collect_residuals``, and
        model: The error model.
        n_bins: Number of bins, at most.
        reference: What a map says of each group.
    """
    n_fine = len(FINE_BINS) - 1
    sums = np.zeros((6, n_fine))
    columns = (counts, response, base, variance, start)
    for found in _blocks_of_residuals(columns, outliers, None, reference):
        fine = np.searchsorted(FINE_BINS, found.expected, side="right") - 1
        fine = np.clip(fine, 0, n_fine - 1)
        scale, model_scale = found.scale(ErrorModel()), found.scale(model)
        square = found.deviation**2
        values_of_rows = (
            np.ones(len(fine)),
            found.expected,
            square / scale,
            found.expectation(ErrorModel()) / scale,
            square / model_scale,
            found.expectation(model) / model_scale,
        )
        for total, values in zip(sums, values_of_rows):
            total += np.bincount(fine, weights=values, minlength=n_fine)
    limits = _choose_limits(sums[0], n_bins)
    if len(limits) < 2:
        return ChiSquareBins(FINE_BINS[limits], *(np.empty(0) for _ in range(4)))
    binned = np.add.reduceat(sums[:, : limits[-1]], limits[:-1], axis=1)
    n, expected, before, p, after, q = binned
    with np.errstate(divide="ignore", invalid="ignore"):  # of bins without any count
        return ChiSquareBins(
            FINE_BINS[limits], n.astype(np.int64), expected / n, before / p, after / q
        )


def _choose_limits(n_rows: np.ndarray, n_bins: int) -> np.ndarray:
    """Limits of bins among those of fine ones, as numbers of fine bins.

    Args:
        n_rows: Number of rows in each fine bin.
    """
    occupied = np.flatnonzero(n_rows)
    if len(occupied) == 0:
        return np.empty(0, dtype=np.int64)
    first, stop = int(occupied[0]), int(occupied[-1]) + 1
    total = n_rows.sum()
    enough = min(max(MIN_DEGREES, total / 100), total / (3 * n_bins))
    width = max((stop - first) / n_bins, 1.0)
    limits = [stop]
    for lower in range(stop - 1, first, -1):  # bright rows are rare: begin with them
        below, inside = n_rows[first:lower].sum(), n_rows[lower : limits[-1]].sum()
        if limits[-1] - lower >= width and min(below, inside) >= enough:
            limits.append(lower)
    return np.array([*limits, first][::-1], dtype=np.int64)


class NormalProbability(NamedTuple):
    """Points of a normal-probability plot, ascending, at most 1000.

    Args:
        expected: Quantiles of the standard normal distribution.
        observed: The same quantiles of the normalised deviations.
    """

    expected: np.ndarray
    observed: np.ndarray


def normal_probability(
    counts: np.ndarray,
    response: np.ndarray,
    base: np.ndarray,
    variance: np.ndarray,
    start: np.ndarray,
    model: ErrorModel,
    outliers: np.ndarray | None = None,
    min_counts: float = MIN_PLOT_COUNTS,
    n_points: int = 1000,
    reference: Reference | None = None,
) -> NormalProbability:
    """Quantiles of the normalised deviations against those of a normal distribution.

    The points are spaced evenly in the expected quantile, so that both tails are shown
    to their ends.

    Args: as those of ``collect_residuals``, and
        model: The error model by which deviations are normalised.
        min_counts: Least expected counts; fewer are not normally distributed, whatever
            the error model is.
        n_points: Number of points, at most.
        reference: What a map says of each group.
    """
    columns = (counts, response, base, variance, start)
    found = collect_residuals(*columns, outliers, reference=reference)
    found = found.select(found.expected >= min_counts)
    observed = np.sort(found.deviation / np.sqrt(found.scale(model)))
    n = len(observed)
    if n == 0:
        return NormalProbability(observed, observed)
    end = norm.ppf(1 - 0.5 / n)
    place = n * norm.cdf(np.linspace(-end, end, n_points)) - 0.5
    chosen = np.unique(np.clip(np.rint(place).astype(np.int64), 0, n - 1))
    return NormalProbability(norm.ppf((chosen + 0.5) / n), observed[chosen])
