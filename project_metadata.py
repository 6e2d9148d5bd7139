"""What setup.py and libtbx_refresh.py both tell the outside: version and entry points.

Nothing is imported from the package, which cannot be imported before it is built.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent

_VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)

# What DIALS finds through entry points, by the group in which it looks.
PLUGINS: dict[str, list[str]] = {
    "dxtbx.scaling_model_ext": [
        "diffuse = dials_diffuse.scaling.model:DiffuseScalingModel",
    ],
}


def version():
    """The version, which stands in dials_diffuse/__init__.py and nowhere else."""
    return _VERSION.search((ROOT / "dials_diffuse" / "__init__.py").read_text())[1]


def commands():
    """Name of each command and of its module, one for each command_line/diffuse_*.py.

    Raises:
        ValueError: If line 1 of such a file does not tell libtbx the same name.
    """
    found = {}
    for path in sorted((ROOT / "command_line").glob("diffuse_*.py")):
        command = f"dials.{path.stem}"
        expected = f"# LIBTBX_SET_DISPATCHER_NAME {command}"
        with path.open(encoding="utf-8") as source:
            line = source.readline().rstrip()
        if line != expected:
            raise ValueError(f"{path}: line 1 is {line!r}; it must be {expected!r}")
        found[command] = path.stem
    return found


def entry_points():
    """Entry points of an installed package: scripts, libtbx dispatchers and plug-ins."""
    return {
        "console_scripts": [
            f"{command} = dials_diffuse.command_line.{module}:run"
            for command, module in commands().items()
        ],
        # Asks libtbx.refresh to wrap the installed scripts into dispatchers.
        "libtbx.dispatcher.script": [
            f"{command} = {command}" for command in commands()
        ],
        **PLUGINS,
    }
