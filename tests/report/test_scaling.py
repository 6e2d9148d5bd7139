from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re

import numpy as np
import pytest
from simulated_observations import ROTATION, STILLS, draw, observe, read_models

from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.command_line import diffuse_scale
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.report.scaling import (
    find_places,
    find_ranges,
    initial_scales,
    scaling_record,
)
from dials_diffuse.report.scaling_plots import (
    make_plots,
    of_many,
    per_cent,
    render_page,
    sections,
)
from dials_diffuse.scaling.axes import DecayAxis, SmoothAxis, StepAxis
from dials_diffuse.scaling.block import Rows, read_block
from dials_diffuse.scaling.components import Prior, TermComponent
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.model import plot_component
from dials_diffuse.scaling.models import scaling_models
from dials_diffuse.scaling.refinement import Refiner

SMALL = {"size": (150, 150), "pixel": 0.6}
CORNER = -0.1  # outliers are at lower places than this, both ways
SCALES_ONLY = [
    f"model.{name}.use=no" for name in ("decay", "absorption", "detector", "offset")
]


def shrink(settings, n_images):
    detector = dataclasses.replace(settings.detector, **SMALL)
    return dataclasses.replace(settings, n_images=n_images, detector=detector)


@contextlib.contextmanager
def scaled(observed, *options):
    """The experiments with their models, reader and result of scaling."""
    expt, refl = observed.files
    parser = diffuse_scale.make_parser()
    params, _, _ = diffuse_scale.parse_arguments(parser, [expt, *options])
    experiments = read_models(expt)
    with ObservationFile(refl) as table:
        result, reader = diffuse_scale.scale_experiments(experiments, [table], params)
        for experiment, model in zip(experiments, scaling_models(result)):
            experiment.scaling_model = model
        yield experiments, reader, result


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    """Stills of known scales, with outliers in a corner of one of them."""
    folder = tmp_path_factory.mktemp("stills")
    geometry = observe(shrink(STILLS, 30), folder)
    scale = np.random.default_rng(3).lognormal(0, 0.3, 30)
    scale /= scale.mean()
    seen = np.bincount(geometry.voxel)[geometry.voxel] >= 4
    mine = (geometry.experiment == 4) & np.all(geometry.place < CORNER, axis=1) & seen
    outlier = np.where(mine, 1, 0)
    observed = draw(
        geometry,
        folder,
        scale[geometry.experiment],
        counts_per_pixel=10,
        outlier=outlier,
        outlier_size=15,
    )
    with scaled(observed, *SCALES_ONLY) as (experiments, reader, result):
        record = scaling_record(experiments, reader, result, ["Mind this"], ["a.expt"])
        yield observed, outlier, scale, record, (experiments, reader, result)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    geometry = observe(shrink(ROTATION, 60), folder)
    factor = np.exp(0.3 * np.sin(2 * np.pi * geometry.turn))
    observed = draw(geometry, folder, factor, counts_per_pixel=10)
    options = [f"model.{name}.use=yes" for name in ("absorption", "detector")]
    with scaled(observed, *options) as (experiments, reader, result):
        record = scaling_record(experiments, reader, result)
        yield observed, record


def binomial_chi_square(observed, use, response, cell):
    """Of counts of each row, given those of its voxel; mean of each cell."""
    voxel, n = observed.geometry.voxel, observed.counts

    def total(values):
        return np.bincount(voxel[use], values[use], voxel.max() + 1)[voxel]

    several = use & (total(np.ones(len(voxel))) > 1)
    t = total(n)
    p = response / np.where(use, total(response), 1)
    chosen = several & (t > 0)
    square = (n - t * p) ** 2 / np.where(chosen, t * p * (1 - p), 1)
    groups = np.unique(cell)
    return np.array([square[chosen & (cell == i)].mean() for i in groups])


def known_outliers(result, observed):
    """Flags of the rows of the table, from those of the sorted block."""
    voxel, block = observed.geometry.voxel, result.refiner.block
    n = np.bincount(voxel)[voxel]
    order = np.argsort(voxel, kind="stable")
    order = order[n[order] > 1]
    # The block is sorted by packed voxel, of which the numbers keep the order.
    np.testing.assert_array_equal(block.counts, observed.counts[order])
    flags = np.zeros(len(voxel), dtype=bool)
    flags[order] = ~result.refiner.used
    return flags


def test_scales_are_the_truth(stills):
    observed, _, scale, record, _ = stills
    counts = np.bincount(observed.geometry.experiment, observed.counts)
    found = np.array(record["experiments"]["scale"])
    others = np.arange(len(scale)) != 4  # it has the outliers
    ratio = (found / scale)[others]
    assert np.all(np.abs(ratio / np.median(ratio) - 1) < 5 / np.sqrt(counts[others]))
    assert np.ptp(found) > 0.5
    assert record["images"]["scale"] == pytest.approx(found)


@pytest.mark.parametrize("state", ["after", "before"])
def test_chi_square_of_stills_is_that_of_binomial_counts(stills, state):
    observed, _, _, record, (_, _, result) = stills
    geometry = observed.geometry
    scale = np.array(record["experiments"]["scale"])
    if state == "before":
        scale = initial_scales(result)
    use = ~known_outliers(result, observed)
    m = geometry.columns["normalisation"]
    response = m * scale[geometry.experiment]
    expected = binomial_chi_square(observed, use, response, geometry.experiment)
    found = record["images"][f"chi_square_{state}"]
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_model_describes_the_counts_better_than_the_ratio_of_counts(sweep):
    total = sweep[1]["refined_against"]
    assert total["chi_square_before"] > 1.5
    assert total["chi_square_after"] == pytest.approx(1, abs=0.05)


def test_all_bins_add_up_to_the_same_numbers(stills):
    observed, _, _, record, (_, _, result) = stills
    total = record["refined_against"]
    voxel = observed.geometry.voxel
    several = np.bincount(voxel)[voxel] > 1
    assert total["n_observations"] == np.count_nonzero(several)
    flags = known_outliers(result, observed)
    assert total["n_too_high"] + total["n_too_low"] == np.count_nonzero(flags)
    for name in ("images", "resolution", "intensity", "detector"):
        for kind in ("n_observations", "n_too_high", "n_too_low"):
            assert np.sum(record[name][kind]) == total[kind], (name, kind)


def test_outliers_are_shown_where_they_are(stills):
    _, outlier, _, record, _ = stills
    high = np.array(record["images"]["n_too_high"])
    n = np.count_nonzero(outlier)
    assert n > 50
    assert 0.8 * n < high[4] <= n + 5
    assert high.sum() - high[4] < 0.1 * n
    detector = record["detector"]
    shown = np.array(detector["n_too_high"])
    limit = 150 * (0.5 + CORNER) + 150 / len(detector["x"])
    x, y = np.meshgrid(detector["x"], detector["y"])
    corner = (x < limit) & (y < limit)
    assert shown[corner].sum() > 0.9 * shown.sum()
    low = np.array(record["images"]["n_too_low"])
    assert low.sum() < 0.1 * n


def test_disagreeing_still_has_the_lowest_correlation(stills):
    """Outliers are left out of it, so the rest of the still agrees as others do."""
    record = stills[3]
    cc, gain = (np.array(record["images"][name]) for name in ("cc", "delta_cc"))
    assert np.all(cc > 0.5)
    np.testing.assert_allclose(gain, (cc.mean() - cc) / (len(cc) - 1), atol=1e-9)
    assert record["experiments"]["cc"] == pytest.approx(cc)


def test_sweep_is_shown_against_its_rotation(sweep):
    observed, record = sweep
    images, geometry = record["images"], observed.geometry
    start, width = geometry.experiments[0].scan.get_oscillation()
    assert images["label"] == "φ (°)"
    n = len(images["x"])
    assert n == 60
    np.testing.assert_allclose(images["x"], start + width * (np.arange(n) + 0.5))
    voxel = geometry.voxel
    several = np.bincount(voxel)[voxel] > 1
    numbers = np.histogram(geometry.frame[several], np.arange(n + 1))[0]
    assert images["n_observations"] == numbers.tolist()
    truth = np.exp(0.3 * np.sin(2 * np.pi * (np.arange(n) + 0.5) / n))
    ratio = np.array(images["scale"]) / truth
    assert np.std(ratio) / np.mean(ratio) < 0.03


def test_page_has_all_plots(stills, sweep):
    for record, surfaces in ((stills[3], []), (sweep[1], ["absorption", "detector"])):
        plots = make_plots(record)
        page = render_page(record)
        assert {"scale", "cc", "delta_cc", "normal_probability"} <= set(plots)
        for start in ("chi_square_", "outliers_"):
            kinds = {name[len(start) :] for name in plots if name.startswith(start)}
            assert {"images", "resolution", "intensity"} <= kinds
        assert {"chi_square_before", "chi_square_after"} <= set(plots)
        terms = [name.split("_")[2] for name in plots if name.startswith("surface_")]
        assert set(surfaces) <= set(terms)
        shown = [name for _, names in sections(plots) for name in names]
        assert sorted(shown) == sorted(plots)
        assert re.findall(r'<div class="plot[^"]*" id="(\w+)"', page) == shown
        assert "Plotly.newPlot" in page
        json.dumps([record, plots], allow_nan=False)


def test_page_names_warnings_stages_and_what_was_switched_off(stills):
    record = stills[3]
    page = render_page({**record, "dropped": {"decay": "it ran away"}})
    assert "Mind this" in page and "decay: it ran away" in page
    assert page.count("the change of χ² in a step") + page.count("no step") > 0
    for stage in record["stages"]:
        assert stage["chi_square_before"] >= 0.999 * stage["chi_square"]


def test_bragg_peaks_are_left_out_of_the_figures(stills):
    record, (experiments, reader, result) = stills[3:]
    (slab,) = list(reader.slabs("Reading"))
    rows = reader.read(*slab)
    values = {
        field.name: getattr(rows, field.name) for field in dataclasses.fields(Rows)
    }
    peaks = Rows(**{**values, "voxel": ~rows.voxel, "cells": dict(rows.cells)})
    refiner = Refiner(
        read_block(reader, further=[peaks]), result.components, reader.tables[0].grid
    )
    n = refiner.block.n_rows - result.refiner.block.n_rows
    assert n == result.refiner.block.n_rows
    refiner.used[:n] = result.refiner.used[::-1]
    refiner.used[n:] = result.refiner.used
    refiner.update_weights()
    with_peaks = dataclasses.replace(result, refiner=refiner)
    found = scaling_record(experiments, reader, with_peaks)
    assert found["refined_against"]["n_bragg_peaks"] == n
    for name in ("n_observations", "n_too_high", "n_too_low", "chi_square_after", "cc"):
        assert found["images"][name] == pytest.approx(record["images"][name], rel=1e-3)


def test_nothing_to_compare_makes_a_page_without_plots(tmp_path, stills):
    observed = stills[0]
    geometry = observed.geometry
    first = np.zeros(geometry.n_rows, dtype=bool)
    first[np.unique(geometry.voxel, return_index=True)[1]] = True
    single = draw(geometry, tmp_path, use=first)
    with scaled(single) as (experiments, reader, result):
        record = scaling_record(experiments, reader, result)
    assert make_plots(record) == {}
    page = render_page(record)
    assert "there is nothing to scale by" in page
    assert "switched off" in page
    json.dumps(record, allow_nan=False)


def test_command_writes_page_and_figures(tmp_path, stills):
    files = stills[0].files
    names = ("experiments", "reflections", "html", "json", "log")
    paths = {name: tmp_path / f"x.{name}" for name in names}
    paths["experiments"] = tmp_path / "x.expt"
    options = [f"output.{name}={path}" for name, path in paths.items()]
    diffuse_scale.run([*files, *SCALES_ONLY, *options])
    record = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert record["images"]["scale"] == pytest.approx(stills[3]["images"]["scale"])
    assert 'id="chi_square_images"' in paths["html"].read_text(encoding="utf-8")


PRIOR = Prior(0.1, 1.0)


def component(axes, unit=None, seed=7):
    n = int(np.prod([axis.n_params for axis in axes]))
    p = 0.1 * np.random.default_rng(seed).standard_normal(n)
    return TermComponent(axes, flumpy.from_numpy(p), PRIOR, unit=unit), p


def test_plot_of_a_line_has_the_parameters_at_their_knots():
    axis = SmoothAxis("phi", 0, 90, 10)
    own, p = component([axis])
    line, knots = plot_component("scale", own)["data"]
    assert knots["x"] == pytest.approx(np.arange(-5, 100, 10))
    assert knots["y"] == pytest.approx(np.exp(p))
    assert line["y"] == pytest.approx(own.values({"phi": np.array(line["x"])}, 72))


def test_plot_of_the_relative_b_of_a_sweep():
    axes = [SmoothAxis("phi", 0, 90, 30), DecayAxis(0.1, 0.6)]
    own, p = component(axes)
    plot = plot_component("decay", own)
    line, knots = plot["data"]
    assert knots["y"] == pytest.approx(p)
    # The factor at two s gives B: ln of their ratio is B (s1² - s2²)/2.
    x = np.array(line["x"])
    low, high = (
        own.values({"phi": x, "s": np.full(len(x), s)}, len(x)) for s in (0.2, 0.5)
    )
    assert line["y"] == pytest.approx(np.log(high / low) / (0.5**2 - 0.2**2) * 2)
    assert "Å²" in plot["layout"]["yaxis"]["title"]["text"]


@pytest.mark.parametrize(
    ("first", "n"), [(SmoothAxis("phi", 0, 90, 10), 6), (StepAxis("panel", 3), 3)]
)
def test_plot_of_three_axes_has_images_of_the_other_two(first, n):
    names = ("u", "v") if first.coordinate == "phi" else ("slow", "fast")
    axes = [first, *(SmoothAxis(name, -0.5, 0.5, 0.25) for name in names)]
    own, _ = component(axes)
    plot = plot_component("absorption", own)
    assert len(plot["data"]) == n
    across, down = ("u", "v") if first.coordinate == "phi" else ("fast", "slow")
    image = plot["data"][-1]
    assert plot["layout"][f"yaxis{n}"]["autorange"] == "reversed"
    i, j = 5, 9
    text = plot["layout"]["annotations"][-1]["text"]
    where = float(re.search(r"[\d.]+", text).group())
    point = {first.coordinate: where, across: image["x"][j], down: image["y"][i]}
    # The smoother of DIALS takes two points at least.
    points = {name: np.array([x, x]) for name, x in point.items()}
    value = own.values(points, 2)[0]
    assert image["z"][i][j] == pytest.approx(value, rel=1e-4)


def test_plot_of_an_offset_is_in_its_unit():
    axes = [SmoothAxis("phi", 0, 90, 30), SmoothAxis("s", 0.1, 0.5, 0.1)]
    own, _ = component(axes, unit=1e6)
    (image,) = plot_component("offset", own)["data"]
    z = np.array(image["z"])
    assert z.shape == (len(image["y"]), len(image["x"]))
    points = {"phi": np.array(image["x"])[[3, 4]], "s": np.array(image["y"])[[7, 8]]}
    values = own.values(points, 2)
    assert [z[7, 3], z[8, 4]] == pytest.approx(values, rel=1e-4)


def test_single_number_has_no_plot():
    assert plot_component("scale", TermComponent([], flex.double([0.1]), PRIOR)) is None


def an_extent(number, is_still, n_panels=1):
    phi = (0.0, 0.0) if is_still else (0.0, 120.0)
    u, v = (-0.6, 0.6), (-0.3, 0.3)
    return Extent(number, is_still, phi, (0.0, 0.5), 0, n_panels, u, v)


def test_ranges_of_several_sweeps_and_a_still_stand_side_by_side(sweep):
    experiments = [sweep[0].geometry.experiments[0]] * 3
    extents = [an_extent(0, False), an_extent(1, True), an_extent(2, False)]
    ranges = find_ranges(experiments, extents)
    assert "all sweeps" in ranges.label
    assert ranges.experiment.tolist() == [0] * 60 + [1] + [2] * 60
    np.testing.assert_allclose(np.diff(ranges.x), 1)
    # Observations get the cell of their range.
    experiment, phi = np.array([0, 0, 1, 2, 2]), np.array([0.5, 119, 0, 3, 120])
    cell = ranges.layout.cell(experiment, {"phi": phi})
    place = [ranges.cell.tolist().index(number) for number in cell]
    assert place == [0, 59, 60, 62, 120]


def test_long_sweeps_have_ranges_of_many_images(sweep):
    (experiment,) = copy.deepcopy(sweep[0].geometry.experiments)
    experiment.scan.set_image_range((1, 3600))
    ranges = find_ranges(ExperimentList([experiment]), [an_extent(0, False)])
    assert 100 < len(ranges.x) < 300


def test_several_panels_are_shown_by_angles(sweep):
    experiments = sweep[0].geometry.experiments
    places = find_places(experiments, [an_extent(0, False, n_panels=4)], 50_000)
    assert "2 sin θ" in places.labels[0]
    assert len(places.x) == pytest.approx(2 * len(places.y), abs=2)
    u, v = np.array([-0.59, 0.59, 0.59]), np.array([-0.29, -0.29, 0.29])
    cell = places.layout.cell(np.zeros(3, dtype=int), {"u": u, "v": v}) - 1
    row, column = np.divmod(cell, len(places.x))
    assert row.tolist() == [0, 0, len(places.y) - 1]
    assert column.tolist() == [0, len(places.x) - 1, len(places.x) - 1]


def test_figures_of_few_observations_are_not_drawn():
    found = {
        "n_observations": [19, 20, 200],
        "chi": [7.0, None, 1.0],
        "high": [3, 1, 1],
    }
    assert of_many(found, "chi") == [None, None, 1.0]
    assert per_cent(found, "high") == [None, pytest.approx(5), pytest.approx(0.5)]
