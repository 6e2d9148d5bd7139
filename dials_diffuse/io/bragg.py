"""Bragg intensities on the scale of the diffuse map, as a DIALS reflection table.

The table is written block by block: the columns are kept in temporary files beside it,
and joined when it is closed, in the msgpack layout of DIALS (version 1, which 3.12 to
3.30 read; ``dials/array_family/reflection_table_msgpack_adapter.h``). DIALS 3.12 reads no
tables in HDF5, and its own writer needs the whole of them in memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import IO, Callable, Iterator, NamedTuple

import numpy as np

from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.bragg.sums import PeakIntensities
from dials_diffuse.util.files import atomic_path

logger = logging.getLogger("dials.diffuse.extract")

# What msgpack can say of the length of an array, and so of a column.
MAX_BYTES = (1 << 32) - 1


class Column(NamedTuple):
    """Name that DIALS has for a column's type, numpy's, and where the values are."""

    kind: str
    dtype: str
    values: Callable[[PeakIntensities], np.ndarray]


def _flags(peaks: PeakIntensities) -> np.ndarray:
    return np.full(len(peaks.id), int(flex.reflection_table.flags.integrated_sum))


# ``intensity.sum.value`` is |F|² in the unit of the map; it needs no Lorentz or
# polarization correction. ``partiality`` is 1 where the peak is complete, else 0, and
# ``normalisation`` the weight of means over stills.
COLUMNS: dict[str, Column] = {
    "miller_index": Column("cctbx::miller::index<>", "<i4", lambda p: p.hkl),
    "id": Column("int", "<i4", lambda p: p.id),
    "panel": Column("std::size_t", "<u8", lambda p: p.panel),
    "intensity.sum.value": Column("double", "<f8", lambda p: p.intensity),
    "intensity.sum.variance": Column("double", "<f8", lambda p: p.variance),
    "background.sum.value": Column("double", "<f8", lambda p: p.background),
    "normalisation": Column("double", "<f8", lambda p: p.weight),
    "partiality": Column("double", "<f8", lambda p: p.complete),
    "num_pixels.foreground": Column("int", "<i4", lambda p: p.n_pixels),
    "xyzobs.px.value": Column("vec3<double>", "<f8", lambda p: p.xyz),
    "flags": Column("std::size_t", "<u8", _flags),
}


class TableIsFull(ValueError):
    """There are more peaks than a reflection table can hold."""


class BraggWriter:
    """Writes Bragg intensities block by block.

    Args:
        path: File to make; pass the path of ``atomic_path``.
        experiments: The experiments that the ids count.

    Attributes:
        n_rows: Number of peaks so far.
    """

    def __init__(self, path: str | os.PathLike, experiments: ExperimentList) -> None:
        self._path = Path(path)
        self._identifiers = [e.identifier for e in experiments]
        self._open = contextlib.ExitStack()
        self._parts: dict[str, IO[bytes]] = {
            name: self._open.enter_context(
                tempfile.TemporaryFile(dir=self._path.parent)
            )
            for name in COLUMNS
        }
        self.n_rows = 0

    def append(self, peaks: PeakIntensities) -> None:
        """Append some peaks.

        Raises:
            TableIsFull: A column would be larger than such a table can hold.
        """
        for name, column in COLUMNS.items():
            values = np.ascontiguousarray(column.values(peaks), dtype=column.dtype)
            if self._parts[name].tell() + values.nbytes > MAX_BYTES:
                raise TableIsFull(
                    f"{self.n_rows + len(peaks.id)} Bragg peaks are more than a "
                    "reflection table can hold"
                )
            self._parts[name].write(values.tobytes())
        self.n_rows += len(peaks.id)

    def close(self) -> None:
        """Join the columns to the table."""
        with self._open, open(self._path, "wb") as table:
            table.write(self._head())
            for name, part in self._parts.items():
                size = part.tell()
                # an array of the type and of the column: number of rows and their bytes
                table.write(_text(name) + _array(2) + _text(COLUMNS[name].kind))
                table.write(_array(2) + _number(self.n_rows) + _bytes_head(size))
                part.seek(0)
                shutil.copyfileobj(part, table)

    def _head(self) -> bytes:
        """All that stands before the first column."""
        identifiers = b"".join(
            _number(i) + _text(name) for i, name in enumerate(self._identifiers)
        )
        return b"".join(
            (
                _array(3) + _text("dials::af::reflection_table") + _number(1) + _map(3),
                _text("identifiers") + _map(len(self._identifiers)) + identifiers,
                _text("nrows") + _number(self.n_rows),
                _text("data") + _map(len(COLUMNS)),
            )
        )

    def __enter__(self) -> BraggWriter:
        return self

    def __exit__(self, exc_type: type | None, *args: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self._open.close()


# msgpack: a byte for the type, the length or the value (big-endian), the contents. The
# longest form of each type, which every reader takes.


def _array(n: int) -> bytes:
    return b"\xdd" + struct.pack(">I", n)


def _map(n: int) -> bytes:
    return b"\xdf" + struct.pack(">I", n)


def _number(value: int) -> bytes:
    return b"\xcf" + struct.pack(">Q", value)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"\xdb" + struct.pack(">I", len(encoded)) + encoded


def _bytes_head(n: int) -> bytes:
    return b"\xc6" + struct.pack(">I", n)


class BraggTable:
    """Takes the parts of a table of Bragg intensities; see ``bragg_table``.

    Args:
        path: The file.
        experiments: The experiments that the ids count.
        files: Closes what is opened here.

    Attributes:
        n_peaks: Number of peaks so far.
        is_full: Whether they were more than a table can hold, so that there is none.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        experiments: ExperimentList,
        files: contextlib.ExitStack,
    ) -> None:
        self._path, self._experiments, self._files = path, experiments, files
        self._writer: BraggWriter | None = None
        self.n_peaks = 0
        self.is_full = False

    def __call__(self, peaks: PeakIntensities) -> None:
        """Append some peaks."""
        self.n_peaks += len(peaks.id)
        if len(peaks.id) == 0 or self.is_full:
            return
        if self._writer is None:
            temporary = self._files.enter_context(atomic_path(self._path))
            writer = BraggWriter(temporary, self._experiments)
            self._writer = self._files.enter_context(writer)
        try:
            self._writer.append(peaks)
        except TableIsFull:
            self.is_full = True
            # An error on the way out of the files is what removes them.
            with contextlib.suppress(TableIsFull), self._files.pop_all():
                raise


@contextlib.contextmanager
def bragg_table(
    path: str | os.PathLike, experiments: ExperimentList
) -> Iterator[BraggTable]:
    """A table of the Bragg intensities that come within the block, part by part.

    The file is made when the first peaks come, without any there is none. It gets its
    name when the block ends; one that fails leaves no file. If there are more peaks than
    a table can hold, there is a warning and no file, not even an earlier one.

    Yields:
        What to call with each part.
    """
    with contextlib.ExitStack() as files:
        table = BraggTable(path, experiments, files)
        yield table
    if table.is_full:
        Path(path).unlink(missing_ok=True)
        logger.warning(
            "Warning: %d Bragg peaks are more than a reflection table can hold, so that "
            "%s was not written. The observations have all that they should. For the "
            "Bragg intensities extract fewer images at a time",
            table.n_peaks,
            path,
        )
