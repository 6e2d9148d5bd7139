"""The background of an image as a few terms, and its value at each pixel.

    b(x, y) = rate_scale · base(x, y) + [ profile(s) + grid(x, y) ] · M(x, y)

in photons. A base is a map of one number per pixel, shared by many images: photons per
second of images without the crystal, for example, and ``rate_scale`` the exposure time.
Profile and grid are intensities, photons/(s sr), and M is the normalisation of the pixel
as in extraction, t P ΔΩ ε A_air (s sr), so polarization and the like act on them as on
the scattering of the crystal. The profile has equally spaced values, linear between them
and constant beyond; each panel's grid has a value at every ``spacing_px``-th pixel edge
(fast, slow) = (j, i) · spacing_px, bilinear between them. A background that is larger
than what is measured leaves a negative intensity: nothing is clipped.

This is the reference in numpy for the pixel loop of extraction.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Mapping, NamedTuple, Sequence, TypeVar

import numpy as np

from dials_diffuse.extraction.settings import CorrectionSettings

Entry = TypeVar("Entry")


@dataclasses.dataclass(frozen=True)
class ImageBackground:
    """The terms of one image.

    Attributes:
        base_index: Number of the base, or None for none.
        rate_scale: Factor of the base.
        profile: Intensity at s = s_start + k s_step, shape (n_s,), or None.
        profile_variance: Its variance, of the same shape.
        grids: For each panel the intensity at its nodes, (n_slow, n_fast), or None.
        grid_variances: Their variances.
    """

    base_index: int | None = None
    rate_scale: float = 0.0
    profile: np.ndarray | None = None
    profile_variance: np.ndarray | None = None
    grids: tuple[np.ndarray, ...] | None = None
    grid_variances: tuple[np.ndarray, ...] | None = None


@dataclasses.dataclass(frozen=True)
class BackgroundAxes:
    """Where the values of profiles and grids stand.

    Attributes:
        s_start, s_step: First value and spacing of the profiles, 1/Å.
        spacing_px: Distance of the nodes of the grids, px; 0 if there are none.
    """

    s_start: float = 0.0
    s_step: float = 0.005
    spacing_px: int = 0


def n_nodes(n_pixels: int, spacing: int) -> int:
    """Number of nodes along an edge: the last is at its end or beyond."""
    return math.ceil(n_pixels / spacing) + 1


def linear_weights(
    x: np.ndarray, start: float, step: float, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where each x lies among n equally spaced points.

    Returns:
        The number k of the point before it, at most n - 2, and the fraction t of the way
        to the next, within 0 and 1: f = (1 - t) f[k] + t f[k + 1].
    """
    place = np.clip((x - start) / step, 0, n - 1)
    k = np.minimum(np.floor(place).astype(np.intp), max(n - 2, 0))
    return k, place - k


class ProfilePlaces(NamedTuple):
    """Where some values of s lie among the points of profiles of one length.

    Attributes:
        k, following: Numbers of the points before and after them.
        t: Fraction of the way between these.
    """

    k: np.ndarray
    following: np.ndarray
    t: np.ndarray

    @classmethod
    def of(cls, s: np.ndarray, n: int, axes: BackgroundAxes) -> ProfilePlaces:
        """The places of s (1/Å) among n points."""
        k, t = linear_weights(s, axes.s_start, axes.s_step, n)
        return cls(k, np.minimum(k + 1, n - 1), t)

    def value(self, profile: np.ndarray) -> np.ndarray:
        """The values of a profile."""
        return (1 - self.t) * profile[self.k] + self.t * profile[self.following]

    def variance(self, variance: np.ndarray) -> np.ndarray:
        """Variances from those of its points."""
        before = (1 - self.t) ** 2 * variance[self.k]
        return before + self.t**2 * variance[self.following]


def profile_at(
    s: np.ndarray, profile: np.ndarray, variance: np.ndarray, axes: BackgroundAxes
) -> tuple[np.ndarray, np.ndarray]:
    """A profile and its variance at s (1/Å); the points are independent of each other."""
    at = ProfilePlaces.of(s, len(profile), axes)
    return at.value(profile), at.variance(variance)


class GridPlaces(NamedTuple):
    """Where some pixels lie among the nodes of grids of one shape.

    Attributes:
        slow, fast: Numbers of the nodes before them, along either axis.
        u, v: Fraction of the way to the next nodes along slow and fast.
    """

    slow: np.ndarray
    fast: np.ndarray
    u: np.ndarray
    v: np.ndarray

    @classmethod
    def of(
        cls, fast: np.ndarray, slow: np.ndarray, shape: tuple[int, int], spacing: int
    ) -> GridPlaces:
        """The places of pixels; see ``grid_at``."""
        i, u = linear_weights(slow, 0.0, spacing, shape[0])
        j, v = linear_weights(fast, 0.0, spacing, shape[1])
        return cls(i, j, u, v)

    def _sum(self, nodes: np.ndarray, power: int) -> np.ndarray:
        result = np.zeros(np.shape(self.slow))
        for di, wi in ((0, 1 - self.u), (1, self.u)):
            for dj, wj in ((0, 1 - self.v), (1, self.v)):
                result += (wi * wj) ** power * nodes[self.slow + di, self.fast + dj]
        return result

    def value(self, grid: np.ndarray) -> np.ndarray:
        """The values of a grid."""
        return self._sum(grid, 1)

    def variance(self, variance: np.ndarray) -> np.ndarray:
        """Variances from those of the nodes."""
        return self._sum(variance, 2)


def grid_at(
    fast: np.ndarray,
    slow: np.ndarray,
    grid: np.ndarray,
    variance: np.ndarray,
    spacing: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A grid and its variance at pixel coordinates, whose pixel centres end in 1/2.

    Args:
        fast, slow: Coordinates in px, arrays of one shape.
        grid, variance: Values at the nodes, (n_slow, n_fast).
        spacing: Distance of the nodes, px.
    """
    at = GridPlaces.of(fast, slow, grid.shape, spacing)
    return at.value(grid), at.variance(variance)


def evaluate(
    terms: ImageBackground,
    axes: BackgroundAxes,
    panel: int,
    s: np.ndarray,
    normalisation: np.ndarray,
    base: np.ndarray | None = None,
    base_variance: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Background of all pixels of a panel, and its variance.

    Args:
        terms: The terms of the image.
        axes: Where the values of its profile and grids stand.
        panel: Number of the panel.
        s: 1/d of the pixels, 1/Å, (n_slow, n_fast).
        normalisation: M of the pixels with the exposure time, s sr, of that shape.
        base: The base of the image for this panel, if it has one.
        base_variance: Its variance.

    Returns:
        Expected photons and their variance; NaN where the base has no value. The errors
        of pixels that share points of the profile or nodes of the grid are correlated.
    """
    value, variance = np.zeros(s.shape), np.zeros(s.shape)
    if terms.base_index is not None:
        value += terms.rate_scale * base
        variance += terms.rate_scale**2 * base_variance
    if terms.profile is not None:
        intensity, v = profile_at(s, terms.profile, terms.profile_variance, axes)
        value += intensity * normalisation
        variance += v * normalisation**2
    if terms.grids is not None:
        slow, fast = np.indices(s.shape) + 0.5
        intensity, v = grid_at(
            fast,
            slow,
            terms.grids[panel],
            terms.grid_variances[panel],
            axes.spacing_px,
        )
        value += intensity * normalisation
        variance += v * normalisation**2
    return value, variance


@dataclasses.dataclass(frozen=True)
class BackgroundModel:
    """The background of a set of images.

    Attributes:
        method: How it was made.
        corrections: The factors of the normalisation that profiles and grids refer to.
        axes: Where the values of profiles and grids stand.
        images: The terms of each image by identifier and array index.
        bases: For each base an array per panel, photons per second (or per image).
        base_variances: Their variances.
    """

    method: str
    corrections: CorrectionSettings
    axes: BackgroundAxes
    images: Mapping[tuple[str, int], ImageBackground]
    bases: Sequence[tuple[np.ndarray, ...]] = ()
    base_variances: Sequence[tuple[np.ndarray, ...]] = ()

    def of_image(self, identifier: str, array_index: int) -> ImageBackground:
        """The terms of an image; ``array_index`` is 0 for a still without a scan.

        Raises:
            ValueError: The model does not know the image.
        """
        return find_image(self.images, identifier, array_index)

    def evaluate(
        self,
        terms: ImageBackground,
        panel: int,
        s: np.ndarray,
        normalisation: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """``evaluate`` with the base that the terms ask for."""
        number = terms.base_index
        base = None if number is None else self.bases[number][panel]
        variance = None if number is None else self.base_variances[number][panel]
        return evaluate(terms, self.axes, panel, s, normalisation, base, variance)


def find_image(
    images: Mapping[tuple[str, int], Entry], identifier: str, array_index: int
) -> Entry:
    """The entry of an image.

    Raises:
        ValueError: There is none.
    """
    try:
        return images[identifier, array_index]
    except KeyError:
        raise ValueError(
            f"The background has no image {array_index + 1} of experiment {identifier}: "
            "make it from the same experiment list with dials.diffuse_background"
        ) from None
