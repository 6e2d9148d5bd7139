"""Forked processes that do the tasks of one program.

Fork hands over models, images and arrays without a copy. Python's process pools do not
bear an exception that a signal raises inside their own code: a lock stays locked, and the
program waits for ever. So, while there is a pool, signals are only noted, and take effect
where the program waits for a result.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterator, Sequence, TypeVar

from threadpoolctl import threadpool_limits

FORK = multiprocessing.get_context("fork")
LOOK_FOR_SIGNALS = 0.1  # s

Result = TypeVar("Result")


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


def _start_worker() -> None:
    """Ctrl-C reaches all processes of a terminal; the parent deals with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def forked_results(
    function: Callable[..., Result],
    tasks: Sequence[tuple],
    nproc: int,
    n_ahead: int | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Iterator[Result]]:
    """The results of a function, in the order of its tasks.

    Linear algebra has one thread meanwhile: threads of its own would take the processors
    from the other processes, and wait for work in a loop where there is but one.

    Args:
        function: A module's function, called as function(*task).
        tasks: Its arguments.
        nproc: Number of processes; with one, no other is made.
        n_ahead: Tasks to have under way or done before the one whose result is waited
            for; None for all.
        stop: Called when the results are no longer wanted; tasks may end early then.

    Yields:
        The results, as they come to be needed.

    Raises:
        ValueError: A process was ended from outside.
    """
    if nproc == 1:
        with threadpool_limits(1, user_api="blas"):
            yield (function(*task) for task in tasks)
        return
    futures: list[concurrent.futures.Future] = []
    try:
        with (
            threadpool_limits(1, user_api="blas"),
            DeferredSignals() as signals,
            concurrent.futures.ProcessPoolExecutor(
                nproc, mp_context=FORK, initializer=_start_worker
            ) as pool,
        ):
            try:
                yield _in_order(pool, function, tasks, n_ahead, futures, signals)
            finally:
                if futures:  # their results are no longer wanted
                    stop()
                for future in futures:
                    future.cancel()
    except BrokenProcessPool:
        raise ValueError(
            "A worker process was ended from outside, perhaps for want of memory: use "
            "a smaller mp.nproc"
        ) from None


def _in_order(
    pool: concurrent.futures.Executor,
    function: Callable[..., Result],
    tasks: Sequence[tuple],
    n_ahead: int | None,
    futures: list[concurrent.futures.Future],
    signals: DeferredSignals,
) -> Iterator[Result]:
    """Submit tasks and wait for their results; ``futures`` holds those under way."""
    waiting = iter(tasks)
    for _ in tasks:
        for task in waiting:
            futures.append(pool.submit(function, *task))
            if n_ahead is not None and len(futures) > n_ahead:
                break
        signals.check()
        while not futures[0].done():
            concurrent.futures.wait(futures[:1], timeout=LOOK_FOR_SIGNALS)
            signals.check()
        yield futures.pop(0).result()
