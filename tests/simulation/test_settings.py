from __future__ import annotations

import dataclasses
import shlex

import pytest

from dials_diffuse.simulation.settings import PRESETS, SimulationSettings
from dials_diffuse.util.command import load_phil


def settings(text: str = "") -> SimulationSettings:
    scope = load_phil("simulate")
    interpreter = scope.command_line_argument_interpreter()
    arguments = [interpreter.process_arg(arg) for arg in shlex.split(text)]
    return SimulationSettings.from_phil(scope.fetch(sources=arguments).extract())


def test_defaults_of_the_parameters_are_those_of_the_classes():
    found = settings("mp.nproc=1")
    assert found == SimulationSettings()
    for field in dataclasses.fields(found):
        assert getattr(found, field.name) == field.default, field.name


def test_every_parameter_is_read():
    found = settings(
        "mode=stills crystal.space_group='C 1 2 1' grid.ndiv=3 noise=none seed=5 "
        "detector.size=100,120 bragg.sigma=0.002 beam.polarization_normal=1,0,0"
    )
    assert found.is_stills and found.noise == "none" and found.seed == 5
    assert found.grid.ndiv == (3, 3, 3)
    assert found.detector.size == (100, 120)
    assert found.detector.pixel == PRESETS["pilatus300k"].pixel
    assert found.bragg.sigma == 0.002
    assert found.beam.polarization_normal == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("beam.flux=-1", "beam.flux=-1 must be positive"),
        ("detector.distance=-100", "behind the source"),
        ("detector.distance=0", "=0 puts the detector into the sample.*be positive"),
        ("scan.width=0", "scan.width=0 must be positive for rotation data.*stills"),
        ("bragg.sigma=0", "bragg.on=False"),
        ("detector.preset=given", "needs detector.size and detector.pixel"),
        ("detector.modules=400,1 detector.gap=10,0", "do not fit into 487 pixels"),
        ("goniometer.axis=0,0,0", "axis=0, 0, 0 has no direction"),
        ("goniometer.axis=1e200,0,0", r"axis=1e\+200, 0, 0 has no direction"),
        ("beam.polarization_normal=0,0,0", "normal=0, 0, 0 has no direction"),
        ("beam.polarization_normal=0,1e-9,1e-7", "perpendicular to the beam"),
        ("beam.polarization_normal=0,0,1", "perpendicular to the beam"),
        ("goniometer.axis=None", "goniometer.axis=None: a value must be given"),
        ("detector.panels=None", "detector.panels=None: a value must be given"),
        ("bragg.on=None", "bragg.on=None: a value must be given"),
        # cctbx makes the missing edge 1 Å
        (
            "crystal.unit_cell=30,40",
            "30, 40, 1, .* has an edge below 2 Å: give a, b, c",
        ),
        ("crystal.unit_cell=nan,40,50,90,90,90", "unit_cell=nan, 40.* must be finite"),
        ("detector.panels=900,900", "panels=900, 900 make .* at most 100000000"),
        ("grid.ndiv=2,3", "grid.ndiv takes one number or three"),
    ],
)
def test_impossible_values_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        settings(text)


SIZES = {
    f"{scope.name}.{item.name}": getattr(item.type, "size_max", None) or 1
    for scope in load_phil("simulate").objects
    if scope.is_scope
    for item in scope.objects
    if item.type.phil_type in ("float", "floats")
}


@pytest.mark.parametrize("name", SIZES)
def test_numbers_must_be_finite(name):
    """nan passes the limits of PHIL, infinity those that it has not got."""
    assert len(SIZES) > 30
    rest = ",1" * (SIZES[name] - 1)
    with pytest.raises(ValueError, match=f"^{name}=nan.* must be finite"):
        settings(f"{name}=nan{rest}")
    for value in ("inf", "-inf"):
        with pytest.raises((ValueError, RuntimeError), match=name):
            settings(f"{name}={value}{rest}")


def test_stills_need_no_rotation():
    assert settings("mode=stills scan.width=0").scan.width == 0
