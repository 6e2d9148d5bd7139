"""Free memory is given back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dials_diffuse.util.memory import giving_back

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")

# Small pieces between arrays that are freed, then: how much memory is still held.
FRAGMENTS = """
import sys
import numpy as np
from dials_diffuse.util.memory import give_back, return_large_arrays

def resident():
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * 4096

def leave_pieces(size):
    pairs = [(np.ones(size), np.ones(1000)) for _ in range(400)]
    return [small for _, small in pairs]

large = np.ones(3_000_000)
del large  # from now on arrays up to its size are not mapped
if "map" in sys.argv:
    return_large_arrays()
before = resident()
pieces = leave_pieces(int(sys.argv[1]))
if "give" in sys.argv:
    give_back()
print(resident() - before)
"""
LARGE, SMALL = 250_000, 25_000  # floats


def held(*arguments: str) -> float:
    """Share of the memory of freed arrays that is still held, in a process of its own."""
    command = [sys.executable, "-c", FRAGMENTS, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout) / (400 * 8 * int(arguments[0]))


def test_all_slabs_come_in_order():
    slabs = [3, 1, 2]
    assert list(giving_back(slabs)) == slabs
    assert list(giving_back([])) == []


@linux
@pytest.mark.parametrize("size", [LARGE, SMALL])
def test_memory_between_small_pieces_is_given_back(size):
    assert held(str(size)) > 0.8
    assert held(str(size), "give") < 0.2


@linux
def test_large_arrays_are_returned_as_soon_as_they_are_freed():
    """Control: small ones are not."""
    assert held(str(LARGE), "map") < 0.1
    assert held(str(SMALL), "map") > 0.8
