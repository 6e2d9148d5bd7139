"""A merged map against the known truth of the simulation that it was made from.

1. The unique voxels of the map are found again in the truth, by index on the same grid.
2. The truth becomes what merging should find, E = k K I_true, with the scattering power
   K and a scale k, which is one or fitted, as the scale of merged experiments is relative.
3. Map and expectation are compared in resolution shells of equal volume.

The standard error of a voxel comes from the counts that were to be expected, never from
those that were observed: with the latter, the low voxels would weigh too much, and χ²
would not be one for correct data.

    var = (M E + B + V) / M²

with the sum of the normalisation M, the background B in the counts, and the variance V
of its estimate. How χ² depends on the intensity tells faults apart: wrong factors
(polarization, absorption, voxels that vary within) raise it where there are many counts,
forgotten background where there are few.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from typing import Any, Mapping, Sequence

import numpy as np

from dials.util import tabulate
from dials_diffuse import symmetry
from dials_diffuse.extraction.settings import ExclusionRegion, symmetric
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import MapFile
from dials_diffuse.io.truth import TruthFile
from dials_diffuse.merging.statistics import (
    IsotropicMean,
    ShellSums,
    shell_edges,
    shell_number,
)
from dials_diffuse.merging.sums import pack

SCALES = ("fit", "absolute")

# Differences between the cells of the two grids that are still refinement errors.
MAX_RELATIVE_LENGTH = 0.01
MAX_ANGLE = 1.0  # degrees

# Bragg exclusions that leave out whole voxels, or nothing
LEAVE_VOXELS_WHOLE = ("none", "statistical")
CUT_POINTS = 9  # along each edge of a voxel, to see whether an ellipsoid cuts it
GROWING_POINTS = (1, 3, CUT_POINTS)  # tried in turn, where it is not periodic
CHUNK = 1_000_000  # points at a time

MAX_ROUNDS = 50  # of the fit of the scale
PRECISION = 1e-12  # relative change of the scale that ends it

_MAP_COLUMNS = (
    "intensity",
    "sigma",
    "normalisation",
    "background",
    "background_variance",
)


@dataclasses.dataclass(frozen=True, eq=False)
class MatchedVoxels:
    """Unique voxels of a map, and what is true of them.

    Args:
        grid: The grid of the map.
        index: Voxel indices in the asymmetric unit, shape (n, 3).
        s: 1/d of their centres, Å⁻¹, shape (n,) as all that follow.
        truth: K I_true, photons/(s·sr).
        intensity, sigma: Of the map, photons/(s·sr).
        normalisation: M, s·sr.
        background, background_variance: B and V, photons, photons².
        left_out: How many voxels of the map are not among them, by the reason.
    """

    grid: Grid
    index: np.ndarray
    s: np.ndarray
    truth: np.ndarray
    intensity: np.ndarray
    sigma: np.ndarray
    normalisation: np.ndarray
    background: np.ndarray
    background_variance: np.ndarray
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.s)

    def expected_counts(self, scale: float) -> np.ndarray:
        """M k K I_true + B of each voxel, photons."""
        # An estimated background may be negative where it is next to nothing.
        background = np.maximum(self.background, 0)
        return scale * self.normalisation * self.truth + background

    def variance(self, scale: float) -> np.ndarray:
        """Expected variance of the intensity of each voxel (see the module)."""
        counts = self.expected_counts(scale)
        return (counts + self.background_variance) / self.normalisation**2


@dataclasses.dataclass(frozen=True)
class ShellComparison:
    """How the voxels of a resolution shell agree with the truth.

    What is not defined, as in an empty shell, is None. The errors of χ² and of the mean
    pull are those of correct data.

    Attributes:
        d_max, d_min: Limits of the shell, Å.
        n_voxels: Voxels compared.
        counts: Mean expected counts of a voxel, photons.
        ratio, ratio_error: Σ M I / Σ M E, weighted by counts, and its standard error.
        cc: Correlation of the map with the truth.
        cc_anisotropic: The same without the mean of each in shells of 0.01 Å⁻¹.
        cc_expected: What the latter is when all is right but the counting noise.
        rms_deviation: Root mean square of (I - E)/E.
        rms_excess: The part of it that is not counting noise: the relative error of
            every voxel that would explain χ², 0 if χ² < 1.
        sigma_ratio: Root mean square of the standard error that the map gives divided
            by the expected one.
        chi2, chi2_error: Mean of (I - E)²/var, 1 for correct data.
        mean_pull, mean_pull_error: Mean of (I - E)/√var, 0 for correct data.
        chi2_per_decade, chi2_per_decade_error: Rise of χ² when E is ten times larger,
            by linear regression.
        chi2_per_s, chi2_per_s_error: Rise of χ² with s, Å.
    """

    d_max: float
    d_min: float
    n_voxels: int
    counts: float | None = None
    ratio: float | None = None
    ratio_error: float | None = None
    cc: float | None = None
    cc_anisotropic: float | None = None
    cc_expected: float | None = None
    rms_deviation: float | None = None
    rms_excess: float | None = None
    sigma_ratio: float | None = None
    chi2: float | None = None
    chi2_error: float | None = None
    mean_pull: float | None = None
    mean_pull_error: float | None = None
    chi2_per_decade: float | None = None
    chi2_per_decade_error: float | None = None
    chi2_per_s: float | None = None
    chi2_per_s_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return dataclasses.asdict(self)


HEADER = ("d max", "d min", "# voxels", "counts", "<map>/<truth>", "CC", "CC aniso")
HEADER += (
    "expected",
    "rms dev. %",
    "beyond noise %",
    "sigma ratio",
    "chi2",
    "mean pull",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """The comparison of a map with the truth.

    Attributes:
        scale_mode: fit or absolute.
        scale, scale_error: k and its standard error, None where it is not fitted.
        shells: From low to high resolution.
        overall: All voxels together.
        voxels: The voxels.
        expected: E of each, photons/(s·sr), shape (n,).
        variance: Expected variance of the intensity of each, shape (n,).
    """

    scale_mode: str
    scale: float
    scale_error: float | None
    shells: tuple[ShellComparison, ...]
    overall: ShellComparison
    voxels: MatchedVoxels
    expected: np.ndarray
    variance: np.ndarray

    @property
    def pull(self) -> np.ndarray:
        """(I - E)/√var of each voxel."""
        return (self.voxels.intensity - self.expected) / np.sqrt(self.variance)

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, without the voxels."""
        return {
            "scale_mode": self.scale_mode,
            "scale": self.scale,
            "scale_error": self.scale_error,
            "left_out": dict(self.voxels.left_out),
            "overall": self.overall.as_dict(),
            "shells": [shell.as_dict() for shell in self.shells],
        }

    def rows(self) -> list[list[str]]:
        """The figures of each shell and of all together as text, below ``HEADER``."""
        rows = [_table_row(shell) for shell in (*self.shells, self.overall)]
        rows[-1][0] = f"Overall {rows[-1][0]}"
        return rows

    def as_table(self) -> str:
        """The table for the log."""
        return tabulate(self.rows(), HEADER, disable_numparse=True, stralign="right")

    def summary(self) -> list[tuple[str, str]]:
        """What the table does not tell: names and figures as text."""
        overall = self.overall
        scale = "1 (absolute)"
        if self.scale_mode == "fit":
            scale = f"{_pair(self.scale, self.scale_error, '.5g', '.1g')} (fitted)"
        per_decade = _pair(overall.chi2_per_decade, overall.chi2_per_decade_error)
        per_s = _pair(overall.chi2_per_s, overall.chi2_per_s_error)
        left_out = ", ".join(f"{n} {why}" for why, n in self.voxels.left_out.items())
        return [
            ("Scale of the map", scale),
            ("Chi2 overall", _pair(overall.chi2, overall.chi2_error, ".4f", ".4f")),
            ("Chi2 per decade of intensity", per_decade),
            ("Chi2 per 1/Å", per_s),
            ("Voxels compared", f"{len(self.voxels)}"),
            ("Voxels left out", left_out or "none"),
        ]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _pair(
    value: float | None,
    error: float | None,
    form: str = "+.3f",
    error_form: str = ".3f",
) -> str:
    """A figure with its standard error."""
    if value is None:
        return "-"
    return f"{value:{form}} +/- {_text(error, error_form)}"


def _table_row(shell: ShellComparison) -> list[str]:
    """The figures of a shell as text; a dash for what is not defined."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    return [
        f"{shell.d_max:.2f}",
        f"{shell.d_min:.2f}",
        f"{shell.n_voxels}",
        _text(shell.counts, ".4g"),
        _pair(shell.ratio, shell.ratio_error, ".4f", ".4f"),
        _text(shell.cc, ".4f"),
        _text(shell.cc_anisotropic, ".4f"),
        _text(shell.cc_expected, ".4f"),
        percent(shell.rms_deviation),
        percent(shell.rms_excess),
        _text(shell.sigma_ratio, ".3f"),
        _text(shell.chi2, ".3f"),
        _pair(shell.mean_pull, shell.mean_pull_error),
    ]


def compare(
    merged: MapFile | str | os.PathLike,
    truth: TruthFile | str | os.PathLike,
    n_shells: int = 10,
    scale: str = "fit",
    exclusion: Sequence[ExclusionRegion] = (),
) -> Comparison:
    """The comparison of a merged map with the truth of its simulation.

    Args:
        merged: The map, or its path.
        truth: The truth, or its path.
        n_shells: Resolution shells.
        scale: fit the scale of the map, or take it as it is (absolute).
        exclusion: The regions about Bragg positions that the extraction left out:
            voxels that one of them cuts are left out, since the map has the mean of what
            remains of them. Empty if there is none (``LEAVE_VOXELS_WHOLE``).

    Raises:
        ValueError: A file is not what it should be, or the two do not fit together.
    """
    with contextlib.ExitStack() as stack:
        if not isinstance(merged, MapFile):
            merged = stack.enter_context(MapFile(merged))
        if not isinstance(truth, TruthFile):
            truth = stack.enter_context(TruthFile(truth))
        voxels = matched_voxels(merged, truth, exclusion)
    return compare_voxels(voxels, n_shells, scale)


def matched_voxels(
    merged: MapFile,
    truth: TruthFile,
    exclusion: Sequence[ExclusionRegion] = (),
) -> MatchedVoxels:
    """The unique voxels of a map that can be compared with the truth.

    Voxels that reach beyond the resolution limits of the map are left out, though their
    centres may lie within: pixels beyond the limits were dropped, so that the map has
    the mean of a part and the truth that of the whole. The same happens at the rim of
    what the detector saw, which is left in, as the files do not tell where it is.

    Args:
        merged: The map.
        truth: The truth.
        exclusion: See ``compare``.

    Raises:
        ValueError: The grids differ, or no voxel is left.
    """
    check_grids(merged.grid, truth.grid)
    grid = merged.grid
    columns = merged.columns(["index", *_MAP_COLUMNS])
    index = symmetry.map_to_asu(columns.pop("index"), truth.grid.laue_group)
    true_columns = truth.columns(["index", "intensity"])
    place = find_voxels(index, true_columns["index"])
    s = grid.s(index)
    reasons = {
        "not in the truth": place < 0,
        "beyond the resolution limits": ~grid.in_resolution_range(s),
        "on the resolution limits": ~is_whole(grid, s),
        "not observed": ~(columns["normalisation"] > 0),
    }
    if exclusion:
        cut = np.zeros(len(index), dtype=bool)
        for region in exclusion:
            cut[~cut] = is_cut_by_region(grid, index[~cut], region)
        reasons["cut by the Bragg exclusion"] = cut
    kept = np.ones(len(index), dtype=bool)
    left_out = {}
    for reason, dropped in reasons.items():
        if number := int(np.sum(kept & dropped)):
            left_out[reason] = number
        kept &= ~dropped
    if not kept.any():
        raise ValueError(
            f"{merged.path} and {truth.path} have no voxel in common that can be "
            "compared: check their resolution limits"
        )
    return MatchedVoxels(
        grid=grid,
        index=index[kept],
        s=s[kept],
        truth=truth.scattering_power * true_columns["intensity"][place[kept]],
        left_out=left_out,
        **{name: values[kept] for name, values in columns.items()},
    )


def check_grids(merged: Grid, truth: Grid) -> None:
    """Check that voxels with the same index are the same voxels.

    Raises:
        ValueError: Subdivision, Laue group or cell differ.
    """
    if merged.ndiv != truth.ndiv:
        ndiv, true_ndiv = (",".join(map(str, g.ndiv)) for g in (merged, truth))
        raise ValueError(
            f"the map has ndiv={ndiv}, the truth ndiv={true_ndiv}: simulate or extract "
            "again with the same grid"
        )
    if not np.array_equal(merged.rotations, truth.rotations):
        raise ValueError(
            f"the map has the Laue group {merged.laue_group.info()}, the truth "
            f"{truth.laue_group.info()}: process the images in the space group of the "
            "simulation"
        )
    if not merged.cell.is_similar_to(truth.cell, MAX_RELATIVE_LENGTH, MAX_ANGLE):
        cells = [" ".join(f"{x:.5g}" for x in g.unit_cell) for g in (merged, truth)]
        raise ValueError(
            f"the cell of the map, {cells[0]}, differs from that of the truth, "
            f"{cells[1]}, by more than {MAX_RELATIVE_LENGTH:.0%} or {MAX_ANGLE:g} "
            "degree: was the map indexed in the same setting?"
        )


def find_voxels(wanted: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The place of voxels in a list of voxels.

    Args:
        wanted: Voxel indices, shape (n, 3).
        index: The list, in any order, shape (m, 3).

    Returns:
        int64 array of shape (n,), -1 for those that are not in the list.
    """
    if len(index) == 0:
        return np.full(len(wanted), -1)
    wanted, packed = pack(wanted), pack(index)
    order = np.argsort(packed)
    place = order[
        np.searchsorted(packed, wanted, sorter=order).clip(max=len(order) - 1)
    ]
    return np.where(packed[place] == wanted, place, -1)


def is_whole(grid: Grid, s: np.ndarray) -> np.ndarray:
    """Whether voxels lie within the resolution limits of a grid with all their parts.

    Args:
        grid: The grid.
        s: 1/d of the voxel centres, Å⁻¹.
    """
    whole = s + grid.half_diagonal <= 1 / grid.d_min
    if grid.d_max is not None:
        whole &= s - grid.half_diagonal >= 1 / grid.d_max
    return whole


def is_cut(grid: Grid, index: np.ndarray, exclusion: Sequence[float]) -> np.ndarray:
    """Whether some part of voxels lies in the ellipsoid about a Bragg position.

    Args:
        grid: The grid.
        index: Voxel indices, shape (n, 3).
        exclusion: g11, g22, g33, g12, g13, g23 of the ellipsoid g(dh, dh) < 1.
    """
    ndiv = np.array(grid.ndiv)
    across = np.linspace(-0.5, 0.5, CUT_POINTS)
    points = np.stack(np.meshgrid(across, across, across), axis=-1).reshape(-1, 3)
    # what happens to a voxel depends only on its place in the reciprocal cell
    places, number = np.unique(index % ndiv, axis=0, return_inverse=True)
    hkl = (places[:, None, :] + points) / ndiv
    inside = ExclusionRegion(tuple(exclusion)).is_inside(hkl, np.zeros(hkl.shape[:-1]))
    return inside.any(axis=1)[number.ravel()]


def is_cut_by_region(
    grid: Grid, index: np.ndarray, region: ExclusionRegion
) -> np.ndarray:
    """Whether some part of voxels lies in the region about a Bragg position.

    Of a region that grows with the resolution, only voxels that are near enough to a
    lattice point are looked at, first at few points of each, then at all.

    Args:
        grid: The grid.
        index: Voxel indices, shape (n, 3).
        region: The region.
    """
    if not (region.growth or region.radial):
        return is_cut(grid, index, region.metric)
    ndiv = np.array(grid.ndiv)
    open_ones = np.flatnonzero(_may_be_cut(grid, index, region))
    cut = np.zeros(len(index), dtype=bool)
    b = np.array(grid.cell.fractionalization_matrix()).reshape(3, 3)
    for n_points in GROWING_POINTS:
        across = np.linspace(-0.5, 0.5, n_points) if n_points > 1 else np.zeros(1)
        points = np.stack(np.meshgrid(across, across, across), axis=-1).reshape(-1, 3)
        for part in np.array_split(
            open_ones, 1 + len(open_ones) * len(points) // CHUNK
        ):
            hkl = (index[part, None] + points) / ndiv
            s2 = np.sum((hkl @ b) ** 2, axis=-1)
            cut[part] = region.is_inside(hkl, s2).any(axis=1)
        open_ones = open_ones[~cut[open_ones]]
    return cut


def _may_be_cut(grid: Grid, index: np.ndarray, region: ExclusionRegion) -> np.ndarray:
    """Whether voxels are near enough to a lattice point.

    By the length of dh in the metric of the region, which is at most that of its widest
    extent, (1 + growth s²)^{1/2}, and of half a diagonal of the voxel.
    """
    g, ndiv = symmetric(region.metric), np.array(grid.ndiv)

    def length2(dh: np.ndarray) -> np.ndarray:
        return np.einsum("...i,ij,...j->...", dh, g, dh)

    signs = np.array(list(itertools.product((-1, 1), repeat=3)))
    reach = np.sqrt(length2(signs / (2 * ndiv)).max())
    s = grid.s(index) + grid.half_diagonal
    dh = index / ndiv - np.rint(index / ndiv)
    # a part of the voxel may be nearest to another lattice point than its centre
    away = np.min([length2(dh - np.sign(dh) * (n > 0)) for n in signs], axis=0)
    return np.sqrt(away) < np.sqrt(1 + region.growth * s**2) + reach


def fit_scale(voxels: MatchedVoxels) -> tuple[float, float]:
    """The scale k of a map by least squares, and its standard error.

    Minimises Σ (I - k K I_true)²/var; var depends on k, so this is repeated until k
    stays. Without background that is at once k = Σ M I / Σ M K I_true, the estimate of
    maximum likelihood for Poisson counts.

    Raises:
        ValueError: The map is not positive on average.
    """
    m, truth = voxels.normalisation, voxels.truth
    scale = float(m @ voxels.intensity) / float(m @ truth)
    for _ in range(MAX_ROUNDS):
        if not scale > 0:
            raise ValueError(
                f"the scale of the map to the truth is {scale:.3g}, not positive: the "
                "map holds no diffuse scattering of this simulation"
            )
        weighted = truth / voxels.variance(scale)
        norm = float(weighted @ truth)
        last, scale = scale, float(weighted @ voxels.intensity) / norm
        if abs(scale - last) <= PRECISION * last:
            break
    return scale, float(1 / np.sqrt(norm))


def compare_voxels(
    voxels: MatchedVoxels, n_shells: int = 10, scale: str = "fit"
) -> Comparison:
    """The comparison of the intensities of voxels with the truth.

    Args:
        voxels: The voxels.
        n_shells: Resolution shells, equal in volume.
        scale: fit or absolute (see ``compare``).

    Raises:
        ValueError: An argument is impossible, or the truth is not positive.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale} is not known: use {' or '.join(SCALES)}")
    if n_shells < 1:
        raise ValueError(f"n_shells={n_shells} must be positive")
    if not np.all(voxels.truth > 0):
        raise ValueError(
            f"the truth is not positive in {np.sum(~(voxels.truth > 0))} of "
            f"{len(voxels)} voxels, which leaves no standard error to compare with"
        )
    factor, error = fit_scale(voxels) if scale == "fit" else (1.0, None)
    columns = _columns(voxels, factor)
    s = voxels.s
    edges = shell_edges(float(s.min()), float(s.max()), n_shells)
    total = _correlations(edges, s, columns["map"], columns["expected"])
    rest = _correlations(edges, s, columns["map_rest"], columns["expected_rest"])
    shell = shell_number(s, edges)
    selections = [*(shell == i for i in range(n_shells)), slice(None)]
    limits = [*zip(edges, edges[1:]), (edges[0], edges[-1])]
    figures = [
        ShellComparison(
            d_max=float(1 / low),
            d_min=float(1 / high),
            cc=cc,
            cc_anisotropic=cc_rest,
            **_figures({name: values[part] for name, values in columns.items()}),
        )
        for (low, high), part, cc, cc_rest in zip(limits, selections, total, rest)
    ]
    return Comparison(
        scale_mode=scale,
        scale=factor,
        scale_error=error,
        shells=tuple(figures[:-1]),
        overall=figures[-1],
        voxels=voxels,
        expected=columns["expected"],
        variance=columns["variance"],
    )


def _columns(voxels: MatchedVoxels, scale: float) -> dict[str, np.ndarray]:
    """What the figures are made of, for each voxel."""
    expected = scale * voxels.truth
    variance = voxels.variance(scale)
    counts = voxels.expected_counts(scale)
    mean = IsotropicMean(float(voxels.s.max()), ("map", "expected"))
    both = {"map": voxels.intensity, "expected": expected}
    mean.add(voxels.s, both)
    return {
        **both,
        "s": voxels.s,
        "map_rest": voxels.intensity - mean.isotropic("map", voxels.s),
        "expected_rest": expected - mean.isotropic("expected", voxels.s),
        "sigma": voxels.sigma,
        "weight": voxels.normalisation,
        "counts": counts,
        "variance": variance,
        "pull": (voxels.intensity - expected) / np.sqrt(variance),
        # Poisson counts have a fourth cumulant, equal to their mean; V is taken as
        # normal, without one.
        "chi2_variance": 2 + counts / (counts + voxels.background_variance) ** 2,
    }


def _correlations(
    edges: np.ndarray, s: np.ndarray, x: np.ndarray, y: np.ndarray
) -> list[float | None]:
    """Correlation coefficients of each shell and of all together."""
    sums = ShellSums(edges)
    sums.add_pairs(s, x, y)
    statistics = sums.statistics()
    return [shell.cc_half for shell in (*statistics.shells, statistics.overall)]


def _figures(part: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The figures of some voxels that are not correlation coefficients."""
    n = len(part["s"])
    if n == 0:
        return {"n_voxels": 0}
    observed, expected, weight = part["map"], part["expected"], part["weight"]
    variance, chi2 = part["variance"], part["pull"] ** 2
    predicted = float(weight @ expected)
    # With a relative error e besides the noise, <χ²> = 1 + e² <E²/var>.
    excess = (chi2.mean() - 1) / float(np.mean(expected**2 / variance))
    signal, noise = np.var(part["expected_rest"]), np.mean(variance)
    per_decade = regression_slope(np.log10(expected), chi2)
    per_s = regression_slope(part["s"], chi2)
    return {
        "n_voxels": n,
        "counts": float(part["counts"].mean()),
        "ratio": float(weight @ observed) / predicted,
        "ratio_error": float(np.sqrt(weight**2 @ variance)) / predicted,
        "cc_expected": float(np.sqrt(signal / (signal + noise))),
        "rms_deviation": float(np.sqrt(np.mean((observed / expected - 1) ** 2))),
        "rms_excess": math.sqrt(max(excess, 0.0)),
        "sigma_ratio": float(np.sqrt(np.mean(part["sigma"] ** 2 / variance))),
        "chi2": float(chi2.mean()),
        "chi2_error": float(np.sqrt(part["chi2_variance"].sum()) / n),
        "mean_pull": float(part["pull"].mean()),
        "mean_pull_error": float(1 / np.sqrt(n)),
        "chi2_per_decade": per_decade[0],
        "chi2_per_decade_error": per_decade[1],
        "chi2_per_s": per_s[0],
        "chi2_per_s_error": per_s[1],
    }


def regression_slope(
    x: np.ndarray, y: np.ndarray
) -> tuple[float, float] | tuple[None, None]:
    """Slope of the regression line of y on x, and its standard error.

    The error does not suppose the same scatter of y everywhere: χ² of few counts
    scatters more. White (1980), https://doi.org/10.2307/1912934.

    Returns:
        None, None for fewer than three points, or where x does not vary.
    """
    dx = x - x.mean()
    norm = float(dx @ dx)
    # What is left by rounding must not pass for a variation.
    if len(x) < 3 or norm <= 1e-20 * float(x @ x):
        return None, None
    slope = float(dx @ y) / norm
    residual = y - y.mean() - slope * dx
    return slope, float(np.sqrt(dx**2 @ residual**2)) / norm
