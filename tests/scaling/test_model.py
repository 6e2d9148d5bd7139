"""The scaling model as a plug-in of DIALS, in stock dials.scale too."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from simulated_observations import ROTATION, STILLS, draw, observe, read_models

from dxtbx import flumpy
from dxtbx.imageset import ImageSetFactory
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory

from dials.algorithms.scaling.model.model import model_phil_scope, plot_scaling_models
from dials.array_family import flex
from dials_diffuse.command_line import diffuse_export
from dials_diffuse.scaling import terms
from dials_diffuse.scaling.model import DiffuseScalingModel, terms_scope
from dials_diffuse.scaling.terms.term import Role, Term, prior_phil, use_phil

SWEEP = dataclasses.replace(ROTATION, n_images=60)
FEW_STILLS = dataclasses.replace(STILLS, n_images=8)
FACTORS = ("scale", "decay", "absorption", "detector")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    geometry = observe(SWEEP, tmp_path_factory.mktemp("sweep"))
    (experiment,) = geometry.experiments
    # The report of DIALS asks for the names of the images.
    experiment.imageset = ImageSetFactory.make_sequence(
        "image_####.cbf",
        list(range(1, SWEEP.n_images + 1)),
        beam=experiment.beam,
        detector=experiment.detector,
        goniometer=experiment.goniometer,
        scan=experiment.scan,
        check_format=False,
    )
    return geometry


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    return observe(FEW_STILLS, tmp_path_factory.mktemp("stills"))


def as_table(geometry, number: int = 0, n: int = 500) -> flex.reflection_table:
    """Some observations of an experiment."""
    mine = np.flatnonzero(geometry.experiment == number)[:n]
    columns = {name: values[mine] for name, values in geometry.columns.items()}
    table = flex.reflection_table()
    table["panel"] = flumpy.from_numpy(columns["panel"].astype(np.uint64))
    table["xyzobs.px.value"] = flumpy.vec_from_numpy(columns["xyzobs.px.value"].copy())
    table["d"] = flumpy.from_numpy(columns["d"].copy())
    return table


def make_model(geometry, *options: str) -> DiffuseScalingModel:
    """A model with random parameters."""
    clerk = model_phil_scope.command_line_argument_interpreter()
    chosen = [clerk.process(option) for option in options]
    params = model_phil_scope.fetch(sources=chosen).extract()
    table = as_table(geometry)
    model = DiffuseScalingModel.from_data(params, geometry.experiments[0], table)
    rng = np.random.default_rng(7)
    for component in model.components.values():
        values = rng.normal(0, 0.2, component.n_params)
        component.parameters = flumpy.from_numpy(values)
    return model


def scales(model: DiffuseScalingModel, geometry) -> np.ndarray:
    """The product of all components for some observations."""
    table = as_table(geometry)
    model.configure_components(table, geometry.experiments[0], None)
    result = np.ones(len(table))
    for component in model.components.values():
        component.update_reflection_data()
        result *= flumpy.to_numpy(component.calculate_scales())
    return result


def test_dials_offers_the_model():
    params = model_phil_scope.extract()
    for name in terms.TERMS:
        assert getattr(params.diffuse, name).use == "auto"
    assert params.diffuse.correction.fix is None


def test_terms_of_experiments(sweep, stills):
    assert list(make_model(sweep).components) == ["scale", "decay", "absorption"]
    assert list(make_model(stills).components) == ["scale", "decay"]
    asked = make_model(stills, "diffuse.detector.use=yes", "diffuse.decay.use=no")
    assert list(asked.components) == ["scale", "detector"]
    order = make_model(sweep).consecutive_refinement_order()
    assert order == [["scale"], ["decay", "absorption"]]


def test_no_effect_at_first(sweep):
    params = model_phil_scope.extract()
    experiment, table = sweep.experiments[0], as_table(sweep)
    model = DiffuseScalingModel.from_data(params, experiment, table)
    assert not model.is_scaled
    np.testing.assert_array_equal(scales(model, sweep), 1)


def test_saved_in_experiments(sweep, tmp_path):
    model = make_model(sweep, "diffuse.detector.use=yes")
    assert set(model.components) == set(FACTORS)
    experiments = ExperimentList([sweep.experiments[0]])
    before = experiments[0].scaling_model
    try:
        experiments[0].scaling_model = model
        experiments.as_file(tmp_path / "scaled.expt")
    finally:
        experiments[0].scaling_model = before
    path = str(tmp_path / "scaled.expt")
    again = ExperimentListFactory.from_json_file(path, check_format=False)
    found = again[0].scaling_model
    assert isinstance(found, DiffuseScalingModel)
    assert found.is_scaled
    expected = scales(model, sweep)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(scales(found, sweep), expected, rtol=1e-12)
    assert json.dumps(found.to_dict()) == json.dumps(
        DiffuseScalingModel.from_dict(found.to_dict()).to_dict()
    )


def test_models_of_other_kinds():
    with pytest.raises(RuntimeError, match="expected a model of the kind diffuse"):
        DiffuseScalingModel.from_dict({"__id__": "KB"})


def test_plots_as_dials_wants_them(sweep, stills):
    plots = plot_scaling_models(make_model(sweep, "diffuse.detector.use=yes"))
    assert set(plots) == {f"diffuse_{name}" for name in FACTORS}
    for plot in plots.values():
        plot["layout"]["title"] += " (dataset 0)"  # as in dials.scale
    json.dumps(plots)
    assert "diffuse_scale" not in plot_scaling_models(make_model(stills))


def test_terms_of_others_get_parameters(monkeypatch):
    monkeypatch.setattr(terms, "TERMS", terms.TERMS.copy())
    own = Term(
        name="shutter",
        role=Role.INNER,
        stage=2,
        help="Opening of the shutter, in 'ms'.",
        phil=use_phil("Whether to refine it.") + prior_phil(0.1, 0.5),
        axes=lambda params, extent: (),
    )
    assert not hasattr(terms_scope().extract(), "shutter")
    terms.register(own)
    assert terms_scope().extract().shutter.size == 0.5
    assert DiffuseScalingModel.phil_scope.extract().shutter.use == "auto"
    assert terms_scope().get("shutter").objects[0].help == own.help
    with pytest.raises(ValueError, match="already has a term named shutter"):
        terms.register(own)


def run_dials_scale(folder: Path, *options: str) -> tuple[dict, ExperimentList]:
    """Columns of scaled.refl, and scaled.expt, of the command itself."""
    command = [sys.executable, "-m", "dials.command_line.scale"]
    files = ["diffuse.expt", "diffuse.refl", "model=diffuse"]
    done = subprocess.run(
        [*command, *files, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Internal Error" not in done.stdout
    table = flex.reflection_table.from_file(str(folder / "scaled.refl"))
    columns = {
        name: flumpy.to_numpy(table[name])
        for name in ("id", "xyzobs.px.value", "d", "inverse_scale_factor")
    }
    return columns, read_models(folder / "scaled.expt")


def check_scales(columns, experiments, truth, tolerance):
    """Against the truth; and those of the models that were saved."""
    found = columns["inverse_scale_factor"]
    ratio = found / truth
    assert np.std(truth) > 5 * tolerance
    assert np.std(ratio) < tolerance * np.mean(ratio)
    table = flex.reflection_table.from_file("scaled.refl")
    for number, experiment in enumerate(experiments):
        own = table.select(table["id"] == number)
        model = experiment.scaling_model
        assert isinstance(model, DiffuseScalingModel)
        model.configure_components(own, experiment, None)
        again = np.ones(len(own))
        for component in model.components.values():
            component.update_reflection_data()
            again *= flumpy.to_numpy(component.calculate_scales())
        np.testing.assert_allclose(again, found[columns["id"] == number], rtol=1e-6)


@pytest.mark.slow
def test_dials_scales_a_sweep(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    n = SWEEP.n_images

    def factor(frame, s):
        # A mean B would go into the intensities.
        b = 1 - 2 * frame / n
        return np.exp(0.3 * np.sin(2 * np.pi * frame / n) + b * s**2 / 2)

    draw(sweep, tmp_path, factor(sweep.frame, sweep.s), counts_per_pixel=20)
    files = ("extracted.expt", "extracted.refl")
    diffuse_export.run([*files, "format=dials", "dials.max_rows=5000"])
    columns, experiments = run_dials_scale(tmp_path, "diffuse.absorption.use=no")
    truth = factor(columns["xyzobs.px.value"][:, 2], 1 / columns["d"])
    check_scales(columns, experiments, truth, 0.01)
    page = Path("dials.scale.html").read_text()
    for name in ("diffuse_scale_0", "diffuse_decay_0"):
        assert f'"{name}"' in page


@pytest.mark.slow
def test_dials_scales_stills(stills, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    factor = np.linspace(0.6, 1.8, FEW_STILLS.n_images)
    draw(stills, tmp_path, factor[stills.experiment], counts_per_pixel=20)
    files = ("extracted.expt", "extracted.refl")
    diffuse_export.run([*files, "format=dials", "dials.max_rows=5000"])
    columns, experiments = run_dials_scale(tmp_path)
    check_scales(columns, experiments, factor[columns["id"]], 0.01)
