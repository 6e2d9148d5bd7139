"""Running a program of DIALS in a folder, and saying in one line why it failed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Sequence

MAX_LINE = 300

# What DIALS puts before, or writes after, the message of an unexpected error.
_REPORT_THIS = re.compile(r"Please report this error (?:at \S+ or )?to [^\s:]+:?\s*")
_SAYS_NOTHING = re.compile(r"^\W*$|\btime taken\b", re.IGNORECASE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def find_program(name: str) -> str:
    """Path of a program of DIALS.

    It is looked for beside this Python, beside the running command, in the folder of a
    libtbx build, and on PATH, in this order, so that a program of another DIALS
    earlier on PATH is not taken.

    Raises:
        ValueError: It is nowhere.
    """
    folders = [os.path.dirname(sys.executable)]
    if sys.argv and sys.argv[0]:
        folders.append(os.path.dirname(os.path.abspath(sys.argv[0])))
    if os.environ.get("LIBTBX_BUILD"):
        folders.append(os.path.join(os.environ["LIBTBX_BUILD"], "bin"))
    for path in (*folders, None):  # None: PATH
        found = shutil.which(name, path=path)
        if found:
            return found
    raise ValueError(
        f"{name} is not found beside {sys.executable} nor on PATH: install DIALS, or "
        "set up its environment"
    )


def last_meaningful_line(text: str) -> str:
    """The last line of a program's output that says something, shortened to one line.

    Frames of tables, times, and what DIALS asks users to do with unexpected errors are
    left out.
    """
    for line in reversed(_COLOUR.sub("", text).splitlines()):
        line = " ".join(_REPORT_THIS.sub("", line).split())
        line = line.removeprefix("Sorry: ")
        if not _SAYS_NOTHING.search(line):
            return line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + "..."
    return "no output"


def missing_outputs(folder: Path, outputs: Sequence[str]) -> list[str]:
    """Those of some names or patterns that no file in a folder matches."""
    return [name for name in outputs if not any(folder.glob(name))]


def remove_outputs(folder: Path, outputs: Sequence[str]) -> None:
    """Remove what an earlier run has left, so that it is not taken for this one's."""
    for name in outputs:
        for path in folder.glob(name):
            path.unlink()


def run_program(
    name: str,
    arguments: Sequence[str],
    log: str,
    outputs: Sequence[str],
    without: str = "",
) -> None:
    """Run a program of DIALS in the current folder.

    What it prints goes to ``<name>.out``, which is kept if it fails, for a traceback
    that is not in the log. It stands in for the log of a program that writes none.

    Args:
        name: The program, for example dials.index.
        arguments: Its arguments.
        log: Its log file.
        outputs: Names or patterns of the files that it must write.
        without: What it means if it ends well without them.

    Raises:
        ValueError: It is missing, fails, or does not write its output. The message
            names the program, its log and the last meaningful line of its output.
    """
    folder = Path.cwd()
    printed = folder / f"{name}.out"
    remove_outputs(folder, [*outputs, log, printed.name])
    status = _run([find_program(name), *arguments], printed)
    text = printed.read_text(encoding="utf-8", errors="replace")
    if not (folder / log).is_file():
        printed.rename(folder / log)
    missing = missing_outputs(folder, outputs)
    if status == 0 and not missing:
        printed.unlink(missing_ok=True)
        return
    if status:
        how = f"failed ({_describe(status)}, log {log})"
    else:
        how = f"{without or f'wrote no {missing[0]}'} (log {log})"
    raise ValueError(f"{name} {how}: {last_meaningful_line(text)}")


def _describe(status: int) -> str:
    """A negative status is the number of the signal that ended the program."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _run(command: Sequence[str], printed: Path) -> int:
    """The exit status of a command whose output goes to a file.

    The command is the head of a process group of its own: if we are ended by a signal,
    its workers are ended too.
    """
    with printed.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as e:
            raise ValueError(f"Cannot run {command[0]}: {e.strerror}") from None
        try:
            return process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
