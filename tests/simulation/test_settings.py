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
        ("detector.distance=0", "must be positive"),
        ("scan.width=0", "scan.width=0 must be positive for rotation data.*stills"),
        ("bragg.sigma=0", "bragg.on=False"),
        ("detector.preset=given", "needs detector.size and detector.pixel"),
        ("detector.modules=400,1 detector.gap=10,0", "do not fit into 487 pixels"),
        ("goniometer.axis=0,0,0", "zero length"),
        ("beam.polarization_normal=0,0,1", "perpendicular to the beam"),
        ("crystal.space_group='P 5'", "P 5 is not the symbol of a space group"),
        (
            "crystal.space_group='P 41' crystal.unit_cell=30,31,40,90,90,90",
            "30, 31, 40, 90, 90, 90 does not have the symmetry of the space group P 41",
        ),
        ("grid.ndiv=2,3", "grid.ndiv takes one number or three"),
    ],
)
def test_impossible_values_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        settings(text)


def test_stills_need_no_rotation():
    assert settings("mode=stills scan.width=0").scan.width == 0
