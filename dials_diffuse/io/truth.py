"""The truth of a simulation on disk: ``truth.h5``.

A NeXus file like a merged map, with all that the images were made from:

    /entry                  NXentry
        map                 NXdata   intensity and its parts, means over the voxels
        asu                 NXcollection   the same for the symmetry-unique voxels
        isotropic           NXdata   solvent and Compton scattering against s
        air                 NXdata   scattering of the air against 2θ
        defects             NXcollection   faulty pixels of each panel
        bragg               NXcollection   |F|² of the unique reflections
        sample              NXsample   cell, symmetry, composition, scattering power
        series_1 ...        NXcollection   scales, absorption, identifiers of each series
        dials_diffuse       NXprocess   grid, program, version, PHIL

Intensities are in electrons² per unit cell. ``scattering_power`` turns them into what
merging finds, photons/(s.sr), where the scale of an image is one.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Mapping, Sequence

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
from dials_diffuse.util.hdf5 import HDF5Input, HDF5Output

SCHEMA = 1
PROGRAM = "dials.diffuse_simulate"
ELECTRONS = "electron^2"  # per unit cell

PARTS: dict[str, str] = {
    "intensity": "All but Bragg peaks: cloud + halo + solvent + compton",
    "cloud": "Cloudy diffuse scattering",
    "halo": "Halos around the Bragg positions",
    "solvent": "Bulk solvent",
    "compton": "Compton scattering",
}

DEFECTS: dict[str, tuple[str, str]] = {
    "hot": ("1", "pixels that always count too many, as slow * n_fast + fast"),
    "excess": ("photons", "what they count too many in each image"),
    "flickering": ("1", "pixels that count too many now and then"),
    "dead": ("1", "pixels that count nothing"),
}


@dataclasses.dataclass(frozen=True)
class SeriesTruth:
    """What is known of the images of one series.

    Attributes:
        identifiers: Of its experiments.
        scale: Relative scale k of each image.
        absorption: Strength a of the absorption of the sample.
        way_out, way_in: The vectors u and v of it.
    """

    identifiers: Sequence[str]
    scale: np.ndarray
    absorption: float
    way_out: np.ndarray
    way_in: np.ndarray


@dataclasses.dataclass(frozen=True)
class Truth:
    """All but the voxels.

    Attributes:
        composition: Atoms per cell.
        scattering_power: K, photons/(s sr electron²).
        isotropic: Columns s, solvent and compton.
        air: Columns two_theta (degrees) and rate (photons/(s sr)).
        defects: For each panel hot, excess, flickering and dead.
        miller_index: Unique reflections, shape (n, 3).
        f_squared: Their |F|², electrons².
        series: The series of images.
    """

    composition: Mapping[str, float]
    scattering_power: float
    isotropic: Mapping[str, np.ndarray]
    air: Mapping[str, np.ndarray]
    defects: Sequence[Mapping[str, np.ndarray]]
    miller_index: np.ndarray
    f_squared: np.ndarray
    series: Sequence[SeriesTruth]


def write_truth(
    path: str | os.PathLike,
    grid: Grid,
    index: np.ndarray,
    parts: Mapping[str, np.ndarray],
    numbers: np.ndarray,
    truth: Truth,
    phil: str = "",
) -> None:
    """Write a truth file.

    Args:
        path: File to make; pass the path of ``atomic_path``.
        grid: The voxel grid.
        index: The unique voxels, shape (n, 3).
        parts: Their ``PARTS``, electrons² per cell.
        numbers: Which of them each voxel of the bounding box is, -1 for none.
        truth: The rest.
        phil: The PHIL parameters, as text.
    """
    output = HDF5Output(path)
    try:
        title = "True diffuse scattering map"
        entry = make_map_entry(output.file, title, grid, SCHEMA, PROGRAM, phil)
        _write_sample(entry["sample"], truth)
        asu = nexus_group(entry, "asu", "NXcollection")
        describe(
            asu.create_dataset("index", data=index, dtype="int32", **COMPRESSION),
            "1",
            "voxel index h*ndiv in the asymmetric unit",
        )
        make_map_groups(entry, grid, [("map", "True diffuse scattering map")])
        for name, meaning in PARTS.items():
            dataset = asu.create_dataset(name, data=parts[name], **COMPRESSION)
            describe(dataset, ELECTRONS, meaning)
            output.check()
            box = make_box(entry, f"map/{name}", numbers.shape, "float32", np.nan)
            describe(box, ELECTRONS, meaning)
            # the last value is that of the voxels that have none: number -1
            write_box(box, np.append(parts[name], np.nan), numbers, output.check)
        _write_isotropic(nexus_group(entry, "isotropic", "NXdata"), truth)
        _write_air(nexus_group(entry, "air", "NXdata"), truth)
        _write_defects(nexus_group(entry, "defects", "NXcollection"), truth)
        _write_bragg(nexus_group(entry, "bragg", "NXcollection"), truth)
        for number, series in enumerate(truth.series, 1):
            group = nexus_group(entry, f"series_{number}", "NXcollection")
            _write_series(group, series)
        output.check()
    finally:
        output.close()


def _write_sample(sample: h5py.Group, truth: Truth) -> None:
    composition = nexus_group(sample, "composition", "NXcollection")
    for element, n_atoms in truth.composition.items():
        describe(
            composition.create_dataset(element, data=float(n_atoms)),
            "1",
            f"{element} atoms per unit cell",
        )
    describe(
        sample.create_dataset("scattering_power", data=truth.scattering_power),
        "photons/(s.sr.electron^2)",
        "flux x r_e^2 x illuminated cells",
    )


def _write_isotropic(group: h5py.Group, truth: Truth) -> None:
    group.attrs["signal"] = "compton"
    group.attrs["auxiliary_signals"] = ["solvent"]
    group.attrs["axes"] = ["s"]
    for name, values in truth.isotropic.items():
        units = "1/angstrom" if name == "s" else ELECTRONS
        meaning = "1/d" if name == "s" else PARTS[name]
        describe(group.create_dataset(name, data=values), units, meaning)


def _write_air(group: h5py.Group, truth: Truth) -> None:
    group.attrs["signal"] = "rate"
    group.attrs["axes"] = ["two_theta"]
    dataset = group.create_dataset("two_theta", data=truth.air["two_theta"])
    describe(dataset, "degree", "scattering angle")
    dataset = group.create_dataset("rate", data=truth.air["rate"])
    describe(dataset, "photons/(s.sr)", "scattering of the air")


def _write_defects(group: h5py.Group, truth: Truth) -> None:
    for number, defects in enumerate(truth.defects):
        panel = nexus_group(group, f"panel_{number}", "NXcollection")
        for name, values in defects.items():
            units, meaning = DEFECTS[name]
            describe(panel.create_dataset(name, data=values), units, meaning)


def _write_bragg(group: h5py.Group, truth: Truth) -> None:
    index = np.asarray(truth.miller_index, dtype=np.int32)
    dataset = group.create_dataset("miller_index", data=index, **COMPRESSION)
    describe(dataset, "1", "unique reflections")
    dataset = group.create_dataset("f_squared", data=truth.f_squared, **COMPRESSION)
    describe(dataset, ELECTRONS, "|F|^2 with displacements, without bulk solvent")


def _write_series(group: h5py.Group, series: SeriesTruth) -> None:
    group.create_dataset(
        "identifiers", data=list(series.identifiers), dtype=h5py.string_dtype()
    )
    describe(
        group.create_dataset("scale", data=series.scale), "1", "scale of each image"
    )
    absorption = nexus_group(group, "absorption", "NXcollection")
    absorption["formula"] = "exp(-strength * ((1 + u.e)/2 + (1 - v.e0)/2) / 2)"
    describe(
        absorption.create_dataset("strength", data=series.absorption),
        "1",
        "mu x path, longest less shortest",
    )
    for name, vector in (("u", series.way_out), ("v", series.way_in)):
        dataset = absorption.create_dataset(name, data=vector)
        describe(dataset, "1", "unit vector in the frame of the goniometer head")


class TruthFile(HDF5Input):
    """Reads a truth file.

    Raises:
        ValueError: The file is not a truth file of a known schema.
    """

    def _load(self) -> None:
        what = "the truth of a simulation"
        entry, self.grid = find_map_entry(
            self._file, self.path, SCHEMA, "asu/cloud", what, PROGRAM
        )
        self._entry = entry
        self.scattering_power = float(entry["sample/scattering_power"][()])
        self.composition = {
            name: float(value[()])
            for name, value in entry["sample/composition"].items()
        }

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """``index`` or ``PARTS`` of all unique voxels."""
        return {name: self._entry[f"asu/{name}"][()] for name in names}

    def bragg(self) -> tuple[np.ndarray, np.ndarray]:
        """Unique reflections, shape (n, 3), and their |F|²."""
        group = self._entry["bragg"]
        return group["miller_index"][()], group["f_squared"][()]

    def isotropic(self) -> dict[str, np.ndarray]:
        """Columns s, solvent and compton."""
        return {name: value[()] for name, value in self._entry["isotropic"].items()}

    def air(self) -> dict[str, np.ndarray]:
        """Columns two_theta (degrees) and rate (photons/(s sr))."""
        return {name: value[()] for name, value in self._entry["air"].items()}

    def defects(self) -> list[dict[str, np.ndarray]]:
        """Faulty pixels of each panel."""
        group = self._entry["defects"]
        return [
            {name: value[()] for name, value in group[f"panel_{i}"].items()}
            for i in range(len(group))
        ]

    def series(self) -> list[SeriesTruth]:
        """What is known of each series of images."""
        result = []
        while (group := self._entry.get(f"series_{len(result) + 1}")) is not None:
            absorption = group["absorption"]
            result.append(
                SeriesTruth(
                    identifiers=[name.decode() for name in group["identifiers"][()]],
                    scale=group["scale"][()],
                    absorption=float(absorption["strength"][()]),
                    way_out=absorption["u"][()],
                    way_in=absorption["v"][()],
                )
            )
        return result
