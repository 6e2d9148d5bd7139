from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest

from dials.array_family import flex
from dials_diffuse import symmetry
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import ASU_COLUMNS, BOXES, MapFile, MapWriter, read_map
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging import observations as observation_module
from dials_diffuse.merging.merge import MergingSettings, merge

GRID = Grid((9.1, 9.1, 12.2, 90, 90, 120), (2, 2, 3), " P 3", 1.6)


def sphere(grid: Grid) -> np.ndarray:
    """All voxels whose centres lie in the resolution range."""
    index = grid.index(np.arange(np.prod(grid.shape)))
    return index[grid.in_resolution_range(grid.s(index))]


def random_rows(grid: Grid, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    voxels = sphere(grid)
    m = rng.uniform(0.5, 2, n)
    return {
        "miller_index": voxels[rng.integers(0, len(voxels), n)],
        "id": rng.integers(0, 3, n),
        "panel": rng.integers(0, 2, n),
        "counts": rng.poisson(3 * m).astype(float),
        "background.sum.value": m,
        "background.sum.variance": 0.1 * m,
        "normalisation": m,
        "num_pixels.valid": rng.integers(1, 9, n),
    }


@pytest.fixture
def merge_files(tmp_path):
    """Returns a function that merges observation files into a map."""

    def run(*paths: str, name: str = "merged.h5", **settings: int):
        tables = [ObservationFile(path) for path in paths]
        with MapWriter(tmp_path / name, tables[0].grid, []) as writer:
            statistics = merge(tables, MergingSettings(**settings), writer)
        for table in tables:
            table.close()
        return statistics, tmp_path / name

    return run


def all_columns(path) -> dict[str, np.ndarray]:
    return dict(read_map(path, list(ASU_COLUMNS)).columns)


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


def test_merged_sums_equal_a_dictionary(write_observations, merge_files):
    rng = np.random.default_rng(7)
    rows = random_rows(GRID, 5000, rng)
    _, refl = write_observations("a", GRID, rows)
    _, path = merge_files(refl)
    unique = symmetry.map_to_asu(rows["miller_index"], GRID.laue_group)
    expected: dict[tuple, np.ndarray] = {}
    for h, n, b, v, m in zip(
        map(tuple, unique),
        rows["counts"],
        rows["background.sum.value"],
        rows["background.sum.variance"],
        rows["normalisation"],
    ):
        expected[h] = expected.get(h, np.zeros(4)) + [n, b, v, m]
    merged = read_map(path, list(ASU_COLUMNS))
    assert len(merged) == len(expected)
    for i, h in enumerate(map(tuple, merged["index"])):
        n, b, v, m = expected[h]
        assert merged["intensity"][i] == pytest.approx((n - b) / m, rel=1e-9, abs=1e-12)
        assert merged["sigma"][i] ** 2 >= 0.999999 * (n + v) / m**2
        assert merged["normalisation"][i] == pytest.approx(m)
    for name in ("counts", "normalisation", "n_obs", "n_pixels"):
        np.testing.assert_allclose(
            merged[f"half_1/{name}"] + merged[f"half_2/{name}"], merged[name]
        )
    assert merged["counts"].sum() == rows["counts"].sum()
    assert merged["n_pixels"].sum() == rows["num_pixels.valid"].sum()


def test_errors_follow_the_error_model_of_scaling(write_observations, merge_files):
    rows = random_rows(GRID, 3000, np.random.default_rng(3))
    rows["counts"] *= 1000  # bright, so that expected counts are those observed
    _, refl = write_observations("a", GRID, rows)
    _, path = merge_files(refl, name="counting.h5")
    counting = read_map(path, list(ASU_COLUMNS))
    a, b = 1.2, 0.05
    with h5py.File(refl, "a") as file:
        file["dials_diffuse"].attrs["error_model"] = (a, b)
    _, path = merge_files(refl, name="scaled.h5")
    scaled = read_map(path, list(ASU_COLUMNS))
    np.testing.assert_array_equal(scaled["intensity"], counting["intensity"])
    squares: dict[tuple, float] = {}
    unique = symmetry.map_to_asu(rows["miller_index"], GRID.laue_group)
    # The rows of a voxel and an experiment are one observation.
    voxels = [(*h, *e) for h, e in zip(rows["miller_index"], rows["id"][:, None])]
    sums: dict[tuple, float] = {}
    for voxel, h, m in zip(voxels, map(tuple, unique), rows["normalisation"]):
        sums[(h, voxel)] = sums.get((h, voxel), 0.0) + m**2
    for (h, _), square in sums.items():
        squares[h] = squares.get(h, 0.0) + square
    expected = [
        a * np.sqrt(sigma**2 + b**2 * squares[tuple(h)] * max(intensity, 0) ** 2 / m**2)
        for h, sigma, intensity, m in zip(
            counting["index"],
            counting["sigma"],
            counting["intensity"],
            counting["normalisation"],
        )
    ]
    np.testing.assert_allclose(scaled["sigma"], expected, rtol=1e-9)


def test_result_does_not_depend_on_the_slabs(
    write_observations, merge_files, monkeypatch
):
    rows = random_rows(GRID, 5000, np.random.default_rng(7))
    _, one = write_observations("one", GRID, rows, rows_per_slab=10_000)
    _, many = write_observations("many", GRID, rows, rows_per_slab=50)
    statistics, path = merge_files(one)
    expected = all_columns(path)
    for rows_in_memory in (1, 300, 10_000):
        monkeypatch.setattr(observation_module, "ROWS_PER_SLAB", rows_in_memory)
        again, path = merge_files(many)
        assert again == statistics
        assert_same(expected, all_columns(path))


def test_result_does_not_depend_on_the_passes(write_observations, merge_files):
    rows = random_rows(GRID, 5000, np.random.default_rng(7))
    _, refl = write_observations("a", GRID, rows)
    statistics, path = merge_files(refl)
    again, other = merge_files(refl, name="other.h5", voxels_per_pass=77)
    assert again == statistics
    assert_same(all_columns(path), all_columns(other))
    with MapFile(path) as first, MapFile(other) as second:
        for name in BOXES:
            np.testing.assert_array_equal(first.box(name), second.box(name))


def test_two_files_equal_one(write_observations, merge_files):
    rng = np.random.default_rng(7)
    rows = random_rows(GRID, 5000, rng)
    # Whole numbers, whose sums are exact in any order
    for name in ("background.sum.value", "background.sum.variance", "normalisation"):
        rows[name] = rng.integers(1, 9, 5000).astype(float)
    _, together = write_observations("all", GRID, rows, ("a", "b", "c"))
    first = rows["id"] == 0
    part = {name: values[first] for name, values in rows.items()}
    rest = {name: values[~first] for name, values in rows.items()}
    rest["id"] = rest["id"] - 1
    _, one = write_observations("one", GRID, part, ("a",))
    _, two = write_observations("two", GRID, rest, ("b", "c"))
    _, path = merge_files(together)
    expected = all_columns(path)
    for order in ((one, two), (two, one)):
        _, path = merge_files(*order)
        assert_same(expected, all_columns(path))


def test_scale_factors_and_offsets_are_undone(write_observations, merge_files):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(7)
    rows = random_rows(GRID, 4000, rng)
    scale, offset, truth = rng.uniform(0.5, 2, 4000), rng.uniform(0, 3, 4000), 7.0
    # No noise: counts = background + M (g I + b)
    rows["counts"] = rows["background.sum.value"] + rows["normalisation"] * (
        scale * truth + offset
    )
    rows["xyzobs.px.value"] = np.column_stack([scale, offset, np.zeros(4000)])
    _, refl = write_observations("a", GRID, rows)
    with h5py.File(refl, "r+") as handle:
        group = handle["dials/processing/group_0"]
        group["inverse_scale_factor"] = group["xyzobs.px.value"][:, 0]
        group["additive_offset"] = group["xyzobs.px.value"][:, 1]
    _, path = merge_files(refl)
    merged = read_map(path, ["index", "intensity", "normalisation"])
    np.testing.assert_allclose(merged["intensity"], truth, rtol=1e-9)
    total = (scale * rows["normalisation"]).sum()
    assert merged["normalisation"].sum() == pytest.approx(total)


def test_flagged_and_empty_rows_are_left_out(write_observations, merge_files, caplog):
    caplog.set_level("INFO", logger="dials.diffuse.merge")
    rows = random_rows(GRID, 3000, np.random.default_rng(7))
    flags = flex.reflection_table.flags
    rows["flags"] = np.zeros(3000, np.uint64)
    rows["flags"][:100] = int(flags.outlier_in_scaling)
    rows["flags"][100:150] = int(flags.excluded_for_scaling)
    rows["flags"][150:400] = int(flags.scaled)
    rows["num_pixels.valid"][400:410] = 0
    rows["counts"][:150] = 1e6
    good = {name: values[150:] for name, values in rows.items()}
    good = {k: np.delete(v, np.s_[250:260], axis=0) for k, v in good.items()}
    _, refl = write_observations("all", GRID, rows)
    _, clean = write_observations("clean", GRID, good)
    _, path = merge_files(refl)
    assert "2840 of 3000 rows used, 160 left out" in caplog.text
    _, expected = merge_files(clean, name="expected.h5")
    assert_same(all_columns(expected), all_columns(path))


def test_all_rows_flagged(write_observations, merge_files):
    rows = random_rows(GRID, 10, np.random.default_rng(7))
    rows["num_pixels.valid"][:] = 0
    _, refl = write_observations("a", GRID, rows)
    with pytest.raises(ValueError, match="a.refl has no usable observations"):
        merge_files(refl)


@pytest.mark.parametrize(
    "grid",
    [
        GRID,
        Grid((9.1, 10.3, 12.2, 90, 100, 90), (3, 2, 3), " C 2y", 1.8, 9.0),
        # Voxels exactly on the limits: h = 5 at 2 Å, h = 1 at 10 Å
        Grid((10, 10, 10, 90, 90, 90), (2, 2, 2), " I 4 2 3", 2.0, 10.0),
    ],
    ids=["P 3", "C 2 with d_max", "I 4 3 2 with voxels on the limits"],
)
def test_fully_sampled_grid_is_complete(grid, write_observations, merge_files):
    _, refl = write_observations("a", grid, {"miller_index": sphere(grid)})
    statistics, _ = merge_files(refl, n_shells=5)
    assert statistics.overall.completeness == 1
    assert [shell.completeness for shell in statistics.shells] == [1] * 5
    assert statistics.overall.n_possible == len(grid.asu_indices())
    assert statistics.overall.n_obs == len(sphere(grid))


def test_asymmetric_unit_alone_is_complete(write_observations, merge_files):
    asu = GRID.asu_indices()
    _, refl = write_observations("a", GRID, {"miller_index": asu})
    statistics, _ = merge_files(refl)
    assert statistics.overall.completeness == 1
    assert statistics.overall.multiplicity == 1
    half = {"miller_index": asu[::2]}
    _, refl = write_observations("b", GRID, half)
    statistics, _ = merge_files(refl, name="half.h5")
    assert statistics.overall.n_voxels == len(asu[::2])


def test_voxels_beyond_the_limits_are_merged_but_not_counted(
    write_observations, merge_files
):
    grid = Grid((10.3, 10.3, 10.3, 90, 90, 90), (3, 3, 3), " P 1", 2.0, 5.0)
    index = grid.index(np.arange(np.prod(grid.shape)))
    s = grid.s(index)
    edge = (s > 0.5) & (s < 0.5 + 0.9 * grid.half_diagonal) | (s < 0.2)
    assert edge.sum() > 100
    _, refl = write_observations("a", grid, {"miller_index": index[edge]})
    statistics, path = merge_files(refl)
    assert statistics.overall.n_voxels == 0
    assert statistics.overall.completeness == 0
    with MapFile(path) as handle:
        np.testing.assert_array_equal(handle.box("map/n_obs").ravel() > 0, edge)


def test_damaged_table_with_voxels_far_out(write_observations, merge_files):
    corner = {"miller_index": np.array([GRID.half_size])}
    _, refl = write_observations("a", GRID, corner)
    with pytest.raises(ValueError, match="1 of 1 observations lie beyond d_min=1.6"):
        merge_files(refl)


@pytest.mark.parametrize("space_group", [" P 3", " P -1", " P 3 2"])
def test_box_is_symmetric_and_holds_the_unique_values(
    space_group, write_observations, merge_files
):
    grid = Grid((9.1, 9.1, 12.2, 90, 90, 120), (2, 2, 3), space_group, 1.6)
    rows = random_rows(grid, 2000, np.random.default_rng(7))
    _, refl = write_observations("a", grid, rows)
    _, path = merge_files(refl)
    merged = read_map(path)
    with MapFile(path) as handle:
        for name, column in (
            ("map/intensity", "intensity"),
            ("map/intensity_errors", "sigma"),
            ("map/n_obs", "n_obs"),
        ):
            box = handle.box(name)
            np.testing.assert_array_equal(
                box.reshape(-1)[grid.key(merged["index"])],
                merged[column].astype(box.dtype),
            )
            index = sphere(grid)
            value = box.reshape(-1)[grid.key(index)]
            for matrix in symmetry.rotation_matrices(grid.laue_group):
                np.testing.assert_array_equal(
                    box.reshape(-1)[grid.key(index @ matrix)], value
                )
            seen = np.isfinite(box) if box.dtype.kind == "f" else box > 0
            unique = np.unique(
                symmetry.map_to_asu(
                    index[seen.reshape(-1)[grid.key(index)]], grid.laue_group
                ),
                axis=0,
            )
            assert len(unique) == len(merged)


def test_half_maps_agree_in_signal_and_not_in_noise(write_observations, merge_files):
    rng = np.random.default_rng(7)
    index = np.repeat(sphere(GRID), 2, axis=0)
    h, k, l = (symmetry.map_to_asu(index, GRID.laue_group) / GRID.ndiv).T
    pattern = 1 + 0.5 * np.cos(2 * np.pi * (0.3 * h + 0.2 * k)) * np.cos(1.3 * l)
    isotropic = 100 * np.exp(-GRID.s(index))
    common = {"miller_index": index, "id": np.arange(len(index)) % 2}
    for name, counts, low, high in (
        ("signal", 1e6 * isotropic * pattern, 0.999, 1),
        ("noise", rng.poisson(isotropic).astype(float), -0.1, 0.1),
    ):
        _, refl = write_observations(name, GRID, {**common, "counts": counts})
        statistics, _ = merge_files(refl, name=f"{name}.h5")
        assert low <= statistics.overall.cc_half <= high


def test_offsets_of_experiments_make_halves_of_observations_disagree(
    write_observations, merge_files
):
    """Six experiments saw all voxels; each has too much at some radii."""
    rng = np.random.default_rng(7)
    index = np.tile(GRID.asu_indices(), (6, 1))
    ids = np.repeat(np.arange(6), len(GRID.asu_indices()))
    phase = 2 * np.pi * ids / 6
    mean = 1000 + 100 * np.cos(20 * GRID.s(index) + phase)
    columns = {"miller_index": index, "id": ids, "counts": rng.poisson(mean) * 1.0}
    names = tuple(f"image {i}" for i in range(6))
    _, refl = write_observations("a", GRID, columns, names)
    n = len(GRID.asu_indices())
    statistics, _ = merge_files(refl, n_shells=3)
    assert all(shell.is_anticorrelated for shell in statistics.shells)
    assert statistics.overall.cc_half < -0.2
    statistics, path = merge_files(
        refl, name="other.h5", n_shells=3, half_split="experiments"
    )
    assert not any(shell.is_anticorrelated for shell in statistics.shells)
    assert abs(statistics.overall.cc_half) < 4 / np.sqrt(n)
    n_obs = read_map(path, ["half_1/n_obs", "half_2/n_obs"])
    assert len(set(n_obs["half_1/n_obs"])) == len(set(n_obs["half_2/n_obs"])) == 1


def test_seed_changes_the_halves_but_not_the_map(write_observations, merge_files):
    rows = random_rows(GRID, 5000, np.random.default_rng(7))
    _, refl = write_observations("a", GRID, rows)
    _, first = merge_files(refl, seed=1)
    _, second = merge_files(refl, name="other.h5", seed=2)
    first, second = all_columns(first), all_columns(second)
    assert np.any(first["half_1/n_obs"] != second["half_1/n_obs"])
    np.testing.assert_allclose(first["intensity"], second["intensity"], rtol=1e-9)


def test_no_sigma_is_zero(write_observations, merge_files):
    index = sphere(GRID)
    rng = np.random.default_rng(7)
    counts = rng.poisson(0.05, len(index)).astype(float)
    counts[GRID.s(index) > 0.5] = 0
    _, refl = write_observations("a", GRID, {"miller_index": index, "counts": counts})
    _, path = merge_files(refl)
    merged = all_columns(path)
    assert np.any(merged["counts"] == 0)
    assert np.all(merged["sigma"] > 0)
    seen = merged["half_1/n_obs"] > 0
    assert np.all(merged["half_1/sigma"][seen] > 0)
    assert np.all(np.isnan(merged["half_1/sigma"][~seen]))


def scaled_cell(factor: float) -> Grid:
    cell = (*(factor * np.array(GRID.unit_cell[:3])).tolist(), *GRID.unit_cell[3:])
    return dataclasses.replace(GRID, unit_cell=cell)


def test_cells_that_differ_in_their_last_digits(write_observations, merge_files):
    """As those of two extractions with the same given cell do."""
    voxel = {"miller_index": np.ones((1, 3), int)}
    _, first = write_observations("first", GRID, voxel, ("a",))
    _, second = write_observations("second", scaled_cell(1 + 1e-5), voxel, ("b",))
    _, path = merge_files(first, second)
    assert read_map(path, ["n_obs"])["n_obs"].tolist() == [2]
    _, third = write_observations("third", scaled_cell(1.002), voxel, ("c",))
    with pytest.raises(ValueError, match="third.refl has a grid with unit_cell="):
        merge_files(first, third, name="other.h5")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_min": 1.7}, "d_min=1.7.*d_min=1.6.*same grid"),
        ({"ndiv": (4, 4, 3)}, r"ndiv=\(4, 4, 3\)"),
        ({"space_group": " P 6"}, "space_group= P 6"),
    ],
)
def test_files_of_other_grids(change, message, write_observations, merge_files):
    voxel = {"miller_index": np.ones((1, 3), int)}
    _, first = write_observations("first", GRID, voxel, ("a",))
    other = dataclasses.replace(GRID, **change)
    _, second = write_observations("second", other, voxel, ("b",))
    with pytest.raises(ValueError, match=f"second.refl has a grid with {message}"):
        merge_files(first, second)


def test_experiment_in_two_files(write_observations, merge_files):
    voxel = {"miller_index": np.ones((1, 3), int)}
    _, first = write_observations("first", GRID, voxel, ("a",))
    _, second = write_observations("second", GRID, voxel, ("a",))
    with pytest.raises(ValueError, match="Experiment a is in .*first.refl and in"):
        merge_files(first, second)


def test_table_without_rows(write_observations, merge_files):
    _, refl = write_observations("a", GRID, {"miller_index": np.zeros((0, 3), int)})
    with pytest.raises(ValueError, match="a.refl has no observations"):
        merge_files(refl)


def test_row_of_an_unknown_experiment(write_observations, merge_files):
    rows = {"miller_index": np.ones((1, 3), int), "id": np.array([4])}
    _, refl = write_observations("a", GRID, rows)
    with pytest.raises(ValueError, match="experiment number 4, which it has no"):
        merge_files(refl)
