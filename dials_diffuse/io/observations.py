"""Voxel observations on disk: ``extracted.refl`` and ``scaled.refl``.

An ordinary DIALS reflection table in the HDF5 layout that DIALS 3.30 reads itself,
``/dials/processing/group_0/<column>``: one row for each voxel seen on one block of
images on one panel. Rows are sorted by voxel (h slowest, l fastest), then by experiment
and frame. Beside it, outside ``/dials``, stand the grid and an NXprocess record in
``/dials_diffuse``, and a slab index, so that later stages read the table in slabs that
never cut a voxel in two and never load the whole of it.

DIALS aborts on other column types than those of ``COLUMNS``.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from typing import Iterator, Mapping

import h5py
import numpy as np

import dials_diffuse
from dials_diffuse.grid import Grid
from dials_diffuse.util.hdf5 import HDF5Input, HDF5Output, damaged

SCHEMA = 1
GROUP = "dials/processing/group_0"
ROOT = "dials_diffuse"
CHUNK_ROWS = 1 << 14

# Of the slabs that extraction writes, and that later stages hold in memory. Larger ones are
# no faster.
ROWS_PER_SLAB = 250_000


@dataclasses.dataclass(frozen=True)
class Column:
    """Type, number of components, unit and meaning of a column."""

    dtype: str
    width: int
    units: str
    meaning: str


COLUMNS: dict[str, Column] = {
    "miller_index": Column("int32", 3, "", "voxel index h*ndiv"),
    "id": Column("int32", 1, "", "number of the experiment"),
    "panel": Column("uint64", 1, "", "number of the panel"),
    "counts": Column("float64", 1, "photons", "sum of (value - pedestal) / gain"),
    "background.sum.value": Column("float64", 1, "photons", "sum of the background"),
    "background.sum.variance": Column(
        "float64", 1, "photons^2", "variance of the background sum"
    ),
    "normalisation": Column(
        "float64",
        1,
        "s.sr",
        "sum of exposure x polarization x solid angle x efficiency x air transmission",
    ),
    "num_pixels.valid": Column("int32", 1, "", "number of pixels"),
    "xyzobs.px.value": Column(
        "float64", 3, "px, px, images", "mean x, y and frame of the pixels"
    ),
    "d": Column("float64", 1, "angstrom", "d-spacing of the voxel centre"),
    "flags": Column("uint64", 1, "", "DIALS reflection flags"),
}


# What scaling adds: an observation obeys (N - B)/M = g I + b.
SCALED_COLUMNS: dict[str, Column] = {
    **COLUMNS,
    "inverse_scale_factor": Column("float64", 1, "", "factor g of the intensity"),
    "additive_offset": Column("float64", 1, "photons/(s.sr)", "offset b"),
}


class ObservationWriter:
    """Writes observations, sorted by voxel, block by block.

    Args:
        path: File to make; pass the path of ``atomic_path``.
        grid: The voxel grid.
        identifiers: Experiment identifier of each experiment number.
        phil: The PHIL parameters that made the observations, as text.
        inputs: Names of the files that they were made from.
        columns: ``COLUMNS`` or ``SCALED_COLUMNS``.
        program: What makes the file.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        grid: Grid,
        identifiers: Mapping[int, str],
        phil: str = "",
        inputs: list[str] | None = None,
        columns: Mapping[str, Column] = COLUMNS,
        program: str = "dials.diffuse_extract",
    ) -> None:
        self.grid = grid
        self.columns = columns
        self.error_model: tuple[float, float] | None = None  # a and b, of scaling
        self.n_rows = 0
        self._last_key = -1
        self._slab_starts: list[int] = []
        self._output = HDF5Output(path)
        self._file = self._output.file
        self._group = self._file.create_group(GROUP)
        self._group.attrs["identifiers"] = list(identifiers.values())
        self._group.attrs["experiment_ids"] = np.array(
            list(identifiers), dtype=np.uint64
        )
        for name, column in columns.items():
            shape = (0,) if column.width == 1 else (0, column.width)
            dataset = self._group.create_dataset(
                name,
                shape=shape,
                maxshape=(None, *shape[1:]),
                chunks=(CHUNK_ROWS, *shape[1:]),
                dtype=column.dtype,
            )
            dataset.attrs["units"] = column.units
            dataset.attrs["long_name"] = column.meaning
        write_provenance(self._file, program, phil, inputs or [])
        write_grid(self._file[ROOT], grid)

    def write_bragg_regions(self, regions: np.ndarray) -> None:
        """Write which regions about the lattice points have been left out.

        Args:
            regions: ``numbers`` of each ``ExclusionRegion``, shape (n, 9).
        """
        dataset = self._file[ROOT].create_dataset("bragg_regions", data=regions)
        dataset.attrs["long_name"] = (
            "g11, g22, g33, g12, g13, g23, growth, growth_radial, radial of the regions "
            "g(dh, dh) + radial g(dh, h)^2 / (1 + growth_radial s^2) < 1 + growth s^2"
        )
        dataset.attrs["units"] = "none; growth, growth_radial, radial: angstrom^2"

    def write_blocks(self, limits: np.ndarray) -> None:
        """Write which images make up the observations.

        Args:
            limits: Of each block of images ``id`` of the experiment, array index of the
                first image and the one after the last, shape (n, 3).
        """
        dataset = self._file[ROOT].create_dataset(
            "blocks",
            data=np.asarray(limits, dtype=np.int32),
            chunks=(CHUNK_ROWS, 3),
            maxshape=(None, 3),
            shuffle=True,  # the numbers count up: next to nothing is left of them
            compression="gzip",
        )
        dataset.attrs["long_name"] = (
            "id of the experiment, first array index and the one after the last of each "
            "block of images that makes one observation of a voxel"
        )
        dataset.attrs["units"] = "none, images, images"
        self._output.check()

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows: all columns, sorted, beyond the voxels written so far.

        Raises:
            ValueError: A column is missing, or the rows are out of order.
        """
        missing = set(self.columns) - set(columns)
        if missing:
            raise ValueError(f"missing columns: {', '.join(sorted(missing))}")
        n = len(columns["id"])
        if n == 0:
            return
        key = self.grid.key(columns["miller_index"])
        if key[0] <= self._last_key or np.any(np.diff(key) < 0):
            raise ValueError("observations must be appended in the order of the voxels")
        self._last_key = int(key[-1])
        self._slab_starts.append(self.n_rows)
        for name in self.columns:
            dataset = self._group[name]
            dataset.resize(self.n_rows + n, axis=0)
            dataset[self.n_rows :] = columns[name]
            self._output.check()
        self.n_rows += n

    def close(self) -> None:
        """Write the slab index and close the file."""
        starts = np.array([*self._slab_starts, self.n_rows], dtype=np.int64)
        self._file[ROOT].create_dataset("slab_start", data=starts)
        self._group.attrs["num_reflections"] = self.n_rows
        if self.error_model is not None:
            self._file[ROOT].attrs["error_model"] = self.error_model
        self._output.close()

    def __enter__(self) -> ObservationWriter:
        return self

    def __exit__(self, exc_type: type | None, *args: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self._output.close()


class ObservationFile(HDF5Input):
    """Reads observations in slabs of whole voxels.

    Attributes:
        bragg_regions: What ``write_bragg_regions`` wrote, shape (n, 9); n = 0 for nothing.
        blocks: What ``write_blocks`` wrote, shape (n, 3); None if it is not known.

    Raises:
        ValueError: The file is not an observation file of a known schema.
    """

    def _load(self) -> None:
        root = self._file.get(ROOT)
        if root is None or GROUP not in self._file:
            raise ValueError(
                f"{self.path} has no diffuse observations: give the output of "
                "dials.diffuse_extract"
            )
        check_schema(root, SCHEMA, self.path)
        self._group = self._file[GROUP]
        self._slab_start: np.ndarray = root["slab_start"][()]
        self.grid = read_grid(root)
        ids, names = (
            self._group.attrs[key] for key in ("experiment_ids", "identifiers")
        )
        self.identifiers: dict[int, str] = dict(zip(map(int, ids), map(str, names)))
        self.columns: tuple[str, ...] = tuple(self._group)
        self.error_model = tuple(map(float, root.attrs.get("error_model", (1.0, 0.0))))
        self.n_rows: int = len(self._group["id"])
        self.bragg_regions = np.zeros((0, 9))
        if "bragg_regions" in root:
            self.bragg_regions = root["bragg_regions"][()]
        self.blocks: np.ndarray | None = (
            root["blocks"][()] if "blocks" in root else None
        )

    def slabs(self, max_rows: int = ROWS_PER_SLAB) -> Iterator[tuple[int, int]]:
        """Row ranges of whole voxels with about ``max_rows`` rows at the most.

        Neighbouring slabs are joined as long as they fit; a single slab of the file is
        never cut.
        """
        starts = self._slab_start
        begin = 0
        for stop, following in zip(starts[1:], [*starts[2:], None]):
            if following is None or following - begin > max_rows:
                if stop > begin:
                    yield int(begin), int(stop)
                begin = stop

    def read(self, start: int, stop: int, names: list[str]) -> dict[str, np.ndarray]:
        """Some columns of the rows from ``start`` up to ``stop``.

        Raises:
            ValueError: The file has no such column.
        """
        missing = [name for name in names if name not in self._group]
        if missing:
            raise ValueError(f"{self.path} has no column {', '.join(missing)}")
        try:
            return {name: self._group[name][start:stop] for name in names}
        except OSError as e:
            raise ValueError(damaged(self.path, e)) from None


def program_of(path: str | os.PathLike) -> str | None:
    """Name of the command of ours that wrote an HDF5 file; None for any other file."""
    try:
        with h5py.File(path, "r") as handle:
            return handle[ROOT]["program"].asstr()[()]
    except (OSError, KeyError):
        return None


def check_schema(root: h5py.Group, newest: int, path: str) -> None:
    """Check that this version knows the layout of a file.

    Raises:
        ValueError: It was written by a newer version.
    """
    schema = root.attrs["schema"]
    if schema > newest:
        raise ValueError(
            f"{path} has schema {schema}, this version reads up to {newest}: use a "
            "newer dials_diffuse"
        )


def write_grid(group: h5py.Group, grid: Grid) -> None:
    """Store a grid as attributes of ``group/grid``."""
    target = group.create_group("grid")
    target.attrs["unit_cell"] = grid.unit_cell
    target.attrs["ndiv"] = grid.ndiv
    target.attrs["space_group"] = grid.space_group
    target.attrs["d_min"] = grid.d_min
    if grid.d_max is not None:
        target.attrs["d_max"] = grid.d_max
    target.attrs["units"] = json.dumps(
        {"unit_cell": "angstrom, degree", "d_min": "angstrom", "d_max": "angstrom"}
    )


def read_grid(group: h5py.Group) -> Grid:
    """The grid that ``write_grid`` stored."""
    attrs = group["grid"].attrs
    return Grid(
        unit_cell=tuple(map(float, attrs["unit_cell"])),
        ndiv=tuple(map(int, attrs["ndiv"])),
        space_group=str(attrs["space_group"]),
        d_min=float(attrs["d_min"]),
        d_max=float(attrs["d_max"]) if "d_max" in attrs else None,
    )


def write_provenance(
    handle: h5py.File, program: str, phil: str, inputs: list[str]
) -> None:
    """Record in ``/dials_diffuse`` what made a file, as a NeXus NXprocess."""
    root = handle.require_group(ROOT)
    root.attrs["NX_class"] = "NXprocess"
    root.attrs["schema"] = SCHEMA
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    for name, value in {
        "program": program,
        "version": dials_diffuse.__version__,
        "date": now.isoformat(),
        "phil": phil,
        "inputs": json.dumps(inputs),
    }.items():
        root.create_dataset(name, data=value)
