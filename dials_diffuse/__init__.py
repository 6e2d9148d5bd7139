"""Merged three-dimensional diffuse scattering maps from diffraction images.

A plug-in to DIALS. Images of a crystal, true stills or rotation, are indexed and
refined by DIALS; every stage from the masks to the map on an absolute scale is then one
``dials.diffuse_*`` command, whose algorithm lives in the subpackage of that name.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# Installed, the subpackages command_line and phil lie in this folder. In a source tree
# that is merely on PYTHONPATH (a libtbx build, plain scons) they lie beside it.
_source_tree = Path(__file__).resolve().parent.parent
if (_source_tree / "SConscript").is_file():
    __path__.append(str(_source_tree))
