"""The scaling model of diffuse scattering, a plug-in of DIALS.

An observation of the intensity I is expected to be a (b I + c), with factors a (absorption,
sensitivity of the detector) and b (scale, decay) and the offset c. ``dials.diffuse_scale``
refines all of them; stock ``dials.scale model=diffuse`` refines the factors, as it
multiplies all components, on observations that ``dials.diffuse_export`` has written.
"""

from __future__ import annotations

from typing import Any, Mapping

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment
from libtbx import phil

from dials.algorithms.scaling.model.model import ScalingModelBase, base_model_phil_str
from dials.array_family import flex
from dials_diffuse.scaling.axes import SmoothAxis
from dials_diffuse.scaling.components import TermComponent, component_from_dict
from dials_diffuse.scaling.coordinates import CoordinateFinder, Extent, find_extents
from dials_diffuse.scaling.terms import TERMS, Role, terms_phil

COLOURS = "Viridis"


def terms_scope() -> phil.scope:
    """The parameters of all terms, for ``include scope``."""
    return phil.parse(terms_phil())


class _ModelScope:
    """The attribute ``phil_scope`` of a class: with the terms that there are by then."""

    def __get__(self, instance: object, owner: type) -> phil.scope:
        return phil.parse(terms_phil() + base_model_phil_str)


class DiffuseScalingModel(ScalingModelBase):
    """Factors and offsets of one experiment.

    Args:
        components: The component of each term, by its name.
        config: What the model must remember beside them.
        is_scaled: Whether the parameters have been refined.

    Raises:
        ValueError: There is no component.
    """

    id_ = "diffuse"

    phil_scope = _ModelScope()

    def __init__(
        self,
        components: Mapping[str, TermComponent],
        config: Mapping[str, Any] | None = None,
        is_scaled: bool = False,
    ) -> None:
        corrections = list(components)
        super().__init__({**(config or {}), "corrections": corrections}, is_scaled)
        self._components = dict(components)
        self._configdict["terms"] = {
            name: component.as_dict() for name, component in components.items()
        }

    @classmethod
    def from_data(
        cls,
        params: Any,
        experiment: Experiment,
        reflection_table: flex.reflection_table,
    ) -> DiffuseScalingModel:
        """A model without effect, with all factors that make sense for the experiment."""
        s = 1 / flumpy.to_numpy(reflection_table["d"])
        (extent,) = find_extents([experiment], (float(s.min()), float(s.max())))
        return cls(make_components(params.diffuse, extent))

    @classmethod
    def from_dict(cls, obj: Mapping[str, Any]) -> DiffuseScalingModel:
        """The model that ``to_dict`` described.

        Raises:
            RuntimeError: It is a model of another kind.
        """
        if obj["__id__"] != cls.id_:
            raise RuntimeError(
                f"expected a model of the kind {cls.id_}, not {obj['__id__']}"
            )
        config = dict(obj["configuration_parameters"])
        components = {
            name: component_from_dict(
                config["terms"][name],
                obj[name]["parameters"],
                obj[name].get("est_standard_devs"),
            )
            for name in config["corrections"]
        }
        return cls(components, config, is_scaled=True)

    def consecutive_refinement_order(self) -> list[list[str]]:
        stages = sorted({TERMS[name].stage for name in self.components})
        return [
            [name for name in self.components if TERMS[name].stage == stage]
            for stage in stages
        ]

    def configure_components(
        self,
        reflection_table: flex.reflection_table,
        experiment: Experiment,
        params: Any,
    ) -> None:
        """Give the components the coordinates of reflections."""
        for name, values in self.coordinates(reflection_table, experiment).items():
            self.components[name].data = values

    def coordinates(
        self, reflection_table: flex.reflection_table, experiment: Experiment
    ) -> dict[str, dict[str, flex.double]]:
        """For each component the coordinates of reflections, and their numbers."""
        n = len(reflection_table)
        xyz = np.array(reflection_table["xyzobs.px.value"]).reshape(n, 3)
        columns = {
            "panel": flumpy.to_numpy(reflection_table["panel"]),
            "xyzobs.px.value": xyz,
            "d": flumpy.to_numpy(reflection_table["d"]),
        }
        axes = [axis for c in self.components.values() for axis in c.axes]
        extents = find_extents([experiment], (0.0, 1.0))
        found = CoordinateFinder([experiment], extents).find(
            np.zeros(n, dtype=np.int64), columns, {axis.coordinate for axis in axes}
        )
        number = flumpy.from_numpy(np.arange(n, dtype=float))
        result = {}
        for name, component in self.components.items():
            own = {axis.coordinate for axis in component.axes}
            result[name] = {
                x: flumpy.from_numpy(np.ascontiguousarray(found[x], dtype=float))
                for x in own
            }
            result[name]["id"] = number
        return result

    def plot_model_components(
        self, reflection_table: flex.reflection_table | None = None
    ) -> dict[str, dict[str, Any]]:
        """Plots of the components for plotly, as the reports of DIALS show them."""
        plots = {}
        for name, component in self.components.items():
            plot = plot_component(name, component)
            if plot:
                plots[f"diffuse_{name}"] = plot
        return plots


def make_components(params: Any, extent: Extent) -> dict[str, TermComponent]:
    """The factors of an experiment, without effect yet; offsets are left out."""
    components = {}
    for name, term in TERMS.items():
        own = getattr(params, name)
        owner = term.owner_for(own, extent)
        if owner is None or term.role is Role.ADDITIVE:
            continue
        n = int(np.prod([axis.n_params for axis in owner.axes]))
        components[name] = TermComponent(
            owner.axes, flex.double(n, 0.0), term.prior(own)
        )
    return components


def plot_component(name: str, component: TermComponent) -> dict[str, Any] | None:
    """A line along the first axis, or an image of the first two, for plotly.

    Further axes are taken at their middle. None for a single number.
    """
    axes = [axis for axis in component.axes if axis.n_cells > 1][:2]
    if not axes:
        return None
    points = [
        axis.centres() if axis in axes else np.median(axis.centres(), keepdims=True)
        for axis in component.axes
    ]
    mesh = np.meshgrid(*points, indexing="ij")
    coordinates = {axis.coordinate: x.ravel() for axis, x in zip(component.axes, mesh)}
    values = component.values(coordinates, mesh[0].size)
    values = values.reshape([len(axis.centres()) for axis in axes])
    titles = [_axis_title(axis.coordinate) for axis in axes]
    title = (
        f"{name.capitalize()} {'(photons/s/sr)' if component.additive else 'factor'}"
    )
    layout = {"title": title, "xaxis": {"title": titles[0]}}
    x = axes[0].centres().tolist()
    if len(axes) == 1:
        data = {"x": x, "y": values.tolist(), "type": "scatter", "mode": "lines"}
        if not isinstance(axes[0], SmoothAxis):
            data["mode"] = "markers"
        layout["yaxis"] = {"title": name.capitalize()}
    else:
        y = axes[1].centres().tolist()
        data = {"x": x, "y": y, "z": values.T.tolist(), "type": "heatmap"}
        data["colorscale"] = COLOURS
        layout["yaxis"] = {"title": titles[1]}
    return {"data": [data], "layout": layout}


def _axis_title(coordinate: str) -> str:
    return {
        "phi": "φ (°)",
        "s": "s = 1/d (Å⁻¹)",
        "panel": "Panel",
        "fast": "Fast axis (fraction of the panel)",
        "slow": "Slow axis (fraction of the panel)",
    }.get(coordinate, coordinate)
