"""Absorption a(u, v, φ) by the sample and what holds it.

Its knots are as far apart as in DIALS' own array model. More of them find no absorption
that is there, but more of the smooth factors with the symmetry of the intensities that no
observation tells from absorption (``tests/truth/test_scaling.py`` has the error of the map).
"""

from __future__ import annotations

from typing import Any

from dials_diffuse.scaling.axes import Axis, SmoothAxis
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.terms.term import Role, Term, prior_phil, use_phil


def _axes(params: Any, extent: Extent) -> tuple[Axis, ...] | None:
    if extent.is_still:
        return None  # of one image it cannot be told from the detector's sensitivity
    directions = (
        SmoothAxis(name, low, high, (high - low) / params.n_directions)
        for name, (low, high) in (("u", extent.u), ("v", extent.v))
    )
    return (SmoothAxis("phi", *extent.phi, params.interval), *directions)


ABSORPTION = Term(
    name="absorption",
    role=Role.OUTER,
    stage=2,
    help="Absorption, by the direction of the scattered beam and the rotation angle.",
    phil=use_phil("Whether to refine absorption by the sample of sweeps.")
    + """
interval = 15.0
  .type = float(value_min=0.01, allow_none=False)
  .help = "Rotation between the knots of the absorption, degrees."
n_directions = 4
  .type = int(value_min=1, allow_none=False)
  .help = "Number of intervals between knots across the detector, both ways."
"""
    + prior_phil(smoothness=0.02, size=0.3),
    axes=_axes,
)
