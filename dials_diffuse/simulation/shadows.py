"""Pixels that a simulated detector lacks, and the shadow that falls on the others."""

from __future__ import annotations

import numpy as np

from dxtbx.model import Detector, Panel

from dials_diffuse.geometry.directions import has_smooth_parallax, lab_coordinates
from dials_diffuse.geometry.interpolation import PixelInterpolation
from dials_diffuse.simulation.settings import SimulationSettings

TOLERANCE = 1e-4  # pixels, of interpolated coordinates


def _is_active(n: int, modules: int, gap: int) -> np.ndarray:
    """Along one axis, the pixels that belong to a module.

    The modules share the pixels between the gaps as evenly as whole numbers allow.
    """
    ends = np.arange(1, modules) * (n - (modules - 1) * gap) // modules
    starts = ends + np.arange(modules - 1) * gap
    active = np.ones(n, dtype=bool)
    for start in starts:
        active[start : start + gap] = False
    return active


def gap_mask(settings: SimulationSettings) -> list[np.ndarray]:
    """The pixels of each panel that are not in a gap between modules.

    Returns:
        For each panel, True where there is a pixel, shape (n_slow, n_fast).
    """
    detector = settings.detector
    fast, slow = (
        _is_active(*axis) for axis in zip(detector.size, detector.modules, detector.gap)
    )
    n_panels = detector.panels[0] * detector.panels[1]
    return [slow[:, None] & fast for _ in range(n_panels)]


def _pixel_coordinates(panel: Panel) -> np.ndarray:
    """Laboratory coordinates of all pixels in mm, shape (3, n_slow, n_fast)."""
    n_fast, n_slow = panel.get_image_size()
    coordinates = PixelInterpolation(
        lambda fast, slow: lab_coordinates(panel, fast, slow, parallax=True),
        (n_slow, n_fast),
        np.full(3, TOLERANCE * panel.get_pixel_size()[0]),
        has_smooth_parallax(panel),
    )
    return coordinates.rows(slice(0, n_slow))


def shadow(settings: SimulationSettings, detector: Detector) -> list[np.ndarray]:
    """Transmission of the beam stop and its arm for each pixel.

    The ray to the pixel's centre, with the parallax of the sensor, is continued to the
    plane that the beam meets at ``distance`` perpendicularly: there the beam stop is a
    disc about the beam, and its arm a strip from the beam upwards (+y) without end.

    Returns:
        For each panel, 0 in the shadow and 1 elsewhere, shape (n_slow, n_fast).
    """
    radius, width = settings.detector.beamstop, settings.detector.beamstop_arm
    result = []
    for panel in detector:
        x, y, z = _pixel_coordinates(panel)
        forward = z < 0
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y = (c * (settings.detector.distance / -z) for c in (x, y))
        disc = x * x + y * y < radius * radius
        arm = (np.abs(x) < width / 2) & (y > 0)
        result.append(np.where(forward & (disc | arm), 0.0, 1.0))
    return result
