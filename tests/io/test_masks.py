from __future__ import annotations

import h5py
import numpy as np
import pytest

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.io.masks import (
    DetectorMask,
    ImageLayer,
    MaskFile,
    given_mask,
    read_masks,
    write_masks,
)

SHAPES = [(5, 7), (4, 3)]


@pytest.fixture
def detectors() -> list[DetectorMask]:
    rng = np.random.default_rng(7)

    def layer(fraction: float) -> list[np.ndarray]:
        return [rng.uniform(size=shape) < fraction for shape in SHAPES]

    first = {"gaps": layer(0.2), "beamstop": layer(0.1), "hot": layer(0.0)}
    return [
        DetectorMask(["a", "b"], first, {"hot": "too many"}),
        DetectorMask(["c"], {"dead": layer(0.5)}),
    ]


@pytest.fixture
def path(tmp_path, detectors):
    write_masks(tmp_path / "m.h5", detectors, "border = 2", ["in.expt"])
    return tmp_path / "m.h5"


def test_round_trip(path, detectors):
    with MaskFile(path) as handle:
        assert len(handle) == 2
        assert handle.identifiers == [["a", "b"], ["c"]]
        assert handle.layer_names(0) == ["gaps", "beamstop", "hot"]
        for number, detector in enumerate(detectors):
            for name, panels in detector.layers.items():
                found = handle.layer(name, number)
                assert all(panel.dtype == bool for panel in found)
                for a, b in zip(found, panels):
                    np.testing.assert_array_equal(a, b)


def test_total_is_what_no_layer_masks(path, detectors):
    masks = read_masks(path)
    layers = detectors[0].layers
    for panel, good in enumerate(masks[0]):
        np.testing.assert_array_equal(
            good, ~(layers["gaps"][panel] | layers["beamstop"][panel])
        )
    np.testing.assert_array_equal(masks[1][1], ~detectors[1].layers["dead"][1])


def test_provenance(path):
    with h5py.File(path) as handle:
        process = handle["entry/dials_diffuse"]
        assert process.attrs["NX_class"] == "NXprocess"
        assert process.attrs["schema"] == 1
        assert process["phil"][()].decode() == "border = 2"
        hot = handle["entry/detector_1/panel_0/layers/hot"]
        assert (hot.attrs["long_name"], hot.compression) == ("too many", "gzip")


def test_no_layer():
    with pytest.raises(ValueError, match="needs a layer"):
        write_masks("x.h5", [DetectorMask(["a"], {})])


def test_unknown_layer(path):
    with MaskFile(path) as handle, pytest.raises(ValueError, match="it has gaps, beam"):
        handle.layer("cold")


def test_files_of_another_kind(tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("no")
    with pytest.raises(ValueError, match="it is not HDF5"):
        read_masks(text)
    with pytest.raises(ValueError, match="does not exist"):
        read_masks(tmp_path / "none.h5")
    other = tmp_path / "other.h5"
    h5py.File(other, "w").close()
    with pytest.raises(ValueError, match="not a mask in layers"):
        read_masks(other)


def test_damaged_and_newer_files(path):
    with h5py.File(path, "r+") as handle:
        del handle["entry/detector_1/panel_1/mask"]
    with pytest.raises(ValueError, match="damaged"):
        read_masks(path)
    with h5py.File(path, "r+") as handle:
        handle["entry/dials_diffuse"].attrs["schema"] = 99
    with pytest.raises(ValueError, match="use a newer"):
        read_masks(path)


def test_layer_of_one_image_is_no_part_of_the_mask(tmp_path, detectors):
    rng = np.random.default_rng(3)
    panels = tuple(rng.uniform(size=shape) < 0.3 for shape in SHAPES)
    layer = ImageLayer(panels, "a", 12, "x_0012.cbf", "near the Bragg positions")
    first, second = detectors
    with_layer = DetectorMask(first.identifiers, first.layers, {}, {"bragg": layer})
    write_masks(tmp_path / "with.h5", [with_layer, second])
    write_masks(tmp_path / "without.h5", detectors)
    masks = [read_masks(tmp_path / f"{x}.h5") for x in ("with", "without")]
    for a, b in zip(*masks):
        assert all(np.array_equal(x, y) for x, y in zip(a, b))
    with MaskFile(tmp_path / "with.h5") as handle:
        assert handle.image_layer_names(0) == ["bragg"]
        assert "bragg" not in handle.layer_names(0)
        found = handle.image_layer("bragg", 0)
        assert (found.identifier, found.image, found.file) == ("a", 12, "x_0012.cbf")
        assert all(np.array_equal(x, y) for x, y in zip(found.panels, panels))
        with pytest.raises(ValueError, match="no layer bragg of an image: it has none"):
            handle.image_layer("bragg", 1)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty: make it again with dials.diffuse_mask"),
        (b"junk" * 100, "is not HDF5 in spite of its name: make it again"),
        (b"\x89HDF\r\n\x1a\n" + b"junk" * 100, "damaged or cut short: make it again"),
    ],
)
def test_empty_and_junk_files_given_as_a_mask(tmp_path, content, message):
    path = tmp_path / "m.h5"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        given_mask(str(path), ExperimentList())
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
