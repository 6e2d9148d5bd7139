"""Sensitivity d(panel) or d(x, y) of the detector, the same on all of its images."""

from __future__ import annotations

from typing import Any

from dials_diffuse.scaling.axes import Axis, SmoothAxis, StepAxis
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.terms.term import Role, Term, prior_phil, use_phil

MANY_PANELS = 8


def _axes(params: Any, extent: Extent) -> tuple[Axis, ...] | None:
    panel = StepAxis("panel", extent.n_panels)
    surface = params.surface == "yes" or (
        params.surface == "auto" and extent.n_panels < MANY_PANELS
    )
    if not surface:
        return (panel,) if extent.n_panels > 1 else None
    return (
        panel,
        *(SmoothAxis(x, 0, 1, 1 / params.n_knots, 8) for x in ("slow", "fast")),
    )


DETECTOR = Term(
    name="detector",
    role=Role.OUTER,
    stage=2,
    help="Sensitivity of the detector where the flat field is wrong.",
    phil=use_phil("Whether to refine the sensitivity of the detector.")
    + f"""
surface = yes no *auto
  .type = choice
  .help = "Whether the sensitivity varies smoothly over each panel, or is one number for"
          "each panel. With auto it varies on detectors of less than {MANY_PANELS} panels."
n_knots = 12
  .type = int(value_min=1, allow_none=False)
  .help = "Number of intervals between knots along each side of a panel."
"""
    + prior_phil(smoothness=0.05, size=0.3),
    axes=_axes,
    owner=lambda extent: ("detector", extent.detector),
)
