"""The relative B: a factor exp(B s²/2), one for each still, smooth along a sweep."""

from __future__ import annotations

from typing import Any

from dials_diffuse.scaling.axes import Axis, DecayAxis, SmoothAxis
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.terms.term import Role, Term, prior_phil, use_phil


def _axes(params: Any, extent: Extent) -> tuple[Axis, ...]:
    decay = DecayAxis(*extent.s)
    if extent.is_still:
        return (decay,)
    return (SmoothAxis("phi", *extent.phi, params.interval), decay)


DECAY = Term(
    name="decay",
    role=Role.INNER,
    stage=2,
    help="Relative B factor, by which scattering falls with the resolution.",
    phil=use_phil("Whether to refine relative B factors.")
    + """
interval = 20.0
  .type = float(value_min=0.01, allow_none=False)
  .help = "Rotation between the knots of the B factor of a sweep, degrees. Stills have"
          "one B factor each."
"""
    + prior_phil(smoothness=1.0, size=3.0),
    axes=_axes,
    error_limit=1.0,  # Å²
)
