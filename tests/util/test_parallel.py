from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest

from dials_diffuse.util import parallel
from dials_diffuse.util.command import ends_by_signal
from dials_diffuse.util.parallel import FORK, forked_results
from dials_diffuse.util.signals import DeferredSignals


def square(x: float, seconds: float = 0.0) -> tuple[float, int]:
    time.sleep(seconds)
    return x * x, os.getpid()


def fail(x: int) -> int:
    if x == 3:
        raise OSError(110, "timed out")  # a TimeoutError
    return x


def end(x: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("n_ahead", [None, 1])
def test_results_come_in_order(nproc, n_ahead):
    tasks = [(i, 0.02 * (i == 0)) for i in range(7)]
    with forked_results(square, tasks, nproc, n_ahead) as results:
        values, workers = zip(*results)
    assert values == (0, 1, 4, 9, 16, 25, 36)
    assert (os.getpid() in workers) == (nproc == 1)


def test_only_so_many_tasks_are_under_way(tmp_path):
    with forked_results(os.mkdir, [(tmp_path / str(i),) for i in range(9)], 2, 2) as r:
        next(r)
        time.sleep(0.5)
        # the first, and two ahead
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


@pytest.mark.parametrize("nproc", [1, 2])
def test_errors_of_tasks_are_raised(nproc):
    stopped = threading.Event()
    with pytest.raises(TimeoutError, match="timed out"):
        with forked_results(
            fail, [(i,) for i in range(9)], nproc, stop=stopped.set
        ) as results:
            list(results)
    assert stopped.is_set() == (nproc > 1)


def test_lost_process():
    with pytest.raises(ValueError, match="ended from outside.*smaller mp.nproc"):
        with forked_results(end, [(1,), (2,)], 2) as results:
            list(results)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_takes_effect_where_a_result_is_waited_for(number):
    tasks = [(i, 0.3) for i in range(100)]
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop, ends_by_signal():
        with forked_results(square, tasks, 2) as results:
            next(results)
            os.kill(os.getpid(), number)
            next(results)
    assert stop.value.code == 128 + number
    assert time.monotonic() - start < 10  # not 100 x 0.3 s / 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("nproc", [1, 2])
def test_signal_is_not_lost_by_the_search_for_libraries(monkeypatch, nproc):
    """Which runs as a call from C: what is raised there goes no farther."""

    def search(*args, **kwargs) -> contextlib.nullcontext:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return contextlib.nullcontext()

    monkeypatch.setattr(parallel, "threadpool_limits", search)
    with pytest.raises(KeyboardInterrupt):
        with forked_results(square, [(1,), (2,)], nproc):
            pass


def test_process_that_inherits_deferred_signals_ends():
    with ends_by_signal(), DeferredSignals():
        assert exit_code_of_ended_worker() == 128 + signal.SIGTERM


def exit_code_of_ended_worker() -> int | None:
    """Of a process that is ended by SIGTERM once it runs.

    A signal that reaches it while it is being forked is lost, by Python.
    """
    running = FORK.Event()
    worker = FORK.Process(target=lambda: (running.set(), time.sleep(30)))
    worker.start()
    assert running.wait(10)
    worker.terminate()
    worker.join(10)
    return worker.exitcode
