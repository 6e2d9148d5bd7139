"""Where the tests find diffraction images and observations.

``diffuse_data`` gives a folder of local test data; ``dials_data_or_local`` prefers images
that the pytest plug-in of dials_data provides. Tests of data that are absent are skipped.
``write_observations`` makes tables of voxel observations without images.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

# Threads of linear algebra wait for each other longer than small arrays take. Set before
# numpy is imported; commands that tests start inherit it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from cctbx import sgtbx
from dxtbx.model import Beam, Crystal, Experiment, ExperimentList

from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import COLUMNS, ObservationWriter

ROOT = Path(__file__).resolve().parent.parent

# Local data sets whose images dials_data offers too: its name of the set.
IN_DIALS_DATA = {"thaumatin_stills": "thaumatin_grid_scan"}

IMAGE_SUFFIXES = (".cbf", ".img", ".h5", ".nxs", ".bz2", ".gz")


class ImageSet(NamedTuple):
    """Images of one crystal, and the folder with what DIALS made of them, if any."""

    images: list[Path]
    processed: Path | None


@pytest.fixture(scope="session")
def diffuse_data():
    """Returns a function from the name of a data set to its folder.

    The data sets lie in the folder named by DIALS_DIFFUSE_DATA, or else in
    ../shared/data relative to the repository.
    """
    folder = ROOT / os.environ.get("DIALS_DIFFUSE_DATA", "../shared/data")

    def find(name: str) -> Path:
        path = folder / name
        if not path.is_dir():
            pytest.skip(f"no data set {name} in {folder} (set DIALS_DIFFUSE_DATA)")
        return path.resolve()

    return find


@pytest.fixture(scope="session")
def dials_data_or_local(request, diffuse_data):
    """Returns a function from the name of a data set to its ImageSet.

    Images come from dials_data if its plug-in is installed and can provide them.
    """

    def find(name: str) -> ImageSet:
        folder = _from_dials_data(request, name)
        if folder is not None:
            return ImageSet(_images(folder), None)
        folder = diffuse_data(name)
        processed = folder / "processed"
        return ImageSet(
            _images(folder / "images"), processed if processed.is_dir() else None
        )

    return find


def _from_dials_data(request, name: str) -> Path | None:
    if name not in IN_DIALS_DATA or not request.config.pluginmanager.hasplugin(
        "dials_data"
    ):
        return None
    try:
        return Path(request.getfixturevalue("dials_data")(IN_DIALS_DATA[name]))
    except pytest.skip.Exception:  # its way to say: not downloaded in this run
        return None


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in IMAGE_SUFFIXES)


@pytest.fixture
def write_observations(tmp_path):
    """Returns a function that writes an observation file and its experiment list.

    Its arguments are the name of the files without suffix, the grid and the columns of
    the rows: ``miller_index`` and others. Columns that are not given are zero, but the
    normalisation and the number of pixels are one. It sorts the rows, and returns the
    paths of the .expt and .refl files.
    """

    def write(
        name: str,
        grid: Grid,
        columns: dict[str, np.ndarray],
        identifiers: tuple[str, ...] = ("a", "b", "c"),
        rows_per_slab: int = 1000,
    ) -> tuple[str, str]:
        expt, refl = tmp_path / f"{name}.expt", tmp_path / f"{name}.refl"
        _experiments(grid, identifiers).as_file(str(expt))
        n = len(columns["miller_index"])
        rows = {
            key: np.zeros((n, 3) if column.width == 3 else n, column.dtype)
            for key, column in COLUMNS.items()
        }
        rows["normalisation"] += 1
        rows["num_pixels.valid"] += 1
        rows.update(columns)
        key = grid.key(rows["miller_index"])
        order = np.lexsort((rows["id"], key))
        key, rows = key[order], {k: v[order] for k, v in rows.items()}
        with ObservationWriter(refl, grid, dict(enumerate(identifiers))) as writer:
            starts = np.flatnonzero(np.diff(key, prepend=-1))
            cuts = starts[np.searchsorted(starts, range(0, n, rows_per_slab))[:n]]
            for start, stop in zip(cuts, [*cuts[1:], n]):
                writer.append({k: v[start:stop] for k, v in rows.items()})
        return str(expt), str(refl)

    return write


def _experiments(grid: Grid, identifiers: tuple[str, ...]) -> ExperimentList:
    """Experiments of one crystal without images."""
    axes = np.array(grid.cell.orthogonalization_matrix()).reshape(3, 3).T
    crystal = Crystal(*map(tuple, axes), sgtbx.space_group(grid.space_group))
    beam = Beam((0, 0, 1), 1.0)
    return ExperimentList(
        [
            Experiment(identifier=name, crystal=crystal, beam=beam)
            for name in identifiers
        ]
    )
