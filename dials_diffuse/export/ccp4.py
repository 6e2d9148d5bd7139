"""Maps in the CCP4/MRC format, for Coot, ChimeraX, PyMOL and the like.

These programs take a map for one in real space, in Å. Reciprocal space is blown up for
them: 1 Å⁻¹ becomes ``scale`` Å, and the reciprocal axes a*, b*, c* become the axes of the
cell. The whole bounding box is one unit cell of the map, and the voxel (0, 0, 0) sits at
the origin of the coordinates (by NXSTART, NYSTART, NZSTART). So a voxel with the
fractional Miller index h has the coordinates scale·(h a* + k b* + l c*), in the usual
Cartesian frame of the reciprocal cell: x along a*, y in the plane of a* and b*.
"""

from __future__ import annotations

import os
from typing import Sequence

import mrcfile
import numpy as np

from dials_diffuse.grid import Grid

LABEL_LENGTH = 80
MAX_LABELS = 10


def map_cell(grid: Grid, scale: float) -> tuple[float, ...]:
    """Unit cell of the map: the bounding box, lengths in Å, angles in degrees."""
    reciprocal = grid.cell.reciprocal().parameters()
    lengths = [
        scale * a * n / div for a, n, div in zip(reciprocal, grid.shape, grid.ndiv)
    ]
    return (*lengths, *reciprocal[3:])


def write_ccp4(
    path: str | os.PathLike,
    grid: Grid,
    box: np.ndarray,
    scale: float,
    labels: Sequence[str] = (),
) -> None:
    """Write a map in single precision.

    Args:
        path: File to make.
        grid: The grid of the map.
        box: Finite values, axes h, k, l.
        scale: Å of the map for each Å⁻¹ of reciprocal space.
        labels: Lines for the header, of at most 80 ASCII characters each.
    """
    # mrcfile takes the fastest axis last: x = h is the fastest in the file. The library
    # of cctbx writes the same format, but through a copy in double precision.
    values = np.ascontiguousarray(box.T, dtype=np.float32)
    with mrcfile.new(path, overwrite=True) as handle:
        handle.set_data(values)
        header = handle.header
        header.nxstart, header.nystart, header.nzstart = (-n for n in grid.half_size)
        header.mx, header.my, header.mz = grid.shape
        cell = map_cell(grid, scale)
        header.cella = tuple(cell[:3])
        header.cellb = tuple(cell[3:])
        header.ispg = 1
        for label in labels[: MAX_LABELS - 1]:  # mrcfile has written one itself
            handle.add_label(label[:LABEL_LENGTH])
