from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # a PEP 517 build does not look beside setup.py

import project_metadata  # noqa: E402


def scons_environment():
    """The environment without the PYTHON* variables by which pip isolates a build.

    scons and the interpreter that it asks for scitbx must see what is installed.
    """
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def scons_command():
    """The scons to run: $SCONS, a module of this interpreter, or the one on PATH."""
    if os.environ.get("SCONS"):
        return os.environ["SCONS"].split()
    probe = subprocess.run(
        [sys.executable, "-c", "import SCons.Script"],
        env=scons_environment(),
        stderr=subprocess.DEVNULL,
    )
    if probe.returncode == 0:
        return [sys.executable, "-m", "SCons"]
    if shutil.which("scons"):
        return [shutil.which("scons")]
    raise SystemExit("scons not found: install it with apt, conda or pip")


class SConsBuildExt(build_ext):
    """Builds the extension by the SConstruct, so that one file describes it."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *scons_command(),
            f"--directory={HERE}",
            "-Q",
            f"-j{self.parallel or os.cpu_count() or 1}",
            f"python={sys.executable}",
            f"libdir={target.parent}",
            str(target),
        ]
        subprocess.run(command, check=True, env=scons_environment())


setup(
    name="dials-diffuse",
    version=project_metadata.version(),
    description="Merged 3-D diffuse scattering maps from diffraction images, with DIALS",
    author="dials_diffuse developers",
    license="BSD-3-Clause",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Physics",
    ],
    python_requires=">=3.9",
    # DIALS, dxtbx and cctbx are needed but not listed: no index has them for pip, and
    # the metadata of Debian's packages bears a version that no requirement accepts.
    install_requires=[],
    extras_require={"test": ["pytest"]},
    package_dir={
        "dials_diffuse": "dials_diffuse",
        "dials_diffuse.command_line": "command_line",
        "dials_diffuse.phil": "phil",
    },
    packages=[
        "dials_diffuse",
        *(f"dials_diffuse.{name}" for name in find_packages(HERE / "dials_diffuse")),
        "dials_diffuse.command_line",
        "dials_diffuse.phil",
    ],
    package_data={"": ["*.phil", "*.html", "*.css", "*.js", "templates/*"]},
    ext_modules=[
        Extension(
            "dials_diffuse_ext",
            sources=sorted(
                str(path.relative_to(HERE))
                for path in HERE.glob("libscitbx_ext/boost_python/*.cc")
            ),
        )
    ],
    cmdclass={"build_ext": SConsBuildExt},
    entry_points=project_metadata.entry_points(),
)
