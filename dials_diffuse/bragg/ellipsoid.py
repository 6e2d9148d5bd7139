"""The region about the reciprocal lattice points that Bragg peaks cover, fitted to images.

Strong spots of a sample of images (``spots``) give the variance v0 + v2 s² of the peaks
(``widths``). The region that holds a fraction f of a three-dimensional Gaussian of that
variance is

    g(dh, dh) < 1 + growth s²,   g = Bᵀ M⁻¹ B / (c² v0),   growth = v2/v0

with dh = h - nearest lattice point, B of the crystal (so that B dh is in Å⁻¹), c² the
quantile f of χ² with three degrees of freedom, and M the shape of the peaks: a sphere,
unless the spots say surely that they are elongated, which widens it. v2 is the square of the
mosaic spread, in which the divergence of the beam and errors of the orientation are
contained. Halos around the peaks are no part of them: the widths are those of the cores (``halos``).
c is widened if the tails of the cores are stronger than a Gaussian's, and by
twice the standard error of the width. g is averaged over the Laue group.

Peaks whose lattice points pass the Ewald sphere are as wide as in a still: dh is the least
of the image's rotation. Mosaic spread does not widen peaks along s, but this region grows
there too; ``is_inside`` offers the one that does not,

    g(dh, dh) + (growth - growth_radial) r² g(dh, h)² / (1 + growth_radial s²) < 1 + growth s²

with r² = c² v0, which is exact for peaks that are spheres at s = 0.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Collection, Mapping, Sequence

import numpy as np
from scipy.linalg import eigh
from scipy.stats import chi2

from cctbx import uctbx
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.bragg import spots as spot_finding
from dials_diffuse.bragg.halos import without_halos
from dials_diffuse.bragg.spots import Spots
from dials_diffuse.bragg.widths import (
    SpotMoments,
    envelope_and_error,
    pixel_size,
    spot_moments,
)
from dials_diffuse.extraction.blocks import image_identity, images_of
from dials_diffuse.extraction.reference import mean_cell
from dials_diffuse.extraction.settings import (
    BraggSettings,
    covered_fraction,
    symmetric,
)

logger = logging.getLogger("dials.diffuse.extract")

FEWEST_REFLECTIONS = 60
# Fraction of all spots that must be near a lattice point; a third is so by chance.
FEWEST_NEAR = 0.5
LEAST_SIGMA = 0.5  # of the peaks, in pixels: the pixels themselves are no points
HOT = 0.3  # fraction of the images in which a hot pixel stands alone
HOT_IMAGES = 3  # at least
TAIL_FRACTION = 0.95  # where tails are compared with a Gaussian's
MOST_TAIL = 2.0
MOST_ERROR = 0.3  # of the variance, relative
# Ratio of the widths from which a shape is no sphere: mosaic spread looks like less.
ELONGATED = 2.0
SURE = 4.0  # standard errors
MOST_EXCLUDED = 0.5  # of a reciprocal cell, from which on there is a warning
DEFAULT_SEMI_AXIS = 0.25


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How an ellipsoid is fitted.

    Attributes:
        fraction: Of the Bragg intensity that shall lie inside.
        n_images: In the sample.
        d_min: Resolution limit in Å, or None for that of the spots.
        gain, trusted_range, mask, masks: As of extraction.
        rejected: Experiment and array index of images to leave out.
    """

    fraction: float = 0.999
    n_images: int = 40
    d_min: float | None = None
    gain: float | None = None
    trusted_range: tuple[float, float] | None = None
    mask: tuple[np.ndarray, ...] | None = None
    masks: Mapping[str, tuple[np.ndarray, ...]] | None = None
    rejected: Collection[tuple[int, int]] = ()

    def mask_of(self, experiment: Experiment) -> tuple[np.ndarray, ...] | None:
        """The mask of an experiment's panels, or None."""
        if self.masks is not None:
            return self.masks.get(experiment.identifier)
        return self.mask

    def __post_init__(self) -> None:
        if not 0.5 <= self.fraction < 1:
            raise ValueError(
                f"The fraction {self.fraction:g} of Bragg intensity inside the ellipsoid "
                "must be at least 0.5 and less than 1"
            )
        if self.n_images < 1:
            raise ValueError("The ellipsoid needs at least one image to be fitted to")


@dataclasses.dataclass(frozen=True)
class Ellipsoid:
    """The region g(dh, dh) < 1 + growth s² and what it was fitted to.

    Attributes:
        metric: g11, g22, g33, g12, g13, g23.
        growth: Å².
        growth_radial: The same along the scattering vector, at most ``growth``.
        radius: Of the region at s = 0 before it got its shape, Å⁻¹.
        semi_axes: At s = 0, along a*, b*, c*, in fractions of these.
        semi_axes_per_angstrom: The same in Å⁻¹.
        mosaic_spread: Standard deviation in degrees, from the growth.
        sigma: Standard deviation of the peaks at s = 0, Å⁻¹.
        tail: Factor by which the tails of the peaks widened the region.
        n_peaks: Spots that were used.
        n_pixels: Their strong pixels.
        n_images: Images that were read.
        excluded_low: Fraction of a reciprocal cell inside the region at s = 0.
        excluded_high: The same at d_min.
        d_min: Å.
        fitted: False for the default.
        n_halos: Spots that were not used because they are mostly halo.
    """

    metric: tuple[float, ...]
    growth: float
    growth_radial: float
    radius: float
    semi_axes: tuple[float, float, float]
    semi_axes_per_angstrom: tuple[float, float, float]
    mosaic_spread: float
    sigma: float
    tail: float
    n_peaks: int
    n_pixels: int
    n_images: int
    excluded_low: float
    excluded_high: float
    d_min: float
    fitted: bool = True
    n_halos: int = 0

    def is_inside(
        self, dh: np.ndarray, hkl: np.ndarray, s: np.ndarray, radial: bool = False
    ) -> np.ndarray:
        """Whether points are inside the region.

        Args:
            dh: From the nearest lattice point, fractional indices, shape (n, 3).
            hkl: The lattice points, shape (n, 3).
            s: Their 1/d, Å⁻¹.
            radial: Whether the region has its own width along the scattering vector.
        """
        g = symmetric(self.metric)
        distance = np.einsum("ni,ij,nj->n", dh, g, dh)
        if radial:
            along = np.einsum("ni,ij,nj->n", dh, g, hkl) * self.radius
            excess = self.growth - self.growth_radial
            distance += along**2 * excess / (1 + self.growth_radial * s**2)
        return distance < 1 + self.growth * s**2


def symmetrized(g: np.ndarray, rotations: np.ndarray) -> tuple[float, ...]:
    """The ellipsoid that holds those of all R g Rᵀ, as g11, g22, g33, g12, g13, g23.

    The mean of these over the group, made so much wider that none of them reaches beyond
    it: equivalent peaks are not elongated alike where the shape breaks the symmetry.
    """
    equivalents = rotations @ g @ np.swapaxes(rotations, 1, 2)
    mean = np.mean(equivalents, axis=0)
    # the largest x such that xᵀ mean x = x for some x on an equivalent's surface
    excess = max(eigh(mean, other, eigvals_only=True)[-1] for other in equivalents)
    g = mean / max(excess, 1.0)
    return tuple(map(float, (g[0, 0], g[1, 1], g[2, 2], g[0, 1], g[0, 2], g[1, 2])))


def unequal_semi_axes(
    semi_axes: Sequence[float], rotations: np.ndarray
) -> list[tuple[int, ...]]:
    """Axes that the Laue group makes equivalent but that were given other semi-axes.

    Args:
        semi_axes: Along a*, b* and c*.
        rotations: Of the Laue group, shape (n, 3, 3).

    Returns:
        The numbers of the axes of each such set.
    """
    # h' = h R takes the axis i to the axes where the i-th row is not zero
    mixed = np.any(rotations != 0, axis=0)
    sets = sorted({tuple(map(int, np.flatnonzero(row))) for row in mixed})
    return [s for s in sets if np.ptp([semi_axes[i] for i in s]) > 0]


def warn_of_unequal_axes(bragg: BraggSettings, rotations: np.ndarray) -> None:
    """Warn that the semi-axes given for equivalent axes are averaged.

    Args:
        bragg: The settings.
        rotations: Of the Laue group, shape (n, 3, 3).
    """
    if bragg.exclusion != "ellipsoid":
        return
    for axes in unequal_semi_axes(bragg.semi_axes, rotations):
        logger.warning(
            "Warning: bragg.semi_axes=%s along %s, which the Laue group makes equivalent, "
            "are not equal: the ellipsoid is averaged over the group",
            ",".join(f"{bragg.semi_axes[i]:g}" for i in axes),
            " and ".join(f"{'abc'[i]}*" for i in axes),
        )


def b_matrix(cell: uctbx.unit_cell) -> np.ndarray:
    """B, which takes hkl to rlp in the crystal's Cartesian frame, shape (3, 3), Å⁻¹."""
    return np.array(cell.fractionalization_matrix()).reshape(3, 3).T


def sample_of_images(
    experiments: ExperimentList, numbers: Sequence[int], settings: FitSettings
) -> list[tuple[int, int]]:
    """Experiment and array index of some images, spread evenly."""
    images = [(i, j) for i in numbers for j in images_of(experiments[i])]
    images = [image for image in images if image not in settings.rejected]
    n = settings.n_images
    chosen = np.unique(np.linspace(0, len(images) - 1, min(n, len(images))).round())
    return [images[int(i)] for i in chosen]


def without_hot_pixels(
    experiments: ExperimentList,
    images: Sequence[tuple[int, int]],
    settings: FitSettings,
) -> tuple[dict[int, list[np.ndarray]], int | None]:
    """Usable pixels of each detector without hot ones, and half the width of windows.

    A pixel is hot if it stands out alone in many different images.

    Returns:
        Masks by the number of the experiment, and None if no image has spots.
    """
    lone: dict[int, list[np.ndarray]] = {}
    shared: dict[object, int] = {}
    first, seen, halves = {}, {}, []
    for number, index in images:
        e = experiments[number]
        key = shared.setdefault(e.detector, number)
        first[number] = key
        if key not in lone:
            seen[key] = set()
            lone[key] = [
                np.zeros(p.get_image_size()[::-1], np.int16) for p in e.detector
            ]
        good = spot_finding.usable_pixels(e, settings.mask_of(e))
        photons = _photons(e, index, good, settings)
        if image_identity(e, index) not in seen[key]:
            seen[key].add(image_identity(e, index))
            strong = [spot_finding.strong_pixels(*panel) for panel in photons]
            for total, pixels in zip(lone[key], strong):
                total += spot_finding.lone_pixels(pixels)
            halves.append(spot_finding.window_size(strong))
    masks = {}
    for number, key in first.items():
        least = max(HOT_IMAGES, HOT * len(seen[key]))
        e = experiments[number]
        good = spot_finding.usable_pixels(e, settings.mask_of(e))
        masks[number] = [g & (n < least) for g, n in zip(good, lone[key])]
    found = [half for half in halves if half is not None]
    return masks, (int(np.median(found)) if found else None)


def _photons(
    experiment: Experiment, index: int, good: list[np.ndarray], settings: FitSettings
) -> list[tuple[np.ndarray, np.ndarray]]:
    return spot_finding.photons_of_image(
        experiment, index, good, settings.gain, settings.trusted_range
    )


def find_spots(
    experiments: ExperimentList, numbers: Sequence[int], settings: FitSettings
) -> tuple[Spots, int, int]:
    """Spots of a sample of images of some experiments.

    Returns:
        The spots near a lattice point, the number of all spots, and that of images.

    Raises:
        ValueError: There are too few, or most are far from any lattice point.
    """
    images = sample_of_images(experiments, numbers, settings)
    masks, half = without_hot_pixels(experiments, images, settings)
    parts, n_all, reflections = [], 0, set()
    for number, index in images if half is not None else ():
        photons = _photons(experiments[number], index, masks[number], settings)
        spots, n = spot_finding.spots_of_image(
            experiments[number], index, photons, half
        )
        parts.append(spots)
        n_all += n
        reflections.update((number, *hkl) for hkl in spots.hkl.tolist())
    n_near = sum(map(len, parts))
    if len(reflections) < FEWEST_REFLECTIONS:
        raise ValueError(
            f"Only {len(reflections)} reflections have strong spots in {len(images)} "
            f"image(s), {FEWEST_REFLECTIONS} are needed to fit the Bragg ellipsoid: give "
            "its semi-axes, or more images"
        )
    if n_near < FEWEST_NEAR * n_all:
        raise ValueError(
            f"Only {n_near} of {n_all} spots are near a reciprocal lattice point: check "
            "the indexing, or give the semi-axes of the ellipsoid"
        )
    return spot_finding.join(parts), n_all, len(images)


def peak_shape(spots: Spots, moments: SpotMoments) -> np.ndarray:
    """Shape M of the peaks in the crystal's Cartesian frame, with a least eigenvalue of 1.

    The moments of a spot are two components b·M b of it. Each is divided by the mean of
    both, whose dependence on s is another matter.

    Returns:
        Symmetric matrix; the unit matrix unless the widths differ surely.
    """
    axes = spots.axes
    v = moments.moment / np.mean(moments.moment, axis=1, keepdims=True)
    products = np.einsum("nki,nkj->nkij", axes, axes)
    pairs = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    design = np.stack(
        [products[..., i, j] * (1 if i == j else 2) for i, j in pairs], axis=-1
    )
    # across is wider than radial for a mosaic crystal: half the difference has that cause
    design = np.concatenate(
        [design, np.broadcast_to([[0.5], [-0.5]], (*v.shape, 1))], axis=-1
    )
    # b·M b of a matrix, less its mean over the spot, says nothing of the trace
    rng, n = np.random.default_rng(7), len(v)
    solutions = [_solve(design, v, np.arange(n))]
    solutions += [_solve(design, v, rng.integers(0, n, n)) for _ in range(20)]
    widths = np.array(
        [np.sqrt(np.maximum(np.linalg.eigvalsh(m), 1e-6)) for m in solutions]
    )
    ratio = np.log(widths[:, 2] / widths[:, 0])
    if ratio[0] < math.log(ELONGATED) or ratio[0] < SURE * np.std(ratio[1:]):
        return np.eye(3)
    # never narrower than the sphere: few directions may have been seen
    return solutions[0] / widths[0, 0] ** 2


def _solve(design: np.ndarray, v: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Robust least squares for a symmetric matrix."""
    a = design[chosen].reshape(-1, design.shape[-1])
    b = v[chosen].ravel()
    weight = np.ones(len(b))
    for _ in range(5):
        normal = (a * weight[:, None]).T @ a + 1e-6 * len(b) * np.eye(a.shape[1])
        m = np.linalg.solve(normal, (a * weight[:, None]).T @ b)
        weight = 1 / np.maximum(np.abs(b - a @ m), 0.05)
    return symmetric(m[:6])


def tail_factor(spots: Spots, moments_v: tuple[float, float], c: float) -> float:
    """How much farther out than a Gaussian's a given fraction of the photons reaches.

    Photons of all spots, each with the same weight, less the background in a ring just
    outside the region, are summed by t = distance/√v across and radial.

    Args:
        spots: The spots.
        moments_v: v0 and v2.
        c: Radius of the region in t.

    Returns:
        At least 1, at most ``MOST_TAIL``.
    """
    v = moments_v[0] + moments_v[1] * spots.s**2
    t = np.sqrt(np.sum(spots.x**2, axis=1) / v[:, None])
    counted = spots.counts != 0
    ring = counted & (t > c) & (t < 1.5 * c)
    n_ring = ring.sum(axis=1)
    background = np.sum(spots.counts * ring, axis=1) / np.maximum(n_ring, 1)
    net = (spots.counts - background[:, None]) * (counted & (t < c))
    total = net.sum(axis=1)
    bright = (n_ring >= 4) & (total > np.quantile(total, 0.5))
    if np.count_nonzero(bright) < FEWEST_REFLECTIONS // 3:
        return 1.0
    edges = np.linspace(0, c, 41)
    place = np.digitize(t[bright], edges) - 1
    share = net[bright] / total[bright][:, None]
    curves = np.stack(
        [np.sum(share * (place <= i), axis=1) for i in range(len(edges) - 1)]
    )
    curve = np.median(curves, axis=1)
    reach = edges[1:][np.argmax(curve >= TAIL_FRACTION * curve[-1])]
    return float(np.clip(reach / math.sqrt(chi2.ppf(TAIL_FRACTION, 2)), 1.0, MOST_TAIL))


def fit_ellipsoid(
    experiments: ExperimentList,
    numbers: Sequence[int],
    rotations: np.ndarray,
    settings: FitSettings = FitSettings(),
) -> Ellipsoid:
    """The region that the Bragg peaks of a data set cover, without their halos.

    Args:
        experiments: Experiments with images and crystals.
        numbers: Which of them make up the data set.
        rotations: Rotation parts of the Laue group, shape (n, 3, 3), h' = h R.
        settings: How.

    Raises:
        ValueError: There are too few spots, they are far from the lattice points, or
            they are mostly halo.
    """
    spots, n_all, n_images = find_spots(experiments, numbers, settings)
    logger.debug("%d of %d spots near a lattice point", len(spots), n_all)
    cores = without_halos(spots)
    if len(cores) < FEWEST_REFLECTIONS:
        raise ValueError(
            f"Only {len(cores)} of {len(spots)} spots stand out of the halos around the "
            f"Bragg positions, {FEWEST_REFLECTIONS} are needed to fit the Bragg "
            "ellipsoid: give its semi-axes"
        )
    cell = mean_cell([experiments[i].crystal.get_unit_cell() for i in numbers])
    result = ellipsoid_of_spots(cores, cell, rotations, settings, n_images)
    return dataclasses.replace(result, n_halos=len(spots) - len(cores))


def ellipsoid_of_spots(
    spots: Spots,
    cell: uctbx.unit_cell,
    rotations: np.ndarray,
    settings: FitSettings,
    n_images: int,
) -> Ellipsoid:
    """The region that the peaks of some spots cover.

    Args:
        spots: The spots.
        cell: Mean cell of the crystals.
        rotations: Of the Laue group.
        settings: How.
        n_images: From which they are, for the record.
    """
    s_max = 1 / settings.d_min if settings.d_min else float(spots.s.max())
    spots = spots.select(spots.s <= s_max)
    if len(spots) < FEWEST_REFLECTIONS:
        raise ValueError(
            f"Only {len(spots)} strong spots within d_min={1 / s_max:.2f} Å, "
            f"{FEWEST_REFLECTIONS} are needed to fit the Bragg ellipsoid"
        )
    moments = spot_moments(spots)
    widths, ends, errors = envelope_and_error(moments, s_max)
    v0, top = (v * (1 + min(2 * e, MOST_ERROR)) for v, e in zip(ends, errors))
    v0 = max(v0, (LEAST_SIGMA * pixel_size(spots)) ** 2)
    v2 = max(top - v0, 0.0) / s_max**2
    c = math.sqrt(chi2.ppf(settings.fraction, 3))
    tail = tail_factor(spots, (v0, v2), c)
    shape = peak_shape(spots, moments) if len(moments.s) == len(spots) else np.eye(3)
    b = b_matrix(cell)
    g = b.T @ np.linalg.inv(shape) @ b / (v0 * (c * tail) ** 2)
    metric, growth = symmetrized(g, rotations), v2 / v0
    axes = 1 / np.sqrt(metric[:3])
    return Ellipsoid(
        metric=metric,
        growth=growth,
        growth_radial=min(widths.radial[1] / v0, growth),
        radius=c * tail * math.sqrt(v0),
        semi_axes=tuple(map(float, axes)),
        semi_axes_per_angstrom=tuple(
            map(float, axes * cell.reciprocal().parameters()[:3])
        ),
        mosaic_spread=math.degrees(math.sqrt(max(ends[1] - ends[0], 0)) / s_max),
        sigma=math.sqrt(ends[0]),
        tail=tail,
        n_peaks=len(spots),
        n_pixels=int(spots.strong.sum()),
        n_images=n_images,
        excluded_low=covered_fraction(metric),
        excluded_high=covered_fraction(metric, 1 + growth * s_max**2),
        d_min=1 / s_max,
    )


def default_ellipsoid(
    cell: uctbx.unit_cell, rotations: np.ndarray, d_min: float
) -> Ellipsoid:
    """Semi-axes of a quarter of the reciprocal axes, where nothing can be fitted."""
    b = b_matrix(cell)
    lengths = np.array(cell.reciprocal().parameters()[:3])
    g = (b.T @ b) / np.outer(lengths, lengths) / DEFAULT_SEMI_AXIS**2
    metric = symmetrized(g, rotations)
    axes = 1 / np.sqrt(metric[:3])
    excluded = covered_fraction(metric)
    return Ellipsoid(
        metric=metric,
        growth=0.0,
        growth_radial=0.0,
        radius=DEFAULT_SEMI_AXIS * float(lengths.max()),
        semi_axes=tuple(map(float, axes)),
        semi_axes_per_angstrom=tuple(map(float, axes * lengths)),
        mosaic_spread=0.0,
        sigma=0.0,
        tail=1.0,
        n_peaks=0,
        n_pixels=0,
        n_images=0,
        excluded_low=excluded,
        excluded_high=excluded,
        d_min=d_min,
        fitted=False,
    )


def data_sets(experiments: ExperimentList) -> list[list[int]]:
    """Numbers of the experiments of each sweep, and of all stills together.

    Lattices in one sweep make one data set: their peaks have the same images.
    """
    groups: dict[object, list[int]] = {}
    for number, e in enumerate(experiments):
        key = "stills"
        if not e.is_still():
            key = image_identity(e, images_of(e)[0])
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def fit_data_sets(
    experiments: ExperimentList,
    rotations: np.ndarray,
    settings: FitSettings = FitSettings(),
) -> list[Ellipsoid]:
    """The ellipsoid of each experiment.

    That of its data set (``data_sets``); if this has too few spots, that of all data sets
    together; and if these have too few as well, the default. All are logged.

    Returns:
        One for each experiment, in their order.
    """
    result: list[Ellipsoid | None] = [None] * len(experiments)
    failed = []
    for numbers in data_sets(experiments):
        try:
            ellipsoid = fit_ellipsoid(experiments, numbers, rotations, settings)
        except ValueError as e:
            logger.warning("Experiments %s: %s", number_ranges(numbers), e)
            failed.append(numbers)
            continue
        log_ellipsoid(ellipsoid, numbers)
        for i in numbers:
            result[i] = ellipsoid
    if failed:
        rest = _of_all(experiments, rotations, settings)
        for i in (i for numbers in failed for i in numbers):
            result[i] = rest
    return result


def _of_all(
    experiments: ExperimentList, rotations: np.ndarray, settings: FitSettings
) -> Ellipsoid:
    """One ellipsoid for all experiments, or the default."""
    try:
        numbers = range(len(experiments))
        ellipsoid = fit_ellipsoid(experiments, numbers, rotations, settings)
    except ValueError:
        cell = mean_cell([e.crystal.get_unit_cell() for e in experiments])
        logger.warning(
            "Too few spots to fit the Bragg ellipsoid: its semi-axes are %g of the "
            "reciprocal axes there",
            DEFAULT_SEMI_AXIS,
        )
        return default_ellipsoid(cell, rotations, settings.d_min or 0.0)
    logger.info("These get the ellipsoid of all experiments together:")
    log_ellipsoid(ellipsoid, numbers)
    return ellipsoid


def number_ranges(numbers: Sequence[int]) -> str:
    """Numbers as text: 0-3, 7."""
    numbers = np.array(sorted(numbers))
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(
        f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts
    )


def log_ellipsoid(ellipsoid: Ellipsoid, numbers: Sequence[int]) -> None:
    """Log what was fitted to a data set."""
    logger.info(
        "Bragg ellipsoid of experiments %s, from %d spots (%d pixels) in %d images, "
        "without %d that are mostly halo: semi-axes %.3f, %.3f, %.3f of a*, b*, c* (%.4f, %.4f, %.4f 1/A) at the origin, "
        "mosaic spread %.3f degrees, tails %.2f; it excludes %.1f %% of the reciprocal "
        "cell at low resolution and %.1f %% at %.2f A",
        number_ranges(numbers),
        ellipsoid.n_peaks,
        ellipsoid.n_pixels,
        ellipsoid.n_images,
        ellipsoid.n_halos,
        *ellipsoid.semi_axes,
        *ellipsoid.semi_axes_per_angstrom,
        ellipsoid.mosaic_spread,
        ellipsoid.tail,
        100 * ellipsoid.excluded_low,
        100 * ellipsoid.excluded_high,
        ellipsoid.d_min,
    )
    if ellipsoid.excluded_high > MOST_EXCLUDED:
        logger.warning(
            "The Bragg ellipsoids of experiments %s leave only %.0f %% of the reciprocal "
            "cell at %.2f A: use a larger d_min",
            number_ranges(numbers),
            100 * (1 - ellipsoid.excluded_high),
            ellipsoid.d_min,
        )
