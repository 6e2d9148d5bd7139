"""The compiled extension module."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

import pytest


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_extension_uses_no_openmp():
    """cctbx's stubs of libgomp would make every thread run the whole of a loop."""
    path = importlib.util.find_spec("dials_diffuse_ext").origin
    listing = subprocess.run(
        ["nm", "--dynamic", path], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert "PyInit_dials_diffuse_ext" in symbols
    assert not [s for s in symbols if s.startswith(("omp_", "GOMP_", "__kmpc_"))]
