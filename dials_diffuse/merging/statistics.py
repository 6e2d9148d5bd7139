"""Completeness, multiplicity and CC1/2 of a merged map in resolution shells.

The shells have equal volumes in reciprocal space, hence about equal numbers of voxels,
as in the tables of dials.scale and dials.merge. CC1/2 (Karplus & Diederichs 2012,
https://doi.org/10.1126/science.1218231) compares two half-maps voxel by voxel after the
isotropic part, the mean of each half in shells of 0.01 Å⁻¹ with linear interpolation, is
taken off: the decay with resolution that every diffuse pattern shows would else give a
high correlation by itself.

Everything is accumulated block by block, so that the voxels need not be in memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import numpy as np

from dials.util import tabulate
from dials_diffuse.merging.estimate import interpolate_shells, thin_shell


@dataclasses.dataclass(frozen=True)
class ShellStatistics:
    """What is known of the voxels of a resolution shell.

    Args:
        d_max: Upper limit of the d-spacing, Å.
        d_min: Lower limit, Å.
        n_obs: Observations: voxels seen by one experiment each.
        n_voxels: Unique voxels observed.
        n_possible: Unique voxels whose centres lie in the shell.
        mean_intensity: Mean intensity of the observed voxels, photons/(s·sr).
        mean_i_over_sigma: Mean of intensity / standard error.
        n_pairs: Unique voxels that both halves observed.
        cc_half: CC1/2 of the anisotropic part; None if it is not defined.
    """

    d_max: float
    d_min: float
    n_obs: int
    n_voxels: int
    n_possible: int
    mean_intensity: float | None
    mean_i_over_sigma: float | None
    n_pairs: int
    cc_half: float | None

    @property
    def completeness(self) -> float | None:
        """Fraction of the possible voxels that were observed."""
        return self.n_voxels / self.n_possible if self.n_possible else None

    @property
    def multiplicity(self) -> float | None:
        """Observations per observed voxel."""
        return self.n_obs / self.n_voxels if self.n_voxels else None

    @property
    def is_anticorrelated(self) -> bool:
        """Whether CC1/2 lies below zero by more than three standard errors.

        The standard error of the correlation of two halves of noise is 1/sqrt(n_pairs).
        """
        return self.cc_half is not None and self.cc_half < -3 / np.sqrt(self.n_pairs)

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            **dataclasses.asdict(self),
            "completeness": self.completeness,
            "multiplicity": self.multiplicity,
        }


@dataclasses.dataclass(frozen=True)
class MergingStatistics:
    """The statistics of each shell, from low to high resolution, and of all together."""

    shells: tuple[ShellStatistics, ...]
    overall: ShellStatistics

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "overall": self.overall.as_dict(),
            "shells": [shell.as_dict() for shell in self.shells],
        }

    def as_table(self) -> str:
        """The table for the log."""
        header = ["d max", "d min", "# obs", "# voxels", "# possible", "% complete"]
        header += ["mult.", "<I>", "<I/sigma>", "CC1/2"]
        rows = [_table_row(shell) for shell in (*self.shells, self.overall)]
        rows[-1][0] = f"Overall {rows[-1][0]}"
        return tabulate(rows, header, disable_numparse=True, stralign="right")


def _table_row(shell: ShellStatistics) -> list[str]:
    """The figures of a shell as text; a dash for what is not defined."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    percent = None if shell.completeness is None else 100 * shell.completeness
    return [
        f"{shell.d_max:.2f}",
        f"{shell.d_min:.2f}",
        f"{shell.n_obs}",
        f"{shell.n_voxels}",
        f"{shell.n_possible}",
        text(percent, ".2f"),
        text(shell.multiplicity, ".2f"),
        text(shell.mean_intensity, ".4g"),
        text(shell.mean_i_over_sigma, ".2f"),
        text(shell.cc_half, ".4f"),
    ]


def shell_edges(s_min: float, s_max: float, n_shells: int) -> np.ndarray:
    """Limits in s of shells of equal volume, Å⁻¹, shape (n_shells + 1,)."""
    return np.cbrt(np.linspace(s_min**3, s_max**3, n_shells + 1))


def shell_number(s: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The shell of each s; those beyond the outer limits are in the outer shells."""
    return np.searchsorted(edges[1:-1], s, side="right")


class IsotropicMean:
    """Mean of some quantities in shells of 0.01 Å⁻¹, accumulated block by block.

    Args:
        s_max: Largest s that can occur, Å⁻¹.
        names: Names of the quantities.

    Attributes:
        number, total: For each quantity, number of voxels and sum of each shell.
    """

    def __init__(self, s_max: float, names: tuple[str, ...]) -> None:
        self.n_shells = int(thin_shell(s_max)) + 1
        self.number = {name: np.zeros(self.n_shells) for name in names}
        self.total = {name: np.zeros(self.n_shells) for name in names}
        self._total_s = {name: np.zeros(self.n_shells) for name in names}

    def add(self, s: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Add voxels; NaN values are not observed and do not count."""
        for name in self.total:
            known = np.isfinite(values[name])
            shell = thin_shell(s[known])
            for sums, weights in (
                (self.number, None),
                (self.total, values[name][known]),
                (self._total_s, s[known]),
            ):
                sums[name] += np.bincount(shell, weights, self.n_shells)

    def mean(self, name: str) -> np.ndarray:
        """Mean of each shell, NaN where nothing was added."""
        return self._divide(self.total[name], name)

    def mean_s(self, name: str) -> np.ndarray:
        """Mean s of what was added to each shell, NaN where nothing was, Å⁻¹."""
        return self._divide(self._total_s[name], name)

    def _divide(self, total: np.ndarray, name: str) -> np.ndarray:
        number = self.number[name]
        return np.where(number > 0, total / np.maximum(number, 1), np.nan)

    def isotropic(self, name: str, s: np.ndarray) -> np.ndarray:
        """The isotropic part at each s."""
        return interpolate_shells(s, self.mean_s(name), self.mean(name))


class ShellSums:
    """What the statistics of shells are made of, accumulated block by block.

    Args:
        edges: Limits of the shells in s, Å⁻¹.
    """

    _NAMES = ("n_possible", "n_voxels", "n_obs", "i", "i_over_sigma", "n_pairs")
    _MOMENTS = ("x", "y", "xx", "yy", "xy")

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = edges
        self._n = len(edges) - 1
        self.sums = {name: np.zeros(self._n) for name in self._NAMES + self._MOMENTS}

    def _add(self, shell: np.ndarray, **values: np.ndarray | None) -> None:
        for name, value in values.items():
            self.sums[name] += np.bincount(shell, value, self._n)

    def add_possible(self, s: np.ndarray) -> None:
        """Count unique voxels that could be observed.

        Args:
            s: 1/d of voxel centres in the resolution range.
        """
        self._add(shell_number(s, self.edges), n_possible=None)

    def add_observed(
        self,
        s: np.ndarray,
        n_obs: np.ndarray,
        intensity: np.ndarray,
        sigma: np.ndarray,
    ) -> None:
        """Add observed voxels whose centres lie in the resolution range."""
        self._add(
            shell_number(s, self.edges),
            n_voxels=None,
            n_obs=n_obs,
            i=intensity,
            i_over_sigma=intensity / sigma,
        )

    def add_pairs(self, s: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """Add the values of voxels of the two halves; NaN means not observed."""
        both = np.isfinite(x) & np.isfinite(y)
        s, x, y = s[both], x[both], y[both]
        self._add(
            shell_number(s, self.edges),
            n_pairs=None,
            x=x,
            y=y,
            xx=x * x,
            yy=y * y,
            xy=x * y,
        )

    def statistics(self) -> MergingStatistics:
        """The statistics of each shell and of all shells together."""
        shells = tuple(
            _shell_statistics(
                self.edges[i],
                self.edges[i + 1],
                {k: v[i] for k, v in self.sums.items()},
            )
            for i in range(self._n)
        )
        totals = {name: values.sum() for name, values in self.sums.items()}
        overall = _shell_statistics(self.edges[0], self.edges[-1], totals)
        return MergingStatistics(shells, overall)


def _shell_statistics(
    s_min: float, s_max: float, sums: Mapping[str, float]
) -> ShellStatistics:
    n = int(sums["n_voxels"])
    return ShellStatistics(
        d_max=float(1 / s_min),
        d_min=float(1 / s_max),
        n_obs=int(sums["n_obs"]),
        n_voxels=n,
        n_possible=int(sums["n_possible"]),
        mean_intensity=float(sums["i"] / n) if n else None,
        mean_i_over_sigma=float(sums["i_over_sigma"] / n) if n else None,
        n_pairs=int(sums["n_pairs"]),
        cc_half=_correlation(sums),
    )


def _correlation(sums: Mapping[str, float]) -> float | None:
    """Pearson's correlation coefficient from the moments of the pairs.

    Returns:
        None for fewer than three pairs, or where one half does not vary.
    """
    n = sums["n_pairs"]
    if n < 3:
        return None
    var_x = sums["xx"] - sums["x"] ** 2 / n
    var_y = sums["yy"] - sums["y"] ** 2 / n
    # What is left of a variance by rounding must not pass for one.
    if var_x <= 1e-12 * sums["xx"] or var_y <= 1e-12 * sums["yy"]:
        return None
    covariance = sums["xy"] - sums["x"] * sums["y"] / n
    return float(covariance / np.sqrt(var_x * var_y))
