from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from dials_diffuse.process import programs
from dials_diffuse.process.programs import (
    find_program,
    last_meaningful_line,
    run_program,
)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Returns a function that puts a shell script on PATH; the current folder is new."""
    bin_folder, work = tmp_path / "bin", tmp_path / "work"
    bin_folder.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("PATH", str(bin_folder), prepend=os.pathsep)

    def write(name: str, script: str) -> str:
        path = bin_folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_find_program(fake):
    path = fake("dials.fake", "")
    assert find_program("dials.fake") == path
    with pytest.raises(ValueError, match="dials.none is not found beside .* install"):
        find_program("dials.none")


def test_the_program_beside_python_is_preferred(fake, tmp_path, monkeypatch):
    fake("dials.fake", "")
    own = tmp_path / "env"
    own.mkdir()
    for name in ("python", "dials.fake"):
        (own / name).write_text("#!/bin/sh\n")
        (own / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(own / "python"))
    assert find_program("dials.fake") == str(own / "dials.fake")


def test_success(fake, tmp_path):
    fake("dials.fake", 'echo "$@" >a.expt; echo hello >fake.log; echo hello')
    run_program("dials.fake", ["x=1", "y z"], "fake.log", ["a.expt"])
    assert (tmp_path / "work" / "a.expt").read_text() == "x=1 y z\n"
    assert sorted(os.listdir()) == ["a.expt", "fake.log"]


def test_output_is_the_log_of_a_program_without_one(fake):
    fake("dials.fake", "echo hello; echo oops >&2; touch a.expt")
    run_program("dials.fake", [], "fake.log", ["a.expt"])
    with open("fake.log") as log:
        assert log.read() == "hello\noops\n"


@pytest.mark.parametrize(
    "script, expected",
    [
        (
            "touch fake.log; echo Indexing failed; echo; echo -----; exit 3",
            r"^dials.fake failed \(exit status 3, log fake.log\): Indexing failed$",
        ),
        (
            "echo working; kill -9 $$",
            r"^dials.fake failed \(ended by SIGKILL, log fake.log\): working$",
        ),
        (
            "echo Not enough spots; echo; echo Total Time Taken = 1.2 s",
            r"^dials.fake indexed nothing \(log fake.log\): Not enough spots$",
        ),
    ],
    ids=["status", "signal", "nothing"],
)
def test_failure(fake, script, expected):
    fake("dials.fake", script)
    with pytest.raises(ValueError, match=expected):
        run_program("dials.fake", [], "fake.log", ["a.expt"], "indexed nothing")


def test_missing_output(fake):
    """An earlier run's output is not taken for that of this one."""
    fake("dials.fake", "echo Nothing found")
    with open("a_1.expt", "w"):
        pass
    expected = r"wrote no a_\*.expt \(log fake.log\): Nothing found"
    with pytest.raises(ValueError, match=expected):
        run_program("dials.fake", [], "fake.log", ["a_*.expt"])


def test_workers_end_with_us(fake, monkeypatch):
    """What interrupts us ends the program and the processes that it has started."""
    fake("dials.fake", "sleep 60 & echo $! >pid; wait")

    class Interrupted(subprocess.Popen):
        """Whose first wait is interrupted."""

        interrupted = False

        def wait(self, timeout=None):
            if not self.interrupted:
                while not os.path.exists("pid") or not os.path.getsize("pid"):
                    time.sleep(0.01)
                self.interrupted = True
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(programs.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_program("dials.fake", [], "fake.log", [])
    with open("pid") as handle:
        pid = int(handle.read())
    for _ in range(200):
        if not is_running(pid):
            break
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """A process that nobody has waited for is no longer running, but still there."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "no output"),
        ("one\ntwo\n\n", "two"),
        ("No spots\n+-----+\n=====\n", "No spots"),
        ("\x1b[31mSorry: no cell\x1b[0m\n", "no cell"),
        (
            "Traceback\n  File x\nRuntimeError: Please report this error to "
            "dials-support@lists.sourceforge.net: bad cell\n",
            "RuntimeError: bad cell",
        ),
        (
            "RuntimeError: Please report this error at https://github.com/dials/dials/"
            "issues or to dials-user-group@jiscmail.ac.uk: bad cell\n",
            "RuntimeError: bad cell",
        ),
        ("x" * 1000, "x" * 297 + "..."),
    ],
)
def test_last_meaningful_line(text, expected):
    assert last_meaningful_line(text) == expected
