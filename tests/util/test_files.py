from __future__ import annotations

import errno
import os
import signal
import stat
import tempfile

import numpy as np
import pytest

from dials_diffuse.util.files import atomic_path, is_disk_full, temporary_folder


def test_file_appears_when_it_is_complete(tmp_path):
    final = tmp_path / "map.h5"
    with atomic_path(final) as path:
        assert path.parent == tmp_path
        path.write_text("new")
        assert not final.exists()
    assert final.read_text() == "new"
    assert os.listdir(tmp_path) == ["map.h5"]


def test_old_file_stays_if_the_block_fails(tmp_path):
    final = tmp_path / "map.h5"
    final.write_text("old")
    with pytest.raises(KeyError):
        with atomic_path(final) as path:
            path.write_text("half")
            raise KeyError("stopped")
    assert final.read_text() == "old"
    assert os.listdir(tmp_path) == ["map.h5"]


def test_interrupted_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(tmp_path / "map.h5") as path:
            path.write_text("half")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_interrupt_leaves_nothing_while_the_file_is_made(tmp_path, monkeypatch):
    make = tempfile.mkstemp

    def interrupted(*args, **kwargs):
        made = make(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return made

    monkeypatch.setattr(tempfile, "mkstemp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(tmp_path / "map.h5"):
            pass
    assert os.listdir(tmp_path) == []


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "usual").write_text("")
    with atomic_path(tmp_path / "ours") as path:
        path.write_text("")
    usual, ours = (
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "ours")
    )
    assert ours == usual


def test_name_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_path("map.h5") as path:
        path.write_text("new")
    assert os.listdir(tmp_path) == ["map.h5"]


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="Cannot write .*map.h5: there is no folder"):
        with atomic_path(tmp_path / "nowhere" / "map.h5"):
            pytest.fail("the block must not run")


def test_name_of_a_folder(tmp_path):
    (tmp_path / "map.h5").mkdir()
    with pytest.raises(ValueError, match="Cannot write .*map.h5: it is a folder"):
        with atomic_path(tmp_path / "map.h5"):
            pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["map.h5"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_told_from_other_errors(code):
    assert is_disk_full(OSError(code, os.strerror(code)))
    # h5py gives the reason in the text, or only in what came before
    assert is_disk_full(RuntimeError(f"write failed: '{os.strerror(code)}', errno = 1"))
    outer = RuntimeError("can't close the file")
    outer.__context__ = OSError(code, os.strerror(code))
    assert is_disk_full(outer)


def test_other_errors_are_not_a_full_disk():
    assert not is_disk_full(OSError(errno.EACCES, os.strerror(errno.EACCES)))
    assert not is_disk_full(ValueError("no such column"))


def test_temporary_folder_is_removed_whatever_happens(tmp_path):
    final = tmp_path / "scaled.refl"
    for error in (None, KeyError("x"), KeyboardInterrupt()):
        try:
            with temporary_folder(final, "rows") as folder:
                assert folder.parent == tmp_path
                assert folder.name.startswith("scaled.refl.")
                (folder / "part").write_text("something")
                if error is not None:
                    raise error
        except (KeyError, KeyboardInterrupt) as e:
            assert e is error
        assert not list(tmp_path.iterdir())


def test_temporary_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(ValueError, match="Cannot write .*scaled.refl: No such file"):
        with temporary_folder(tmp_path / "none" / "scaled.refl", "rows"):
            pass


def test_short_write_of_numpy_is_a_full_disk(tmp_path):
    """That is how it ends; control: another error of a file."""
    with pytest.raises(ValueError, match="scaled.refl: no space left"):
        with temporary_folder(tmp_path / "scaled.refl", "rows"):
            with open("/dev/full", "wb", buffering=0) as handle:
                np.zeros(100_000).tofile(handle)
    with pytest.raises(FileNotFoundError):
        with temporary_folder(tmp_path / "scaled.refl", "rows") as folder:
            np.fromfile(folder / "none")
