from __future__ import annotations

import pytest

from dials_diffuse.process.settings import (
    PROGRAMS,
    ProcessSettings,
    split_arguments,
)
from dials_diffuse.util.command import load_phil

PHIL = load_phil("process")


def settings_of(inputs, *args) -> ProcessSettings:
    interpreter = PHIL.command_line_argument_interpreter()
    sources = [interpreter.process_arg(arg) for arg in args]
    working, unused = PHIL.fetch(sources=sources, track_unused_definitions=True)
    assert not unused
    return ProcessSettings.from_phil(working.extract(), inputs)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.cbf", "a.expt", "b.expt", "my.phil"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()


@pytest.mark.parametrize("program", PROGRAMS)
def test_options_of_each_program(program, tmp_path):
    value = "output.log=1.log" if program == "import" else "filter.d_min=2"
    settings = settings_of(
        ["a.cbf"],
        f'{program}.options="{value} output.log=x.log"',
        f"{program}.options='output.log=\"a b.log\"'",
        f"{program}.phil=my.phil",
    )
    assert settings.options.pop(program) == (
        str(tmp_path / "my.phil"),
        value,
        "output.log=x.log",
        "output.log=a b.log",
    )
    assert set(settings.options.values()) == {()}


def test_options_without_quotes():
    """As a shell leaves them over from find_spots.options="a=1 b=2"."""
    settings = settings_of(["a.cbf"], "find_spots.options=gain=2 filter.d_min=3")
    assert settings.options["find_spots"] == ("gain=2", "filter.d_min=3")


def test_paths_are_absolute(tmp_path):
    settings = settings_of(
        ["a.cbf", "images"], "input.mask=my.phil", "input.reference_geometry=a.expt"
    )
    assert settings.files == (str(tmp_path / "a.cbf"), str(tmp_path / "images"))
    assert settings.mask == str(tmp_path / "my.phil")
    assert settings.reference_geometry == str(tmp_path / "a.expt")


@pytest.mark.parametrize("args", [["x_####.cbf"], []])
def test_templates(args, tmp_path):
    parameter = [] if args else ["input.template=x_####.cbf"]
    settings = settings_of(args, *parameter)
    assert settings.templates == (str(tmp_path / "x_####.cbf"),)
    assert settings.files == ()


def test_directory(tmp_path):
    settings = settings_of([], "input.directory=images")
    assert settings.files == (str(tmp_path / "images"),)


def test_symmetry():
    settings = settings_of(
        ["a.cbf"], "space_group=P 41", "unit_cell=48.4,48.4,63.4,90,90,90", "mp.nproc=3"
    )
    assert settings.space_group == "P41"
    assert settings.unit_cell == (48.4, 48.4, 63.4, 90, 90, 90)
    assert settings.nproc == 3


def test_integrate_is_a_switch_beside_the_options_of_the_program():
    settings = settings_of(["a.cbf"], "integrate=True", 'integrate.options="a=1"')
    assert settings.integrate is True
    assert settings.options["integrate"] == ("a=1",)


@pytest.mark.parametrize(
    "inputs, args, message",
    [
        ([], (), "Please give image files, a template, a folder, or an imported"),
        (["none.cbf"], (), "image none.cbf does not exist"),
        (["a.cbf", "a.expt"], (), "either image files and folders, or templates, or"),
        (["a.cbf", "x_#.cbf"], (), "either image files and folders, or templates, or"),
        (["a.expt", "b.expt"], (), "Please give one .expt, not 2"),
        (
            ["a.expt"],
            ("input.reference_geometry=b.expt",),
            "input.reference_geometry is for importing",
        ),
        (["a.expt"], ('import.options="output.log=1"',), "there is no dials.import"),
        (["a.cbf"], ("input.mask=no.mask",), "input.mask no.mask does not exist"),
        (["a.cbf"], ("index.phil=no.phil",), "index.phil no.phil does not exist"),
        (["a.cbf"], ('index.options="fft3d"',), "fft3d is no parameter"),
        (["a.cbf"], ('index.options="a=\'b"',), "index.options=a='b: No closing quot"),
        (["a.cbf"], ('import.options="x.y=1"',), "import.options: x.y=1: Unknown"),
        (["a.cbf"], ("mode=stills", "integrate=True"), "is for rotation data only"),
    ],
)
def test_errors(inputs, args, message):
    with pytest.raises(ValueError, match=message):
        settings_of(inputs, *args)


def test_split_arguments(tmp_path):
    (tmp_path / "x=1.cbf").touch()
    images = ["a.cbf", "images", "x_####.cbf", "a.expt", "x=1.cbf", "none.cbf"]
    rest = ["-v", "mode=stills", "my.phil", "index.options=a=1"]
    assert split_arguments([*rest[:2], *images, *rest[2:]]) == (images, rest)
