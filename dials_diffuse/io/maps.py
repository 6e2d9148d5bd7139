"""Merged maps on disk: ``merged.h5``.

A NeXus file that NeXpy, silx and h5web open at the map without help:

    /entry                 NXentry
        map                NXdata   intensity, intensity_errors, n_obs on h, k, l
        half_1, half_2     NXdata   intensity of the two halves
        shells             NXdata   statistics in resolution shells
        isotropic          NXdata   mean intensity in shells of 0.01 Å⁻¹, observed ones
        asu                NXcollection   the symmetry-unique voxels: the exact data
        sample             NXsample   reference cell, space group, reciprocal basis
        experiments        NXcollection   identifiers of the experiments
        dials_diffuse      NXprocess   grid, program, version, PHIL and inputs

The dense arrays are single precision and fill the bounding box by symmetry; voxels that
were not observed are NaN. Later stages read the list in ``asu``, which has the sums.
"""

from __future__ import annotations

import dataclasses
import os
from types import TracebackType
from typing import Any, Iterator, Mapping, Sequence

import h5py
import numpy as np

from dials_diffuse.grid import Grid
from dials_diffuse.io.nexus import (
    COMPRESSION,
    describe,
    find_map_entry,
    make_box,
    make_map_entry,
    make_map_groups,
    nexus_group,
    write_box,
)
from dials_diffuse.io.observations import Column
from dials_diffuse.util.hdf5 import HDF5Input, HDF5Output

SCHEMA = 1
PROGRAM = "dials.diffuse_merge"
INTENSITY = "photons/(s.sr)"
ASU_CHUNK = 1 << 16

SUM_COLUMNS: dict[str, Column] = {
    "counts": Column("float64", 1, "photons", "sum of the counts N"),
    "background": Column("float64", 1, "photons", "sum of the background B"),
    "background_variance": Column(
        "float64", 1, "photons^2", "variance V of B, (a_i/a)^2 times that of table i"
    ),
    "normalisation": Column("float64", 1, "s.sr", "sum of scale x normalisation M"),
    "fractional": Column(
        "float64",
        1,
        "s^2.sr^2",
        "sum F of (a_i/a x b_i x scale x normalisation)^2, error model of table i",
    ),
    "n_pixels": Column("int64", 1, "1", "number of pixels"),
    "n_obs": Column(
        "int32", 1, "1", "number of observations (voxels seen by one experiment)"
    ),
    "intensity": Column("float64", 1, INTENSITY, "(N - B)/M"),
    "sigma": Column(
        "float64",
        1,
        INTENSITY,
        "a sqrt(r N' + V + F I^2)/M, N' expected counts, r mean of (a_i/a)^2, a largest a_i",
    ),
}

ASU_COLUMNS: dict[str, Column] = {
    "index": Column("int32", 3, "1", "voxel index h*ndiv in the asymmetric unit"),
    "d": Column("float64", 1, "angstrom", "d-spacing of the voxel centre"),
    **SUM_COLUMNS,
    **{
        f"half_{half}/{name}": column
        for half in (1, 2)
        for name, column in SUM_COLUMNS.items()
    },
}

# Dense arrays: type, value where not observed, unit, meaning.
BOXES: dict[str, tuple[str, float, str, str]] = {
    "map/intensity": ("float32", np.nan, INTENSITY, "Diffuse intensity"),
    "map/intensity_errors": ("float32", np.nan, INTENSITY, "Standard error"),
    "map/n_obs": ("int32", 0, "1", "Number of observations"),
    "half_1/intensity": ("float32", np.nan, INTENSITY, "Intensity of half 1"),
    "half_2/intensity": ("float32", np.nan, INTENSITY, "Intensity of half 2"),
}


@dataclasses.dataclass(frozen=True)
class Table:
    """The columns of a table, and the one to plot against ``s``."""

    signal: str
    columns: Mapping[str, Column]


TABLES: dict[str, Table] = {
    "shells": Table(
        "cc_half",
        {
            "s": Column("float64", 1, "1/angstrom", "1/d, middle of the shell"),
            "d_max": Column("float64", 1, "angstrom", "upper limit of d"),
            "d_min": Column("float64", 1, "angstrom", "lower limit of d"),
            "n_obs": Column("int64", 1, "1", "observations"),
            "n_voxels": Column("int64", 1, "1", "observed unique voxels"),
            "n_possible": Column("int64", 1, "1", "possible unique voxels"),
            "completeness": Column("float64", 1, "1", "fraction observed"),
            "multiplicity": Column("float64", 1, "1", "observations per voxel"),
            "mean_intensity": Column("float64", 1, INTENSITY, "mean intensity"),
            "mean_i_over_sigma": Column(
                "float64", 1, "1", "mean of intensity / standard error"
            ),
            "n_pairs": Column("int64", 1, "1", "voxels observed in both halves"),
            "cc_half": Column("float64", 1, "1", "CC1/2 of the anisotropic part"),
        },
    ),
    "isotropic": Table(
        "intensity",
        {
            "s": Column(
                "float64", 1, "1/angstrom", "1/d, mean of the shell of 0.01 1/angstrom"
            ),
            "intensity": Column("float64", 1, INTENSITY, "mean intensity"),
            "n_voxels": Column("int64", 1, "1", "observed unique voxels"),
        },
    ),
}


class MapWriter:
    """Writes a merged map: first the list of unique voxels, then what is made of it.

    Args:
        path: File to make; pass the path of ``atomic_path``.
        grid: The voxel grid.
        identifiers: Identifiers of the merged experiments.
        phil: The PHIL parameters that made the map, as text.
        inputs: Names of the files that it was made from.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        grid: Grid,
        identifiers: Sequence[str],
        phil: str = "",
        inputs: Sequence[str] = (),
    ) -> None:
        self.grid = grid
        self.n_voxels = 0
        self._output = HDF5Output(path)
        self._entry = make_map_entry(
            self._output.file,
            "Diffuse scattering map",
            grid,
            SCHEMA,
            PROGRAM,
            phil,
            inputs,
        )
        experiments = nexus_group(self._entry, "experiments", "NXcollection")
        experiments.create_dataset(
            "identifiers", data=list(identifiers), dtype=h5py.string_dtype()
        )
        self._asu = nexus_group(self._entry, "asu", "NXcollection")
        for half in ("half_1", "half_2"):
            nexus_group(self._asu, half, "NXcollection")
        for name, column in ASU_COLUMNS.items():
            _make_column(self._asu, name, column)
        titles = (
            ("map", "Diffuse scattering map"),
            ("half_1", "Half 1 of the observations"),
            ("half_2", "Half 2 of the observations"),
        )
        make_map_groups(self._entry, grid, titles)

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append unique voxels to the list, with some of ``ASU_COLUMNS``.

        The columns that are not given are filled with zeros until ``update``.
        """
        start = self.n_voxels
        self.n_voxels += len(columns["index"])
        for name in ASU_COLUMNS:
            self._asu[name].resize(self.n_voxels, axis=0)
        self.update(start, columns)

    def update(self, start: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write columns of the list from the voxel number ``start`` on."""
        for name, values in columns.items():
            self._asu[name][start : start + len(values)] = values
            self._output.check()

    def blocks(
        self, names: Sequence[str], max_rows: int = 1 << 20
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Columns of the list block by block, each with the number of its first row."""
        for start in range(0, self.n_voxels, max_rows):
            stop = min(start + max_rows, self.n_voxels)
            yield start, {name: self._asu[name][start:stop] for name in names}

    def write_box(self, name: str, values: np.ndarray, numbers: np.ndarray) -> None:
        """Write one of the dense arrays ``BOXES``, axes h, k, l.

        Args:
            name: Name of the array.
            values: The values that occur in it, shape (n,).
            numbers: Which of them each voxel has, of the shape of the grid.
        """
        dtype, fill, units, meaning = BOXES[name]
        dataset = make_box(self._entry, name, numbers.shape, dtype, fill)
        describe(dataset, units, meaning)
        write_box(dataset, values, numbers, self._output.check)

    def write_table(self, name: str, columns: Mapping[str, np.ndarray]) -> None:
        """Write one of ``TABLES``, with all of its columns."""
        table = TABLES[name]
        group = nexus_group(self._entry, name, "NXdata")
        group.attrs["signal"] = table.signal
        group.attrs["axes"] = ["s"]
        for key, column in table.columns.items():
            dataset = group.create_dataset(key, data=columns[key], dtype=column.dtype)
            describe(dataset, column.units, column.meaning)

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: Not all could be written.
        """
        self._output.close()

    def __enter__(self) -> MapWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class VoxelList:
    """The symmetry-unique voxels of a merged map.

    Args:
        grid: The voxel grid.
        columns: Each of ``ASU_COLUMNS`` that was asked for, shape (n,) or (n, 3).
    """

    grid: Grid
    columns: Mapping[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


class MapFile(HDF5Input):
    """Reads a merged map.

    Raises:
        ValueError: The file is not a merged map of a known schema.
    """

    def _load(self) -> None:
        self._entry, self.grid = find_map_entry(
            self._file, self.path, SCHEMA, "asu/sigma", "a merged map", PROGRAM
        )
        self.identifiers = [
            name.decode() for name in self._entry["experiments/identifiers"][()]
        ]
        self.n_voxels: int = len(self._entry["asu/index"])

    def blocks(
        self, names: Sequence[str], max_rows: int = 1 << 20
    ) -> Iterator[dict[str, np.ndarray]]:
        """Columns of the unique voxels, block by block."""
        for start in range(0, self.n_voxels, max_rows):
            stop = min(start + max_rows, self.n_voxels)
            yield {name: self._entry[f"asu/{name}"][start:stop] for name in names}

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of all unique voxels."""
        return {name: self._entry[f"asu/{name}"][()] for name in names}

    def box(self, name: str = "map/intensity") -> np.ndarray:
        """One of the dense arrays ``BOXES``, axes h, k, l."""
        return self._entry[name][()]

    def layer(self, name: str, axis: int, value: int = 0) -> np.ndarray:
        """The layer of a dense array where one index has an integer value.

        Args:
            name: One of ``BOXES``.
            axis: 0, 1 or 2 for h, k or l.
            value: Miller index of the layer.

        Raises:
            ValueError: The layer lies outside the map.
        """
        place = self.grid.half_size[axis] + value * self.grid.ndiv[axis]
        if not 0 <= place < self.grid.shape[axis]:
            raise ValueError(
                f"{self.path} has no layer {'hkl'[axis]}={value}: the map ends at "
                f"{self.grid.half_size[axis] / self.grid.ndiv[axis]:g}"
            )
        selection: list[Any] = [slice(None)] * 3
        selection[axis] = place
        return self._entry[name][tuple(selection)]

    def table(self, name: str) -> dict[str, np.ndarray]:
        """The columns of ``shells`` or ``isotropic``."""
        return {key: values[()] for key, values in self._entry[name].items()}


def read_map(
    path: str | os.PathLike,
    names: Sequence[str] = ("index", "d", "intensity", "sigma", "n_obs"),
) -> VoxelList:
    """The unique voxels of a merged map, with some of ``ASU_COLUMNS``.

    Raises:
        ValueError: The file is not a merged map.
    """
    with MapFile(path) as handle:
        return VoxelList(handle.grid, handle.columns(names))


def _make_column(group: h5py.Group, name: str, column: Column) -> None:
    """An empty column that can grow."""
    shape = (0,) if column.width == 1 else (0, column.width)
    dataset = group.create_dataset(
        name,
        shape=shape,
        maxshape=(None, *shape[1:]),
        chunks=(ASU_CHUNK, *shape[1:]),
        dtype=column.dtype,
        **COMPRESSION,
    )
    describe(dataset, column.units, column.meaning)
