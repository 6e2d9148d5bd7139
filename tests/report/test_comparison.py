from __future__ import annotations

import base64
import dataclasses
import io
import re

import matplotlib.image
import numpy as np
import pytest
from matched_voxels import correct_voxels, selected

from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import MapFile, MapWriter
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.merge import MergingSettings, merge
from dials_diffuse.report import comparison as report
from dials_diffuse.simulation.comparison import (
    Comparison,
    compare_voxels,
)

GRID = Grid((12.0, 14.0, 16.0, 90, 103, 90), (2, 3, 2), " P 2y", 2.0)


def make_comparison(truth: np.ndarray, counts: float, v: float = 0.0) -> Comparison:
    """The comparison of a correct map of a given level of counts."""
    rng = np.random.default_rng(7)
    voxels = correct_voxels(GRID, truth, counts / truth.mean(), rng, v)
    return compare_voxels(voxels, 5)


def decaying(exponent: float = 5.0) -> np.ndarray:
    index = GRID.asu_indices()
    h, k, l = (index / GRID.ndiv).T
    wave = 1 + 0.5 * np.cos(2 * k) * np.cos(h + l)
    return 50 * np.exp(-exponent * GRID.s(index) ** 2) * wave


@pytest.fixture(scope="module")
def comparison():
    return make_comparison(decaying(), counts=50)


@pytest.fixture(scope="module")
def section(comparison):
    figure = report.plot_comparison(comparison, "a map < a truth")
    title, text = report.comparison_section(comparison, figure, dpi=30)
    return figure, title, text


@pytest.mark.parametrize("normal", [0, 1, 2])
def test_layers_are_those_of_the_map(write_observations, tmp_path, normal):
    """Filled from the unique voxels, they equal the ones cut from the dense map."""
    voxels = GRID.asu_indices()[::3]
    values = np.arange(len(voxels)) + 1.0
    _, refl = write_observations("a", GRID, {"miller_index": voxels, "counts": values})
    path = tmp_path / "merged.h5"
    with ObservationFile(refl) as table, MapWriter(path, GRID, []) as writer:
        merge([table], MergingSettings(n_shells=1), writer)
    with MapFile(path) as handle:
        columns = handle.columns(["index", "intensity"])
        expected = handle.layer("map/intensity", normal)
    order = np.random.default_rng(7).permutation(len(voxels))
    layer = report.layer_values(
        GRID, normal, columns["index"][order], columns["intensity"][order]
    )
    assert np.isfinite(expected).sum() > 50
    np.testing.assert_array_equal(layer, expected)


def test_pulls_of_noise_are_those_of_a_correct_map():
    few = make_comparison(decaying(), counts=2, v=3.0)
    noise, pull = report.noise_pulls(few), few.pull
    n = len(pull)
    assert abs(noise.mean()) < 4 / np.sqrt(n)
    assert noise.var() == pytest.approx(1, abs=0.1)
    # Third moment of a Poisson distribution among normal ones: λ/(λ + V)^1.5
    counts = few.voxels.expected_counts(few.scale)
    skewness = np.mean(counts / (counts + 3) ** 1.5)
    assert np.mean(noise**3) == pytest.approx(skewness, abs=0.15)
    assert np.mean(pull**3) == pytest.approx(skewness, abs=0.15)
    assert skewness > 0.1
    np.testing.assert_array_equal(noise, report.noise_pulls(few))


def axes_by_title(figure, start: str):
    (found,) = [ax for ax in figure.axes if ax.get_title().startswith(start)]
    return found


def test_figure_shows_map_and_truth_in_the_same_colours(section):
    figure, _, _ = section
    for layer in ("hk0", "h0l", "0kl"):
        images = [
            axes_by_title(figure, f"{layer}, {name}").images[0]
            for name in ("truth", "map", "(map - truth)")
        ]
        assert images[0].get_clim() == images[1].get_clim()
        assert images[2].get_clim() == (-4, 4)
        difference = np.ma.filled(images[2].get_array(), np.nan)
        assert np.nanstd(difference) == pytest.approx(1, abs=0.15)
        assert np.isnan(difference).any()  # the origin and beyond d_min


def test_figure_shows_each_voxel_and_shell(section, comparison):
    figure, _, _ = section
    scatter = axes_by_title(figure, f"{len(comparison.voxels)} unique voxels")
    shown = scatter.collections[0].get_array().sum()
    outside = sum(int(text.get_text().split()[0]) for text in scatter.texts)
    assert shown + outside == len(comparison.voxels)
    assert outside < 0.01 * len(comparison.voxels)
    (cc,) = [ax for ax in figure.axes if ax.get_ylabel() == "CC anisotropic"]
    np.testing.assert_allclose(
        cc.lines[1].get_ydata(), [shell.cc_anisotropic for shell in comparison.shells]
    )
    (chi2,) = [ax for ax in figure.axes if ax.get_ylabel() == "χ²"]
    np.testing.assert_allclose(
        chi2.lines[0].get_ydata(), [shell.chi2 for shell in comparison.shells]
    )


def test_histogram_is_a_density_with_all_voxels(comparison):
    figure = report.Figure()
    wild = dataclasses.replace(
        comparison, variance=comparison.variance / 1e4
    )  # far beyond the limits
    for case in (comparison, wild):
        ax = figure.add_subplot()
        report.plot_pulls(ax, case)
        density = ax.patches[0].get_data()
        assert np.sum(density.values * np.diff(density.edges)) == pytest.approx(1)
        expected = f"standard deviation {case.pull.std():.3f}"
        assert expected in ax.get_title()


def test_axes_of_strong_variation_are_logarithmic():
    figure = report.Figure()
    for exponent, scale in ((1.0, "linear"), (40.0, "log")):
        ax = figure.add_subplot()
        # Some voxels without any count do not disturb it
        report.plot_scatter(ax, make_comparison(decaying(exponent), 20), "photons")
        assert (ax.get_xscale(), ax.get_yscale()) == (scale, scale)


def test_section_holds_the_table_and_the_picture(section, comparison):
    _, title, text = section
    assert title == "Comparison with the truth of the simulation"
    cells = re.findall("<td>(.*?)</td>", text)
    assert len(cells) == len(comparison.summary()) + 13 * 6
    assert f"{comparison.overall.chi2:.3f}" in cells[-13:]
    assert "<th>&lt;map&gt;/&lt;truth&gt;</th>" in text
    (data,) = re.findall('src="data:image/png;base64,(.*?)"', text)
    image = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
    assert image.shape[:2] == (615, 450)
    assert image[..., :3].std() > 0.05


def test_empty_shells_and_layers_can_be_drawn(comparison):
    voxels = comparison.voxels
    some = (voxels.s > 0.45) & np.all(voxels.index != 0, axis=1)
    some |= voxels.s < 0.1
    result = compare_voxels(selected(voxels, some), 10)
    assert any(shell.n_voxels == 0 for shell in result.shells)
    _, text = report.comparison_section(result, report.plot_comparison(result), 20)
    assert "<td>-</td>" in text
