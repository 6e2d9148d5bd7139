"""What a term of the scaling model is."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Callable, Hashable

from dials_diffuse.scaling.axes import Axis
from dials_diffuse.scaling.components import Prior
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.layout import Owner


class Role(enum.IntEnum):
    """How a term enters a (b I + c): as factor b, as factor a, or as offset c."""

    INNER = 0
    OUTER = 1
    ADDITIVE = 2


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of the scaling model.

    Args:
        name: Of the component and the PHIL scope.
        role: How it enters the model.
        stage: Terms of one stage are refined together; later ones after earlier ones.
            None for a term that is not refined.
        help: One sentence for the PHIL scope.
        phil: Body of the PHIL scope: ``use`` (yes, no, auto) and further parameters,
            ``smoothness`` and ``size`` among them (see ``Prior``).
        axes: From the parameters and what an experiment covers, the axes of the term for
            the experiment; None if the term makes no sense for it.
        owner: Experiments with the same owner share parameters.
        default: Whether ``use=auto`` takes the term for an experiment.
        error_limit: Greatest standard error of a parameter for which the data are said to
            determine the term; None for terms that are always used.
    """

    name: str
    role: Role
    stage: int | None
    help: str
    phil: str
    axes: Callable[[Any, Extent], "tuple[Axis, ...] | None"]
    owner: Callable[[Extent], Hashable] = lambda extent: extent.number
    default: Callable[[Extent], bool] = lambda extent: True
    error_limit: float | None = 0.1

    def owner_for(self, params: Any, extent: Extent) -> Owner | None:
        """Who has the parameters of the term for an experiment, None for nobody."""
        if params.use == "no" or (params.use == "auto" and not self.default(extent)):
            return None
        axes = self.axes(params, extent)
        return None if axes is None else Owner(self.owner(extent), axes)

    @staticmethod
    def prior(params: Any) -> Prior:
        """What is expected of the parameters."""
        return Prior(params.smoothness, params.size)


OVERRULED = (
    " With yes it stays even if the observations say little of it or do not need it. In any"
    " case it is switched off if they do not determine it, with a standard error above half"
    " the size that is expected of its parameters, if there are too few of them for its"
    " parameters, or if its values run away in the refinement."
)


def use_phil(help: str, always: bool = False) -> str:
    """The parameter that switches a term on and off.

    Args:
        help: What it decides, a sentence.
        always: Whether the term needs no observations that determine it
            (``error_limit=None``).
    """
    text = help if always else help + OVERRULED
    return f"""
use = yes no *auto
  .type = choice
  .help = "{text}"
"""


def prior_phil(smoothness: float, size: float) -> str:
    """The parameters of the restraints."""
    return f"""
smoothness = {smoothness:g}
  .type = float(value_min=1e-6, allow_none=False)
  .help = "Expected second difference of neighbouring parameters (standard deviation):"
          "the smaller, the smoother."
  .expert_level = 2
size = {size:g}
  .type = float(value_min=1e-6, allow_none=False)
  .help = "Expected size of the parameters (standard deviation): a weak restraint to"
          "zero, which settles what the data leave open."
  .expert_level = 2
"""
