from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    make_scan,
    memory_experiment,
    random_images,
)

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.blocks import Block, make_blocks
from dials_diffuse.extraction.geometry_report import geometry_record, worst_images
from dials_diffuse.extraction.indexing_report import indexing_record, least_sure
from dials_diffuse.extraction.lattice_settings import Operator
from dials_diffuse.extraction.reindexing import Indexing
from dials_diffuse.extraction.report import (
    StaticPixels,
    count_static_pixels,
    pixels_record,
)
from dials_diffuse.extraction.settings import ExtractionSettings
from dials_diffuse.extraction.totals import block_of_rows
from dials_diffuse.geometry.validation import ImageResiduals
from dials_diffuse.grid import Grid
from dials_diffuse.report import extraction
from dials_diffuse.report.extraction import ImageAxis, plot_geometry
from dials_diffuse.report.extraction_record import finite

GRID = Grid((26.0, 31.0, 22.0, 90.0, 90.0, 90.0), (2, 2, 2), "P 2 2", 2.4, 9.0)


def stills(n: int, wavelengths=(1.0,)) -> ExperimentList:
    result = ExperimentList()
    for i in range(n):
        detector = make_detector(2, (70, 60), 20.0, 8.0, parallax=False)
        experiment = memory_experiment(
            random_images(1, detector),
            detector,
            make_crystal("P 21 21 21", seed=i),
            identifier=str(i),
        )
        experiment.beam = make_beam(wavelengths[i % len(wavelengths)])
        result.append(experiment)
    return result


def test_pixels_that_no_image_can_use():
    """Against dxtbx' own resolution of each pixel."""
    experiments = stills(2)
    masks = tuple(np.random.default_rng(3).random((60, 70)) < 0.8 for _ in range(2))
    settings = ExtractionSettings(mask=masks)
    blocks = make_blocks(experiments, 1.0)
    found = count_static_pixels(experiments, blocks, GRID, settings)
    s0 = experiments[0].beam.get_s0()
    outside = 0
    for panel, mask in zip(experiments[0].detector, masks):
        for y, x in np.argwhere(mask).tolist():
            d = panel.get_resolution_at_pixel(s0, (x + 0.5, y + 0.5))
            outside += not 2.4 <= d <= 9.0
    assert 0 < outside < 6000
    assert found.total == 2 * 2 * 60 * 70
    assert found.masked == 2 * sum(int((~mask).sum()) for mask in masks)
    assert found.outside == pytest.approx(2 * outside, abs=4)
    assert not found.is_estimate


def test_of_many_beams_some_are_counted(monkeypatch):
    experiments = stills(6, wavelengths=[1 + 0.01 * i for i in range(6)])
    blocks = make_blocks(experiments, 1.0)
    settings = ExtractionSettings()
    every = count_static_pixels(experiments, blocks, GRID, settings)
    monkeypatch.setattr("dials_diffuse.extraction.report.MOST_KEYS", 3)
    some = count_static_pixels(experiments, blocks, GRID, settings)
    assert some.is_estimate and not every.is_estimate
    assert some.total == every.total
    assert some.outside == pytest.approx(every.outside, rel=0.05)


def test_left_out_images_have_no_pixels():
    experiments = stills(3)
    blocks = make_blocks(experiments, 1.0, {(1, 0)})
    found = count_static_pixels(experiments, blocks, GRID, ExtractionSettings())
    assert found.total == 2 * 2 * 60 * 70


def test_pixels_add_up():
    peaks = SimpleNamespace(n_pixels=np.array([5, 7]))
    record = pixels_record(StaticPixels(100, 10, 20, False), peaks, 50)
    assert (record["bragg"], record["dropped"]) == (12, 8)


def test_block_of_each_observation():
    blocks = [
        Block(0, range(0, 1), 1.0),
        Block(2, range(4, 7), 1.0),
        Block(2, range(7, 9), 1.0),
        Block(3, range(0, 5), 1.0),
    ]
    experiment = np.array([0, 2, 2, 2, 2, 3, 3])
    z = np.array([0.5, 4.01, 6.99, 7.0, 8.5, 0.1, 4.9])
    found = block_of_rows(blocks, experiment, z)
    np.testing.assert_array_equal(found, [0, 1, 1, 2, 2, 3, 3])


def residuals(mean, error=1e-5, n_spots=50) -> ImageResiduals:
    mean = np.array(mean, dtype=float)
    n = len(mean)
    return ImageResiduals(
        experiment=np.arange(n),
        array_index=np.zeros(n, dtype=int),
        n_spots=np.full(n, n_spots),
        mean=mean,
        largest=3 * mean,
        shift=0.1 * mean,
        rms_hkl=mean * 30,
        mean_error=np.broadcast_to(error, n).astype(float),
    )


def test_worst_images_come_first():
    """Those beyond the tolerance before one that is unsure, though its mean is larger."""
    images = residuals([0.001, 0.004, 0.001, 0.009, 0.0012, 0.005])
    images.mean_error[3] = 0.004
    record = geometry_record(images, 0.003, given=True, reject=False)
    assert (record["n_beyond"], record["n_unsure"]) == (2, 1)
    rows = worst_images(record, 4)
    assert [row["experiment"] for row in rows] == [5, 1, 3, 4]
    assert [row["is_beyond"] for row in rows] == [True, True, False, False]
    assert geometry_record(residuals([]), 0.003, False, False) is None


def test_every_image_is_plotted():
    images = residuals([0.001] * 5 + [0.004])
    record = geometry_record(images, 0.003, given=False, reject=False)
    axes = {"first_image": [1] * 6, "n_images": [1] * 6}
    (ax,) = plot_geometry(record, axes).axes
    lines = {line.get_label(): line for line in ax.lines}
    red = lines["mean beyond the tolerance"]
    assert red.get_xdata().tolist() == [5] and red.get_ydata().tolist() == [0.004]
    assert len(lines["largest of an image"].get_xdata()) == 6
    assert set(lines["tolerance of the mean"].get_ydata()) == {0.003}
    assert ax.get_xlabel() == "Experiment"


@pytest.mark.parametrize(
    "first, n_images, label, place",
    [
        ([11], [20], "Image", 13),
        ([1, 1, 1], [1, 1, 1], "Experiment", 0),
        ([1, 5], [10, 4], "Image, all sweeps in their order", 12),
    ],
)
def test_place_of_images(first, n_images, label, place):
    axis = ImageAxis({"first_image": first, "n_images": n_images})
    assert axis.label == label
    last = len(first) - 1
    image = first[last] + 2 if label != "Experiment" else 1
    assert axis.place([last], [image]) == [place if label != "Experiment" else last]


def test_large_runs_make_small_pages():
    """Twenty thousand stills are one picture as twenty are."""
    rng = np.random.default_rng(5)
    sizes = []
    for n in (20, 20_000):
        images = residuals(rng.gamma(20, 5e-5, n))
        record = geometry_record(images, 0.003, given=False, reject=False)
        axes = {"first_image": np.ones(n, int), "n_images": np.ones(n, int)}
        sizes.append(len(extraction._picture(plot_geometry(record, axes))))
        assert len(worst_images(record)) == 20
    assert sizes[1] < 300_000


def indexing(evidence) -> Indexing:
    n = len(evidence)
    swap = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]])
    return Indexing(
        operators=(Operator(np.eye(3, dtype=int)), Operator(swap)),
        units=tuple((i,) for i in range(n)),
        choice=np.arange(n) % 2,
        evidence=np.array(evidence),
        n_contrasts=np.full(n, 100),
        in_doubt="keep",
    )


def test_crystals_in_doubt_are_listed_first():
    record = indexing_record(indexing([8.0, 1.0, np.inf, 7.0]), list("abcd"))
    assert (record["n_reindexed"], record["n_ambiguous"]) == (1, 1)
    rows = least_sure(record, 2)
    assert [row["identifiers"] for row in rows] == [["b"], ["d"]]
    assert rows[0]["best_operator"] != rows[0]["operator"] == "h,k,l"
    assert rows[1]["best_operator"] == rows[1]["operator"] != "h,k,l"
    text = json.dumps(finite(record), allow_nan=False)
    assert json.loads(text)["crystals"][2]["evidence"] is None
    (ax,) = extraction.plot_indexing(finite(record)).axes
    assert sum(len(line.get_xdata()) for line in ax.lines[:2]) == 4


def test_json_has_no_nan():
    value = {"a": [np.nan, np.float32(1.5)], "b": np.array([1, 2]), "c": (np.inf, "x")}
    expected = {"a": [None, 1.5], "b": [1, 2], "c": [None, "x"]}
    assert finite(value) == expected
    json.dumps(finite(value), allow_nan=False)


def test_sweep_is_counted_by_images():
    detector = make_detector()
    experiment = memory_experiment(
        random_images(4, detector), detector, make_crystal(), scan=make_scan(4)
    )
    experiments = ExperimentList([experiment])
    blocks = make_blocks(experiments, 1.0)
    settings = ExtractionSettings()
    found = count_static_pixels(experiments, blocks, GRID, settings)
    size = np.prod(detector[0].get_image_size())
    assert found.total == 4 * size and sum(map(len, blocks)) == 4
