"""What scaling found."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple

import numpy as np

from dials_diffuse.scaling.components import JointComponent
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.error_model import ErrorModel
from dials_diffuse.scaling.refinement import Fit, Refiner


class Stage(NamedTuple):
    """One minimisation, for log and report.

    Args:
        terms: The terms that were refined.
        fit: How well the observations are described after it.
        before: χ² per degree of freedom before it, with the same weights.
    """

    terms: list[str]
    fit: Fit
    before: float


class Source(enum.Enum):
    """Where the scale of an experiment is from.

    Nothing tells that of one without rows, either.
    """

    REFINEMENT = "refinement"
    ALL = "all observations"
    NOTHING = "nothing"


@dataclasses.dataclass
class Scaling:
    """The result.

    Args:
        components: The terms that were refined, for all experiments.
        extents: What the experiments cover.
        refiner: With the observations that were refined against.
        error_model: Scatter beyond that of counting.
        stages: The minimisations.
        dropped: Terms that were switched off, and why.
        before: χ² per degree of freedom with scales only from the ratio of counts.
        counting: That of the result without outliers, with the errors of counting,
            before the scales of experiments with few of these observations are set.
        after: The same with the error model.
        control: That of other voxels; None if all voxels were refined against.
        step: One in how many voxels was refined against.
        n_observations: Of each experiment among those refined against, in voxels that
            others have seen too, and of Bragg peaks that they have seen; None if nothing
            was refined.
        source: Where the scale of each experiment is from, a ``Source``.
    """

    components: dict[str, JointComponent]
    extents: list[Extent]
    refiner: Refiner | None
    error_model: ErrorModel = ErrorModel()
    stages: list[Stage] = dataclasses.field(default_factory=list)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    before: float | None = None
    counting: float | None = None
    after: float | None = None
    control: float | None = None
    step: int = 1
    n_observations: np.ndarray | None = None
    source: np.ndarray | None = None

    def experiment_scales(self) -> np.ndarray:
        """Mean scale b of each experiment, over its observations of the refinement.

        Of experiments without any, the mean over all of their images.
        """
        n = len(self.extents)
        if "scale" not in self.components:
            return np.ones(n)
        component = self.components["scale"]
        values = component.cell_values()
        result = np.array(
            [values[component.layout.cells_of(i)].mean() for i in range(n)]
        )
        if self.refiner is not None:
            block = self.refiner.block
            number = np.bincount(block.experiment, minlength=n)
            total = np.bincount(block.experiment, values[block.cells["scale"]], n)
            result = np.where(number > 0, total / np.maximum(number, 1), result)
        return result

    def summary(self) -> dict[str, Any]:
        """What a summary of all stages tells of scaling."""
        scales = self.experiment_scales()
        return {
            "terms": list(self.components),
            "dropped": dict(self.dropped),
            "chi_square_before": self.before,
            "chi_square": self.counting,
            "chi_square_error_model": self.after,
            "error_model": self.error_model.parameters,
            "n_experiments": len(scales),
            "scale_min": float(scales.min()),
            "scale_max": float(scales.max()),
        }
