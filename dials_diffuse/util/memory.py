"""Memory that is free, but not yet the system's again.

The C library of Linux (glibc) keeps the memory of arrays below 32 MiB that are freed, once
it has seen such arrays freed. What is allocated between them and stays leaves it in
pieces: slab by slab a little more would be held. Elsewhere nothing of this is done.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Iterable, Iterator, TypeVar

Item = TypeVar("Item")

# Columns of floats of a slab are larger. Were it less, getting it anew would take time.
LARGE = 1 << 20  # bytes
KEPT = 16 << 20  # bytes that are free at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def return_large_arrays() -> None:
    """From now on large arrays are the system's again as soon as they are freed.

    This holds for the rest of the process.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Return free memory to the system, whatever the size of its pieces."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def giving_back(slabs: Iterable[Item]) -> Iterator[Item]:
    """The same slabs; free memory is given back after the last."""
    yield from slabs
    give_back()
