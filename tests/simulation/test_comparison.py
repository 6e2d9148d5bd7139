from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from matched_voxels import correct_voxels, selected

from cctbx import sgtbx

from dials_diffuse import symmetry
from dials_diffuse.command_line import diffuse_process
from dials_diffuse.extraction.settings import BraggSettings, ExclusionRegion
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import MapWriter, read_map
from dials_diffuse.io.observations import ObservationFile, ObservationWriter
from dials_diffuse.io.truth import PARTS, Truth, write_truth
from dials_diffuse.merging.merge import MergingSettings, merge
from dials_diffuse.merging.sums import number_voxels, unique_voxels, unpack
from dials_diffuse.simulation import comparison
from dials_diffuse.simulation.comparison import (
    MatchedVoxels,
    compare,
    compare_voxels,
    is_cut,
    is_cut_by_region,
)

# a = b, but not by symmetry: h and k can be exchanged by mistake.
GRID = Grid((22.0, 22.0, 27.0, 90, 90, 90), (2, 2, 2), " P 2ac 2ab", 2.2)
POWER = 3.0

# Semi-axes of 1/7, 1/8 and 1/6 that grow with s, less along it
GROWING = ExclusionRegion((49.0, 64.0, 36.0, 5.0, 0.0, -3.0), 30.0, 0.5, 0.01)


def true_intensity(grid: Grid, index: np.ndarray) -> np.ndarray:
    """Electrons², decaying with s, with features that have the symmetry mmm."""
    h, k, l = (index / grid.ndiv).T
    waves = np.cos(1.9 * h) * np.cos(0.8 * k) + np.cos(1.3 * l) * np.cos(1.1 * h)
    return 40 * np.exp(-10 * grid.s(index) ** 2) * (1 + 0.3 * waves) + 2


@pytest.fixture
def write_true_map(tmp_path):
    """Returns a function that writes the truth on a grid."""

    def write(grid: Grid = GRID, name: str = "truth.h5") -> str:
        packed = unique_voxels(grid)
        index = unpack(packed)
        parts = {part: np.ones(len(index)) for part in PARTS}
        parts["intensity"] = true_intensity(grid, index)
        isotropic = {part: np.ones(2) for part in ("s", "solvent", "compton")}
        truth = Truth(
            composition={"C": 10.0},
            scattering_power=POWER,
            isotropic=isotropic,
            air={"two_theta": np.zeros(1), "rate": np.zeros(1)},
            defects=[],
            miller_index=np.ones((1, 3)),
            f_squared=np.ones(1),
            series=[],
        )
        numbers = number_voxels(grid, packed)
        write_truth(tmp_path / name, grid, index, parts, numbers, truth)
        return str(tmp_path / name)

    return write


@pytest.fixture
def merge_rows(tmp_path, write_observations):
    """Returns a function that merges rows of observations into a map."""

    def run(columns: dict[str, np.ndarray], grid: Grid = GRID) -> str:
        _, refl = write_observations("sim", grid, columns)
        path = tmp_path / "merged.h5"
        with ObservationFile(refl) as table:
            with MapWriter(path, table.grid, []) as writer:
                merge([table], MergingSettings(n_shells=2), writer)
        return str(path)

    return run


def observe(
    grid: Grid = GRID, level: float = 1.0, background: float = 0.0, seed: int = 7
) -> dict[str, np.ndarray]:
    """Rows of three crystals that saw some equivalent of each voxel, with Poisson noise.

    The background is known exactly; M differs from row to row, with the mean ``level``.
    """
    rng = np.random.default_rng(seed)
    unique = grid.asu_indices()
    voxel = np.tile(np.arange(len(unique)), 3)
    signs = rng.choice([-1, 1], (len(voxel), 3))
    m = level * rng.uniform(0.2, 1.8, len(voxel))
    rate = POWER * true_intensity(grid, unique)[voxel] + background
    return {
        "miller_index": unique[voxel] * signs,
        "id": np.repeat(np.arange(3), len(unique)),
        "counts": rng.poisson(m * rate).astype(float),
        "background.sum.value": m * background,
        "normalisation": m,
    }


def simulated_voxels(seed: int = 7, level: float = 3.0) -> MatchedVoxels:
    """The voxels of a correct map, without files."""
    rng = np.random.default_rng(seed)
    index = GRID.asu_indices()
    truth = POWER * true_intensity(GRID, index)
    m = level * rng.uniform(0.3, 1.7, len(index))
    return correct_voxels(GRID, truth, m, rng)


def assert_correct(result: comparison.Comparison) -> None:
    """All figures of a map are those of counting noise alone, within four errors."""
    for shell in (*result.shells, result.overall):
        assert abs(shell.ratio - 1) < 4 * shell.ratio_error
        assert abs(shell.chi2 - 1) < 4 * shell.chi2_error
        assert abs(shell.mean_pull) < 4 * shell.mean_pull_error
        cc_error = (1 - shell.cc_expected**2) / np.sqrt(shell.n_voxels)
        assert abs(shell.cc_anisotropic - shell.cc_expected) < 5 * cc_error
        assert shell.cc >= shell.cc_anisotropic - 2 * cc_error
    overall = result.overall
    assert abs(overall.chi2_per_decade) < 4 * overall.chi2_per_decade_error
    assert abs(overall.chi2_per_s) < 4 * overall.chi2_per_s_error
    # The errors are small enough for this to say something
    assert overall.chi2_error < 0.04
    assert overall.chi2_per_decade_error < 0.2


@pytest.mark.parametrize("background", [0.0, 30.0])
@pytest.mark.parametrize("scale", ["fit", "absolute"])
def test_correct_map_agrees_with_the_truth(
    write_true_map, merge_rows, background, scale
):
    merged = merge_rows(observe(background=background))
    result = compare(merged, write_true_map(), n_shells=5, scale=scale)
    assert_correct(result)
    if scale == "fit":
        assert abs(result.scale - 1) < 4 * result.scale_error
        assert 0 < result.scale_error < 0.005
    else:
        assert (result.scale, result.scale_error) == (1.0, None)
    assert 0.5 < result.overall.cc_anisotropic < 0.99
    assert result.overall.sigma_ratio == pytest.approx(1, abs=0.03)


def test_few_counts_are_unbiased(write_true_map, merge_rows):
    """With weights from observed counts the scale would come out far too low."""
    result = compare(merge_rows(observe(level=0.003)), write_true_map(), n_shells=1)
    voxels = result.voxels
    assert 0.1 < result.overall.counts < 0.6
    assert abs(result.scale - 1) < 4 * result.scale_error
    assert abs(result.overall.chi2 - 1) < 4 * result.overall.chi2_error
    weight = 1 / np.maximum(voxels.intensity / voxels.normalisation, 0.1)
    naive = np.sum(weight * voxels.truth * voxels.intensity)
    naive /= np.sum(weight * voxels.truth**2)
    assert naive < 1 - 20 * result.scale_error


def test_background_takes_part_in_the_standard_error():
    voxels = simulated_voxels()
    n = len(voxels)
    more = dataclasses.replace(
        voxels, background=np.full(n, 20.0), background_variance=np.full(n, 5.0)
    )
    m = voxels.normalisation
    np.testing.assert_allclose(voxels.variance(2.0), 2 * voxels.truth / m)
    expected = (2 * m * voxels.truth + 25) / m**2
    np.testing.assert_allclose(more.variance(2.0), expected)


def test_wrong_scale_is_fitted_or_seen(write_true_map, merge_rows):
    columns = observe()
    columns["normalisation"] /= 1.3
    merged, truth = merge_rows(columns), write_true_map()
    fitted = compare(merged, truth, n_shells=2)
    assert fitted.scale == pytest.approx(1.3, abs=4 * fitted.scale_error)
    assert fitted.overall.ratio == pytest.approx(1, abs=1e-9)
    assert_correct(fitted)
    absolute = compare(merged, truth, n_shells=2, scale="absolute")
    assert absolute.overall.ratio == pytest.approx(1.3, abs=0.01)
    assert absolute.overall.chi2 > 3
    assert absolute.overall.mean_pull > 1
    # Correlation coefficients do not see it
    for name in ("cc", "cc_anisotropic"):
        assert getattr(absolute.overall, name) == pytest.approx(
            getattr(fitted.overall, name)
        )


def test_wrong_setting_is_seen(write_true_map, merge_rows):
    columns = observe()
    truth = write_true_map()
    right = compare(merge_rows(columns), truth, n_shells=2).overall
    columns["miller_index"] = columns["miller_index"][:, [1, 0, 2]]
    wrong = compare(merge_rows(columns), truth, n_shells=2).overall
    assert right.cc_anisotropic > 0.8
    assert wrong.cc_anisotropic < 0.5
    assert wrong.cc_anisotropic < right.cc_anisotropic - 0.3
    assert wrong.chi2 > 5
    # What the isotropic part has in common hides it from the plain correlation
    assert wrong.cc > 0.8


def test_forgotten_background_is_seen(write_true_map, merge_rows):
    columns = observe(background=20.0, level=3.0)
    columns["background.sum.value"][:] = 0
    result = compare(merge_rows(columns), write_true_map(), scale="absolute")
    assert_grows(result.shells, "ratio")
    overall = result.overall
    assert overall.mean_pull > 30 * overall.mean_pull_error
    assert overall.chi2_per_decade < -4 * overall.chi2_per_decade_error
    assert overall.chi2_per_s > 4 * overall.chi2_per_s_error
    # A scale that is fitted takes part of it, with the opposite sign at low resolution
    fitted = compare_voxels(result.voxels, scale="fit")
    assert fitted.scale > 1.1
    assert fitted.shells[0].ratio < 0.98
    assert fitted.shells[-1].ratio > 1.02


def assert_grows(shells, name: str) -> None:
    values = [getattr(shell, name) for shell in shells]
    assert np.corrcoef(values, np.arange(len(values)))[0, 1] > 0.9
    assert values[-1] > values[0]


def test_wrong_factors_raise_chi2_with_the_intensity():
    voxels = simulated_voxels()
    factor = np.random.default_rng(8).normal(1, 0.1, len(voxels))
    wrong = dataclasses.replace(voxels, intensity=voxels.intensity * factor)
    overall = compare_voxels(wrong).overall
    assert overall.chi2 > 1.5
    assert overall.chi2_per_decade > 4 * overall.chi2_per_decade_error
    # (I - E)²/var = 0.01 E²/(E/M) more
    expected = 1 + np.mean(0.01 * voxels.truth * voxels.normalisation)
    assert overall.chi2 == pytest.approx(expected, rel=0.1)
    assert overall.rms_excess == pytest.approx(0.1, abs=0.01)
    assert compare_voxels(voxels).overall.rms_excess < 0.03


def test_wrong_gain_is_seen_in_chi2_and_wrong_sigma_in_its_ratio():
    voxels = simulated_voxels(level=10.0)
    right = compare_voxels(voxels).overall
    assert right.sigma_ratio == pytest.approx(1, abs=0.02)
    twice = dataclasses.replace(voxels, sigma=2 * voxels.sigma)
    overall = compare_voxels(twice).overall
    assert overall.sigma_ratio == pytest.approx(2 * right.sigma_ratio)
    assert overall.chi2 == right.chi2  # the sigma of the map is not used for it
    # Four units for each photon: twice the standard error
    rng = np.random.default_rng(8)
    m = voxels.normalisation
    counts = 4 * rng.poisson(m * voxels.truth / 4)
    gain = dataclasses.replace(voxels, intensity=counts / m)
    overall = compare_voxels(gain).overall
    assert overall.chi2 == pytest.approx(4, abs=0.2)
    assert abs(overall.ratio - 1) < 8 * overall.ratio_error


def test_figures_equal_independent_formulas():
    voxels = simulated_voxels(level=0.05)
    v = np.random.default_rng(9).uniform(0, 5, len(voxels))
    voxels = dataclasses.replace(voxels, background_variance=v, background=v / 2)
    result = compare_voxels(voxels, 4, "absolute")
    volumes = [1 / shell.d_min**3 - 1 / shell.d_max**3 for shell in result.shells]
    np.testing.assert_allclose(volumes, volumes[0])
    assert sum(shell.n_voxels for shell in result.shells) == len(voxels)
    i, e, m = voxels.intensity, voxels.truth, voxels.normalisation
    var = (m * e + 1.5 * v) / m**2
    limit = 1 / result.shells[1].d_max, 1 / result.shells[1].d_min
    shell = (voxels.s >= limit[0]) & (voxels.s < limit[1])
    for figures, part in (
        (result.shells[1], shell),
        (result.overall, np.ones(len(voxels), bool)),
    ):
        pull = (i - e)[part] / np.sqrt(var[part])
        total = (m * i)[part].sum() / (m * e)[part].sum()
        assert figures.n_voxels == part.sum()
        assert figures.ratio == pytest.approx(total)
        error = np.sqrt(((m * e) + 1.5 * v)[part].sum()) / (m * e)[part].sum()
        assert figures.ratio_error == pytest.approx(error)
        assert figures.cc == pytest.approx(np.corrcoef(i[part], e[part])[0, 1])
        deviation = np.sqrt(np.mean((i / e - 1)[part] ** 2))
        assert figures.rms_deviation == pytest.approx(deviation)
        excess = (np.mean(pull**2) - 1) / np.mean((e**2 / var)[part])
        assert figures.rms_excess**2 == pytest.approx(max(excess, 0), abs=1e-12)
        assert figures.chi2 == pytest.approx(np.mean(pull**2))
        assert figures.mean_pull == pytest.approx(np.mean(pull))
        for x, slope in ((np.log10(e), "chi2_per_decade"), (voxels.s, "chi2_per_s")):
            line = np.polyfit(x[part], pull**2, 1)
            assert getattr(figures, slope) == pytest.approx(line[0])


def test_errors_of_the_figures_are_right():
    """The scatter of the figures of many maps is that of their errors."""
    results = [
        compare_voxels(simulated_voxels(n, 0.01), 1, "absolute") for n in range(60)
    ]
    for name in ("chi2", "mean_pull", "ratio", "chi2_per_decade", "chi2_per_s"):
        values = [getattr(result.overall, name) for result in results]
        errors = [getattr(result.overall, f"{name}_error") for result in results]
        # The standard deviation of 60 values is known to 9 %
        assert np.std(values, ddof=1) == pytest.approx(np.mean(errors), rel=0.35)
    scales = [compare_voxels(simulated_voxels(n, 0.01), 1) for n in range(60)]
    scatter = np.std([result.scale for result in scales], ddof=1)
    assert scatter == pytest.approx(scales[0].scale_error, rel=0.35)


def test_maps_of_other_resolution_are_matched_by_index(write_true_map, merge_rows):
    fine = dataclasses.replace(GRID, d_min=1.9)
    merged = merge_rows(observe(fine), fine)
    result = compare(merged, write_true_map(), n_shells=1, scale="absolute")
    voxels = result.voxels
    assert voxels.grid == fine
    for h, truth in zip(voxels.index[::50], voxels.truth[::50]):
        assert truth == pytest.approx(POWER * true_intensity(GRID, h[None])[0])
    columns = read_map(merged)
    intensity = dict(zip(map(tuple, columns["index"]), columns["intensity"]))
    for h, value in zip(map(tuple, voxels.index), voxels.intensity):
        assert intensity[h] == value
    assert voxels.left_out["not in the truth"] > 100
    assert len(voxels) + sum(voxels.left_out.values()) == len(columns)


def test_voxels_that_reach_beyond_the_limits_are_left_out(write_true_map, merge_rows):
    grid = dataclasses.replace(GRID, d_max=12.0)
    voxels = compare(merge_rows(observe(grid), grid), write_true_map()).voxels
    corners = np.array(np.meshgrid(*[[-0.5, 0.5]] * 3)).reshape(3, -1).T
    unique = grid.asu_indices()
    s = np.array([grid.s(unique + corner) for corner in corners])
    inside = np.all((s < 1 / 2.2) & (s > 1 / 12), axis=0)
    kept = set(map(tuple, voxels.index))
    assert kept < set(map(tuple, unique[inside]))
    # None is left out for no reason: it comes near to a limit by half a diagonal
    near = (GRID.s(unique) > 1 / 2.2 - grid.half_diagonal) | (
        GRID.s(unique) < 1 / 12 + grid.half_diagonal
    )
    assert kept == set(map(tuple, unique[~near]))
    assert voxels.left_out == {"on the resolution limits": near.sum()}


def test_cut_voxels_are_left_out(write_true_map, merge_rows):
    merged, truth = merge_rows(observe()), write_true_map()
    everything = compare(merged, truth).voxels

    def left(*semi_axes: float) -> MatchedVoxels:
        metric = [*np.array(semi_axes) ** -2.0, 0.0, 0.0, 0.0]
        return compare(merged, truth, exclusion=[ExclusionRegion(metric)]).voxels

    # a voxel half-way between Bragg positions begins at 1/4
    near = np.all(everything.index % 2 == 0, axis=1)
    np.testing.assert_array_equal(left(0.2, 0.2, 0.2).index, everything.index[~near])
    assert left(0.2, 0.2, 0.2).left_out["cut by the Bragg exclusion"] == near.sum()
    near |= np.all(everything.index[:, :2] % 2 == 0, axis=1)
    np.testing.assert_array_equal(left(0.2, 0.2, 0.3).index, everything.index[~near])


@pytest.mark.parametrize(
    "exclusion, warns",
    [("none", False), ("statistical", False), ("auto", True), ("shoebox", True)],
)
def test_exclusions_whose_cuts_are_not_known(tmp_path, caplog, exclusion, warns):
    path = tmp_path / "x.refl"
    with ObservationWriter(path, GRID, {0: "a"}):
        pass
    with caplog.at_level("WARNING", "dials.diffuse"):
        known = diffuse_process.known_exclusion(BraggSettings(exclusion), GRID, path)
    assert known == []
    assert ("compared as if they were whole" in caplog.text) == warns


def test_exclusions_whose_cuts_are_known(tmp_path, caplog):
    """The fitted ones from the table of extraction, a given one from its settings."""
    path = tmp_path / "x.refl"
    with ObservationWriter(path, GRID, {0: "a"}) as writer:
        writer.write_bragg_regions(np.array([GROWING.numbers]))
    with caplog.at_level("WARNING", "dials.diffuse"):
        found = diffuse_process.known_exclusion(BraggSettings("auto"), GRID, path)
        given = BraggSettings(semi_axes=(0.2, 0.2, 0.5))
        metric = diffuse_process.known_exclusion(given, GRID, path)
    assert found == [GROWING] and not caplog.text
    expected = [25, 25, 4, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(metric[0].numbers, expected, atol=1e-12)


def test_left_out_whole_voxels_leave_the_others_as_they_are(write_true_map, merge_rows):
    columns = observe(level=3.0)
    rng = np.random.default_rng(7)
    peaks = rng.random(len(GRID.asu_indices())) < 0.1
    columns = {name: x[~np.tile(peaks, 3)] for name, x in columns.items()}
    assert_correct(compare(merge_rows(columns), write_true_map()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ndiv": (2, 2, 1)}, "the map has ndiv=2,2,2, the truth ndiv=2,2,1"),
        ({"space_group": " P 2y"}, "Laue group P m m m, the truth P 1 2/m 1"),
        ({"unit_cell": (22.0, 22.5, 27, 90, 90, 90)}, "differs from that of the truth"),
    ],
)
def test_maps_on_other_grids_are_refused(write_true_map, merge_rows, changes, message):
    other = write_true_map(dataclasses.replace(GRID, **changes))
    merged = merge_rows(observe())
    with pytest.raises(ValueError, match=message) as error:
        compare(merged, other)
    assert "\n" not in str(error.value)


def test_similar_cells_and_other_space_groups_of_the_laue_group_are_accepted(
    write_true_map, merge_rows
):
    other = dataclasses.replace(
        GRID, unit_cell=(22.1, 21.9, 27, 90, 90, 90), space_group=" P 2 2"
    )
    result = compare(merge_rows(observe()), write_true_map(other))
    assert result.overall.cc_anisotropic > 0.7


def test_asymmetric_unit_is_that_of_the_truth(write_true_map, merge_rows):
    """Space groups whose asymmetric units leave room for doubt."""
    for symbol in ("P 1 21 1", "P 1 1 21", "P 1"):
        hall = sgtbx.space_group_info(symbol).type().hall_symbol()
        grid = dataclasses.replace(GRID, space_group=hall, d_min=3.0)
        result = compare(merge_rows(observe(grid), grid), write_true_map(grid), 1)
        unique = symmetry.map_to_asu(result.voxels.index, grid.laue_group)
        np.testing.assert_array_equal(unique, result.voxels.index)
        assert abs(result.overall.chi2 - 1) < 4 * result.overall.chi2_error
        assert "not in the truth" not in result.voxels.left_out


def test_wrong_input_is_refused(write_true_map, merge_rows):
    merged, truth = merge_rows(observe()), write_true_map()
    with pytest.raises(ValueError, match="is not the truth of a simulation"):
        compare(merged, merged)
    with pytest.raises(ValueError, match=r"truth\.h5 is"):
        compare(truth, truth)
    with pytest.raises(ValueError, match="scale=relative is not known: use fit"):
        compare(merged, truth, scale="relative")
    with pytest.raises(ValueError, match="n_shells=0 must be positive"):
        compare(merged, truth, n_shells=0)
    with pytest.raises(ValueError, match="have no voxel in common"):
        compare(merged, truth, exclusion=[ExclusionRegion((1, 1, 1, 0, 0, 0))])
    voxels = simulated_voxels()
    with pytest.raises(ValueError, match="is -1, not positive"):
        compare_voxels(dataclasses.replace(voxels, intensity=-voxels.truth))
    voxels.truth[:3] = 0
    with pytest.raises(ValueError, match="not positive in 3 of"):
        compare_voxels(voxels)


def test_find_voxels():
    index = np.array([[3, -1, 2], [0, 0, 0], [-5, 2, 1]])
    wanted = np.array([[-5, 2, 1], [3, -1, 2], [3, -1, 3], [-9, 0, 0], [9, 9, 9]])
    found = comparison.find_voxels(wanted, index)
    np.testing.assert_array_equal(found, [2, 0, -1, -1, -1])
    np.testing.assert_array_equal(comparison.find_voxels(wanted, index[:0]), [-1] * 5)


def test_slope_is_not_defined_without_variation():
    y = np.array([1.0, 2.0, 4.0])
    assert comparison.regression_slope(np.full(3, 0.1), y) == (None, None)
    assert comparison.regression_slope(y[:2], y[:2]) == (None, None)
    slope, error = comparison.regression_slope(y, 3 * y - 1)
    assert slope == pytest.approx(3)
    assert error == pytest.approx(0, abs=1e-12)


def test_table_and_dictionary_hold_all_shells():
    result = compare_voxels(simulated_voxels(), 3)
    lines = result.as_table().splitlines()
    assert sum("Overall" in line for line in lines) == 1
    assert f"{result.overall.chi2:.3f}" in lines[-2]
    content = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert len(content["shells"]) == 3
    assert content["overall"]["chi2"] == result.overall.chi2
    assert content["scale"] == result.scale
    assert dict(result.summary())["Voxels compared"] == str(len(result.voxels))


def test_empty_shells_have_dashes():
    voxels = simulated_voxels()
    ends = (voxels.s < 0.1) | (voxels.s > 0.44)
    result = compare_voxels(selected(voxels, ends), 12)
    empty = result.shells[5]
    assert (empty.n_voxels, empty.ratio, empty.cc) == (0, None, None)
    assert result.rows()[5][3:] == ["-"] * 10
    json.dumps(result.as_dict(), allow_nan=False)


@pytest.mark.parametrize("radius", [0.1, 0.25, 0.4])
def test_voxels_that_an_exclusion_cuts(radius):
    """With two voxels per cell an exclusion of up to 1/4 cuts those on Bragg positions."""
    grid = Grid((20.0, 30.0, 40.0, 90.0, 90.0, 90.0), (2, 2, 2), "P 2 2", 5.0)
    index = np.array(
        [[0, 0, 0], [2, -4, 6], [1, 0, 0], [1, 1, 3], [3, 2, 1], [-1, 0, 2]]
    )
    metric = (radius**-2,) * 3 + (0.0,) * 3
    on_bragg = np.all(index % 2 == 0, axis=1)
    # the near face of the voxel at (1/2, 0, 0) is at 1/4, the near edge of the one at
    # (1/2, 0, 1/2) at sqrt(2)/4, the near corner of (1/2, 1/2, 1/2) at sqrt(3)/4
    distance = np.sqrt(np.sum(index % 2 != 0, axis=1)) / 4
    expected = on_bragg | (distance < radius)
    np.testing.assert_array_equal(is_cut(grid, index, metric), expected)


@pytest.mark.parametrize("ndiv", [(2, 2, 2), (3, 4, 5)])
def test_voxels_that_a_growing_region_cuts(ndiv):
    """Against the definition at points of all voxels, and against one that grows not."""
    grid = dataclasses.replace(GRID, ndiv=ndiv)
    rng = np.random.default_rng(7)
    index = rng.integers(-4 * np.array(ndiv), 4 * np.array(ndiv) + 1, (200, 3))
    cut = is_cut_by_region(grid, index, GROWING)
    fixed = ExclusionRegion(GROWING.metric)
    smaller = is_cut_by_region(grid, index, fixed)
    np.testing.assert_array_equal(smaller, is_cut(grid, index, fixed.metric))
    assert np.all(cut[smaller]) and 0.05 < smaller.mean() < cut.mean() < 0.95
    b = np.array(grid.cell.fractionalization_matrix()).reshape(3, 3)
    g11, g22, g33, g12, g13, g23 = GROWING.metric
    g = np.array([[g11, g12, g13], [g12, g22, g23], [g13, g23, g33]])
    points = np.array(list(np.ndindex(25, 25, 25))) / 24 - 0.5
    truly = []
    for voxel in index:
        hkl = (voxel + points) / ndiv
        dh = hkl - np.rint(hkl)
        s2 = np.sum((hkl @ b) ** 2, axis=1)
        along = np.einsum("ni,ij,nj->n", dh, g, hkl)
        distance = np.einsum("ni,ij,nj->n", dh, g, dh)
        distance += 0.01 * along**2 / (1 + 0.5 * s2)
        truly.append(np.any(distance < 1 + 30.0 * s2))
    assert not np.any(cut & ~np.array(truly))
    # A sliver of a voxel may lie between the points that are tried.
    assert np.count_nonzero(np.array(truly) & ~cut) <= 2


def test_voxels_that_several_regions_cut(write_true_map, merge_rows):
    merged, truth = merge_rows(observe()), write_true_map()
    wide = ExclusionRegion((11.0, 11.0, 30.0, 0.0, 0.0, 0.0))

    def left(*regions: ExclusionRegion) -> set[tuple[int, ...]]:
        voxels = compare(merged, truth, exclusion=regions).voxels
        return set(map(tuple, voxels.index.tolist()))

    assert left(GROWING) != left(wide)
    assert left(GROWING, wide) == left(GROWING) & left(wide)
    assert len(left(GROWING, wide)) < min(len(left(GROWING)), len(left(wide)))
