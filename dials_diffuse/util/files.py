"""Files that appear under their final name only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import Iterator

from dials_diffuse.util.signals import enter_whole


@contextlib.contextmanager
def atomic_path(final: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``final`` if the block succeeds.

    Yields:
        The path to write. It is removed if the block raises.

    Raises:
        ValueError: The folder cannot be written to, ``final`` is itself a folder, or the
            disk is full.
    """
    final = Path(final)
    if final.is_dir():
        raise ValueError(f"Cannot write {final}: it is a folder")
    if not final.parent.is_dir():
        raise ValueError(f"Cannot write {final}: there is no folder {final.parent}")
    with enter_whole(lambda: _temporary_file(final)) as temporary:
        try:
            yield temporary
            # mkstemp makes private files; give this one the permissions of any other
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, final)
        except Exception as e:
            if is_disk_full(e):
                raise ValueError(disk_full_message(final)) from e
            raise


@contextlib.contextmanager
def _temporary_file(final: Path) -> Iterator[Path]:
    """An empty file in the same folder; at the end it is removed, if still there."""
    try:
        handle, name = tempfile.mkstemp(
            # writers of dxtbx choose the format by the suffix
            prefix=f".{final.stem}.part.",
            suffix=final.suffix,
            dir=final.parent,
        )
    except OSError as e:
        raise ValueError(f"Cannot write {final}: {e.strerror}") from None
    os.close(handle)
    try:
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def temporary_folder(final: str | os.PathLike, suffix: str) -> Iterator[Path]:
    """A folder beside a file that is being made, removed at the end.

    Its name tells what it belongs to, should the process be killed.

    Args:
        final: The file.
        suffix: What the folder is for.

    Raises:
        ValueError: It cannot be made, or the disk is full.
    """
    final = Path(os.path.realpath(final))
    with enter_whole(lambda: _temporary_folder(final, suffix)) as folder:
        try:
            yield Path(folder)
        except Exception as e:
            if is_disk_full(e):
                raise ValueError(disk_full_message(final)) from e
            raise


def _temporary_folder(final: Path, suffix: str) -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(
            prefix=f"{final.name}.", suffix=f".{suffix}", dir=final.parent
        )
    except OSError as e:
        raise ValueError(f"Cannot write {final}: {e.strerror}") from None


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception of the system, h5py or one of their causes says so.

    h5py raises OSError or RuntimeError and gives the reason in the text only.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in full:
        return True
    text = str(error)
    # numpy tells the reason of a short write by numbers only.
    if isinstance(error, OSError) and " requested and " in text:
        return True
    if any(os.strerror(code) in text for code in full):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_disk_full(cause)


def disk_full_message(path: str | os.PathLike) -> str:
    """What to tell the user when ``path`` could not be written for want of space."""
    return (
        f"Cannot write {path}: no space left on the device (or over the file size "
        "limit). Free some space or choose another output folder"
    )
