"""The scaling model of diffuse scattering, a plug-in of DIALS.

An observation of the intensity I is expected to be a (b I + c), with factors a (absorption,
sensitivity of the detector) and b (scale, decay) and the offset c. ``dials.diffuse_scale``
refines all of them; stock ``dials.scale model=diffuse`` refines the factors, as it
multiplies all components, on observations that ``dials.diffuse_export`` has written.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment
from libtbx import phil

from dials.algorithms.scaling.model.model import ScalingModelBase, base_model_phil_str
from dials.array_family import flex
from dials_diffuse.scaling.axes import Axis, DecayAxis, SmoothAxis, StepAxis
from dials_diffuse.scaling.components import TermComponent, component_from_dict
from dials_diffuse.scaling.coordinates import CoordinateFinder, Extent, find_extents
from dials_diffuse.scaling.terms import TERMS, Role, terms_phil

COLOUR = "#1f4e79"
DIVERGING = [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]]
MOST_IMAGES = 6  # of a term of three axes
IMAGES_PER_ROW = 3


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
        stages = {TERMS[name].stage for name in self.components} - {None}
        return [
            [name for name in self.components if TERMS[name].stage == stage]
            for stage in sorted(stages)
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
                # DIALS appends the number of the experiment to a title of plain text.
                title = plot["layout"]["title"]["text"]
                plot["layout"]["title"] = title
                plots[f"diffuse_{name}"] = plot
        return plots


def make_components(params: Any, extent: Extent) -> dict[str, TermComponent]:
    """The factors of an experiment, without effect yet; offsets are left out.

    In DIALS each experiment has parameters of its own. A factor that several have in
    common is only taken with ``use=yes``.
    """
    components = {}
    for name, term in TERMS.items():
        own = getattr(params, name)
        owner = term.owner_for(own, extent)
        if owner is None or term.role is Role.ADDITIVE or term.stage is None:
            continue
        if own.use == "auto" and owner.key != extent.number:
            continue
        n = int(np.prod([axis.n_params for axis in owner.axes]))
        components[name] = TermComponent(
            owner.axes, flex.double(n, 0.0), term.prior(own)
        )
    return components


def plot_component(name: str, component: TermComponent) -> dict[str, Any] | None:
    """A plot of a component for plotly; None for a single number.

    A line with the parameters at their knots for one axis; an image for two; for three,
    images at some points of the first axis, on one scale of colours. The B factor of a
    sweep is drawn against the rotation, that of a still as factor against s.
    """
    axes = [axis for axis in component.axes if axis.n_cells > 1]
    if not axes:
        return None
    smooth = [axis for axis in axes if not isinstance(axis, DecayAxis)]
    if len(smooth) < len(axes) and len(smooth) == 1:
        return _plot_decay(name, smooth[0], component)
    values = _cell_values(component).reshape([axis.n_cells for axis in axes])
    if len(axes) == 1:
        return _plot_line(name, axes[0], values, component)
    if len(axes) == 2:
        return _plot_images(name, axes, values[None], [""], component.additive)
    chosen = _some(axes[0].n_cells, MOST_IMAGES)
    points = axes[0].centres()[chosen]
    name_of, unit = {"phi": ("φ = ", "°"), "panel": ("Panel ", "")}.get(
        axes[0].coordinate, (f"{axes[0].coordinate} = ", "")
    )
    titles = [f"{name_of}{point:.4g}{unit}" for point in points]
    return _plot_images(name, axes[1:3], values[chosen], titles, component.additive)


def _cell_values(component: TermComponent) -> np.ndarray:
    """The value of a component in the middle of each of its cells."""
    mesh = np.meshgrid(*(axis.centres() for axis in component.axes), indexing="ij")
    places = zip(component.axes, mesh)
    coordinates = {axis.coordinate: x.ravel() for axis, x in places}
    return component.values(coordinates, mesh[0].size)


def _some(n: int, most: int) -> np.ndarray:
    """Some of n numbers from 0, at about equal distances."""
    if n <= most:
        return np.arange(n)
    return ((np.arange(most) + 0.5) * n / most).astype(int)


def _plot_line(
    name: str, axis: Axis, values: np.ndarray, component: TermComponent
) -> dict[str, Any]:
    """Values along an axis, and the parameters where they have their knots."""
    line = {"x": axis.centres().tolist(), "y": values.tolist(), "type": "scatter"}
    data = [{**line, "mode": "lines", "name": "Model", "line": {"color": COLOUR}}]
    if isinstance(axis, SmoothAxis):
        parameters = flumpy.to_numpy(component.parameters)
        at_knots = (
            component.unit * parameters if component.additive else np.exp(parameters)
        )
        data.append(_plot_knots(axis, at_knots))
    elif isinstance(axis, StepAxis):
        data[0].update(mode="markers", marker={"color": COLOUR})
    return {"data": data, "layout": _layout(name, axis, _value_title(name, component))}


def _plot_knots(axis: SmoothAxis, values: np.ndarray) -> dict[str, Any]:
    return {
        "x": axis.knots().tolist(),
        "y": values.tolist(),
        "type": "scatter",
        "mode": "markers",
        "name": "Parameters",
        "marker": {"color": COLOUR, "symbol": "circle-open"},
    }


def _plot_decay(name: str, axis: Axis, component: TermComponent) -> dict[str, Any]:
    """The relative B of a sweep."""
    x, parameters = axis.centres(), flumpy.to_numpy(component.parameters)
    line = {
        "x": x.tolist(),
        "y": (axis.weights(x) @ parameters).tolist(),
        "type": "scatter",
        "mode": "lines",
        "name": "Model",
        "line": {"color": COLOUR},
    }
    data = [line]
    if isinstance(axis, SmoothAxis):
        data.append(_plot_knots(axis, parameters))
    return {"data": data, "layout": _layout(name, axis, "Relative B (Å²)")}


def _layout(name: str, axis: Axis, title: str) -> dict[str, Any]:
    return {
        "title": {"text": name.capitalize()},
        "xaxis": {"title": {"text": _axis_title(axis.coordinate)}},
        "yaxis": {"title": {"text": title}},
    }


def _plot_images(
    name: str,
    axes: Sequence[Axis],
    values: np.ndarray,
    titles: Sequence[str],
    additive: bool,
) -> dict[str, Any]:
    """Images side by side, shape (n_images, cells of the axes), on one scale."""
    first, second = axes
    if first.coordinate in ("slow", "u"):  # drawn as seen along the beam
        across, down = (second, first) if first.coordinate == "slow" else axes
    else:
        across, down = first, second
    if across is first:
        values = values.transpose(0, 2, 1)
    layout = {
        "title": {"text": _surface_title(name, additive)},
        "coloraxis": _colours(values, additive),
        "annotations": [],
    }
    data = []
    for i, (image, title) in enumerate(zip(values, titles)):
        suffix = str(i + 1) if i else ""
        place = _place(i, len(values))
        layout.update(_axes_of_image(across, down, place, suffix))
        data.append(
            {
                "x": across.centres().tolist(),
                "y": down.centres().tolist(),
                "z": [[float(f"{value:.5g}") for value in row] for row in image],
                "type": "heatmap",
                "xaxis": "x" + suffix,
                "yaxis": "y" + suffix,
                "coloraxis": "coloraxis",
            }
        )
        if title:
            layout["annotations"].append(_title_above(title, place))
    return {"data": data, "layout": layout}


def _axes_of_image(
    across: Axis, down: Axis, place: tuple[float, float, float, float], suffix: str
) -> dict[str, Any]:
    """The axes of one of several images, titled at the border of the plot only."""
    left, bottom, width, height = place
    x = {
        "domain": [left, left + width],
        "anchor": "y" + suffix,
        "title": {"text": _axis_title(across.coordinate) if bottom < 0.3 else ""},
    }
    y = {
        "domain": [bottom, bottom + height],
        "anchor": "x" + suffix,
        "title": {"text": _axis_title(down.coordinate) if left == 0 else ""},
        "showticklabels": left == 0,
    }
    if down.coordinate in ("slow", "v"):
        y["autorange"] = "reversed"
    return {"xaxis" + suffix: x, "yaxis" + suffix: y}


def _title_above(
    title: str, place: tuple[float, float, float, float]
) -> dict[str, Any]:
    """The title of one of several images."""
    left, bottom, width, height = place
    return {
        "text": title,
        "x": left + width / 2,
        "y": bottom + height,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "center",
        "yanchor": "bottom",
        "showarrow": False,
    }


def _place(i: int, n: int) -> tuple[float, float, float, float]:
    """Left edge, lower edge, width and height of the i-th of n images."""
    n_columns = min(n, IMAGES_PER_ROW)
    n_rows = -(-n // n_columns)
    row, column = divmod(i, n_columns)
    width = 1.0 if n_columns == 1 else 0.94 / n_columns
    height = 1.0 if n_rows == 1 else 0.76 / n_rows
    return column / n_columns, 1 - row / n_rows - height, width, height


def _colours(values: np.ndarray, additive: bool) -> dict[str, Any]:
    """Factors: blue below 1, red above. Offsets: from their smallest on."""
    bar = {"thickness": 14, "len": 0.9, "exponentformat": "power"}
    if additive:
        return {"colorscale": "Viridis", "colorbar": bar}
    width = max(float(np.abs(values - 1).max()), 1e-3)
    limits = {"cmin": 1 - width, "cmax": 1 + width}
    return {"colorscale": DIVERGING, "colorbar": bar, **limits}


def _surface_title(name: str, additive: bool) -> str:
    return f"{name.capitalize()} ({'photons s⁻¹ sr⁻¹' if additive else 'factor'})"


def _value_title(name: str, component: TermComponent) -> str:
    return "Photons s⁻¹ sr⁻¹" if component.additive else "Factor"


def _axis_title(coordinate: str) -> str:
    return {
        "phi": "φ (°)",
        "s": "s = 1/d (Å⁻¹)",
        "panel": "Panel",
        "fast": "Fast axis (fraction of the panel)",
        "slow": "Slow axis (fraction of the panel)",
        "u": "Horizontal direction, 2 sin θ",
        "v": "Vertical direction, 2 sin θ",
    }.get(coordinate, coordinate)
