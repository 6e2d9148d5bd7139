from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid
from dials_diffuse.merging import sums

# Cells that obey the group, in standard and other settings, with even and odd ndiv.
GRIDS = [
    Grid((9.1, 10.3, 12.2, 75, 100, 110), (2, 3, 1), " P 1", 2.0),
    Grid((9.1, 10.3, 12.2, 90, 100, 90), (2, 3, 1), " P 2yb", 2.0),
    Grid((9.1, 10.3, 12.2, 90, 100, 90), (3, 2, 3), " C 2y", 2.0),
    # I 1 2 1, a non-standard setting of C 2
    Grid((9.1, 10.3, 12.2, 90, 100, 90), (2, 2, 2), " C 2y (x,y,-x+z)", 2.0),
    Grid((9.1, 9.1, 12.2, 90, 90, 90), (2, 2, 3), " P 4w", 2.0),
    Grid((9.1, 9.1, 12.2, 90, 90, 120), (3, 3, 2), " P 3", 2.0),
    Grid((9.1, 9.1, 9.1, 80, 80, 80), (2, 2, 2), " P 3*", 2.0),  # R 3:R
    Grid((9.1, 9.1, 12.2, 90, 90, 120), (2, 2, 1), " R 3", 2.0),
    Grid((9.1, 9.1, 9.1, 90, 90, 90), (3, 3, 3), " I 4 2 3", 2.0),
    Grid((9.1, 9.1, 9.1, 90, 90, 90), (2, 2, 2), " I 4 2 3", 2.0),
]


def ids(grid: Grid) -> str:
    return f"{grid.space_group.strip()} {grid.ndiv}"


def all_voxels(grid: Grid) -> np.ndarray:
    return grid.index(np.arange(np.prod(grid.shape)))


def random_columns(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    columns = {name: rng.uniform(1, 2, n) for name in sums.SUMS}
    columns["n_pixels"] = rng.integers(1, 9, n)
    return columns


def test_pack_keeps_order_and_negative_indices():
    index = np.array([[-3, 0, 5], [-3, 1, -5], [0, 0, 0], [2, -7, 1]])
    packed = sums.pack(index)
    assert np.all(np.diff(packed) > 0)
    np.testing.assert_array_equal(sums.unpack(packed), index)


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_voxels_share_a_number_if_they_are_equivalent(grid):
    voxels = sums.unique_voxels(grid)
    numbers = sums.number_voxels(grid, voxels)
    index = all_voxels(grid)
    number = numbers.reshape(-1)
    reachable = grid.s(index) <= 1 / grid.d_min + grid.half_diagonal
    assert np.all(number[reachable] >= 0)
    known = number >= 0
    representative = symmetry.map_to_asu(index[known], grid.laue_group)
    np.testing.assert_array_equal(sums.unpack(voxels[number[known]]), representative)


def test_unique_voxels_hold_all_pixels_of_the_sphere():
    grid = Grid((9.1, 9.1, 12.2, 90, 90, 120), (3, 3, 2), " P 3", 2.0)
    rng = np.random.default_rng(7)
    rlp = rng.normal(size=(20000, 3))
    rlp *= (
        rng.uniform(0.8, 1, (20000, 1))
        / grid.d_min
        / np.linalg.norm(rlp, axis=1, keepdims=True)
    )
    a = np.array(grid.cell.orthogonalization_matrix()).reshape(3, 3)
    voxels = grid.voxel_index(rlp @ a)
    numbers = sums.number_voxels(grid, sums.unique_voxels(grid))
    assert np.all(numbers.reshape(-1)[grid.key(voxels)] >= 0)


@pytest.mark.parametrize("grid", GRIDS, ids=ids)
def test_sums_equal_a_dictionary_over_operators(grid):
    rng = np.random.default_rng(7)
    voxels = all_voxels(grid)
    voxels = voxels[grid.s(voxels) <= 1 / grid.d_min]
    index = voxels[np.sort(rng.integers(0, len(voxels), 3000))]
    experiment = rng.integers(0, 3, len(index))
    columns = random_columns(len(index), rng)

    matrices = [
        np.array(op.r().as_double()).reshape(3, 3).round().astype(int)
        for op in grid.laue_group.all_ops()
    ]
    expected: dict[tuple, np.ndarray] = {}
    observations: dict[tuple, set] = {}
    rows = np.array([columns[name] for name in sums.SUMS]).T
    for h, number, row in zip(index, experiment, rows):
        name = max(tuple(h @ matrix) for matrix in matrices)
        expected[name] = expected.get(name, 0) + row
        observations.setdefault(name, set()).add((*h, number))

    list_ = sums.unique_voxels(grid)
    numbers = sums.number_voxels(grid, list_)
    accumulator = sums.Accumulator(0, len(list_))
    grouped = sums.group_observations(index, experiment, columns)
    half = sums.split_halves(
        grouped.index, sums.hash_identifiers("abc")[grouped.experiment], 1
    )
    number = numbers.reshape(-1)[grid.key(grouped.index)]
    assert accumulator.add(grouped, number, half) == len(grouped.experiment)
    [(places, found)] = accumulator.observed()

    assert len(places) == len(expected)
    for i, h in enumerate(sums.unpack(list_[places])):
        name = max(tuple(h @ matrix) for matrix in matrices)
        total = [found[key][:, i].sum() for key in sums.SUMS]
        np.testing.assert_allclose(total, expected[name], rtol=1e-12)
        assert found["n_obs"][:, i].sum() == len(observations[name])


def test_grouping_adds_the_rows_of_a_voxel_and_experiment():
    index = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 1, 0]])
    experiment = np.array([0, 1, 1, 1])
    columns = {name: np.array([1.0, 2.0, 4.0, 8.0]) for name in sums.SUMS}
    grouped = sums.group_observations(index, experiment, columns)
    np.testing.assert_array_equal(grouped.index, index[[0, 1, 3]])
    np.testing.assert_array_equal(grouped.experiment, [0, 1, 1])
    np.testing.assert_array_equal(grouped.sums["counts"], [1, 6, 8])


def test_grouping_does_not_need_sorted_rows():
    rng = np.random.default_rng(7)
    index = rng.integers(-2, 3, (500, 3))
    experiment = rng.integers(0, 3, 500)
    columns = random_columns(500, rng)
    order = np.lexsort((experiment, sums.pack(index)))
    mixed = sums.group_observations(index, experiment, columns)
    tidy = sums.group_observations(
        index[order], experiment[order], {k: v[order] for k, v in columns.items()}
    )
    np.testing.assert_array_equal(mixed.index, tidy.index)
    np.testing.assert_array_equal(mixed.experiment, tidy.experiment)
    for name in sums.SUMS:
        np.testing.assert_array_equal(mixed.sums[name], tidy.sums[name])


def test_two_accumulators_equal_one():
    rng = np.random.default_rng(7)
    index = np.column_stack([np.arange(60) // 3, np.zeros((60, 2), dtype=int)])
    # Whole numbers, whose sums are exact in any order
    columns = {name: rng.integers(1, 100, 60).astype(float) for name in sums.SUMS}
    number = np.arange(60) % 7
    half = rng.integers(0, 2, 60)

    def accumulate(part: slice) -> dict[str, np.ndarray]:
        accumulator = sums.Accumulator(0, 7)
        observations = sums.Observations(
            index[part], number[part], {k: v[part] for k, v in columns.items()}
        )
        accumulator.add(observations, number[part], half[part])
        return accumulator.sums

    whole = accumulate(slice(None))
    first, second = accumulate(slice(0, 21)), accumulate(slice(21, None))
    assert whole["counts"].sum() == columns["counts"].sum()
    for name in whole:
        np.testing.assert_array_equal(first[name] + second[name], whole[name])


def test_accumulator_takes_its_range_only():
    observations = sums.Observations(
        np.zeros((4, 3), int), np.zeros(4, int), dict.fromkeys(sums.SUMS, np.ones(4))
    )
    accumulator = sums.Accumulator(2, 4)
    number, half = np.array([1, 2, 3, 4]), np.zeros(4, int)
    assert accumulator.add(observations, number, half) == 2
    [(places, _)] = accumulator.observed()
    np.testing.assert_array_equal(places, [2, 3])


@pytest.fixture
def many_observations():
    index = np.stack(np.meshgrid(*[np.arange(-20, 21)] * 3), axis=-1).reshape(-1, 3)
    hashes = sums.hash_identifiers(["sweep 1", "sweep 2"])
    return index, hashes


def test_halves_are_balanced(many_observations):
    index, hashes = many_observations
    for value in hashes:
        half = sums.split_halves(index, np.full(len(index), value), 42)
        assert set(np.unique(half)) == {0, 1}
        sigma = 0.5 / np.sqrt(len(index))
        assert abs(half.mean() - 0.5) < 4 * sigma


def test_halves_of_experiments_seeds_and_friedel_mates_are_independent(
    many_observations,
):
    index, hashes = many_observations
    n = len(index)
    first = sums.split_halves(index, np.full(n, hashes[0]), 42)
    for other in (
        sums.split_halves(index, np.full(n, hashes[1]), 42),
        sums.split_halves(index, np.full(n, hashes[0]), 43),
        sums.split_halves(-index, np.full(n, hashes[0]), 42),
        sums.split_halves(index + [1, 0, 0], np.full(n, hashes[0]), 42),
    ):
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / np.sqrt(n)


def test_halves_do_not_depend_on_the_order(many_observations):
    index, hashes = many_observations
    order = np.random.default_rng(7).permutation(len(index))
    values = np.full(len(index), hashes[0])
    half = sums.split_halves(index, values, 42)
    np.testing.assert_array_equal(
        sums.split_halves(index[order], values, 42), half[order]
    )


def test_splitmix64_gives_the_published_sequence():
    # First outputs of the generator started at 0, which adds the golden gamma each time
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = np.array([0, gamma, gamma + gamma], dtype=np.uint64)
    np.testing.assert_array_equal(
        sums.mix_bits(state),
        np.array(
            [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
            dtype=np.uint64,
        ),
    )


def test_halves_are_the_same_on_every_machine():
    index = np.array(
        [[0, 0, 0], [1, 2, 3], [-1, 0, 4], [5, 5, -5], [7, 0, 1], [2, 2, 2]]
    )
    values = sums.hash_identifiers(["a"] * len(index))
    # Recorded once; another result would change the half-maps of every user
    np.testing.assert_array_equal(
        sums.split_halves(index, values, 42), [0, 1, 0, 1, 1, 1]
    )


def test_grid_with_an_axis_too_long_to_pack():
    grid = Grid((100.0, 1.0, 1.0, 90, 90, 90), (12000, 1, 1), " P 1", 1.0)
    with pytest.raises(ValueError, match="too long on one axis"):
        sums.unique_voxels(grid)


def test_split_of_experiments_depends_on_identifier_and_seed_only():
    names = [f"image {i}" for i in range(2000)]
    half = sums.split_experiments(sums.hash_identifiers(names), 42)
    again = sums.split_experiments(sums.hash_identifiers(names[::-1]), 42)
    np.testing.assert_array_equal(half, again[::-1])
    other = sums.split_experiments(sums.hash_identifiers(names), 43)
    for fraction in (half.mean(), np.mean(half == other)):
        assert fraction == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(2000))
