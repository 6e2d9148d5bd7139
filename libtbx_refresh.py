from __future__ import annotations

import sys

import libtbx.load_env
import libtbx.pkg_utils

# libtbx itself puts this folder on the path of every dispatcher, which makes the package
# importable, and makes the dispatchers from command_line/. What is left are the plug-ins.
# libtbx executes this file without a __file__, hence dist_path.
sys.path.insert(0, libtbx.env.dist_path("dials_diffuse"))
import project_metadata  # noqa: E402

print("dials_diffuse", project_metadata.version())
if project_metadata.PLUGINS:
    libtbx.pkg_utils.define_entry_points(project_metadata.PLUGINS)
