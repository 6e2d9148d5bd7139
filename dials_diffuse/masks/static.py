"""Layers that do not depend on the photons: models, files, and the user's shapes.

All masks here are flat arrays over the pixels of a detector, True for masked pixels.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Mapping, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Detector
from libtbx.utils import Sorry

import dials.util.masking
from dials_diffuse.extraction.tables import lookup_mask
from dials_diffuse.masks.series import Series, flatten
from dials_diffuse.masks.settings import default_shapes
from dials_diffuse.masks.statistics import PixelSums

# Which parameters of DIALS' masking make which layer.
SHAPE_LAYERS = {
    "shapes": ("border", "untrusted"),
    "resolution": ("d_min", "d_max", "resolution_range"),
    "ice_rings": ("ice_rings",),
}


def untrusted_rectangles(detector: Detector) -> np.ndarray:
    """Pixels in the untrusted rectangles of the panels."""
    return ~flatten(
        [flumpy.to_numpy(panel.get_untrusted_rectangle_mask()) for panel in detector]
    )


def file_masks(series: Series, masks: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Pixels that files mask: those given, and those of all image sets.

    What only some image sets mask is left to each of them.

    Args:
        series: The images.
        masks: Masks that fit the detector, True for good pixels.
    """
    imagesets = {id(e.imageset): e.imageset for e in series.experiments}.values()
    lookups = [lookup_mask(imageset) for imageset in imagesets]
    bad = np.zeros(sum(a * b for a, b in series.shapes), dtype=bool)
    if all(lookup is not None for lookup in lookups):
        bad |= np.logical_and.reduce([~flatten(lookup) for lookup in lookups])
    for mask in masks:
        bad |= ~flatten(mask)
    return bad


def shape_layers(series: Series, params: Any) -> dict[str, np.ndarray]:
    """The layers of the user's shapes, by DIALS' own masking.

    Args:
        series: The images, the first of which says where the beam is.
        params: An extract of ``dials.util.masking.phil_scope``.

    Raises:
        ValueError: A shape does not fit the detector.
    """
    n_panels = len(series.detector)
    for region in params.untrusted:
        if region.panel is not None and not 0 <= region.panel < n_panels:
            raise ValueError(
                f"untrusted.panel={region.panel}: the detector has the panels 0 to "
                f"{n_panels - 1}"
            )
    first = series.experiments[0]
    # not the image set, which may have the models of the image headers
    models = SimpleNamespace(
        get_detector=lambda: first.detector, get_beam=lambda: first.beam
    )
    result = {}
    for layer, names in SHAPE_LAYERS.items():
        chosen = default_shapes()
        for name in names:
            # a copy, as DIALS fills in what the regions leave open
            setattr(chosen, name, copy.deepcopy(getattr(params, name)))
        chosen.disable_parallax_correction = params.disable_parallax_correction
        try:
            masks = dials.util.masking.generate_mask(models, chosen)
        except (RuntimeError, AssertionError, IndexError, Sorry) as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise ValueError(
                f"The mask parameters {', '.join(names)} do not fit the detector "
                f"({reason}): check the coordinates in pixels, resolutions in Angstrom"
            ) from None
        result[layer] = ~flatten([flumpy.to_numpy(mask) for mask in masks])
    return result


def never_trusted(sums: PixelSums) -> Mapping[str, np.ndarray]:
    """Pixels that no image trusts: ``gaps`` always below, else ``untrusted``."""
    gaps = sums.below == sums.n_images
    return {
        "gaps": gaps,
        "untrusted": (sums.below + sums.above >= sums.n_images) & ~gaps,
    }
