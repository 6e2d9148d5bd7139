"""What every dials.diffuse_* command does before and after its one function call.

A command loads its PHIL once (``load_phil``). Its run() makes the parser; below
``errors_in_one_line`` it parses the arguments (``parse_arguments``) and checks them, and
below ``logged_work`` it does its work.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import logging
import os
import signal
import sys
import threading
from typing import Any, Callable, Iterator, NoReturn, Sequence

import h5py

import iotbx.phil
import libtbx.phil
from libtbx.utils import Sorry

import dials.util.log
import dials_diffuse
from dials.util.options import ArgumentParser
from dials.util.version import dials_version
from dials_diffuse.util.parallel import one_thread

logger = logging.getLogger("dials.diffuse.command")


def load_phil(name: str) -> libtbx.phil.scope:
    """The PHIL scope of ``phil/<name>.phil``, with the scopes that it includes."""
    source = importlib.resources.files("dials_diffuse.phil") / f"{name}.phil"
    return iotbx.phil.parse(source.read_text(encoding="utf-8"), process_includes=True)


def parse_arguments(
    parser: ArgumentParser, args: Sequence[str] | None = None
) -> tuple[Any, Any, list[str]]:
    """Parameters, options and HDF5 files of a command line.

    DIALS reads every file argument to see what it is, as text (all of it) and as a
    reflection table. Our HDF5 files may be larger than the memory, so they are taken
    out before DIALS sees them.

    Args:
        parser: A parser that does not read reflections.
        args: The arguments, or None for those of the process.

    Returns:
        params: The extracted PHIL parameters.
        options: The options, for ``start_log``.
        files: The HDF5 files among the arguments, in their order.

    Raises:
        ValueError: An argument is neither a file that the command can use nor a
            parameter, or has a wrong value.
    """
    args = list(sys.argv[1:] if args is None else map(os.fspath, args))
    files = [arg for arg in args if os.path.isfile(arg) and h5py.is_hdf5(arg)]
    rest = [arg for arg in args if arg not in files]
    parser.error = _refuse  # DIALS 3.30 would end the process here, with its usage
    try:
        params, options, unhandled = parser.parse_args(
            args=rest, show_diff_phil=False, return_unhandled=True
        )
    except (RuntimeError, Sorry) as e:  # a value that does not fit its PHIL type
        raise ValueError(" ".join(str(e).split())) from None
    if unhandled:
        reasons = [_why_unhandled(arg, parser.system_phil) for arg in unhandled]
        raise ValueError("\n".join(reasons))
    return params, options, files


def _refuse(message: str) -> NoReturn:
    raise ValueError(" ".join(message.split()))


def _why_unhandled(arg: str, phil: libtbx.phil.scope) -> str:
    """Why DIALS could not use an argument, in one line."""
    if os.path.isdir(arg):
        return f"{arg} is a folder: give files"
    if os.path.exists(arg):
        return (
            f"{arg} is empty, damaged or of a kind that this command does not read (such "
            "as the .refl of another stage): see the help (-h)"
        )
    if "=" not in arg:
        return f"{arg} does not exist"
    try:
        phil.command_line_argument_interpreter().process_arg(arg=arg)
    except Exception as e:  # libtbx raises Sorry and RuntimeError alike
        reason = " ".join(str(e).split())
        return reason if arg in reason else f"{arg}: {reason}"
    return f"{arg} is not understood: see the help (-h)"


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Within it a ValueError ends the command: one clear line and exit status 1.

    Raises:
        Sorry: In place of a ValueError.
    """
    try:
        yield
    except ValueError as e:
        raise Sorry(e) from None


@contextlib.contextmanager
def logged_work(parser: ArgumentParser, params: Any, options: Any) -> Iterator[None]:
    """Start the log with the changed parameters; within it signals end the work in order.

    Linear algebra has one thread: matrices are small, and other threads would wait for
    them in a loop.

    Args:
        parser: The parser that has read the arguments.
        params, options: From ``parse_arguments``.

    Raises:
        ValueError: The log file cannot be written.
    """
    start_log(params, options)
    report_changes(parser)
    with ends_by_signal(), one_thread():
        yield


@contextlib.contextmanager
def collect_warnings(messages: list[str]) -> Iterator[None]:
    """Append the warnings that our stages log within it to a list, each once."""
    handler = logging.Handler(logging.WARNING)

    def keep(record: logging.LogRecord) -> None:
        message = record.getMessage().removeprefix("Warning: ")
        if message not in messages:
            messages.append(message)

    handler.emit = keep
    parent = logging.getLogger("dials.diffuse")
    parent.addHandler(handler)
    try:
        yield
    finally:
        parent.removeHandler(handler)


@contextlib.contextmanager
def ends_by_signal() -> Iterator[None]:
    """Within it SIGINT (Ctrl-C) and SIGTERM (of batch systems) end the work in order.

    Temporary files are removed, one line says so, and the exit status is 128 + signal.
    A handler of SIGTERM that a program has set stays in force.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    own = in_main_thread and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, _handler_of(os.getpid()))
    try:
        yield
    except (KeyboardInterrupt, _Terminated) as e:
        number = signal.SIGTERM if isinstance(e, _Terminated) else signal.SIGINT
        logger.error("Ended by %s: nothing unfinished was kept", number.name)
        sys.exit(128 + number)
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Terminated(BaseException):
    """SIGTERM has come."""


def _handler_of(owner: int) -> Callable[..., None]:
    """A handler that raises in the process that has set it.

    Workers inherit it by fork; one that the parent ends must go without a word.
    """

    def handle(*_: Any) -> None:
        if os.getpid() != owner:
            os._exit(128 + signal.SIGTERM)
        raise _Terminated

    return handle


def refuse_hdf5(files: Sequence[str]) -> None:
    """For commands that take models of DIALS: outputs of ours are of a later stage.

    Raises:
        ValueError: There are files in HDF5.
    """
    if files:
        raise ValueError(
            f"{files[0]} is an HDF5 file, the output of a later stage: give the .expt "
            "and .refl of dials.index, dials.refine or dials.integrate"
        )


def start_log(params: Any, options: Any) -> None:
    """Log to the terminal and to ``params.output.log``; first line the versions.

    Raises:
        ValueError: The log file cannot be written, or is an input.
    """
    refuse_input_as_log(params)
    try:
        dials.util.log.config(options.verbose, logfile=params.output.log)
    except OSError as e:
        raise ValueError(
            f"Cannot write the log file {params.output.log}: {e.strerror}"
        ) from None
    logger.info("%s, dials_diffuse %s", dials_version(), dials_diffuse.__version__)


def refuse_input_as_log(params: Any) -> None:
    """A log that has the name of an input would destroy it.

    Raises:
        ValueError: It has.
    """
    if params.output.log is None:
        return
    kinds = vars(params.input).values() if hasattr(params, "input") else ()
    names = [item.filename for kind in kinds if isinstance(kind, list) for item in kind]
    for name in ("mask", "background"):
        value = getattr(params, name, None)
        values = value if isinstance(value, list) else [value]
        names += [v for v in values if isinstance(v, str)]
    log = os.path.realpath(params.output.log)
    if log in map(os.path.realpath, names):
        raise ValueError(
            f"output.log={params.output.log} is an input: give another name"
        )


def report_changes(parser: ArgumentParser) -> None:
    """Log the parameters that differ from their defaults."""
    changes = parser.diff_phil.as_str().rstrip()
    if changes:
        logger.info("The following parameters have been modified:\n%s", changes)
