"""SCons environment for an installed cctbx, as libtbx would export it in its own build.

``libtbx.scons`` in a developer build hands env_etc (where things are) and
env_no_includes_boost_python_ext (how to compile) to every SConscript. An installed cctbx
(Debian, conda) has no such build. Here the interpreter that will import the extension is
asked where it finds scitbx, and the two objects are made from its answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

# Run by the target interpreter. Packages are located without being imported, since
# libtbx prints and checks things on import.
_PROBE = """
import importlib.util, json, os, sys, sysconfig
spec = importlib.util.find_spec("scitbx")
print(json.dumps({
    "include": sysconfig.get_path("include"),
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "libdir": sysconfig.get_config_var("LIBDIR"),
    "multiarch": sysconfig.get_config_var("MULTIARCH") or "",
    "prefixes": [sys.prefix, sys.base_prefix],
    "tag": sys.implementation.cache_tag,
    "version": "%d%d" % sys.version_info[:2],
    "packages": os.path.dirname(os.path.dirname(spec.origin)) if spec else None,
}))
"""

# Paths that every compiler and linker searches by itself.
_SYSTEM_INCLUDE = "/usr/include"
_SYSTEM_LIB = "/usr/lib"


def make(Environment, arguments):
    """Returns env_etc and env_no_includes_boost_python_ext.

    Args:
        Environment: SCons' class of that name, which only SConscripts can see.
        arguments: SCons' ARGUMENTS, of which ``python`` is used here.
    """
    python = _probe(arguments.get("python", sys.executable))
    prefixes = python["prefixes"]
    include_roots = _existing(
        [os.path.join(prefix, "include") for prefix in prefixes]
        + [python["packages"], _SYSTEM_INCLUDE]
    )
    lib_dirs = _existing(
        [os.path.join(prefix, "lib") for prefix in prefixes]
        + [os.path.join(prefix, "lib", python["multiarch"]) for prefix in prefixes]
        + [python["libdir"]]
    )

    env_etc = SimpleNamespace(
        compiler="darwin_c++" if sys.platform == "darwin" else "unix_gcc",
        no_boost_python=False,
        python_tag=python["tag"],
        include_registry=SimpleNamespace(append=_append_include_paths),
        enable_more_warnings=lambda env: env.AppendUnique(CCFLAGS=["-Wall"]),
        python_include=python["include"],
        scitbx_include=_root_of("scitbx/array_family/flex_types.h", include_roots),
        boost_adaptbx_include=_root_of(
            "boost_adaptbx/optional_conversions.h", include_roots
        ),
        boost_include=_root_of("boost/python.hpp", include_roots),
        # conda keeps headers that cctbx generates apart from those that it copies
        conda_cpppath=include_roots,
    )
    return env_etc, _environment(Environment, python, lib_dirs)


def _probe(executable):
    """What the interpreter says of itself, free of the PYTHON* variables of pip."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    probe = subprocess.run(
        [executable, "-c", _PROBE],
        stdout=subprocess.PIPE,
        universal_newlines=True,
        check=True,
        env=environ,
    )
    return json.loads(probe.stdout.splitlines()[-1])


def _existing(directories):
    """The directories that exist, each once, in order."""
    return list(dict.fromkeys(d for d in directories if d and os.path.isdir(d)))


def _append_include_paths(env, paths):
    env.AppendUnique(CPPPATH=[p for p in paths if p != _SYSTEM_INCLUDE])


def _root_of(header, roots):
    """The first of the roots that holds this header."""
    for root in roots:
        if os.path.isfile(os.path.join(root, header)):
            return root
    sys.exit(
        f"{header} not found in {', '.join(roots)}: install the headers of cctbx and "
        "Boost (Debian: libcctbx-dev), or name another interpreter by python=..."
    )


def _boost_python_library(version, lib_dirs):
    """Folder and name of Boost.Python for this interpreter, e.g. boost_python311."""
    names = ["boost_python" + version, "boost_python"]
    for name in names:
        for directory in lib_dirs:
            for suffix in (".so", ".dylib"):
                if os.path.exists(os.path.join(directory, f"lib{name}{suffix}")):
                    return directory, name
    sys.exit(f"no library {' or '.join(names)} in {', '.join(lib_dirs)}")


def _flags(variable):
    return os.environ.get(variable, "").split()


def _environment(Environment, python, lib_dirs):
    """The SCons environment that builds a Boost.Python extension module."""
    lib_dir, boost_python = _boost_python_library(python["version"], lib_dirs)
    env = Environment(ENV=os.environ, tools=["cc", "g++", "gnulink", "ar"])
    if sys.platform == "darwin":
        env.Replace(SHLINKFLAGS=["-bundle", "-undefined", "dynamic_lookup"])
    if os.environ.get("CC"):
        env.Replace(CC=os.environ["CC"], SHCC=os.environ["CC"])
    if os.environ.get("CXX"):
        env.Replace(**dict.fromkeys(("CXX", "SHCXX", "SHLINK"), os.environ["CXX"]))
    env.Append(
        CCFLAGS=["-fPIC", "-fno-strict-aliasing", "-DNDEBUG"],
        # BOOST_PYTHON_MAX_BASES: as cctbx was built, for one layout of its classes
        CPPDEFINES=[
            "BOOST_ALL_NO_LIB",
            "BOOST_BIND_GLOBAL_PLACEHOLDERS",
            "BOOST_ALLOW_DEPRECATED_HEADERS",
            ("BOOST_PYTHON_MAX_BASES", "2"),
        ],
        LIBPATH=[d for d in lib_dirs if d != _SYSTEM_LIB],
        LIBS=[boost_python, "m"],
    )
    env.Append(
        CXXFLAGS=_flags("CPPFLAGS") + _flags("CXXFLAGS"), SHLINKFLAGS=_flags("LDFLAGS")
    )
    env.Replace(SHLIBPREFIX="", SHLIBSUFFIX=python["suffix"])
    if sys.platform != "darwin" and not lib_dir.startswith(_SYSTEM_LIB):
        env.Append(RPATH=[lib_dir])  # the loader searches a conda prefix only if told
    return env
