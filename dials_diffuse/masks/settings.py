"""The settings of the masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import libtbx.phil

import dials.util.masking
from dials_diffuse.util.compat import available_cores

DYNAMIC_LAYERS = ("hot", "dead", "flickering", "unstable")


def default_shapes() -> Any:
    """The parameters of DIALS' masking that mask nothing."""
    # fetching drops the templates of the definitions that may be repeated
    return dials.util.masking.phil_scope.fetch().extract()


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """How masks are made.

    Attributes:
        shapes: An extract of the masking scope of DIALS.
        beamstop: Whether to look for the shadow of a beam stop and its arm.
        transmission: What is below this fraction of its ring may be shadow.
        border: Pixels over which the shadow may have a soft edge.
        find: The layers of faulty pixels to look for.
        max_images: Number of images to read for each detector, None for all.
        gain: Detector units per photon, None for that of each panel.
        trusted_range: Smallest and largest value to use, None for that of each panel.
        nproc: Number of processes.
    """

    shapes: Any = dataclasses.field(default_factory=default_shapes)
    beamstop: bool = True
    transmission: float = 0.5
    border: int = 2
    find: tuple[str, ...] = DYNAMIC_LAYERS
    max_images: int | None = 400
    gain: float | None = None
    trusted_range: tuple[float, float] | None = None
    nproc: int = 1

    def __post_init__(self) -> None:
        if self.trusted_range and self.trusted_range[0] >= self.trusted_range[1]:
            raise ValueError("trusted_range needs the smaller value first")

    @classmethod
    def from_phil(cls, params: Any, scope: libtbx.phil.scope) -> MaskSettings:
        """The settings of the command.

        Args:
            params: The extracted parameters.
            scope: The working scope they come from.

        Raises:
            ValueError: A value will not do.
        """
        shapes = dials.util.masking.phil_scope.fetch(source=scope).extract()
        _check_shapes(shapes)
        nproc = params.mp.nproc
        return cls(
            shapes=shapes,
            beamstop=params.beamstop.automatic,
            transmission=params.beamstop.transmission,
            border=params.beamstop.border,
            find=tuple(params.pixels.find or ()),
            max_images=params.pixels.max_images,
            gain=params.gain,
            trusted_range=(
                tuple(params.trusted_range) if params.trusted_range else None
            ),
            nproc=available_cores() if nproc is libtbx.Auto else nproc,
        )


def _check_shapes(shapes: Any) -> None:
    """Refuse what DIALS' masking would answer with an assertion, or pass over.

    Raises:
        ValueError: A shape or a range will not do.
    """
    if shapes.border < 0:
        raise ValueError(f"border={shapes.border} must be a number of pixels from 0 on")
    for region in shapes.untrusted:
        polygon = region.polygon
        if polygon and (len(polygon) % 2 or len(polygon) < 8):
            raise ValueError(
                f"untrusted.polygon={','.join(map(str, polygon))} must be the pixel "
                "coordinates x1,y1,x2,y2,... of four corners or more"
            )
    for limits in filter(None, shapes.resolution_range or ()):
        if limits[0] == limits[1]:
            raise ValueError(
                f"resolution_range={limits[0]:g},{limits[1]:g} must be two resolutions"
            )
    if shapes.d_min and shapes.d_max and shapes.d_min >= shapes.d_max:
        raise ValueError(
            f"d_min={shapes.d_min:g} must be smaller than d_max={shapes.d_max:g}"
        )
