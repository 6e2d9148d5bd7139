"""Pixel masks in named layers on disk: ``diffuse_mask.h5``.

A NeXus file in which each detector is a group, and each panel one of its:

    /entry                       NXentry
        detector_1 ...           NXdetector
            identifiers          of the experiments that share the detector
            panel_0 ...          NXcollection
                mask             1 for good pixels, (n_slow, n_fast)
                layers/<name>    1 for pixels that the layer masks
        dials_diffuse            NXprocess   schema, program, version, PHIL

The geometry is in the experiment list: the identifiers say whose it is.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Mapping, Sequence

import h5py
import numpy as np

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.tables import check_masks
from dials_diffuse.io.inputs import read_mask
from dials_diffuse.io.nexus import COMPRESSION, ENTRY, describe, nexus_group
from dials_diffuse.io.observations import ROOT, check_schema, write_provenance
from dials_diffuse.util.hdf5 import HDF5Input, HDF5Output, damaged

SCHEMA = 1

PanelArrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class DetectorMask:
    """The mask of a detector.

    Attributes:
        identifiers: Of the experiments that share the detector.
        layers: Boolean arrays by panel, (n_slow, n_fast), True for masked pixels, for
            each layer.
        meanings: What the layers are, for those that need to be told.
    """

    identifiers: Sequence[str]
    layers: Mapping[str, PanelArrays]
    meanings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def good(self) -> tuple[np.ndarray, ...]:
        """The pixels of each panel that no layer masks."""
        return tuple(
            ~np.logical_or.reduce(panels) for panels in zip(*self.layers.values())
        )


def write_masks(
    path: str | os.PathLike,
    detectors: Sequence[DetectorMask],
    phil: str = "",
    inputs: Sequence[str] = (),
) -> None:
    """Write the masks of some detectors.

    Args:
        path: File to make; pass the path of ``atomic_path``.
        detectors: The masks, each with at least one layer.
        phil: The PHIL parameters that made them, as text.
        inputs: Names of the files that they were made from.

    Raises:
        ValueError: A mask has no layer.
        OSError: Not all could be written.
    """
    if not all(detector.layers for detector in detectors):
        raise ValueError("A mask needs a layer: give one that masks nothing")
    output = HDF5Output(path)
    try:
        output.file.attrs["NX_class"] = "NXroot"
        output.file.attrs["default"] = ENTRY
        entry = nexus_group(output.file, ENTRY, "NXentry")
        entry["title"] = "Pixel masks"
        write_provenance(entry, "dials.diffuse_mask", phil, list(inputs))
        entry[ROOT].attrs["schema"] = SCHEMA
        for number, detector in enumerate(detectors, 1):
            group = nexus_group(entry, f"detector_{number}", "NXdetector")
            _write_detector(group, detector)
            output.check()
    finally:
        output.close()


def _write_detector(group: h5py.Group, detector: DetectorMask) -> None:
    group.create_dataset(
        "identifiers", data=list(detector.identifiers), dtype=h5py.string_dtype()
    )
    for number, good in enumerate(detector.good):
        panel = nexus_group(group, f"panel_{number}", "NXcollection")
        _write_array(panel, "mask", good, "1 for good pixels, axes slow, fast")
        layers = nexus_group(panel, "layers", "NXcollection")
        # attributes keep the order, which groups do not
        layers.attrs["names"] = list(detector.layers)
        for name, panels in detector.layers.items():
            meaning = detector.meanings.get(name, f"1 for pixels masked as {name}")
            _write_array(layers, name, panels[number], meaning)


def _write_array(
    group: h5py.Group, name: str, values: np.ndarray, meaning: str
) -> None:
    data = np.asarray(values, dtype=np.uint8)
    describe(group.create_dataset(name, data=data, **COMPRESSION), "1", meaning)


class MaskFile(HDF5Input):
    """Reads masks in named layers.

    Attributes:
        identifiers: For each detector, those of its experiments.

    Raises:
        ValueError: The file is not a mask file of a known schema.
    """

    def _load(self) -> None:
        entry = self._file.get(ENTRY)
        if entry is None or ROOT not in entry or "detector_1/panel_0" not in entry:
            raise ValueError(
                f"{self.path} is not a mask in layers: give the output of "
                "dials.diffuse_mask"
            )
        check_schema(entry[ROOT], SCHEMA, self.path)
        self._detectors: list[h5py.Group] = []
        while (group := entry.get(f"detector_{len(self._detectors) + 1}")) is not None:
            self._detectors.append(group)
        self.identifiers = [
            [name.decode() for name in group["identifiers"][()]]
            for group in self._detectors
        ]

    def __len__(self) -> int:
        return len(self._detectors)

    def _panels(self, number: int) -> list[h5py.Group]:
        group = self._detectors[number]
        n_panels = sum(name.startswith("panel_") for name in group)
        return [group[f"panel_{i}"] for i in range(n_panels)]

    def layer_names(self, number: int = 0) -> list[str]:
        """The names of the layers of a detector, in their order."""
        return list(map(str, self._panels(number)[0]["layers"].attrs["names"]))

    def good(self, number: int = 0) -> tuple[np.ndarray, ...]:
        """The total mask of a detector.

        Returns:
            For each panel, True for good pixels, (n_slow, n_fast).

        Raises:
            ValueError: The file is damaged.
        """
        return self._read(number, "mask")

    def layer(self, name: str, number: int = 0) -> tuple[np.ndarray, ...]:
        """A layer of a detector.

        Returns:
            For each panel, True for masked pixels, (n_slow, n_fast).

        Raises:
            ValueError: There is no such layer, or the file is damaged.
        """
        if name not in self.layer_names(number):
            raise ValueError(
                f"{self.path} has no layer {name}: it has "
                f"{', '.join(self.layer_names(number))}"
            )
        return self._read(number, f"layers/{name}")

    def _read(self, number: int, name: str) -> tuple[np.ndarray, ...]:
        try:
            return tuple(p[name][()].astype(bool) for p in self._panels(number))
        except (KeyError, OSError) as e:
            raise ValueError(damaged(self.path, e)) from None


def read_masks(path: str | os.PathLike) -> list[tuple[np.ndarray, ...]]:
    """The total mask of each detector in a file.

    Returns:
        For each detector and panel, True for good pixels, (n_slow, n_fast).

    Raises:
        ValueError: The file is not a mask in layers, or it is damaged.
    """
    with MaskFile(path) as handle:
        return [handle.good(number) for number in range(len(handle))]


def masks_of_experiments(
    path: str | os.PathLike, experiments: ExperimentList
) -> dict[str, tuple[np.ndarray, ...]]:
    """The total mask of each experiment, by its identifier.

    Raises:
        ValueError: The file cannot be read, or has no mask for an experiment.
    """
    result: dict[str, tuple[np.ndarray, ...]] = {}
    with MaskFile(path) as handle:
        for number, identifiers in enumerate(handle.identifiers):
            result.update(dict.fromkeys(identifiers, handle.good(number)))
    missing = [e.identifier for e in experiments if e.identifier not in result]
    if missing:
        raise ValueError(
            f"{path} has no mask for {len(missing)} of {len(experiments)} experiments: "
            "give the one made for these, or the .mask file of their detector"
        )
    return result


def given_mask(path: str | None, experiments: ExperimentList) -> dict[str, Any]:
    """The mask that a user gives, in either kind of file, checked against experiments.

    Returns:
        What to replace in the settings of a stage: ``mask``, the same for all, from a
        file of dials.generate_mask, or ``masks``, by identifier, from layers; or nothing.

    Raises:
        ValueError: It cannot be read, or belongs to other images.
    """
    if path is None:
        return {}
    if not h5py.is_hdf5(path):
        mask = read_mask(path)
        for detector in experiments.detectors():
            check_masks(detector, mask, path)
        return {"mask": mask}
    masks = masks_of_experiments(path, experiments)
    for experiment in experiments:
        check_masks(experiment.detector, masks[experiment.identifier], path)
    return {"masks": masks}
