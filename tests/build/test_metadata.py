"""What an installation promises: version, commands and plug-ins."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

import dials_diffuse

ROOT = Path(__file__).resolve().parents[2]


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def metadata():
    return load_module(ROOT / "project_metadata.py")


@pytest.fixture(scope="module")
def installed():
    try:
        return importlib.metadata.distribution("dials-diffuse")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("dials_diffuse is on the path but not installed by pip")


def test_version_has_one_source(metadata, installed):
    assert metadata.version() == dials_diffuse.__version__
    assert installed.version == dials_diffuse.__version__
    for name in ("setup.py", "pyproject.toml", "project_metadata.py", "libtbx_config"):
        assert dials_diffuse.__version__ not in (ROOT / name).read_text()


def test_every_command_file_is_a_declared_command(metadata):
    files = {path.stem for path in (ROOT / "command_line").glob("diffuse_*.py")}
    assert files
    assert metadata.commands() == {f"dials.{stem}": stem for stem in files}


@pytest.mark.parametrize("group", ["console_scripts", "libtbx.dispatcher.script"])
def test_installed_entry_points_are_the_commands(metadata, installed, group):
    names = {entry.name for entry in installed.entry_points if entry.group == group}
    assert names == set(metadata.commands())


def test_every_entry_point_loads(installed):
    for entry in installed.entry_points:
        if entry.group != "libtbx.dispatcher.script":  # names of scripts, not objects
            assert callable(entry.load()), entry


@pytest.mark.parametrize(
    "line", ['"""No such line."""', "# LIBTBX_SET_DISPATCHER_NAME dials.diffuse_y"]
)
def test_wrong_dispatcher_name_is_refused(metadata, tmp_path, monkeypatch, line):
    monkeypatch.setattr(metadata, "ROOT", tmp_path)
    (tmp_path / "command_line").mkdir()
    (tmp_path / "command_line" / "diffuse_x.py").write_text(line + "\n")
    with pytest.raises(ValueError, match="must be '# LIBTBX_.* dials.diffuse_x'"):
        metadata.commands()


def test_commands_run_as_scripts(metadata):
    """A libtbx dispatcher executes the file instead of calling run()."""
    for stem in metadata.commands().values():
        source = (ROOT / "command_line" / f"{stem}.py").read_text()
        assert 'if __name__ == "__main__":\n    run()\n' in source, stem


def test_presets_are_package_data():
    folder = Path(importlib.import_module("dials_diffuse.phil").__file__).parent
    expected = {path.name for path in (ROOT / "phil").glob("*.phil")}
    assert {path.name for path in folder.glob("*.phil")} == expected
