"""The scale b: one for each still, smooth along a sweep."""

from __future__ import annotations

from typing import Any

from dials_diffuse.scaling.axes import Axis, SmoothAxis
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.terms.term import Role, Term, prior_phil, use_phil


def _axes(params: Any, extent: Extent) -> tuple[Axis, ...]:
    if extent.is_still:
        return ()
    return (SmoothAxis("phi", *extent.phi, params.interval, cells_per_interval=64),)


SCALE = Term(
    name="scale",
    role=Role.INNER,
    stage=1,
    help="Scale of an experiment: flux, exposure and illuminated volume.",
    phil=use_phil("Whether to refine scales of the experiments.", always=True)
    + """
interval = 5.0
  .type = float(value_min=0.01, allow_none=False)
  .help = "Rotation between the knots of the scale of a sweep, degrees. Stills have one"
          "scale each."
"""
    + prior_phil(smoothness=0.3, size=3.0),
    axes=_axes,
    error_limit=None,
)
