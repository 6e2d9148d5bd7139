from __future__ import annotations

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from dials_diffuse.util.hdf5 import (
    METADATA_CACHE,
    GuardedFile,
    HDF5Output,
    open_hdf5,
)

# Chunks that grow are kept in a cache, which the library cannot empty on a full disk
FULL_DISK = """
import resource, sys
import numpy as np
from dials_diffuse.util.files import atomic_path
from dials_diffuse.util.hdf5 import HDF5Output

limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with atomic_path(sys.argv[1]) as path:
        output = HDF5Output(path)
        try:
            data = output.file.create_dataset(
                "data", shape=(0,), maxshape=(None,), chunks=(4096,), dtype=float
            )
            for i in range(100):
                data.resize(4096 * (i + 1), axis=0)
                data[4096 * i :] = np.random.default_rng(i).random(4096)
                output.check()
        finally:
            output.close()
except ValueError as e:
    print(e)
"""


@pytest.mark.parametrize("limit", [100, 10_000, 500_000])
def test_full_disk_leaves_no_file_and_no_crash(tmp_path, limit):
    final = tmp_path / "map.h5"
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(final), str(limit)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.stderr == ""
    assert result.returncode == 0
    assert f"Cannot write {final}: no space left on the device" in result.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_file_is_an_ordinary_one(tmp_path, compression):
    path = tmp_path / "map.h5"
    values = np.random.default_rng(7).normal(size=(50, 60, 70))
    output = HDF5Output(path)
    output.file.create_dataset(
        "group/box", data=values, chunks=(16, 16, 16), compression=compression
    )
    output.check()
    np.testing.assert_array_equal(output.file["group/box"][3], values[3])
    output.file["group"].attrs["units"] = "s.sr"
    output.close()
    with h5py.File(path) as handle:
        np.testing.assert_array_equal(handle["group/box"][()], values)
        assert handle["group"].attrs["units"] == "s.sr"


def test_error_is_raised_when_asked_for(tmp_path):
    output = HDF5Output(tmp_path / "map.h5")
    output._guard.error = OSError("made up")
    output.file["data"] = np.zeros(100_000)
    with pytest.raises(OSError, match="made up"):
        output.check()
    with pytest.raises(OSError, match="made up"):
        output.close()


def test_what_could_not_be_written_can_be_read_back(tmp_path):
    handle = GuardedFile(tmp_path / "file")
    handle.write(b"0123456789")
    handle.error = OSError("made up")
    handle.seek(8)
    handle.write(b"abcd")
    handle.seek(3)
    handle.write(b"XY")
    for start, expected in ((0, b"012XY567ab"), (9, b"bcd"), (4, b"Y567")):
        buffer = bytearray(len(expected))
        handle.seek(start)
        handle.readinto(buffer)
        assert buffer == expected
        assert handle.tell() == start + len(expected)
    handle.seek(10)
    assert handle.read(4) == b"cd\0\0"
    handle.close()
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_what_cannot_be_read_back_is_told(tmp_path):
    handle = GuardedFile(tmp_path / "file")
    handle.write(b"0123")
    handle._raw.close()
    handle._raw = open(tmp_path / "file", "ab", buffering=0)  # which cannot be read
    handle.seek(0)
    assert handle.read(4) == bytes(4)
    assert isinstance(handle.error, OSError)
    handle.close()


def test_structure_of_many_chunks_is_not_kept(tmp_path):
    """More of it than the cache takes is written and read; control: h5py by itself."""
    path = tmp_path / "chunks.h5"
    values = np.arange(320_000, dtype=np.int32)  # in 80 000 chunks
    output = HDF5Output(path)
    output.file.create_dataset("data", data=values, chunks=(4,))
    written = output.file.id.get_mdc_size()
    output.close()
    assert path.stat().st_size - values.nbytes > METADATA_CACHE
    with open_hdf5(path) as file:
        assert np.array_equal(file["data"][()], values)
        read = file.id.get_mdc_size()
        assert file.id.get_mdc_config().max_size == METADATA_CACHE
    for most, _, used, _ in (written, read):
        assert used <= most == METADATA_CACHE
    with h5py.File(path, "r") as file:
        assert file.id.get_mdc_config().max_size > METADATA_CACHE
