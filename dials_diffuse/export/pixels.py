"""The pixels of one image with their scattering vectors, as extraction sees them.

Directions, normalisation, masks and models are those of the pixel loop, and the voxel of
each pixel is the loop's own: summed by voxel, the pixels give extraction's sums.
"""

from __future__ import annotations

import os

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment
from scitbx.array_family import flex

import dials_diffuse_ext as ext
from dials_diffuse.extraction.blocks import exposure_times
from dials_diffuse.extraction.loop import loop_frame, read_image
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.extraction.tables import (
    PanelTable,
    detector_tables,
    inclusive_trusted_range,
)
from dials_diffuse.geometry.orientation import (
    FrameModel,
    crystal_setting,
    frame_model,
    inverse,
)
from dials_diffuse.grid import Grid

RING = 0.01  # Å⁻¹, width of the rings of ``expected_counts``

PIXELS = np.dtype(
    [
        ("panel", "i4"),
        ("x", "i4"),
        ("y", "i4"),
        ("rlp", "f8", 3),
        ("hkl", "f8", 3),
        ("voxel", "i4", 3),
        ("counts", "f8"),
        ("normalisation", "f8"),
        ("intensity", "f8"),
        ("sigma", "f8"),
    ]
)
CSV_NAMES = (
    *("panel", "x", "y", "rlp_x", "rlp_y", "rlp_z", "h", "k", "l"),
    *("voxel_h", "voxel_k", "voxel_l"),
    *("counts", "normalisation", "intensity", "sigma"),
)


def image_pixels(
    experiment: Experiment, array_index: int, grid: Grid, settings: ExtractionSettings
) -> np.ndarray:
    """The pixels of an image that extraction uses.

        rlp = (S R F)⁻¹ (s1 - s0),  hkl = A⁻¹ rlp,  I = counts / normalisation

    Args:
        experiment: The experiment, with its images.
        array_index: The image in the scan; 0 for a still without.
        grid: The voxel grid, for the limits and the voxels.
        settings: The settings of extraction.

    Returns:
        Array of dtype ``PIXELS``: the number of the panel; the pixel along the fast (x)
        and slow (y) axis from 0; rlp in Å⁻¹ in the laboratory frame with the crystal as
        it is at zero of all goniometer angles (of a still, as it is), at the pixel's
        centre; the fractional Miller index; the index of the voxel, which for wide
        images that extraction spreads over their rotation is that of the pixel's row;
        photons; normalisation; photons by normalisation and its standard deviation, see
        ``standard_deviations``.

    Raises:
        ValueError: The image cannot be read, or no pixel is left.
    """
    model = frame_model(experiment, array_index)
    images = read_image(experiment, array_index)
    exposure = 1.0
    if settings.corrections.exposure and experiment.scan is not None:
        first = experiment.scan.get_array_range()[0]
        exposure = exposure_times(experiment)[array_index - first]
    pixels = np.concatenate(
        [
            _panel_pixels(
                number, table, experiment, images[number], model, grid, settings
            )
            for number, table in enumerate(detector_tables(experiment, settings))
        ]
    )
    if len(pixels) == 0:
        raise ValueError(
            "No pixel is left: check the mask, the trusted range and the resolution "
            "limits"
        )
    first = experiment.scan.get_array_range()[0] if experiment.scan else array_index
    a = crystal_setting(experiment.crystal, array_index - first)
    pixels["rlp"] = pixels["hkl"] @ a.T
    pixels["normalisation"] *= exposure
    pixels["intensity"] = pixels["counts"] / pixels["normalisation"]
    pixels["sigma"] = standard_deviations(pixels)
    return pixels


def _panel_pixels(
    number: int,
    table: PanelTable,
    experiment: Experiment,
    image: flex.int | flex.double,
    model: FrameModel,
    grid: Grid,
    settings: ExtractionSettings,
) -> np.ndarray:
    """The pixels of a panel of an image of 1 s, without what all pixels decide."""
    frame = loop_frame(model, experiment, grid, settings)
    weight = table.arrays.weight
    places = ext.voxels(grid.half_size, table.panel, frame)
    key = flumpy.to_numpy(places).reshape(weight.shape)
    value = flumpy.to_numpy(image)
    panel = experiment.detector[number]
    low, high = settings.trusted_range or inclusive_trusted_range(panel)
    used = (weight > 0) & (value >= low) & (value <= high) & (key >= 0)
    rows = np.empty(np.count_nonzero(used), dtype=PIXELS)
    rows["panel"] = number
    rows["y"], rows["x"] = np.nonzero(used)
    e = table.arrays.e[:, used].T.astype(float)
    scattering = e * np.linalg.norm(model.s0) - model.s0
    rows["hkl"] = scattering @ inverse(model.setting).T
    rows["voxel"] = grid.index(key[used])
    rows["counts"] = table.photons(value[used].astype(float), np.ones(len(rows)))
    rows["normalisation"] = weight[used] * table.weight_unit
    return rows


def expected_counts(pixels: np.ndarray) -> np.ndarray:
    """Photons of each pixel if the image depended on resolution only.

    The ratio of photons to normalisation in rings of 0.01 Å⁻¹, times the pixel's own
    normalisation. A ring without photons has one half for all of its pixels together.
    """
    s = np.linalg.norm(pixels["rlp"], axis=1)
    ring = (s / RING).astype(int)
    counts = np.maximum(np.bincount(ring, pixels["counts"]), 0.5)
    normalisation = np.bincount(ring, pixels["normalisation"])
    return (counts[ring] / normalisation[ring]) * pixels["normalisation"]


def standard_deviations(pixels: np.ndarray) -> np.ndarray:
    """√counts / normalisation, and for pixels without photons √expected / normalisation.

    A pixel without photons is not known exactly: its deviation is that of the photons to
    be expected there.
    """
    counts = pixels["counts"]
    variance = np.where(counts > 0, counts, expected_counts(pixels))
    return np.sqrt(variance) / pixels["normalisation"]


def pixel_arrays(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of the pixels by their names."""
    return {name: np.ascontiguousarray(pixels[name]) for name in PIXELS.names}


def write_csv(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Write pixels as comma-separated values, a line each, with a header."""
    columns = [pixels[name].reshape(len(pixels), -1) for name in PIXELS.names]
    formats = [
        "%d" if column.dtype.kind == "i" else "%.8g"
        for column in columns
        for _ in column.T
    ]
    np.savetxt(
        path,
        np.concatenate(columns, axis=1),
        fmt=formats,
        delimiter=",",
        header=",".join(CSV_NAMES),
        comments="",
    )
