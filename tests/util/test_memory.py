"""Free memory is given back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dials_diffuse.util.memory import giving_back

# Small pieces between arrays below the size that the C library maps by itself.
FRAGMENTS = """
import ctypes, re, sys
import numpy as np
from dials_diffuse.util.memory import give_back

def resident():
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * 4096

ctypes.CDLL(None).mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: no array is mapped
pairs = [(np.ones(100_000), np.ones(1000)) for _ in range(200)]
pairs = [small for _, small in pairs]
before = resident()
if sys.argv[1] == "give":
    give_back()
print(before - resident())
"""


def test_all_slabs_come_in_order():
    slabs = [3, 1, 2]
    assert list(giving_back(slabs)) == slabs
    assert list(giving_back([])) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
@pytest.mark.parametrize("give", [False, True])
def test_memory_between_small_pieces_is_given_back(give):
    result = subprocess.run(
        [sys.executable, "-c", FRAGMENTS, "give" if give else "keep"],
        capture_output=True,
        text=True,
        check=True,
    )
    freed = int(result.stdout)
    assert (freed > 100e6) == give
