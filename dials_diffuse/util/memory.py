"""Memory that is free, but not yet the system's again.

The C library of Linux (glibc) keeps the memory of arrays up to 32 MiB that are freed, once
it has seen such arrays freed. What is allocated between them and stays leaves it in
pieces: slab by slab a little more would be held. Elsewhere nothing of this is done.

The pixel loop wants the opposite, images that use the same memory over and over
(``ext.keep_freed_memory``): what is called last holds for the rest of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Iterable, Iterator, TypeVar

Item = TypeVar("Item")

# Most columns of a slab of one table, and all of the refinement, are larger. Were it less,
# getting them anew would take time.
LARGE = 1 << 20  # bytes
# Smaller pieces, of the columns of many tables for example, are given back after so many.
SLABS_TOGETHER = 8
KEPT = 16 << 20  # bytes that are free at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def return_large_arrays() -> None:
    """From now on large arrays are the system's again as soon as they are freed."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def give_back() -> None:
    """Return free memory to the system, whatever the size of its pieces."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def giving_back(slabs: Iterable[Item]) -> Iterator[Item]:
    """The same slabs; free memory is given back after some of them and the last."""
    for number, slab in enumerate(slabs, 1):
        yield slab
        if number % SLABS_TOGETHER == 0:
            give_back()
    give_back()
