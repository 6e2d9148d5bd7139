"""What settles the part of the factors that depends on the resolution alone.

All observations of a voxel have the same s = 1/d, so that no observation tells a factor
f(s) from the intensities. Noise would settle it. This term is not refined: it makes the mean
of the logarithm of all other factors zero at each s.
"""

from __future__ import annotations

from typing import Any

from dials_diffuse.scaling.axes import Axis, SmoothAxis
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.terms.term import Role, Term, prior_phil, use_phil


def _axes(params: Any, extent: Extent) -> tuple[Axis, ...]:
    low, high = extent.s
    return (SmoothAxis("s", low, high, (high - low) / params.n_resolution),)


RESOLUTION = Term(
    name="resolution",
    role=Role.INNER,
    stage=None,
    help="Takes out what other factors have in common at one resolution, which no"
    " observation determines.",
    phil=use_phil(
        "Whether the mean factor at each resolution is set to 1.", always=True
    )
    + """
n_resolution = 30
  .type = int(value_min=1, allow_none=False)
  .help = "Number of intervals between knots along s = 1/d."
  .expert_level = 2
"""
    + prior_phil(smoothness=1.0, size=10.0),
    axes=_axes,
    owner=lambda extent: "all",
    error_limit=None,
)
