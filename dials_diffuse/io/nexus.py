"""The NeXus forms that our maps share."""

from __future__ import annotations

from typing import Callable, Iterable, Sequence

import h5py
import numpy as np

from cctbx import sgtbx

from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import (
    ROOT,
    check_schema,
    read_grid,
    write_grid,
    write_provenance,
)

ENTRY = "entry"
BOX_CHUNK = 32
# Fast compression: higher levels take longer and save little on noisy data.
COMPRESSION = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


def nexus_group(parent: h5py.Group, name: str, nx_class: str) -> h5py.Group:
    """A new group of a NeXus class."""
    group = parent.create_group(name)
    group.attrs["NX_class"] = nx_class
    return group


def describe(dataset: h5py.Dataset, units: str, meaning: str) -> None:
    """Say what a dataset holds, and in which unit."""
    dataset.attrs["units"] = units
    dataset.attrs["long_name"] = meaning


def make_map_entry(
    root: h5py.File,
    title: str,
    grid: Grid,
    schema: int,
    program: str,
    phil: str,
    inputs: Sequence[str] = (),
) -> h5py.Group:
    """The entry of a file whose default plot is the group ``map``, a map on a grid.

    Args:
        root: The file.
        title: Its title.
        grid: The grid.
        schema: Number of the layout.
        program, phil, inputs: What made it; see ``write_provenance``.

    Returns:
        The entry, with the groups ``dials_diffuse`` and ``sample``.
    """
    root.attrs["default"] = ENTRY
    root.attrs["NX_class"] = "NXroot"
    entry = nexus_group(root, ENTRY, "NXentry")
    entry.attrs["default"] = "map"
    entry["title"] = title
    write_provenance(entry, program, phil, list(inputs))
    entry[ROOT].attrs["schema"] = schema
    write_grid(entry[ROOT], grid)
    _write_sample(entry, grid)
    return entry


def find_map_entry(
    root: h5py.File, path: str, schema: int, dataset: str, what: str, program: str
) -> tuple[h5py.Group, Grid]:
    """The entry that ``make_map_entry`` made, and its grid.

    Args:
        root: The file.
        path: Its name.
        schema: The newest layout that can be read.
        dataset: Which files of this kind alone have.
        what: The kind.
        program: Writes such files.

    Raises:
        ValueError: The file is of another kind, or its layout too new.
    """
    entry = root.get(ENTRY)
    if entry is None or ROOT not in entry or dataset not in entry:
        raise ValueError(f"{path} is not {what}: give the output of {program}")
    check_schema(entry[ROOT], schema, path)
    return entry, read_grid(entry[ROOT])


def _write_sample(entry: h5py.Group, grid: Grid) -> None:
    """The cell and the symmetry of a grid, in the terms of NXsample."""
    sample = nexus_group(entry, "sample", "NXsample")
    cell = grid.cell
    basis = np.array(cell.fractionalization_matrix()).reshape(3, 3).T
    for name, value, units, meaning in (
        ("unit_cell_abc", grid.unit_cell[:3], "angstrom", "a, b, c"),
        (
            "unit_cell_alphabetagamma",
            grid.unit_cell[3:],
            "degree",
            "alpha, beta, gamma",
        ),
        ("unit_cell_volume", cell.volume(), "angstrom^3", "volume of the cell"),
        (
            "reciprocal_basis",
            basis,
            "1/angstrom",
            "a*, b*, c* in the columns; a along x, b in the xy plane",
        ),
    ):
        describe(sample.create_dataset(name, data=value), units, meaning)
    group = sgtbx.space_group(grid.space_group)
    sample["space_group"] = group.type().lookup_symbol()
    sample["hall_symbol"] = grid.space_group
    sample["laue_group"] = str(grid.laue_group.info())


def make_map_groups(
    entry: h5py.Group, grid: Grid, titles: Iterable[tuple[str, str]]
) -> None:
    """NXdata groups of dense arrays on the axes h, k, l of a grid.

    Args:
        entry: Where to make them.
        grid: The grid.
        titles: Names and titles; the others share the axes of the first.
    """
    first = None
    for name, title in titles:
        group = nexus_group(entry, name, "NXdata")
        group.attrs["signal"] = "intensity"
        group.attrs["axes"] = ["h", "k", "l"]
        for i, (axis, values) in enumerate(zip("hkl", grid.axes())):
            group.attrs[f"{axis}_indices"] = i
            if first is None:
                dataset = group.create_dataset(axis, data=values)
                describe(dataset, "r.l.u.", f"Miller index {axis}")
            else:
                group[axis] = first[axis]
        group["title"] = title
        first = first or group


def write_box(
    dataset: h5py.Dataset,
    values: np.ndarray,
    numbers: np.ndarray,
    check: Callable[[], None],
) -> None:
    """Fill a dense array from the values of the unique voxels.

    Args:
        dataset: The array, of the shape of the grid.
        values: The values that occur in it, shape (n,).
        numbers: Which of them each voxel has, of the shape of the grid.
        check: Called after each part, to find out whether the disk is full.
    """
    for start in range(0, len(numbers), dataset.chunks[0]):
        planes = slice(start, start + dataset.chunks[0])
        dataset[planes] = values[numbers[planes]]
        check()


def make_box(
    entry: h5py.Group, name: str, shape: tuple[int, ...], dtype: str, fill: float
) -> h5py.Dataset:
    """An empty dense array in compressed chunks."""
    return entry.create_dataset(
        name,
        shape=shape,
        dtype=dtype,
        chunks=tuple(min(BOX_CHUNK, n) for n in shape),
        fillvalue=fill,
        **COMPRESSION,
    )
