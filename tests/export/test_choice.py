from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse.export.choice import N_SHARES, chosen_rows, shares, survey
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging import sums
from dials_diffuse.merging.estimate import thin_shell

GRID = Grid((9.1, 10.3, 12.2, 90, 100, 90), (2, 3, 2), " P 2yb", 1.8)


def observations() -> dict[str, np.ndarray]:
    """Three rows of every voxel of the sphere and of the origin; some have no pixels."""
    index = GRID.index(np.arange(np.prod(GRID.shape)))
    s = GRID.s(index)
    index = np.repeat(index[GRID.in_resolution_range(s) | (s == 0)], 3, axis=0)
    rng = np.random.default_rng(7)
    n = len(index)
    return {
        "miller_index": index,
        "id": np.arange(n) % 3,
        "counts": rng.poisson(5, n).astype(float),
        "normalisation": rng.uniform(0.5, 2, n),
        "num_pixels.valid": (rng.random(n) > 0.1).astype(int),
        "d": 1 / np.maximum(GRID.s(index), 1e-9),
    }


@pytest.fixture
def table(write_observations):
    with ObservationFile(write_observations("all", GRID, observations())[1]) as table:
        yield table


def test_survey_counts_usable_rows_and_photons_of_shells(table):
    found = survey([table])
    rows = observations()
    usable = (rows["num_pixels.valid"] > 0) & np.any(rows["miller_index"] != 0, axis=1)
    assert found.n_rows == len(usable)
    assert found.n_usable == np.count_nonzero(usable) < len(usable)
    shell = thin_shell(GRID.s(rows["miller_index"]))
    for number in np.unique(shell[usable]):
        here = usable & (shell == number)
        photons, weight = (rows[x][here].sum() for x in ("counts", "normalisation"))
        assert found.rate[number] == pytest.approx((photons + 1) / weight)


def test_a_voxel_is_chosen_with_all_equivalent_rows_or_not_at_all(table):
    all_rows = chosen_rows(table, N_SHARES)
    counted = survey([table])
    assert len(all_rows.unique) == counted.n_usable
    chosen = chosen_rows(table, counted.shares_within(2000))
    assert 1900 < len(chosen.unique) <= 2000
    expected = np.isin(all_rows.unique, chosen.unique)
    assert np.count_nonzero(expected) == len(chosen.unique)
    # operators of the Laue group 2/m, unique axis b
    index = {tuple(x) for x in chosen.rows["miller_index"].tolist()}
    mates = {(-h, k, -l) for h, k, l in index} | {(-h, -k, -l) for h, k, l in index}
    unchosen = set(map(tuple, all_rows.rows["miller_index"][~expected].tolist()))
    assert unchosen and not unchosen & (index | mates)


def test_choices_are_nested_and_do_not_depend_on_slabs(table, write_observations):
    counted = survey([table])
    few, more = (chosen_rows(table, counted.shares_within(n)).rows for n in (500, 2000))
    few, more = (set(map(tuple, rows["miller_index"].tolist())) for rows in (few, more))
    assert few < more
    expt, refl = write_observations("slabs", GRID, observations(), rows_per_slab=77)
    with ObservationFile(refl) as other:
        found = chosen_rows(other, survey([other]).shares_within(2000)).rows
    assert set(map(tuple, found["miller_index"].tolist())) == more


def test_shares_are_even():
    index = GRID.asu_indices()
    rng = np.random.default_rng(7)
    many = rng.integers(-4000, 4000, (200_000, 3)).astype(np.int32)
    for voxels in (index, many):
        share = shares(np.unique(sums.pack(voxels)))
        n, chosen = len(share), np.count_nonzero(share < N_SHARES // 4)
        assert chosen / n == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / n))


def test_limits(table):
    counted = survey([table])
    assert counted.shares_within(None) == N_SHARES
    assert counted.shares_within(counted.n_usable) == N_SHARES
    assert counted.shares_within(1) >= 1


def test_nothing_usable_is_refused(write_observations):
    rows = {**observations(), "num_pixels.valid": 0}
    rows["num_pixels.valid"] = np.zeros(len(rows["id"]), dtype=int)
    with ObservationFile(write_observations("none", GRID, rows)[1]) as table:
        with pytest.raises(ValueError, match="has no usable observations"):
            survey([table])
