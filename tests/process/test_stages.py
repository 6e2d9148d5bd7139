from __future__ import annotations

import importlib

import pytest
from simulate_images import cbf_models, make_beam, make_crystal, make_goniometer

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.process.settings import PROGRAMS, ProcessSettings
from dials_diffuse.process.stages import (
    Stage,
    import_stages,
    rotation_stages,
    run_stages,
    shared_models,
    stills_stages,
)

MODULES = {"dials.import": "dials_import"}


def settings(**changes) -> ProcessSettings:
    values = {
        "files": ("/data/a_1.cbf",),
        "mask": "/data/pixels.mask",
        "space_group": "P41",
        "unit_cell": (48.45, 48.45, 63.4, 90, 90, 90),
        "integrate": True,
        "nproc": 3,
    }
    return ProcessSettings(**{**values, **changes})


def write_experiments(path, wavelengths=(1.0,), distances=(0,), goniometer=False):
    """Experiments with these wavelengths and shifts of the detector."""
    experiments = ExperimentList()
    for i, (wavelength, shift) in enumerate(zip(wavelengths, distances)):
        detector, _ = cbf_models()
        if shift:
            frame = detector[0].get_origin()
            detector[0].set_frame(
                detector[0].get_fast_axis(),
                detector[0].get_slow_axis(),
                (frame[0] + shift, *frame[1:]),
            )
        experiments.append(
            Experiment(
                identifier=str(i),
                beam=make_beam(wavelength),
                detector=detector,
                goniometer=make_goniometer() if goniometer else None,
                crystal=make_crystal(),
            )
        )
    experiments.as_file(str(path))
    return str(path)


def all_stages(tmp_path, monkeypatch, **changes) -> list[Stage]:
    monkeypatch.chdir(tmp_path)
    write_experiments(tmp_path / "imported.expt")
    chosen = settings(**changes)
    return [
        *import_stages(chosen, "rotation"),
        *rotation_stages(chosen),
        *import_stages(chosen, "stills"),
        *stills_stages(chosen),
    ]


def test_dials_knows_our_parameters(tmp_path, monkeypatch):
    """Each parameter that we set is one of the program it is given to."""
    n_parameters = 0
    for stage in all_stages(tmp_path, monkeypatch):
        name = MODULES.get(stage.name, stage.name[len("dials.") :])
        module = importlib.import_module(f"dials.command_line.{name}")
        paths = {item.path for item in module.phil_scope.all_definitions()}
        for argument in stage.arguments():
            if "=" in argument and not argument.startswith("template="):
                path = argument.split("=")[0]
                assert any(
                    known == path or known.endswith(f".{path}") for known in paths
                )
                n_parameters += 1
    assert n_parameters > 20


def test_options_of_the_user_come_last(tmp_path, monkeypatch):
    options = {name: (f"/{name}.phil", f"{name}=1") for name in PROGRAMS}
    stages = all_stages(tmp_path, monkeypatch, options=options)
    seen = set()
    for stage in stages:
        name = stage.name[len("dials.") :]
        assert tuple(stage.arguments()[-2:]) == options[name]
        seen.add(name)
    assert seen == set(PROGRAMS)


def test_known_symmetry_and_mask_are_passed_on(tmp_path, monkeypatch):
    stages = {s.name: s.arguments() for s in all_stages(tmp_path, monkeypatch)}
    for name in ("dials.index", "dials.stills_process"):
        assert "indexing.known_symmetry.space_group=P41" in stages[name]
        cell = "indexing.known_symmetry.unit_cell=48.45,48.45,63.4,90,90,90"
        assert cell in stages[name]
    for name in ("dials.find_spots", "dials.stills_process"):
        assert "spotfinder.lookup.mask=/data/pixels.mask" in stages[name]


def test_unknown_symmetry(tmp_path, monkeypatch):
    changes = {"space_group": None, "unit_cell": None, "mask": None}
    for stage in all_stages(tmp_path, monkeypatch, **changes):
        text = " ".join(stage.arguments())
        assert "known_symmetry" not in text
        assert "mask" not in text


def test_integration_is_optional():
    names = [s.name for s in rotation_stages(settings(integrate=False))]
    assert names == ["dials.find_spots", "dials.index", "dials.refine"]


def test_templates_and_imported_experiments():
    template = settings(files=(), templates=("/data/a_####.cbf",))
    (stage,) = import_stages(template, "rotation")
    assert stage.arguments() == ["template=/data/a_####.cbf"]
    imported = settings(files=(), experiments="/data/imported.expt")
    assert import_stages(imported, "rotation") == []
    assert rotation_stages(imported)[0].arguments()[0] == "/data/imported.expt"
    assert stills_stages(imported)[0].arguments()[0] == "/data/imported.expt"


@pytest.mark.parametrize("has_goniometer", [False, True])
def test_reference_geometry(tmp_path, has_goniometer):
    """A reference without a goniometer does not take that of rotation data away."""
    path = write_experiments(tmp_path / "ref.expt", goniometer=has_goniometer)
    chosen = settings(reference_geometry=path)
    (stage,) = import_stages(chosen, "rotation")
    assert f"input.reference_geometry={path}" in stage.arguments()
    without = "input.use_gonio_reference=False" in stage.arguments()
    assert without == (not has_goniometer)
    (stage,) = import_stages(chosen, "stills")
    assert "geometry.convert_sequences_to_stills=True" in stage.arguments()


def test_damaged_reference_geometry(tmp_path):
    path = tmp_path / "ref.expt"
    path.write_text("{")
    with pytest.raises(ValueError, match="Cannot read the geometry .*ref.expt"):
        import_stages(settings(reference_geometry=str(path)), "rotation")


@pytest.mark.parametrize(
    "wavelengths, distances, expected",
    [
        ((1.0, 1.0), (0, 0), ["detector", "beam"]),
        ((1.0, 1.01), (0, 0), ["detector"]),
        ((1.0, 1.0), (0, 2), ["beam"]),
    ],
)
def test_models_are_shared_if_they_are_alike(
    tmp_path, wavelengths, distances, expected
):
    path = write_experiments(tmp_path / "a.expt", wavelengths, distances)
    assert shared_models(path) == [
        f"reference_from_experiment.{name}=0" for name in expected
    ]


def test_a_failed_stage_is_the_last(tmp_path):
    done = []

    def work(name, arguments, log, outputs):
        done.append((name, arguments))
        if name == "bad":
            raise ValueError("bad failed")

    stages = [
        Stage(name, lambda name=name: [f"of {name}"], (), "a.log", work)
        for name in ("good", "bad", "never")
    ]
    results = []
    with pytest.raises(ValueError, match="bad failed"):
        run_stages(stages, results)
    assert done == [("good", ["of good"]), ("bad", ["of bad"])]
    assert [(r.name, r.state) for r in results] == [("good", "done"), ("bad", "failed")]
    assert results[0].command == "good 'of good'"
