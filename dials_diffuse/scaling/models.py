"""The scaling model of each experiment, from the terms of all experiments together."""

from __future__ import annotations

from dxtbx import flumpy

from dials_diffuse.scaling.components import TermComponent
from dials_diffuse.scaling.model import DiffuseScalingModel
from dials_diffuse.scaling.scale import Scaling


def scaling_models(scaling: Scaling) -> list[DiffuseScalingModel | None]:
    """The model of each experiment; None if it has no term."""
    return [_model(scaling, extent.number) for extent in scaling.extents]


def _model(scaling: Scaling, number: int) -> DiffuseScalingModel | None:
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
            unit=joint.unit if joint.additive else None,
        )
    if not components:
        return None
    model = DiffuseScalingModel(components, is_scaled=True)
    model.set_error_model(scaling.error_model.as_dials())
    return model
