"""The scaling model of each experiment, from the terms of all experiments together."""

from __future__ import annotations

from typing import Mapping

import numpy as np

from dxtbx import flumpy

from dials_diffuse.scaling.components import TermComponent
from dials_diffuse.scaling.model import DiffuseScalingModel
from dials_diffuse.scaling.result import Scaling


def scaling_models(scaling: Scaling) -> list[DiffuseScalingModel | None]:
    """The model of each experiment; None if it has no term."""
    errors = standard_errors(scaling)
    return [_model(scaling, errors, extent.number) for extent in scaling.extents]


def standard_errors(scaling: Scaling) -> dict[str, np.ndarray]:
    """Standard errors of the parameters of each term, the others taken as known."""
    if scaling.refiner is None:
        return {}
    scaling.refiner.evaluate()
    result = {}
    for name, component in scaling.components.items():
        curvature = scaling.refiner.curvature(name)
        result[name] = np.sqrt(2 / (curvature + component.restraint_curvature()))
    return result


def _model(
    scaling: Scaling, errors: Mapping[str, np.ndarray], number: int
) -> DiffuseScalingModel | None:
    components = {}
    for name, joint in scaling.components.items():
        place = joint.layout.of_experiment(number)
        if place is None:
            continue
        axes, chosen = place
        values = flumpy.to_numpy(joint.parameters)[chosen].copy()
        components[name] = TermComponent(
            axes,
            flumpy.from_numpy(values),
            joint.prior,
            parameter_esds=flumpy.from_numpy(errors[name][chosen].copy()),
            unit=joint.unit if joint.additive else None,
        )
    if not components:
        return None
    model = DiffuseScalingModel(components, is_scaled=True)
    model.set_error_model(scaling.error_model.as_dials())
    return model
