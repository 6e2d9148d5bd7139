"""The offset c(s, φ) or c(s) of a still: scattering that is not of the crystal."""

from __future__ import annotations

from typing import Any

from dials_diffuse.scaling.axes import Axis, SmoothAxis
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.terms.term import Role, Term, prior_phil, use_phil


def _axes(params: Any, extent: Extent) -> tuple[Axis, ...]:
    low, high = extent.s
    s = SmoothAxis("s", low, high, (high - low) / params.n_resolution)
    if extent.is_still:
        return (s,)
    return (SmoothAxis("phi", *extent.phi, params.interval), s)


OFFSET = Term(
    name="offset",
    role=Role.ADDITIVE,
    stage=3,
    help="Background that the extraction has left, the same in all directions.",
    phil=use_phil("Whether to refine an additive offset.")
    + """
interval = 10.0
  .type = float(value_min=0.01, allow_none=False)
  .help = "Rotation between the knots of the offset of a sweep, degrees."
n_resolution = 15
  .type = int(value_min=1, allow_none=False)
  .help = "Number of intervals between knots along s = 1/d."
"""
    + prior_phil(smoothness=0.1, size=1.0),
    axes=_axes,
)
