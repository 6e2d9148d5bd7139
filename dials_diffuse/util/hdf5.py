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

    Has the methods that h5py asks of a file object. What is written after the first
    error stays in memory, because the library reads some of it back: that is what it
    writes between two calls of ``HDF5Output.check``, and to close the file.

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
        n = self._raw.readinto(view)
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

    Attributes:
        file: The h5py file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._guard = GuardedFile(path)
        # Attributes of more than 64 KiB, the identifiers of a few thousand experiments,
        # need the object headers of HDF5 1.8.
        self.file = h5py.File(self._guard, "w", libver=("v108", "v110"))

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
