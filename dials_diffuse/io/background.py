"""The background of images on disk: ``diffuse_background.h5``.

    /entry                  NXentry
        profiles            NXdata   intensity and variance of each image against s
        images              NXcollection   identifier, array index, base and its factor
        bases               NXcollection   panel_0, panel_0_variance ...: counts per second
                            of images without the crystal, (n_bases, n_slow, n_fast)
        grids               NXcollection   panel_0, panel_0_variance ...: intensity at
                            nodes, (n_images, n_slow, n_fast)
        dials_diffuse       NXprocess   method, corrections, program, version, PHIL

Only the parts that a method makes are there. Arrays are chunked by image and by base, so
the terms of one image are read without those of the others. The formula is that of
``dials_diffuse.background.model``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Mapping, Sequence

import h5py
import numpy as np

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.background.model import (
    BackgroundAxes,
    BackgroundModel,
    ImageBackground,
    find_image,
)
from dials_diffuse.extraction.blocks import images_of
from dials_diffuse.extraction.settings import CorrectionSettings
from dials_diffuse.io.nexus import COMPRESSION, ENTRY, describe, nexus_group
from dials_diffuse.io.observations import ROOT, check_schema, write_provenance
from dials_diffuse.util.hdf5 import HDF5Input, HDF5Output, damaged

SCHEMA = 1
INTENSITY = "photons/(s.sr)"
IMAGE_COLUMNS: dict[str, tuple[type, str, str]] = {
    "experiment": (np.int32, "1", "number of the experiment, in identifiers"),
    "array_index": (np.int32, "1", "array index in the scan, 0 for a still without"),
    "base_index": (np.int32, "1", "number of the base, -1 for none"),
    "rate_scale": (np.float64, "s", "factor of the base"),
}


class BackgroundWriter:
    """Writes a background image by image.

    Args:
        path: File to make; pass the path of ``atomic_path``.
        method: How it is made.
        corrections: The factors of the normalisation.
        axes: Where the points of profiles and grids are.
        phil: The PHIL parameters, as text.
        inputs: Names of the input files.
        counting: What counts were made with: gain and trusted_range, None for those of
            the panels.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        method: str,
        corrections: CorrectionSettings,
        axes: BackgroundAxes,
        phil: str = "",
        inputs: Sequence[str] = (),
        counting: Mapping[str, Any] | None = None,
    ) -> None:
        self.axes = axes
        self._output = HDF5Output(path)
        root = self._output.file
        root.attrs["NX_class"] = "NXroot"
        root.attrs["default"] = ENTRY
        self._entry = nexus_group(root, ENTRY, "NXentry")
        self._entry["title"] = "Background of images"
        write_provenance(self._entry, "dials.diffuse_background", phil, list(inputs))
        process = self._entry[ROOT]
        process.attrs["schema"] = SCHEMA
        process.attrs["method"] = method
        process.attrs["corrections"] = json.dumps(dataclasses.asdict(corrections))
        process.attrs["counting"] = json.dumps(counting or {})
        self._bases: list[tuple[float, int]] = []
        self._columns: dict[str, list] = {name: [] for name in IMAGE_COLUMNS}
        self._identifiers: dict[str, int] = {}

    def add_base(
        self,
        rates: Sequence[np.ndarray],
        variances: Sequence[np.ndarray],
        phi: float | None,
        n_images: int,
    ) -> None:
        """Add a base: an array per panel, (n_slow, n_fast).

        Args:
            rates: Photons per second.
            variances: Their variances.
            phi: Middle of the range of rotation in degrees, or None.
            n_images: How many images it was made from.
        """
        group = self._entry.get("bases")
        if group is None:
            group = nexus_group(self._entry, "bases", "NXcollection")
        for number, (rate, variance) in enumerate(zip(rates, variances)):
            name = f"panel_{number}"
            self._append(group, name, rate, "photons/s", "rate without the crystal")
            self._append(
                group, f"{name}_variance", variance, "photons^2/s^2", "its variance"
            )
        self._bases.append((np.nan if phi is None else phi, n_images))

    def add_image(
        self, identifier: str, array_index: int, terms: ImageBackground
    ) -> None:
        """Add the terms of an image."""
        number = self._identifiers.setdefault(identifier, len(self._identifiers))
        base = -1 if terms.base_index is None else terms.base_index
        for name, value in zip(
            IMAGE_COLUMNS, (number, array_index, base, terms.rate_scale)
        ):
            self._columns[name].append(value)
        if terms.profile is not None:
            self._add_profile(terms)
        if terms.grids is not None:
            self._add_grids(terms)

    def _add_profile(self, terms: ImageBackground) -> None:
        group = self._entry.get("profiles")
        if group is None:
            group = nexus_group(self._entry, "profiles", "NXdata")
            self._entry.attrs["default"] = "profiles"
            group.attrs["signal"] = "intensity"
            group.attrs["axes"] = [".", "s"]
            s = self.axes.s_start + self.axes.s_step * np.arange(len(terms.profile))
            describe(group.create_dataset("s", data=s), "1/angstrom", "1/d")
        self._append(group, "intensity", terms.profile, INTENSITY, "radial background")
        self._append(
            group,
            "variance",
            terms.profile_variance,
            "photons^2/(s^2.sr^2)",
            "variance of the radial background",
        )

    def _add_grids(self, terms: ImageBackground) -> None:
        group = self._entry.get("grids")
        if group is None:
            group = nexus_group(self._entry, "grids", "NXcollection")
            spacing = group.create_dataset("spacing", data=self.axes.spacing_px)
            describe(spacing, "px", "distance of the nodes; the first is at px 0, 0")
        for number, pair in enumerate(zip(terms.grids, terms.grid_variances)):
            name = f"panel_{number}"
            self._append(
                group, name, pair[0], INTENSITY, "what the radial background lacks"
            )
            self._append(
                group,
                f"{name}_variance",
                pair[1],
                "photons^2/(s^2.sr^2)",
                "variance of it",
            )

    def _append(
        self, group: h5py.Group, name: str, values: np.ndarray, units: str, meaning: str
    ) -> None:
        """Append an array along the first axis of a dataset."""
        dataset = group.get(name)
        if dataset is None:
            dataset = group.create_dataset(
                name,
                shape=(0, *values.shape),
                maxshape=(None, *values.shape),
                chunks=(1, *values.shape),
                dtype="float32" if values.ndim == 2 else "float64",
                **COMPRESSION,
            )
            describe(dataset, units, meaning)
        dataset.resize(len(dataset) + 1, axis=0)
        dataset[-1] = values
        self._output.check()

    def close(self) -> None:
        """Write the table of images and close the file."""
        group = nexus_group(self._entry, "images", "NXcollection")
        group.create_dataset(
            "identifiers", data=list(self._identifiers), dtype=h5py.string_dtype()
        )
        for name, (dtype, units, meaning) in IMAGE_COLUMNS.items():
            values = np.array(self._columns[name], dtype=dtype)
            describe(group.create_dataset(name, data=values), units, meaning)
        if self._bases:
            phi, n_images = np.array(self._bases).T
            bases = self._entry["bases"]
            describe(
                bases.create_dataset("phi", data=phi), "degree", "middle of the range"
            )
            describe(
                bases.create_dataset("n_images", data=n_images.astype(np.int32)),
                "1",
                "images added up",
            )
        self._output.close()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, exc_type: type | None, *args: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self._output.close()


class BackgroundFile(HDF5Input):
    """Reads a background, image by image.

    Attributes:
        method: How it was made.
        corrections: The factors of the normalisation that profiles and grids refer to.
        counting: gain and trusted_range that it was made with, None for the panels' own.
        axes: Where their points are.
        images: Identifier and array index of each image, in the order of the file.
        n_bases: Number of bases.

    Raises:
        ValueError: The file is not a background of a known schema.
    """

    def _load(self) -> None:
        entry = self._file.get(ENTRY)
        root = None if entry is None else entry.get(ROOT)
        if root is None or "method" not in root.attrs:
            raise ValueError(
                f"{self.path} is not a background: give the output of "
                "dials.diffuse_background"
            )
        check_schema(root, SCHEMA, self.path)
        self._entry = entry
        self.method = str(root.attrs["method"])
        self.corrections = _corrections(root.attrs["corrections"])
        self.counting: dict[str, Any] = json.loads(root.attrs["counting"])
        images = entry["images"]
        self._columns = {name: images[name][()] for name in IMAGE_COLUMNS}
        names = images["identifiers"].asstr()[()]
        self.images: list[tuple[str, int]] = [
            (str(names[i]), int(j))
            for i, j in zip(self._columns["experiment"], self._columns["array_index"])
        ]
        self._rows = {image: row for row, image in enumerate(self.images)}
        s = entry["profiles/s"][()] if "profiles" in entry else np.array([0.0, 0.005])
        spacing = int(entry["grids/spacing"][()]) if "grids" in entry else 0
        self.axes = BackgroundAxes(float(s[0]), float(s[1] - s[0]), spacing)
        self.n_bases = len(entry["bases/phi"]) if "bases" in entry else 0

    def check_corrections(self, corrections: CorrectionSettings) -> None:
        """Check that profiles and grids refer to the normalisation that is used.

        Raises:
            ValueError: They do not.
        """
        if self.method not in ("radial", "modal"):
            return
        for name, value in dataclasses.asdict(self.corrections).items():
            other = getattr(corrections, name)
            if value != other:
                raise ValueError(
                    f"{self.path} was made with corrections.{name}={value}, not {other}: "
                    "use the same corrections for both, or make it again"
                )

    def check_counting(
        self, gain: float | None, trusted_range: tuple[float, float] | None
    ) -> None:
        """Check that photons were counted as they are now.

        Raises:
            ValueError: They were not.
        """
        now = {"gain": gain, "trusted_range": trusted_range and list(trusted_range)}
        for name, value in now.items():
            made_with = self.counting.get(name)
            if made_with != value:
                raise ValueError(
                    f"{self.path} was made with {name}={made_with}, not {value}: use the "
                    "same for both, or make it again"
                )

    def of_image(self, identifier: str, array_index: int) -> ImageBackground:
        """The terms of an image; ``array_index`` is 0 for a still without a scan.

        Raises:
            ValueError: The file does not know the image, or is damaged.
        """
        row = find_image(self._rows, identifier, array_index)
        try:
            return self._terms(row)
        except (KeyError, OSError) as e:
            raise ValueError(damaged(self.path, e)) from None

    def _terms(self, row: int) -> ImageBackground:
        base = int(self._columns["base_index"][row])
        profile = variance = grids = grid_variances = None
        if "profiles" in self._entry:
            group = self._entry["profiles"]
            profile, variance = group["intensity"][row], group["variance"][row]
        if "grids" in self._entry:
            group = self._entry["grids"]
            panels = range(len([n for n in group if n.endswith("_variance")]))
            grids, grid_variances = (
                tuple(group[f"panel_{i}{end}"][row].astype(float) for i in panels)
                for end in ("", "_variance")
            )
        return ImageBackground(
            base_index=base if base >= 0 else None,
            rate_scale=float(self._columns["rate_scale"][row]),
            profile=profile,
            profile_variance=variance,
            grids=grids,
            grid_variances=grid_variances,
        )

    def base(
        self, number: int
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """A base and its variance, float32, an array per panel.

        Raises:
            ValueError: The file is damaged.
        """
        try:
            group = self._entry["bases"]
            panels = range(len([n for n in group if n.endswith("_variance")]))
            return (
                tuple(group[f"panel_{i}"][number] for i in panels),
                tuple(group[f"panel_{i}_variance"][number] for i in panels),
            )
        except (KeyError, OSError) as e:
            raise ValueError(damaged(self.path, e)) from None

    def read(self) -> BackgroundModel:
        """The whole background; for small files and tests."""
        bases = [self.base(i) for i in range(self.n_bases)]
        return BackgroundModel(
            method=self.method,
            corrections=self.corrections,
            axes=self.axes,
            images={image: self.of_image(*image) for image in self.images},
            bases=tuple(rates for rates, _ in bases),
            base_variances=tuple(variances for _, variances in bases),
        )


def _corrections(text: str) -> CorrectionSettings:
    values = json.loads(text)
    normal = values["polarization_normal"]
    values["polarization_normal"] = None if normal is None else tuple(normal)
    return CorrectionSettings(**values)


def check_images(background: BackgroundFile, experiments: ExperimentList) -> None:
    """Check that a background knows all images of some experiments.

    Raises:
        ValueError: It lacks some.
    """
    known = set(background.images)
    missing = [
        (e.identifier, i)
        for e in experiments
        for i in images_of(e)
        if (e.identifier, i) not in known
    ]
    if missing:
        raise ValueError(
            f"{background.path} has no background for {len(missing)} images, the first of "
            f"them image {missing[0][1] + 1} of experiment {missing[0][0]}: make one for "
            "these experiments"
        )
