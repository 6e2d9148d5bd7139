"""Maps as numpy archives."""

from __future__ import annotations

import os
import zipfile
from typing import Iterable

import numpy as np


def write_npz(
    path: str | os.PathLike, arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write arrays as ``numpy.savez_compressed`` does, but one at a time.

    Args:
        path: File to make.
        arrays: Name and values of each array; a generator keeps only one in memory.
    """
    with zipfile.ZipFile(
        path, "w", compression=zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive:
        for name, values in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(
                    member, np.asanyarray(values), allow_pickle=False
                )
