"""HDF5 files that survive a full disk.

When a write fails, the HDF5 library (1.10 to 1.14) cannot close the file any more: it
raises again at every attempt, and crashes when the process ends. So the library is given
a file object that keeps the first error for itself and lets the library believe that all
is well; the error is raised from here, and the file is closed and thrown away in order.
"""

from __future__ import annotations

import os

import h5py


class GuardedFile:
    """An unbuffered file that keeps errors instead of raising them.

    Has the methods that h5py asks of a file object.

    Args:
        path: File to make.

    Attributes:
        error: The first error, after which nothing more is written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._raw = open(path, "w+b", buffering=0)
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while self.error is None and done < len(view):
            try:
                # A disk that fills up takes part of the data before it fails.
                done += self._raw.write(view[done:])
            except OSError as e:
                self.error = e
        return len(view)

    def truncate(self, size: int) -> int:
        if self.error is None:
            try:
                self._raw.truncate(size)
            except OSError as e:
                self.error = e
        return size

    def read(self, size: int = -1) -> bytes:
        return self._raw.read(size)

    def readinto(self, buffer: bytearray) -> int:
        return self._raw.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

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

    Attributes:
        file: The h5py file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._guard = GuardedFile(path)
        self.file = h5py.File(self._guard, "w")

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
