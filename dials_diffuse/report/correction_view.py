"""The corrections of a detector as pictures: each factor where pixels are seen.

Only numbers: ``correction_pictures`` draws them with matplotlib, ``correction_plots`` for
the page of ``dials.diffuse_extract``.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from dxtbx.model import Beam, Detector, Experiment

from dials_diffuse.extraction.blocks import exposure_times
from dials_diffuse.extraction.settings import CorrectionSettings, ExtractionSettings
from dials_diffuse.report.beam_view import (
    BeamView,
    beam_view,
    close_gaps,
    pixel_spacing,
    spaced_pixels,
    to_picture,
)
from dials_diffuse.report.corrections import (
    FACTORS,
    Factor,
    panel_factors,
    product_of,
)


def pixel_values(
    detector: Detector, beam: Beam, settings: CorrectionSettings, spacing: int = 1
) -> dict[str, np.ndarray]:
    """The factors at the ``spaced_pixels`` of all panels, ``product`` last, flat."""
    parts = [
        panel_factors(panel, beam, settings, *spaced_pixels(panel, spacing))
        for panel in detector
    ]
    return {
        name: np.concatenate([part[name].ravel() for part in parts])
        for name in parts[0]
    }


@dataclasses.dataclass(frozen=True)
class CorrectionView:
    """The factors of a detector in a beam, where its pixels are seen along the beam.

    Attributes:
        title: What the detector is, and the wavelength.
        factors: The factors that are taken in, and their product last.
        pictures: Each factor, in the unit of its label, shape (n_rows, n_columns), the
            upper row first; NaN where no pixel is seen. Empty if none is seen at all.
        extent: Limits of the pictures in pixels from the beam: left, right, bottom, top.
        times: Exposure times of all images in their order (s), None if not taken in.
        beam_view: Where the pixels are seen.
    """

    title: str
    factors: list[Factor]
    pictures: list[np.ndarray]
    extent: tuple[float, float, float, float]
    times: np.ndarray | None
    beam_view: BeamView


def view_corrections(
    experiments: Sequence[Experiment], settings: ExtractionSettings, n_pixels: int
) -> CorrectionView:
    """The factors of a detector as pictures.

    Args:
        experiments: Those of the detector; the beam is that of the first.
        settings: The settings of extraction.
        n_pixels: How many pixels of the detector to look at, about; a cell of a picture
            has four of them.
    """
    detector, beam = experiments[0].detector, experiments[0].beam
    spacing = pixel_spacing(detector, n_pixels)
    values = pixel_values(detector, beam, settings.corrections, spacing)
    names = list(values)[:-1]
    factors = [*(FACTORS[name] for name in names), product_of(names)]
    view = beam_view(detector, beam, spacing)
    pictures, extent = [], (0.0, 0.0, 0.0, 0.0)
    if not view.is_empty:
        row, column, shape = view.cells()
        extent = view.extent(shape)
        pictures = [
            close_gaps(to_picture(flat * factor.scale, row, column, shape))
            for factor, flat in zip(factors, values.values())
        ]
    times = None
    if settings.corrections.exposure:
        times = np.concatenate([exposure_times(e) for e in experiments])
    panels = "1 panel" if len(detector) == 1 else f"{len(detector)} panels"
    title = f"detector of {panels}, {beam.get_wavelength():.4f} Å"
    return CorrectionView(title, factors, pictures, extent, times, view)
