"""Where the tests find diffraction images.

``diffuse_data`` gives a folder of local test data; ``dials_data_or_local`` prefers images
that the pytest plug-in of dials_data provides. Tests of data that are absent are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

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
