"""Memory that is free, but not yet the system's again."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Iterable, Iterator, TypeVar

Item = TypeVar("Item")


def give_back() -> None:
    """Return free memory to the system, as far as the C library can (glibc does).

    What is allocated between large arrays keeps them from being returned when they are
    freed: slab by slab a little more memory would be held.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def giving_back(slabs: Iterable[Item]) -> Iterator[Item]:
    """The same slabs; free memory is given back after each of them."""
    for slab in slabs:
        yield slab
        give_back()
