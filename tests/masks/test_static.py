from __future__ import annotations

import pickle

import numpy as np
import pytest
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    memory_experiment,
    random_images,
)

import libtbx.phil
from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList

from dials.command_line import generate_mask
from dials_diffuse.masks.make import make_mask
from dials_diffuse.masks.series import flatten, make_series
from dials_diffuse.masks.settings import MaskSettings
from dials_diffuse.masks.static import shape_layers
from dials_diffuse.util.command import load_phil

CASES = {
    "shapes": [
        "untrusted.polygon=5,5,40,8,30,50,8,30",
        "untrusted.circle=50,40,7",
        "untrusted.rectangle=0,9,30,60",
        "border=2",
        "untrusted{panel=1\npolygon=1,1,1,20,30,20,30,1}",
    ],
    "resolution": ["d_min=2.2", "d_max=9", "resolution_range=3,3.5"],
    "ice_rings": ["ice_rings.filter=True", "ice_rings.width=0.004"],
}


def still(n_panels: int = 2):
    detector = make_detector(n_panels)
    images = random_images(1, detector)
    return memory_experiment(images, detector, make_crystal("P 1"), make_beam())


def mask_settings(*args: str) -> MaskSettings:
    scope = load_phil("mask").fetch(sources=[libtbx.phil.parse(a) for a in args])
    return MaskSettings.from_phil(scope.extract(), scope)


@pytest.mark.parametrize("layer", CASES)
def test_shapes_agree_with_dials(layer, tmp_path):
    experiments = ExperimentList([still()])
    imageset = experiments[0].imageset
    imageset.set_detector(experiments[0].detector)
    imageset.set_beam(experiments[0].beam)
    sources = [libtbx.phil.parse(x) for x in CASES[layer]]
    params = generate_mask.phil_scope.fetch(sources=sources).extract()
    params.output.mask = str(tmp_path / "pixels.mask")
    generate_mask.generate_mask(experiments, params)
    with open(params.output.mask, "rb") as handle:
        expected = flatten([flumpy.to_numpy(m) for m in pickle.load(handle)])
    (series,) = make_series(experiments)
    layers = shape_layers(series, mask_settings(*CASES[layer]).shapes)
    assert 0 < np.count_nonzero(~expected) < expected.size
    np.testing.assert_array_equal(layers.pop(layer), ~expected)
    assert not any(other.any() for other in layers.values())


def test_files_and_lookups():
    experiment = still()
    (series,) = make_series(ExperimentList([experiment]))
    masks = [np.ones(shape, dtype=bool) for shape in series.shapes]
    masks[1][7, 3] = False
    made = make_mask(series, MaskSettings(find=(), beamstop=False), [masks])
    assert [panel.sum() for panel in made.layers["file"]] == [0, 1]
    assert not made.good[1][7, 3]


def test_untrusted_rectangles():
    experiment = still(1)
    experiment.detector[0].add_mask(3, 5, 8, 12)
    (series,) = make_series(ExperimentList([experiment]))
    made = make_mask(series, MaskSettings(find=(), beamstop=False))
    expected = np.zeros(series.shapes[0], dtype=bool)
    expected[5:12, 3:8] = True
    np.testing.assert_array_equal(made.layers["untrusted"][0], expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["untrusted.polygon=1,2,3"], "four corners"),
        (["untrusted.polygon=1,2,3,4,5,6"], "four corners"),
        (["resolution_range=3,3"], "two resolutions"),
        (["d_min=5", "d_max=3"], "must be smaller than d_max"),
        (["border=-1"], "from 0 on"),
        (["trusted_range=5,3"], "smaller value first"),
    ],
)
def test_bad_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        mask_settings(*arguments)


def test_panel_that_does_not_exist():
    (series,) = make_series(ExperimentList([still()]))
    shapes = mask_settings("untrusted{panel=2\ncircle=3,3,2}").shapes
    with pytest.raises(ValueError, match="panels 0 to 1"):
        shape_layers(series, shapes)
