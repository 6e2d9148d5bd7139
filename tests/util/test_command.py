from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import h5py
import pytest

import libtbx.phil

import dials_diffuse
from dials.util.options import ArgumentParser
from dials.util.version import dials_version
from dials_diffuse.util import command
from dials_diffuse.util.command import ends_by_signal
from dials_diffuse.util.files import atomic_path

PHIL = """
n_shells = 20
  .type = int(value_min=1)
output {
  log = None
    .type = path
}
"""


@pytest.fixture
def parser():
    return ArgumentParser(
        usage="test",
        phil=libtbx.phil.parse(PHIL),
        epilog="",
        read_experiments=True,
        check_format=False,
    )


def test_hdf5_files_are_kept_from_dials(parser, tmp_path):
    path = tmp_path / "large.refl"
    with h5py.File(path, "w"):
        pass
    params, options, files = command.parse_arguments(parser, [path, "n_shells=3"])
    assert files == [str(path)]
    assert params.n_shells == 3
    assert options.verbose == 0


@pytest.mark.parametrize(
    "arg, message",
    [
        ("nowhere.refl", "nowhere.refl does not exist"),
        ("n_shells=abc", 'n_shells="abc"'),
        ("n_shels=3", "n_shels"),
        ("n_shells=", "n_shells="),
    ],
)
def test_wrong_argument_is_named(parser, tmp_path, monkeypatch, arg, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        command.parse_arguments(parser, [arg])
    assert len(str(error.value).splitlines()) == 1


def test_wrong_files_are_all_named(parser, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a reflection table")
    with pytest.raises(
        ValueError, match="notes.txt is empty, damaged.*\n.*is a folder"
    ):
        command.parse_arguments(parser, [str(text), str(tmp_path)])


def test_log_tells_versions_and_changed_parameters(parser, tmp_path):
    log = tmp_path / "test.log"
    params, options, _ = command.parse_arguments(
        parser, ["n_shells=3", f"output.log={log}"]
    )
    command.start_log(params, options)
    command.report_changes(parser)
    logging.getLogger("dials.diffuse.test").info("12 voxels")
    text = log.read_text()
    assert dials_version() in text
    assert f"dials_diffuse {dials_diffuse.__version__}" in text
    assert "n_shells = 3" in text
    assert "12 voxels" in text


def test_log_that_cannot_be_written(parser, tmp_path):
    params, options, _ = command.parse_arguments(
        parser, [f"output.log={tmp_path}/nowhere/test.log"]
    )
    with pytest.raises(ValueError, match="Cannot write the log file .*test.log"):
        command.start_log(params, options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_remove_temporary_files(tmp_path, caplog, number):
    """SIGTERM, by which batch systems end a job, and Ctrl-C unwind like an error."""
    with pytest.raises(SystemExit) as stop, ends_by_signal():
        with atomic_path(tmp_path / "map.h5") as path:
            path.write_text("half of it")
            os.kill(os.getpid(), number)
            time.sleep(10)
    assert stop.value.code == 128 + number
    assert f"Ended by {number.name}: nothing unfinished was kept" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_handler_of_another_program_stays():
    def mine(*_):
        raise AssertionError("never called")

    old = signal.signal(signal.SIGTERM, mine)
    try:
        with ends_by_signal():
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, old)


def test_worker_ended_by_its_parent_says_nothing(capfd):
    """A pool that has lost a worker ends the others by SIGTERM."""
    fork = multiprocessing.get_context("fork")
    running = fork.Event()
    with ends_by_signal():
        worker = fork.Process(target=lambda: (running.set(), time.sleep(30)))
        worker.start()
        # a signal that reaches it while it is being forked is lost, by Python
        assert running.wait(10)
        worker.terminate()
        worker.join(10)
    assert worker.exitcode == 128 + signal.SIGTERM
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["models.expt", "pixels.mask"])
def test_log_does_not_overwrite_an_input(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for file in ("models.expt", "pixels.mask"):
        (tmp_path / file).write_text("precious")
    item = SimpleNamespace(filename=str(tmp_path / "models.expt"))
    params = SimpleNamespace(
        input=SimpleNamespace(experiments=[item]),
        mask="pixels.mask",
        output=SimpleNamespace(log=name),
    )
    with pytest.raises(ValueError, match="is an input"):
        command.start_log(params, SimpleNamespace(verbose=0))
    assert (tmp_path / name).read_text() == "precious"
