"""Free memory is given back to the system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from dials_diffuse.util import memory
from dials_diffuse.util.memory import SLABS_TOGETHER, giving_back

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.maxsize < 2**32,
    reason="needs glibc of 64 bits",
)

# Small pieces between arrays that are freed, then: how much memory is still held.
FRAGMENTS = """
import re, sys
import numpy as np
from dials_diffuse.util.memory import give_back, return_large_arrays

def resident():
    with open("/proc/self/smaps_rollup") as handle:
        return int(re.search(r"Rss: *(\\d+)", handle.read())[1]) * 1024

def leave_pieces(size):
    pairs = [(np.ones(size), np.ones(1000)) for _ in range(100)]
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
    # What was set for another allocator, or for this one, would hold here too.
    unset = ("LD_PRELOAD", "GLIBC_TUNABLES")
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in unset and not name.startswith("MALLOC_")
    }
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=env
    )
    return int(result.stdout) / (100 * 8 * int(arguments[0]))


def test_all_slabs_come_in_order():
    slabs = [3, 1, 2]
    assert list(giving_back(slabs)) == slabs
    assert list(giving_back([])) == []


def test_memory_is_given_back_after_some_slabs_and_the_last(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "give_back", lambda: given.append(seen[-1]))
    seen = [0]
    for slab in giving_back(range(1, 2 * SLABS_TOGETHER + 2)):
        seen.append(slab)
    assert given == [SLABS_TOGETHER, 2 * SLABS_TOGETHER, 2 * SLABS_TOGETHER + 1]


@glibc
@pytest.mark.parametrize("size", [LARGE, SMALL])
def test_memory_between_small_pieces_is_given_back(size):
    assert held(str(size)) > 0.8
    assert held(str(size), "give") < 0.2


@glibc
def test_large_arrays_are_returned_as_soon_as_they_are_freed():
    """Control: small ones are not."""
    assert held(str(LARGE), "map") < 0.1
    assert held(str(SMALL), "map") > 0.8
