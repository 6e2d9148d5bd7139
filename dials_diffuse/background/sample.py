"""What an image measures beside its background: for reports and checks."""

from __future__ import annotations

import dataclasses

import numpy as np

from dxtbx.model import Experiment

from dials_diffuse.background.model import BackgroundAxes, ImageBackground, evaluate
from dials_diffuse.background.pixels import make_pixels, near_bragg, read_photons
from dials_diffuse.background.settings import BackgroundSettings
from dials_diffuse.geometry.orientation import frame_model

Base = tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class SampleImage:
    """The usable pixels of an image, flat.

    Attributes:
        x, y: Where they are seen from the sample, on a plane across the beam at a
            distance of 1; x to the right and y up as seen along the beam.
        s: 1/d, 1/Å.
        photons: Measured.
        background: Expected of the background.
        variance: Of the background.
        normalisation: M with the exposure time, s sr.
        near_bragg: Whether near a Bragg position.
    """

    x: np.ndarray
    y: np.ndarray
    s: np.ndarray
    photons: np.ndarray
    background: np.ndarray
    variance: np.ndarray
    normalisation: np.ndarray
    near_bragg: np.ndarray


def sample_image(
    experiment: Experiment,
    array_index: int,
    exposure: float,
    terms: ImageBackground,
    axes: BackgroundAxes,
    settings: BackgroundSettings,
    base: Base | None = None,
) -> SampleImage:
    """An image and its background.

    Args:
        experiment: The experiment of the image.
        array_index: Which image of it.
        exposure: Exposure time as in extraction, s.
        terms: Its background.
        axes: Where the points of profiles and grids are.
        settings: Masks, gain, Bragg exclusion and corrections.
        base: The base that the terms ask for, values and variances of each panel.
    """
    pixels = make_pixels(experiment, settings)
    photons, trusted = read_photons(experiment, array_index, settings)
    n = len(photons)
    s, m = np.full(n, np.nan), np.full(n, np.nan)
    s[pixels.flat] = pixels.s
    m[pixels.flat] = pixels.normalisation * exposure
    values, first = [], 0
    for number, shape in enumerate(pixels.shapes):
        part = slice(first, first + shape[0] * shape[1])
        first = part.stop
        both = evaluate(
            terms,
            axes,
            number,
            np.nan_to_num(s[part]).reshape(shape),
            m[part].reshape(shape),
            None if base is None else base[0][number],
            None if base is None else base[1][number],
        )
        values.append(np.reshape(both, (2, -1)))
    background, variance = np.concatenate(values, axis=1)
    used = trusted[pixels.flat] & np.isfinite(background[pixels.flat])
    flat, e = pixels.flat[used], pixels.e[:, used]
    bragg = np.zeros(len(flat), dtype=bool)
    if experiment.crystal is not None:
        bragg = near_bragg(
            e, frame_model(experiment, array_index), experiment, settings
        )
    x, y = _across_the_beam(e, experiment)
    return SampleImage(
        x, y, s[flat], photons[flat], background[flat], variance[flat], m[flat], bragg
    )


def _across_the_beam(
    e: np.ndarray, experiment: Experiment
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates on a plane across the beam at a distance of 1, y as near to up."""
    e0 = np.array(experiment.beam.get_s0())
    e0 /= np.linalg.norm(e0)
    up = np.array([0.0, 1.0, 0.0]) - e0[1] * e0
    up /= np.linalg.norm(up)
    # along the beam (-z) with y up, +x of the laboratory is to the right
    right = np.cross(e0, up)
    forward = e0 @ e
    return (right @ e) / forward, (up @ e) / forward


@dataclasses.dataclass(frozen=True)
class Shell:
    """Mean photons per pixel in a range of resolution, Bragg positions left out.

    Attributes:
        s: Middle of the shell, 1/Å.
        n_pixels: Number of pixels.
        measured, background: Mean photons per pixel.
        residual: Measured less background.
        sigma: Counting error of the measured mean.
    """

    s: float
    n_pixels: int
    measured: float
    background: float
    residual: float
    sigma: float


def shells(image: SampleImage, n_shells: int = 15) -> list[Shell]:
    """Means in shells of equal width in s; none if all pixels are near Bragg positions."""
    keep = ~image.near_bragg
    if not keep.any():
        return []
    s = image.s[keep]
    edges = np.linspace(s.min(), s.max(), n_shells + 1)
    number = np.clip(np.searchsorted(edges, s, "right") - 1, 0, n_shells - 1)
    n = np.bincount(number, minlength=n_shells)
    photons, background = (
        np.bincount(number, values[keep], minlength=n_shells)
        for values in (image.photons, image.background)
    )
    return [
        Shell(
            s=float((edges[i] + edges[i + 1]) / 2),
            n_pixels=int(n[i]),
            measured=float(photons[i] / n[i]),
            background=float(background[i] / n[i]),
            residual=float((photons[i] - background[i]) / n[i]),
            sigma=float(np.sqrt(max(photons[i], 1.0)) / n[i]),
        )
        for i in range(n_shells)
        if n[i] > 0
    ]
