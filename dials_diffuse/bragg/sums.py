"""Bragg intensities on the scale of the diffuse map, from the pixels it leaves out.

The pixels of an exclusion region, one reciprocal lattice point in one block of images,
have been added up: N photons less the background B, normalisation M, n pixels. What
lies under the peak is taken from the diffuse scattering of the same block around it.

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
from typing import Sequence

import numpy as np

from dxtbx.model import Experiment, Panel
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse import corrections
from dials_diffuse.bragg.points import PointGrid
from dials_diffuse.extraction.settings import ExtractionSettings, symmetric
from dials_diffuse.geometry.directions import pixel_to_millimeter
from dials_diffuse.geometry.orientation import frame_model
from dials_diffuse.grid import Grid

MIN_COVERAGE = 0.8  # of the exclusion region, by pixels and images that were used
MIN_ZETA = 0.05  # as in DIALS: nearer to the rotation axis, peaks take many images
NEAR = 2.0  # of the exclusion radius: where the diffuse scattering around is taken


def add_surroundings(
    rows: np.ndarray, points: PointGrid, metric: Sequence[float] | None = None
) -> None:
    """Set what lies under the Bragg peaks of a block, from the voxels around them.

    Changes ``background`` and ``background_variance`` of the rows of lattice points:
    the mean intensity above background of the voxels of the reciprocal cell, those with
    centres within ``NEAR`` radii if there are any, times M. Peaks without any
    surroundings get NaN.

    Args:
        rows: Array of dtype ``extraction.loop.SUMS``, of one block of images.
        points: The lattice points of the grid.
        metric: The exclusion ellipsoid g11, g22, g33, g12, g13, g23, or None.
    """
    is_peak = rows["key"] >= points.n_voxels
    if not is_peak.any():
        return
    peaks = rows[is_peak]
    keys, cell_of_peak = np.unique(peaks["key"], return_inverse=True)
    around = rows[~is_peak]
    index = points.grid.index(around["key"])
    hkl = points.nearest(index)
    cell = np.searchsorted(keys, points.key(hkl)) % len(keys)
    at_peak = keys[cell] == points.key(hkl)
    around, cell, index, hkl = (a[at_peak] for a in (around, cell, index, hkl))
    near = np.ones(len(around), dtype=bool)
    if metric is not None:
        dh = index / points.grid.ndiv - hkl
        near = np.einsum("ni,ij,nj->n", dh, symmetric(metric), dh) < NEAR**2
        near |= np.bincount(cell[near], minlength=len(keys))[cell] == 0
    sums = {
        name: np.bincount(cell[near], around[name][near], minlength=len(keys))
        for name in ("counts", "background", "background_variance", "normalisation")
    }
    with np.errstate(invalid="ignore", divide="ignore"):
        intensity = (sums["counts"] - sums["background"]) / sums["normalisation"]
        variance = sums["counts"] + sums["background_variance"]
        variance = variance / sums["normalisation"] ** 2
    m = peaks["normalisation"]
    peaks["background"] += intensity[cell_of_peak] * m
    peaks["background_variance"] += variance[cell_of_peak] * m**2
    rows[is_peak] = peaks


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


def peak_intensities(
    rows: np.ndarray,
    experiments: ExperimentList,
    grid: Grid,
    settings: ExtractionSettings,
) -> PeakIntensities:
    """|F|² of every peak from the sums of its pixels.

    Args:
        rows: Sums of lattice points, array of dtype ``extraction.loop.SUMS``; the
            blocks of an experiment need not be adjacent.
        experiments: The experiments that the ids of the rows count.
        grid: The voxel grid.
        settings: The settings of extraction, for the exclusion region.
    """
    points = PointGrid(grid)
    rows = rows[np.isfinite(rows["background"]) & (rows["n_pixels"] > 0)]
    z = rows["z"] / np.maximum(rows["n_pixels"], 1)
    rows = rows[np.lexsort((z, rows["panel"], rows["key"], rows["id"]))]
    xyz = np.stack([rows[axis] / rows["n_pixels"] for axis in "xyz"], axis=-1)
    hkl = points.hkl(rows["key"])
    factor, weight = np.zeros(len(rows)), np.ones(len(rows))
    zeta, coverage = np.ones(len(rows)), np.ones(len(rows))
    # rows are ordered by experiment
    starts = np.searchsorted(rows["id"], np.arange(len(experiments) + 1))
    for number in np.unique(rows["id"]):
        experiment = experiments[int(number)]
        mine = slice(starts[number], starts[number + 1])
        region = settings.region(experiment, grid)
        if region is None:
            continue
        volume = region.volume(experiment.crystal.get_unit_cell(), hkl[mine])
        if experiment.is_still():
            factor[mine] = volume / rows["normalisation"][mine]
            weight[mine] = rows["normalisation"][mine]
            continue
        coverage[mine] = 1 / volume
        for panel in np.unique(rows["panel"][mine]):
            at = starts[number] + np.flatnonzero(rows["panel"][mine] == panel)
            swept, zeta[at] = swept_volume(
                experiment.detector[int(panel)], experiment, xyz[at]
            )
            swept *= rows["n_pixels"][at] * experiment.crystal.get_unit_cell().volume()
            factor[at] = swept / rows["normalisation"][at]
            coverage[at] *= swept
    whole = zeta >= MIN_ZETA
    return _combined(rows, xyz, hkl, factor, weight, coverage, whole, experiments)


def _combined(
    rows: np.ndarray,
    xyz: np.ndarray,
    hkl: np.ndarray,
    factor: np.ndarray,
    weight: np.ndarray,
    coverage: np.ndarray,
    whole: np.ndarray,
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
    return PeakIntensities(
        hkl=hkl[new],
        id=rows["id"][new],
        panel=rows["panel"][new],
        intensity=total((rows["counts"] - rows["background"]) * factor),
        variance=total((rows["counts"] + rows["background_variance"]) * factor**2),
        background=total(rows["background"] * factor),
        weight=weight[new],
        n_pixels=pixels.astype(int),
        xyz=np.stack([total(x * n) for x in xyz.T], axis=-1) / pixels[:, None],
        complete=(total(~whole | _at_end(rows, xyz, experiments)) == 0)
        & (total(coverage) > MIN_COVERAGE)
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
