"""Signals kept away from code that does not bear an exception at any place.

Python runs the handlers of signals between any two steps, and ours raise: a lock may stay
locked, an object half made, a file without owner.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any, Callable, ContextManager, Iterator, TypeVar

from dials.util import progress

Entered = TypeVar("Entered")


class DeferredSignals:
    """Within it SIGINT and SIGTERM take effect in ``check`` and at the end only.

    Signals whose handler is not a Python function stay as they are.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._noted: list[int] = []
        self._handlers: dict[int, Callable[[int, Any], Any]] = {}

    def _note(self, number: int, _: Any) -> None:
        if os.getpid() == self._owner:
            self._noted.append(number)
        elif number == signal.SIGTERM:  # a new process, not yet told what to do
            os._exit(128 + number)

    def check(self) -> None:
        """Let the first signal that has come take effect."""
        if self._noted:
            number = self._noted.pop(0)
            self._handlers[number](number, None)

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if exc_type is None:
            self.check()


@contextlib.contextmanager
def enter_whole(
    make: Callable[[], ContextManager[Entered]],
) -> Iterator[Entered]:
    """A context that signals let be made and entered as a whole, or not at all.

    Args:
        make: Makes the context.

    Yields:
        What it gives when entered.
    """
    with contextlib.ExitStack() as stack:
        with DeferredSignals():
            entered = stack.enter_context(make())
        yield entered


def progress_bar(*args: Any, **options: Any) -> progress:
    """A progress bar of DIALS; one that is half made ends with a traceback."""
    with DeferredSignals():
        return progress(*args, **options)
