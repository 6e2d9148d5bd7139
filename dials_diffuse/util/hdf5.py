"""HDF5 files: writing that survives a full disk, reading with clear errors.

When a write fails, the HDF5 library (1.10 to 1.14) cannot close the file any more: it
raises again at every attempt, and crashes when the process ends. So the library is given
a file object that keeps the first error for itself and lets the library believe that all
is well; the error is raised from here, and the file is closed and thrown away in order.
"""

from __future__ import annotations

import contextlib
import os
from typing import TypeVar

import h5py

METADATA_CACHE = 1 << 20  # bytes, by the size in the file

Reader = TypeVar("Reader", bound="HDF5Input")


class GuardedFile:
    """An unbuffered file that keeps errors instead of raising them.

    Has the methods that h5py asks of a file object. What is written after the first
    error stays in memory, because the library reads some of it back: that is what it
    writes up to the next call of ``HDF5Output.check``, and to close the file.

    Args:
        path: File to make.

    Attributes:
        error: The first error, after which nothing more reaches the disk.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._raw = open(path, "w+b", buffering=0)
        self._position = 0
        self._kept: list[tuple[int, bytes]] = []
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            # A disk that fills up takes part of the data before it fails.
            while self.error is None and done < len(view):
                done += self._raw.write(view[done:])
        except OSError as e:
            self.error = e
        if done < len(view):
            self._kept.append((self._position + done, bytes(view[done:])))
        self._position += len(view)
        return len(view)

    def readinto(self, buffer: bytearray) -> int:
        view = memoryview(buffer).cast("B")
        n = 0
        try:
            while n < len(view) and (more := self._raw.readinto(view[n:])):
                n += more
        except OSError as e:
            self.error = self.error or e
        view[n:] = bytes(len(view) - n)
        for offset, data in self._kept:
            start = max(offset - self._position, 0)
            stop = min(offset + len(data) - self._position, len(view))
            if start < stop:
                skip = start + self._position - offset
                view[start:stop] = data[skip : skip + stop - start]
        self._position += len(view)
        return len(view)

    def read(self, size: int) -> bytes:
        buffer = bytearray(size)
        self.readinto(buffer)
        return bytes(buffer)

    def truncate(self, size: int) -> int:
        if self.error is None:
            try:
                self._raw.truncate(size)
            except OSError as e:
                self.error = e
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = self._raw.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing to do: the file is not buffered."""

    def close(self) -> None:
        try:
            self._raw.close()
        except OSError as e:  # a network file system may tell only now
            self.error = self.error or e


class HDF5Output:
    """An HDF5 file being written.

    Args:
        path: File to make.
        with_times: Whether the objects of the file tell when they were made. Attributes
            of more than 64 KiB, the identifiers of a few thousand experiments, need the
            object headers of HDF5 1.8, which do.

    Attributes:
        file: The h5py file.
    """

    def __init__(self, path: str | os.PathLike, with_times: bool = True) -> None:
        self._guard = GuardedFile(path)
        oldest = "v108" if with_times else "earliest"
        self.file = h5py.File(self._guard, "w", libver=(oldest, "v110"))
        limit_metadata_cache(self.file)

    def check(self) -> None:
        """Raise the error of a write that failed, if any; call it after each write.

        Raises:
            OSError: The disk is full, for example.
        """
        if self._guard.error is not None:
            raise self._guard.error

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: Not all could be written.
        """
        self.file.close()
        self._guard.close()
        self.check()


class HDF5Input:
    """An HDF5 file being read; the base of our readers.

    Args:
        path: File to read.

    Raises:
        ValueError: It does not exist, cannot be read, or lacks a part.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self._file = open_hdf5(path)
        try:
            self._load()
        except (KeyError, OSError) as e:
            self._file.close()
            raise ValueError(damaged(self.path, e)) from None
        except ValueError:
            self._file.close()
            raise

    def _load(self) -> None:
        """Check the file and read what every use needs; for derived classes."""

    def close(self) -> None:
        self._file.close()

    def __enter__(self: Reader) -> Reader:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def open_hdf5(path: str | os.PathLike) -> h5py.File:
    """An HDF5 file opened for reading.

    Raises:
        ValueError: It does not exist or cannot be read.
    """
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as e:
        reason = os.strerror(e.errno) if e.errno else "it is not HDF5, or cut short"
        raise ValueError(f"Cannot read {path}: {reason}") from None
    limit_metadata_cache(file)
    return file


def limit_metadata_cache(file: h5py.File) -> None:
    """Let the library keep little of the structure of an open file in memory.

    By itself it keeps up to 32 MiB by the size in the file, mostly where the chunks of long
    columns are, which take several times as much in memory. What is needed again is read
    again.
    """
    with contextlib.suppress(RuntimeError, ValueError):  # a file works without it, too
        config = file.id.get_mdc_config()
        config.set_initial_size = True
        config.initial_size = config.min_size = config.max_size = METADATA_CACHE
        file.id.set_mdc_config(config)


def damaged(path: str, error: Exception) -> str:
    """What to tell the user of a file that lacks a part or cannot be read to its end."""
    return f"{path} is damaged ({' '.join(str(error).split())}): make it again"
