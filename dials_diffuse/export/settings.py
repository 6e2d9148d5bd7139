"""The parameters of extraction that the export of pixels takes over.

All that decide which pixels are used and what they count as, with the same defaults, but
for the surroundings of the Bragg positions, which are kept.
"""

from __future__ import annotations

from typing import Any

import iotbx.phil
import libtbx.phil

from dials_diffuse.util.command import load_phil

# of extract.phil, those that are not about pixels
LEFT_OUT = {"block_width", "mp", "output", "indexing", "geometry", "background"}
# exclusions that one image by itself cannot tell, and what belongs to them
BRAGG = """
bragg {
  exclusion = *none ellipsoid
    .type = choice
    .help = "Whether to leave out the pixels within an ellipsoid about each reciprocal"
            "lattice point."
}
"""
LEFT_OUT_OF_BRAGG = {"exclusion", "fraction", "margin", "absent"}


def _pixel_scope() -> libtbx.phil.scope:
    scope = load_phil("extract")
    scope.objects = [x for x in scope.objects if x.name not in LEFT_OUT]
    (bragg,) = [x for x in scope.objects if x.name == "bragg"]
    (own,) = iotbx.phil.parse(BRAGG).objects
    kept = [x for x in bragg.objects if x.name not in LEFT_OUT_OF_BRAGG]
    bragg.objects = [*own.objects, *kept]
    return scope


extraction_phil = _pixel_scope()


def full_parameters(params: Any) -> Any:
    """All parameters of extraction, with those that the user gave for the pixels."""
    scope = load_phil("extract")
    given = extraction_phil.format(params)
    result = scope.fetch(given).extract()
    result.mp.nproc = 1
    return result
