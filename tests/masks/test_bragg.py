"""The Bragg layer against Miller indices that numpy and dxtbx give each pixel."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from simulate_images import (
    make_crystal,
    make_detector,
    make_scan,
    memory_experiment,
    random_images,
)

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.blocks import Block
from dials_diffuse.extraction.loop import accumulate_block
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import BraggSettings, ExtractionSettings
from dials_diffuse.extraction.tables import detector_tables
from dials_diffuse.masks.bragg import BraggSample, bragg_layers, left_out
from dials_diffuse.masks.series import make_series

SETTINGS = ExtractionSettings()
SAMPLE = BraggSample(SETTINGS)


def still(space_group: str = "P 1", identifier: str = "0", seed: int = 7) -> Experiment:
    detector = make_detector(2)
    crystal = make_crystal(space_group, seed)
    images = random_images(1, detector)
    return memory_experiment(images, detector, crystal, identifier=identifier)


def sweep(n_images: int = 5) -> Experiment:
    detector = make_detector(1)
    images = random_images(n_images, detector)
    return memory_experiment(
        images, detector, make_crystal("P 1"), scan=make_scan(n_images, 0.02, first=3)
    )


def distance_from_points(experiment: Experiment, a: np.ndarray) -> list[np.ndarray]:
    """|hkl - nearest| in reciprocal axes (the cells' own metric is tested elsewhere)."""
    s0 = np.array(experiment.beam.get_s0())
    cell = experiment.crystal.get_unit_cell().reciprocal().parameters()
    cosines = np.cos(np.radians(cell[3:]))
    metric = np.eye(3)
    for (i, j), c in zip(((1, 2), (0, 2), (0, 1)), cosines):
        metric[i, j] = metric[j, i] = c
    result = []
    for panel in experiment.detector:
        n_fast, n_slow = panel.get_image_size()
        lab = np.array(
            [
                [panel.get_pixel_lab_coord((x + 0.5, y + 0.5)) for x in range(n_fast)]
                for y in range(n_slow)
            ]
        )
        s1 = lab / np.linalg.norm(lab, axis=2)[..., None] * np.linalg.norm(s0)
        hkl = (s1 - s0) @ np.linalg.inv(a).T
        d = hkl - np.rint(hkl)
        result.append(np.sqrt(np.einsum("yxi,ij,yxj->yx", d, metric, d)))
    return result


def in_range(experiment: Experiment, d_min: float) -> list[np.ndarray]:
    s0 = experiment.beam.get_s0()
    return [
        np.array(
            [
                [
                    panel.get_resolution_at_pixel(s0, (x + 0.5, y + 0.5)) > d_min
                    for x in range(panel.get_image_size()[0])
                ]
                for y in range(panel.get_image_size()[1])
            ]
        )
        for panel in experiment.detector
    ]


def test_still_against_miller_indices():
    e = still()
    experiments = ExperimentList([e])
    (layer,) = bragg_layers(
        experiments,
        make_series(experiments),
        None,
        [[np.ones((60, 70), bool)] * 2],
        SAMPLE,
    )
    distances = distance_from_points(e, np.array(e.crystal.get_A()).reshape(3, 3))
    inside = in_range(e, layer.d_min)
    for panel, distance, seen in zip(layer.panels, distances, inside):
        sure = abs(distance - 0.25) > 1e-3
        np.testing.assert_array_equal((panel & sure), (distance < 0.25) & seen & sure)
        assert 0.01 < panel.mean() < 0.12
    assert layer.image == 1


def test_image_of_a_sweep_against_miller_indices():
    """An image so narrow that its rotation does not matter, at its middle."""
    e = sweep()
    experiments = ExperimentList([e])
    sample = BraggSample(SETTINGS, image=6)
    (layer,) = bragg_layers(
        experiments, make_series(experiments), None, [[np.ones((60, 70), bool)]], sample
    )
    axis = np.array(e.goniometer.get_rotation_axis())
    angle = np.radians(e.scan.get_angle_from_array_index(5.5))
    k = np.cross(np.eye(3), axis)  # axis x v
    turn = np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k
    a = turn @ np.array(e.crystal.get_A()).reshape(3, 3)
    ((panel,), (distance,)) = layer.panels, distance_from_points(e, a)
    sure = abs(distance - 0.25) > 0.01
    expected = (distance < 0.25) & in_range(e, layer.d_min)[0]
    np.testing.assert_array_equal(panel & sure, expected & sure)
    assert (layer.image, layer.array_index) == (6, 5)


def used(e: Experiment, array_index: int, settings: ExtractionSettings) -> int:
    """Pixels that extraction adds to voxels, of an image."""
    grid = make_grid(ExperimentList([e]), settings)
    block = Block(0, range(array_index, array_index + 1), 1.0)
    rows = accumulate_block(block, e, detector_tables(e, settings), [], grid, settings)
    return int(rows["n_pixels"][rows["key"] < np.prod(grid.shape)].sum())


@pytest.mark.parametrize("ndiv", [1, 2, 5])
@pytest.mark.parametrize("absent", [False, True])
def test_number_of_pixels_is_that_of_extraction(ndiv, absent):
    """With a screw axis, and voxels of many pixels and of few."""
    e = still("P 61")
    bragg = BraggSettings(semi_axes=(0.3,) * 3, absent=absent)
    settings = dataclasses.replace(SETTINGS, ndiv=(ndiv,) * 3, bragg=bragg)
    everything = dataclasses.replace(settings, bragg=BraggSettings(exclusion="none"))
    experiments = ExperimentList([e])
    found = left_out(experiments, 0, 0, make_grid(experiments, settings), settings)
    n = sum(panel.sum() for panel in found)
    assert n == used(e, 0, everything) - used(e, 0, settings) > 0


def test_other_lattice_of_the_image_is_left_out_too():
    one = still()
    two = still(identifier="1", seed=11)
    two.imageset = one.imageset
    experiments = ExperimentList([one, two])
    grid = make_grid(experiments, SETTINGS)
    both = left_out(experiments, 0, 0, grid, SETTINGS)
    alone = [left_out(ExperimentList([e]), 0, 0, grid, SETTINGS) for e in (one, two)]
    for panel, a, b in zip(both, *alone):
        np.testing.assert_array_equal(panel, a | b)
        assert (b & ~a).any()


def test_figures_beside_a_mask():
    experiments = ExperimentList([still()])
    good = [np.ones((60, 70), bool), np.ones((60, 70), bool)]
    good[0][:30] = False
    series = make_series(experiments)
    (layer,) = bragg_layers(experiments, series, None, [good], SAMPLE)
    summary = layer.summary(good)
    assert summary["n_only"] == sum((p & g).sum() for p, g in zip(layer.panels, good))
    assert summary["n_together"] == summary["n_only"] + 30 * 70
    assert summary["n_pixels"] > summary["n_only"] > 0


@pytest.mark.parametrize(
    "bragg, message",
    [
        (BraggSettings(exclusion="none"), "leaves no pixel out"),
        (BraggSettings(exclusion="statistical"), "the voxels of all images"),
        (BraggSettings(exclusion="shoebox"), "needs the reflection table"),
        (BraggSettings(semi_axes=(1, 1, 1)), "cover 100 %"),
    ],
)
def test_no_layer(caplog, bragg, message):
    caplog.set_level("INFO", logger="dials.diffuse.mask")
    experiments = ExperimentList([still()])
    sample = BraggSample(dataclasses.replace(SETTINGS, bragg=bragg))
    good = [[np.ones((60, 70), bool)] * 2]
    assert bragg_layers(experiments, make_series(experiments), None, good, sample) == [
        None
    ]
    assert message in caplog.text


@pytest.mark.parametrize(
    "sample, message",
    [({"experiment": 1}, "the first is 0"), ({"image": 2}, "has the images 1 to 1")],
)
def test_sample_that_is_not_there(sample, message):
    experiments = ExperimentList([still()])
    series = make_series(experiments)
    with pytest.raises(ValueError, match=message):
        bragg_layers(experiments, series, None, [[]], BraggSample(SETTINGS, **sample))
