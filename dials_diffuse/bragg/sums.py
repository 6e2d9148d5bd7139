"""Bragg intensities on the scale of the diffuse map, from the pixels it leaves out.

The pixels of an exclusion region, one reciprocal lattice point in one block of images,
have been added up: N photons less the background B, normalisation M, n pixels. What
lies under the peak is taken from the diffuse scattering of the same block around it, as
far as that tells: its differences from voxel to voxel are a part of the variance.

*Rotation.* Each pixel and image sweeps the volume

    d³s = |m2 · (e0 × e)| ΔΩ Δφ / λ³

of reciprocal space, m2 the rotation axis, so with the mean intensity density of a peak,
∫ I d³s = |F|²/V, the sum over all the pixels and images of a peak is

    |F|² = V Σ (N - B) d³s n / M

in the unit of the map, which is that of N/M (Boysen & Adlhart, 1987, J. Appl. Cryst. 20,
200-209, doi:10.1107/S0021889887086850, for the Lorentz factor of volume elements).

*Stills.* One still cuts a peak; many orientations fill the region evenly. Its volume is
v reciprocal cells, and the mean over the region of what all stills saw is

    |F|² = v Σ (N - B) / Σ M

A row of one still is (N - B) v / M, an estimate as good as its cut is typical: merge with
weights M.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Sequence

import numpy as np

from dxtbx.model import Experiment, Panel
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse import corrections
from dials_diffuse.bragg.points import PointGrid
from dials_diffuse.extraction.settings import (
    ExclusionRegion,
    ExtractionSettings,
    symmetric,
)
from dials_diffuse.geometry.directions import pixel_to_millimeter
from dials_diffuse.geometry.orientation import frame_model
from dials_diffuse.grid import Grid

MIN_COVERAGE = 0.8  # of the exclusion region, by pixels and images that were used
MIN_ZETA = 0.05  # as in DIALS: nearer to the rotation axis, peaks take many images
NEAR = 2.0  # of the exclusion radius: where the diffuse scattering around is taken
PRIOR = 4.0  # voxels that the mean spread of the surroundings of all peaks counts for
MOST_POOLED = 0.95  # quantile of the spreads from which on they are left out of it


def add_surroundings(
    rows: np.ndarray, points: PointGrid, metric: Sequence[float] | None = None
) -> None:
    """Set what lies under the Bragg peaks of a block, from the voxels around them.

    Changes ``background`` and ``background_variance`` of the rows of lattice points:
    the mean intensity above background of the voxels of the reciprocal cell, those with
    centres within ``NEAR`` radii if there are any, times M, and its variance
    (``surroundings``). Voxels half-way between lattice points are around both. Peaks
    without any surroundings get NaN.

    Args:
        rows: Array of dtype ``extraction.loop.SUMS``, of one block of images.
        points: The lattice points of the grid.
        metric: The exclusion ellipsoid g11, g22, g33, g12, g13, g23, or None.
    """
    is_peak = rows["key"] >= points.n_voxels
    if not is_peak.any():
        return
    peaks = _chosen(rows, is_peak)
    keys, cell_of_peak = np.unique(peaks["key"], return_inverse=True)
    around = _chosen(rows, ~is_peak)
    index = points.grid.index(around["key"])
    voxel, hkl = points.around(index)
    key = points.key(hkl)
    cell = np.searchsorted(keys, key) % len(keys)
    at_peak = np.flatnonzero(keys[cell] == key)
    voxel, cell, hkl = (a[at_peak] for a in (voxel, cell, hkl))
    if metric is not None:
        dh = index[voxel] / points.grid.ndiv - hkl
        near = np.sum((dh @ symmetric(metric)) * dh, axis=1) < NEAR**2
        near |= np.bincount(cell[near], minlength=len(keys))[cell] == 0
        voxel, cell = voxel[near], cell[near]
    mean, variance, spread = surroundings(_chosen(around, voxel), cell, len(keys))
    m = peaks["normalisation"]
    peaks["background"] += mean[cell_of_peak] * m
    peaks["background_variance"] += (variance + spread)[cell_of_peak] * m**2
    rows[is_peak] = peaks


def _chosen(rows: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Some rows; numpy would copy structured ones field by field, which takes long."""
    whole = np.dtype((np.void, rows.dtype.itemsize))
    return rows.view(whole)[which].view(rows.dtype)


def surroundings(
    voxels: np.ndarray, cell: np.ndarray, n_cells: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean intensity of the voxels around each peak, and how far it may be off below it.

    With the intensities I_j = (N_j - B_j)/M_j, their mean over the cell and its counting
    variance are

        I = Σ (N_j - B_j) / Σ M_j,    var(I) = Σ (N_j + var B_j) / (Σ M_j)²

    The diffuse scattering differs from voxel to voxel by more than counting does (halos,
    slopes), with the variance τ² that makes up the sum Q = Σ M_j (I_j - I)²:

        τ² = (Q - Q₀) / D,    D = Σ M_j - Σ M_j²/Σ M_j

    Q₀ being the part of counting (DerSimonian & Laird, 1986, Control. Clin. Trials 7,
    177-188, doi:10.1016/0197-2456(86)90046-2). What lies below the peak is one more
    such voxel: it differs from the mean by the variance τ² (1 + Σ M_j²/(Σ M_j)²).
    Few voxels tell little of τ², so it is drawn to the (τ/I)² of all cells, which
    counts like ``PRIOR`` voxels.

    Args:
        voxels: Array of dtype ``extraction.loop.SUMS``.
        cell: Number of the cell of each.
        n_cells: Number of cells.

    Returns:
        I, var(I) and the variance of the difference, shape (n_cells,); NaN where a cell
        has no voxels.
    """

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(cell, values, minlength=n_cells)

    m, n = voxels["normalisation"], total(np.ones(len(cell)))
    net = voxels["counts"] - voxels["background"]
    with np.errstate(invalid="ignore", divide="ignore"):
        sum_m = total(m)
        mean = total(net) / sum_m
        noise = total(voxels["counts"] + voxels["background_variance"])
        effective = total(m**2) / sum_m
        d = sum_m - effective
        # of the mean: single counts, zero or one, would tell of no noise or of much
        expected = np.maximum(mean[cell] * m + voxels["background"], 0)
        expected = (expected + voxels["background_variance"]) / m
        excess = total(m * (net / m - mean[cell]) ** 2)
        excess -= total(expected * (1 - m / sum_m[cell]))
        several = (n > 1) & (mean > 0)
        relative = _pooled(excess[several], (mean**2 * d)[several])
        own = np.where(n > 1, excess / d, 0.0)
        trust = np.maximum(n - 1, 0) / (np.maximum(n - 1, 0) + PRIOR)
        tau2 = np.maximum(trust * own + (1 - trust) * relative * mean**2, 0.0)
        return mean, noise / sum_m**2, tau2 * (1 + effective / sum_m)


def _pooled(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Ratio of the sums, without the cells of the largest numerators; at least 0."""
    if len(numerator) == 0:
        return 0.0
    kept = numerator <= np.quantile(numerator / denominator, MOST_POOLED) * denominator
    return max(float(numerator[kept].sum() / denominator[kept].sum()), 0.0)


@dataclasses.dataclass(frozen=True)
class PeakIntensities:
    """Bragg intensities in the unit of the diffuse map; one row per peak and sweep.

    Attributes:
        hkl: Miller indices, shape (n, 3).
        id: Number of the experiment.
        panel: Number of the panel.
        intensity: |F|², shape (n,).
        variance: Its variance.
        background: What was taken off, in the same unit.
        weight: For means: M of stills, 1 for rotation.
        n_pixels: Pixels of all images.
        xyz: Mean position, px, px, images, shape (n, 3).
        complete: Whether the peak lies wholly within the scan, is not near the rotation
            axis, and has no part of its region masked, untrusted or beside the
            detector; False for stills.
    """

    hkl: np.ndarray
    id: np.ndarray
    panel: np.ndarray
    intensity: np.ndarray
    variance: np.ndarray
    background: np.ndarray
    weight: np.ndarray
    n_pixels: np.ndarray
    xyz: np.ndarray
    complete: np.ndarray


def swept_volume(
    panel: Panel, experiment: Experiment, xyz: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Volume d³s that a pixel sweeps in one rotation image, Å⁻³.

    Args:
        panel, experiment: The models.
        xyz: Positions, px, px, images, shape (n, 3), all on the panel.

    Returns:
        |m2 · (e0 × e)| ΔΩ Δφ / λ³, and ζ = |m2 · (e0 × e)| / |e0 × e|, shape (n,).
    """
    d = np.array(panel.get_d_matrix()).reshape(3, 3)
    mm = xyz[:, :2] * panel.get_pixel_size()
    position = d[:, :2] @ mm.T + d[:, 2:]
    ray = d[:, :2] @ pixel_to_millimeter(panel, xyz[:, :2]).T + d[:, 2:]
    solid_angle = corrections.solid_angle(
        position, np.array(panel.get_normal()), panel.get_pixel_size()
    )
    e = ray / corrections.length(ray)
    volume, zeta = np.empty(len(xyz)), np.empty(len(xyz))
    images = np.floor(xyz[:, 2]).astype(int)
    for image in np.unique(images):
        model = frame_model(experiment, int(image))
        at = images == image
        beam_length = np.linalg.norm(model.s0)  # 1/λ
        cross = np.cross(model.s0 / beam_length, e[:, at].T)
        product = np.abs(cross @ model.rotation)
        volume[at] = product * beam_length**3 * solid_angle[at]
        width = np.linalg.norm(model.rotation)
        sine = np.linalg.norm(cross, axis=1)
        zeta[at] = product / width / np.maximum(sine, np.finfo(float).tiny)
    return volume, zeta


def exclusion_regions(
    experiments: ExperimentList, grid: Grid, settings: ExtractionSettings
) -> list[ExclusionRegion | None]:
    """The region left out about the lattice points of each experiment."""
    return [settings.region(experiment, grid) for experiment in experiments]


def peak_intensities(
    rows: np.ndarray,
    experiments: ExperimentList,
    grid: Grid,
    settings: ExtractionSettings,
    regions: Sequence[ExclusionRegion | None] | None = None,
) -> PeakIntensities:
    """|F|² of every peak from the sums of its pixels.

    The peaks are ordered by lattice point, then by experiment, panel and image, so that
    parts of the rows that hold whole lattice points, one after the other, give the same
    as all rows together.

    Args:
        rows: Sums of lattice points, array of dtype ``extraction.loop.SUMS``: all of
            each point.
        experiments: The experiments that the ids of the rows count.
        grid: The voxel grid.
        settings: The settings of extraction, for the exclusion region.
        regions: Of ``exclusion_regions``, where they are at hand.
    """
    points = PointGrid(grid)
    if regions is None:
        regions = exclusion_regions(experiments, grid, settings)
    known = np.array([region is not None for region in regions])[rows["id"]]
    rows = rows[np.isfinite(rows["background"]) & (rows["n_pixels"] > 0) & known]
    z = rows["z"] / np.maximum(rows["n_pixels"], 1)
    rows = rows[np.lexsort((z, rows["panel"], rows["id"], rows["key"]))]
    xyz = np.stack([rows[axis] / rows["n_pixels"] for axis in "xyz"], axis=-1)
    hkl = points.hkl(rows["key"])
    scale = _Scale.of(len(rows))
    order = np.argsort(rows["id"], kind="stable")
    numbers, starts = np.unique(rows["id"][order], return_index=True)
    for number, mine in zip(numbers, np.split(order, starts[1:])):
        experiment, region = experiments[int(number)], regions[int(number)]
        volume = region.volume(experiment.crystal.get_unit_cell(), hkl[mine])
        if experiment.is_still():
            scale.set_still(rows, mine, volume)
        else:
            scale.set_rotation(rows, mine, volume, experiment, xyz)
    return _combined(rows, xyz, hkl, scale, experiments)


class _Scale(NamedTuple):
    """What turns the rows of sums into |F|², one value for each row.

    Attributes:
        factor: |F|² per photon.
        weight: For means.
        coverage: Fraction of the exclusion region that the row's pixels sweep.
        whole: Whether the row is far enough from the rotation axis.
    """

    factor: np.ndarray
    weight: np.ndarray
    coverage: np.ndarray
    whole: np.ndarray

    @classmethod
    def of(cls, n: int) -> _Scale:
        return cls(np.zeros(n), np.ones(n), np.ones(n), np.ones(n, dtype=bool))

    def set_still(self, rows: np.ndarray, at: np.ndarray, volume: np.ndarray) -> None:
        """Set the values of the rows of a still, by the volume of their regions."""
        self.weight[at] = rows["normalisation"][at]
        self.factor[at] = volume / rows["normalisation"][at]

    def set_rotation(
        self,
        rows: np.ndarray,
        at: np.ndarray,
        volume: np.ndarray,
        experiment: Experiment,
        xyz: np.ndarray,
    ) -> None:
        """Set the values of the rows of a sweep, whose mean positions are xyz."""
        cell_volume = experiment.crystal.get_unit_cell().volume()
        panels = rows["panel"][at]
        for number in np.unique(panels):
            mine = at[panels == number]
            panel = experiment.detector[int(number)]
            swept, zeta = swept_volume(panel, experiment, xyz[mine])
            swept *= rows["n_pixels"][mine] * cell_volume
            self.factor[mine] = swept / rows["normalisation"][mine]
            self.coverage[mine] = swept / volume[panels == number]
            self.whole[mine] = zeta >= MIN_ZETA


def _combined(
    rows: np.ndarray,
    xyz: np.ndarray,
    hkl: np.ndarray,
    scale: _Scale,
    experiments: ExperimentList,
) -> PeakIntensities:
    """Add up the rows of each peak: those of blocks that follow each other."""
    n = rows["n_pixels"]
    if len(rows) == 0:
        empty = np.zeros(0)
        return PeakIntensities(
            hkl, rows["id"], rows["panel"], *(empty,) * 4, n, xyz, empty.astype(bool)
        )
    is_still = np.array([e.is_still() for e in experiments])[rows["id"]]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = np.diff(rows["id"]) != 0
    new[1:] |= np.diff(rows["key"]) != 0
    # the same point is met again on the other side of the Ewald sphere
    new[1:] |= np.hypot(*np.diff(xyz[:, :2], axis=0).T) > _far(n)[1:]
    new |= is_still
    group = np.cumsum(new) - 1

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(group, values)

    pixels = total(n)
    cut = ~scale.whole | _at_end(rows, xyz, experiments)
    return PeakIntensities(
        hkl=hkl[new],
        id=rows["id"][new],
        panel=rows["panel"][new],
        intensity=total((rows["counts"] - rows["background"]) * scale.factor),
        variance=total(
            (rows["counts"] + rows["background_variance"]) * scale.factor**2
        ),
        background=total(rows["background"] * scale.factor),
        weight=scale.weight[new],
        n_pixels=pixels.astype(int),
        xyz=np.stack([total(x * n) for x in xyz.T], axis=-1) / pixels[:, None],
        complete=(total(cut) == 0)
        & (total(scale.coverage) > MIN_COVERAGE)
        & ~is_still[new],
    )


def _far(n_pixels: np.ndarray) -> np.ndarray:
    """Distance between the parts of two peaks, px: more than a peak measures."""
    return 10 + 2 * np.sqrt(n_pixels)


def _at_end(
    rows: np.ndarray, xyz: np.ndarray, experiments: ExperimentList
) -> np.ndarray:
    """Rows of blocks within two images of an end of their scan."""
    ends = [e.scan.get_array_range() if e.scan else (0, 0) for e in experiments]
    first, last = np.array(ends)[rows["id"]].T
    return (xyz[:, 2] < first + 2) | (xyz[:, 2] > last - 2)
