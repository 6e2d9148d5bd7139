from __future__ import annotations

import json

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
from dials_diffuse.report.extraction import (
    intensity_unit,
    plot_blocks,
    plot_geometry,
    plot_indexing,
    plot_shells,
)
from dials_diffuse.report.extraction_record import finite
from dials_diffuse.report.image_axis import ImageAxis

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
    record = pixels_record(StaticPixels(100, 10, 20, False), 12, 50)
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
    plot = plot_geometry(record, axes)
    traces = {trace["name"]: trace for trace in plot["data"]}
    red = traces["mean beyond the tolerance"]
    assert (red["x"], red["y"]) == ([5], [0.004])
    largest = traces["largest of an image"]
    assert (largest["x0"], largest["dx"]) == (0, 1)
    assert largest["y"] == [0.003] * 5 + [0.012]
    mean = traces["mean, with its standard error"]
    assert (mean["x0"], mean["dx"], mean["y"]) == (0, 1, [0.001] * 5)
    assert mean["error_y"]["array"] == [1e-5] * 5
    assert set(traces["tolerance of the mean"]["y"]) == {0.003}
    assert plot["layout"]["xaxis"]["title"]["text"] == "Experiment"


@pytest.mark.parametrize("largest, kind", [(7.9, None), (8.1, "log")])
def test_far_spots_make_the_axis_logarithmic(largest, kind):
    images = residuals([0.001, 0.001, 0.001 * largest])
    record = geometry_record(images, 0.003, given=False, reject=False)
    plot = plot_geometry(record, {"first_image": [1] * 3, "n_images": [1] * 3})
    assert plot["layout"]["yaxis"].get("type") == kind


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


def blocks_of(n: int) -> dict:
    """Blocks of n stills, every third number not known."""
    rng = np.random.default_rng(5)
    intensity = rng.gamma(20, 5e7, n)
    intensity[::3] = np.nan
    return finite(
        {
            "experiment": np.arange(n),
            "first_image": np.ones(n, dtype=int),
            "n_images": np.ones(n, dtype=int),
            "n_pixels": rng.integers(4e6, 5e6, n),
            "photons_per_pixel": rng.gamma(20, 0.1, n),
            "background_per_pixel": rng.gamma(20, 0.05, n),
            "intensity": intensity,
        }
    )


def test_large_runs_make_small_pages():
    """Twenty thousand stills need less than two megabytes, and are all there."""
    n = 20_000
    images = residuals(np.random.default_rng(5).gamma(20, 5e-5, n))
    record = geometry_record(images, 0.003, given=False, reject=False)
    axes = {"first_image": np.ones(n, int), "n_images": np.ones(n, int)}
    plots = [plot_geometry(record, axes), plot_blocks(blocks_of(n), axes)]
    text = json.dumps(plots, allow_nan=False, separators=(",", ":"))
    assert len(text) < 2_000_000
    assert len(worst_images(record)) == 20
    for trace in (*plots[0]["data"][:1], *plots[1]["data"]):
        assert (len(trace["y"]), trace["type"]) == (n, "scattergl")
        assert (trace["x0"], trace["dx"]) == (0, 1)


def test_blocks_are_plotted_as_they_are():
    """A block of each sweep at the middle of its images, and marks where sweeps begin."""
    blocks = blocks_of(4)
    blocks["experiment"] = [0, 0, 1, 1]
    blocks["first_image"], blocks["n_images"] = [1, 6, 11, 16], [5, 5, 5, 2]
    plot = plot_blocks(blocks, {"first_image": [1, 11], "n_images": [10, 7]})
    traces = {trace["name"]: trace for trace in plot["data"]}
    assert traces["all photons"]["x"] == [2, 7, 12, 15.5]
    for name, column in (
        ("all photons", "photons_per_pixel"),
        ("background", "background_per_pixel"),
        ("mean intensity", "intensity"),
    ):
        expected = [x and pytest.approx(x, rel=5e-4) for x in blocks[column]]
        assert traces[name]["y"] == expected
    assert traces["mean intensity"]["y"][0] is None
    pixels = np.array(blocks["n_pixels"]) / blocks["n_images"]
    np.testing.assert_allclose(traces["pixels"]["y"], pixels / 1000, rtol=5e-4)
    shapes = plot["layout"]["shapes"]
    assert [shape["x0"] for shape in shapes] == [-0.5, 9.5]
    assert [text["text"] for text in plot["layout"]["annotations"]] == ["0", "1"]
    without = {**blocks, "background_per_pixel": [0.0] * 4}
    plot = plot_blocks(without, {"first_image": [1, 11], "n_images": [10, 7]})
    assert "background" not in [trace["name"] for trace in plot["data"]]


def test_shells_are_plotted_by_their_middle():
    names = ("intensity", "photons_per_pixel", "background_per_pixel")
    limits = [(None, 4.0), (4.0, 2.0), (2.0, 1.6)]
    shells = [
        {"d_max": d_max, "d_min": d_min, **dict.fromkeys(names, 2.0 + i)}
        for i, (d_max, d_min) in enumerate(limits)
    ]
    shells[2]["intensity"] = None
    plots = plot_shells(shells)
    (intensity,) = plots["shells_intensity"]["data"]
    assert intensity["x"] == pytest.approx([0.125, 0.375, 0.5625])
    assert intensity["y"] == [2.0, 3.0, None]
    assert len(plots["shells_counts"]["data"]) == 2
    axis = plots["shells_counts"]["layout"]["xaxis"]
    assert axis["range"] == [0, 0.625]
    for s, text in zip(axis["tickvals"], axis["ticktext"]):
        assert 1 / s == pytest.approx(float(text))


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
    *settings, sure = plot_indexing(finite(record))["data"]
    assert [trace["y"] for trace in settings] == [[8.0, None], [1.0, 7.0]]
    assert [trace["name"][-1] for trace in settings] == ["2", "2"]
    assert set(sure["y"]) == {record["sure_from"]}


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


@pytest.mark.parametrize(
    "off, unit",
    [
        ((), "photons s⁻¹ sr⁻¹"),
        (("exposure",), "photons sr⁻¹"),
        (("polarization", "solid angle"), "photons s⁻¹ per pixel"),
        (("solid angle", "exposure"), "photons per pixel"),
    ],
)
def test_unit_without_some_corrections(off, unit):
    assert intensity_unit(off) == unit
