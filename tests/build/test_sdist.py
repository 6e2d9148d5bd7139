"""The source archive holds all that a build needs, and nothing that a build makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folders of the repository, all of whose sources belong into the archive.
SOURCE_FOLDERS = ("dials_diffuse", "command_line", "phil", "libscitbx_ext", "tests")
SOURCE_SUFFIXES = {".py", ".pyi", ".phil", ".h", ".cc", ".html", ".css", ".js"}
BUILD_FILES = (
    "LICENSE MANIFEST.in Makefile SConscript SConstruct libtbx_config "
    "libtbx_refresh.py project_metadata.py pyproject.toml setup.py standalone_env.py"
).split()


def not_of_the_checkout(folder, names):
    """Names in a folder of the repository that a fresh checkout does not have."""
    patterns = ["*.so", "*.egg-info", "__pycache__", ".git", ".*_cache"]
    if Path(folder) == ROOT:
        patterns += ["build", "dist"]
    return shutil.ignore_patterns(*patterns)(folder, names)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source archive of a copy of this checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "checkout", ignore=not_of_the_checkout)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(folder)],
        cwd=folder / "checkout",
        check=True,
    )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def imported_extension(folder: Path, cwd: Path) -> Path:
    """The extension that a new interpreter imports with a folder on its path."""
    result = subprocess.run(
        [sys.executable, "-c", "import dials_diffuse_ext as e; print(e.__file__)"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=cwd,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Path(result.stdout.strip())


def test_sdist_is_complete(sdist):
    expected = {Path(name) for name in BUILD_FILES}
    for folder in SOURCE_FOLDERS:
        expected |= {
            path.relative_to(ROOT)
            for path in (ROOT / folder).rglob("*")
            if path.suffix in SOURCE_SUFFIXES
        }
    assert not [str(path) for path in sorted(expected) if not (sdist / path).exists()]


def test_sdist_holds_nothing_built(sdist):
    built = {".so", ".os", ".o", ".pyc"}
    assert not [str(path) for path in sdist.rglob("*") if path.suffix in built]


@pytest.mark.slow
def test_sdist_installs(sdist, tmp_path):
    target = tmp_path / "target"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps"]
        + ["--no-build-isolation", f"--target={target}", str(sdist)],
        check=True,
    )
    assert imported_extension(target, tmp_path).parent == target
    commands = (ROOT / "command_line").glob("diffuse_*.py")
    scripts = (target / "bin").glob("dials.diffuse_*")
    assert {p.name for p in scripts} == {f"dials.{p.stem}" for p in commands}


@pytest.mark.slow
def test_plain_scons_builds(sdist, tmp_path):
    """The SConscript by itself, without pip: the extension imports."""
    shutil.copytree(sdist, tmp_path / "checkout")
    scons = shutil.which("scons")
    if scons is None:
        pytest.skip("scons is not on PATH")
    subprocess.run(
        [scons, "-Q", f"python={sys.executable}"],
        cwd=tmp_path / "checkout",
        check=True,
        stdout=subprocess.DEVNULL,
    )
    library = tmp_path / "checkout" / "build" / "lib"
    (extension,) = library.glob("dials_diffuse_ext*.so")
    assert imported_extension(library, tmp_path) == extension


@pytest.mark.slow
def test_libtbx_builds(sdist, tmp_path):
    """As a module of a libtbx build: the dispatcher comes out and runs."""
    if shutil.which("libtbx.configure") is None:
        pytest.skip("libtbx.configure is not on PATH")
    shutil.copytree(sdist, tmp_path / "modules" / "dials_diffuse")
    build = tmp_path / "build"
    build.mkdir()
    # the programs of the system, not of the virtual environment of these tests
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    for command in (["libtbx.configure", "dials_diffuse"], ["libtbx.scons", "-j2"]):
        subprocess.run(
            command, cwd=build, env=environment, check=True, capture_output=True
        )
    result = subprocess.run(
        [build / "bin" / "dials.diffuse_extract", "-h"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "voxels of reciprocal space" in result.stdout
