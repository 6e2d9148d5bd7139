"""Pixel masks in named layers on disk: ``diffuse_mask.h5``.

A NeXus file in which each detector is a group, and each panel one of its:

    /entry                       NXentry
        detector_1 ...           NXdetector
            identifiers          of the experiments that share the detector
            panel_0 ...          NXcollection
                mask             1 for good pixels, (n_slow, n_fast)
                layers/<name>    1 for pixels that the layer masks
            image_layers         NXcollection
                <name>           NXcollection, a layer of one image, as bragg: no part
                    panel_0 ...  of the mask; attributes say which image it is
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
HDF5_SUFFIXES = (".h5", ".hdf5", ".nxs")

PanelArrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageLayer:
    """A layer that belongs to one image, and is no part of the mask of the detector.

    Attributes:
        panels: Boolean arrays, (n_slow, n_fast), True for pixels left out.
        identifier: Of the experiment of the image.
        image: Number of the image, as in the scan.
        file: File of the image.
        meaning: What the layer leaves out.
    """

    panels: PanelArrays
    identifier: str
    image: int
    file: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class DetectorMask:
    """The mask of a detector.

    Attributes:
        identifiers: Of the experiments that share the detector.
        layers: Boolean arrays by panel, (n_slow, n_fast), True for masked pixels, for
            each layer.
        meanings: What the layers are, for those that need to be told.
        image_layers: Layers of single images, by name.
    """

    identifiers: Sequence[str]
    layers: Mapping[str, PanelArrays]
    meanings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    image_layers: Mapping[str, ImageLayer] = dataclasses.field(default_factory=dict)

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
    if detector.image_layers:
        images = nexus_group(group, "image_layers", "NXcollection")
        images.attrs["names"] = list(detector.image_layers)
        for name, layer in detector.image_layers.items():
            _write_image_layer(nexus_group(images, name, "NXcollection"), layer)


def _write_image_layer(group: h5py.Group, layer: ImageLayer) -> None:
    group.attrs["identifier"] = layer.identifier
    group.attrs["image"] = layer.image
    group.attrs["file"] = layer.file
    group.attrs["meaning"] = layer.meaning
    for number, panel in enumerate(layer.panels):
        meaning = f"1 for pixels {layer.meaning} in this image; not in the mask"
        _write_array(group, f"panel_{number}", panel, meaning)


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
        try:
            self.identifiers = [
                [name.decode() for name in group["identifiers"][()]]
                for group in self._detectors
            ]
        except (AttributeError, TypeError) as e:  # no list of texts
            raise ValueError(damaged(self.path, e)) from None

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

    def image_layer_names(self, number: int = 0) -> list[str]:
        """The names of the layers of a detector that belong to one image."""
        group = self._detectors[number].get("image_layers")
        return [] if group is None else list(map(str, group.attrs["names"]))

    def image_layer(self, name: str, number: int = 0) -> ImageLayer:
        """A layer that belongs to one image, as ``bragg``.

        Raises:
            ValueError: There is no such layer, or the file is damaged.
        """
        names = self.image_layer_names(number)
        if name not in names:
            raise ValueError(
                f"{self.path} has no layer {name} of an image: it has "
                f"{', '.join(names) or 'none'}"
            )
        group = self._detectors[number]["image_layers"][name]
        n_panels = len(self._panels(number))
        try:
            return ImageLayer(
                panels=tuple(
                    group[f"panel_{i}"][()].astype(bool) for i in range(n_panels)
                ),
                identifier=str(group.attrs["identifier"]),
                image=int(group.attrs["image"]),
                file=str(group.attrs["file"]),
                meaning=str(group.attrs["meaning"]),
            )
        except (KeyError, OSError) as e:
            raise ValueError(damaged(self.path, e)) from None

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


def check_kind(path: str) -> None:
    """Refuse a file that cannot be a mask of either kind, before it is read as one.

    Raises:
        ValueError: It is empty, or should be HDF5 by its name or its beginning and
            is not, or not to its end.
    """
    if not os.path.isfile(path):
        return  # whoever reads it says so
    found = None
    if os.path.getsize(path) == 0:
        found = "is empty"
    elif h5py.is_hdf5(path):
        try:
            h5py.File(path, "r").close()
        except OSError:
            found = "is damaged or cut short"
    elif os.path.splitext(path)[1].lower() in HDF5_SUFFIXES:
        found = "is not HDF5 in spite of its name"
    if found:
        raise ValueError(
            f"The mask {path} {found}: make it again with dials.diffuse_mask, or give a "
            "mask of dials.generate_mask"
        )


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
    check_kind(path)
    if not h5py.is_hdf5(path):
        mask = read_mask(path)
        for detector in experiments.detectors():
            check_masks(detector, mask, path)
        return {"mask": mask}
    masks = masks_of_experiments(path, experiments)
    for experiment in experiments:
        check_masks(experiment.detector, masks[experiment.identifier], path)
    return {"masks": masks}
