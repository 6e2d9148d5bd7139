"""Intensity of a voxel and its variance, from the sums of its observations.

    I = (N - B) / M        var I = a² (r N' + V + F I²) / M²

with the counts N (photons), the background B and its variance V, and the normalisation
M. The error model of scaling gives a, and F = Σ (b M)² over the observations; without it
a = 1, F = 0 and r = 1. Sums of counts are Poisson distributed however few they are, so I is
unbiased; no single count ever serves as a weight.

Where tables of different error models are merged, a is the largest, and all variances of a
row are multiplied by r_i = (a_i/a)²: its parts of V, of F, and of the counts. Of these
M_i I + B_i are expected, so that

    r N' = r_s (N' - B) + r_b B,    r_s = Σ r_i M_i / M,    r_b = Σ r_i B_i / B

N' stands for the expected counts, of which N is an estimate, and a useless one near
zero: N = 0 would say that the voxel is known exactly. Where N is less than the mean E of
its resolution shell at the same normalisation, N' is instead the expectation after
seeing N when the expected counts of a shell are distributed exponentially with mean E
(as intensities are by Wilson (1949), https://doi.org/10.1107/S0365110X49000813):

    N' = E (N + 1) / (E + 1)        if N < E,        N' = N        otherwise

The two agree at N = E. N' lies between N and E, and is positive: at N = 0 it tends to E
for E << 1, and to one photon for E >> 1.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

# Width in s of the shells in which intensities are taken to be isotropic, Å⁻¹.
THIN_SHELL = 0.01


def thin_shell(s: np.ndarray) -> np.ndarray:
    """Number of the shell of 0.01 Å⁻¹ in which each s = 1/d lies."""
    return np.floor(np.asarray(s) / THIN_SHELL).astype(np.int64)


def interpolate_shells(
    s: np.ndarray, shell_s: np.ndarray, shell_mean: np.ndarray
) -> np.ndarray:
    """The isotropic part at each s, linear between the thin shells and beyond the ends.

    Steps from shell to shell would leave the slope within each shell in the anisotropic
    part, and with it a correlation of the halves of any pattern.

    Args:
        s: 1/d, Å⁻¹.
        shell_s: Mean s of the voxels of each shell, ascending, Å⁻¹.
        shell_mean: Mean of each shell; shells with NaN are bridged.
    """
    known = np.isfinite(shell_mean)
    nodes, values = shell_s[known], shell_mean[known]
    if len(nodes) < 2:
        return np.full(np.shape(s), values[0] if len(nodes) else np.nan)
    s = np.clip(s, nodes[0] - THIN_SHELL, nodes[-1] + THIN_SHELL)
    right = np.clip(np.searchsorted(nodes, s), 1, len(nodes) - 1)
    slope = (values[right] - values[right - 1]) / (nodes[right] - nodes[right - 1])
    return values[right] + slope * (s - nodes[right])


def shell_rate(counts: np.ndarray, normalisation: np.ndarray) -> np.ndarray:
    """Mean counts per unit normalisation of each shell, never zero.

    One photon is added to each shell, so that a shell without any photon gets an upper
    estimate instead of certainty.

    Args:
        counts: Sum of the counts of each shell, photons.
        normalisation: Sum of the normalisation of each shell; shells with zero are
            empty and get NaN.
    """
    empty = normalisation <= 0
    return np.where(empty, np.nan, (counts + 1) / np.where(empty, 1, normalisation))


def intensity(
    counts: np.ndarray, background: np.ndarray, normalisation: np.ndarray
) -> np.ndarray:
    """(N - B) / M, and NaN where M is zero: not observed."""
    observed = normalisation > 0
    return np.where(
        observed,
        (counts - background) / np.where(observed, normalisation, 1),
        np.nan,
    )


def expected_counts(counts: np.ndarray, shell_mean: np.ndarray) -> np.ndarray:
    """N', the expected counts of each voxel (see the module), photons.

    Args:
        counts: Counts N of each voxel; negative ones, which the noise of an integrating
            detector makes, count as none.
        shell_mean: Mean counts E of its shell for the voxel's normalisation.
    """
    n = np.maximum(counts, 0.0)
    return np.where(n < shell_mean, shell_mean * (n + 1) / (shell_mean + 1), n)


def sigma(
    counts: np.ndarray,
    background_variance: np.ndarray,
    normalisation: np.ndarray,
    rate: np.ndarray,
    scatter: np.ndarray | float = 0.0,
    a: float = 1.0,
    background: np.ndarray | float = 0.0,
    counting: Sequence[np.ndarray | float] = (1.0, 1.0),
) -> np.ndarray:
    """Standard error of the intensity, a √(r N' + V + F I²) / M, NaN where M is zero.

    Args:
        rate: ``shell_rate`` of the shell in which the voxel lies.
        scatter: F I², photons².
        a: Of the error model.
        background: B, photons; it matters only where r_s and r_b differ.
        counting: r_s and r_b.
    """
    observed = normalisation > 0
    m = np.where(observed, normalisation, 1.0)
    n = expected_counts(counts, m * rate)
    below = np.maximum(background, 0.0)
    above = np.maximum(n - below, 0.0)
    total = np.maximum(above + below, np.finfo(float).tiny)
    n = n * (counting[0] * above + counting[1] * below) / total
    return np.where(
        observed, a * np.sqrt(n + background_variance + scatter) / m, np.nan
    )
