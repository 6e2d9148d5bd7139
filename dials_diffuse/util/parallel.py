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
import signal
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterator, Sequence, TypeVar

try:
    from threadpoolctl import threadpool_limits  # comes with scikit-learn, as in DIALS
except ImportError:

    def threadpool_limits(*_: Any, **__: Any) -> contextlib.AbstractContextManager:
        """Nothing: linear algebra keeps its threads, which costs processor time only."""
        return contextlib.nullcontext()


from dials_diffuse.util.signals import DeferredSignals, enter_whole

FORK = multiprocessing.get_context("fork")
LOOK_FOR_SIGNALS = 0.1  # s

Result = TypeVar("Result")


def _start_worker() -> None:
    """Ctrl-C reaches all processes of a terminal; the parent deals with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def one_thread() -> contextlib.AbstractContextManager:
    """Within it linear algebra has one thread: others would but wait in a loop.

    The libraries are found by calls from C, which lose what a signal raises.
    """
    return enter_whole(lambda: threadpool_limits(1, user_api="blas"))


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
        with one_thread():
            yield (function(*task) for task in tasks)
        return
    futures: list[concurrent.futures.Future] = []
    try:
        with (
            one_thread(),
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
                # Not future.cancel(): the pool of Python 3.11 may wait for ever for
                # another event once it has dropped the last cancelled task.
                pool.shutdown(cancel_futures=True)
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
