from __future__ import annotations

import logging

import numpy as np
import pytest

from cctbx import sgtbx

from dials_diffuse import symmetry
from dials_diffuse.extraction.report import log_settings
from dials_diffuse.extraction.settings_check import (
    Contrasts,
    check_settings,
    reindexing_operators,
)
from dials_diffuse.grid import Grid

TETRAGONAL = Grid((48.0, 48.0, 63.0, 90.0, 90.0, 90.0), (2, 2, 2), "P 4w", 2.5)


def hall(symbol: str) -> str:
    return sgtbx.space_group_info(symbol).group().type().hall_symbol()


@pytest.mark.parametrize(
    "symbol, cell, n_operators",
    [
        ("P 41", (48, 48, 63, 90, 90, 90), 1),
        ("P 41 21 2", (48, 48, 63, 90, 90, 90), 0),  # all of the lattice's symmetry
        ("P 3", (50, 50, 80, 90, 90, 120), 3),
        ("P 2 3", (60, 60, 60, 90, 90, 90), 1),
        ("P 4 3 2", (60, 60, 60, 90, 90, 90), 0),
        ("P 21 21 21", (40, 50, 60, 90, 90, 90), 0),
        ("P 21 21 21", (50, 50, 60, 90, 90, 90), 1),  # two axes of one length
        ("C 1 2 1", (80, 40, 50, 90, 110, 90), 0),
        ("P 1", (30, 40, 50, 80, 95, 100), 0),
        ("I 4", (48, 48, 63, 90, 90, 90), 1),
    ],
)
def test_operators_are_the_cosets_of_the_lattice(symbol, cell, n_operators):
    grid = Grid(tuple(map(float, cell)), (2, 2, 2), hall(symbol), 3.0)
    operators = reindexing_operators(grid)
    assert len(operators) == n_operators
    laue = {r.tobytes() for r in symmetry.rotation_matrices(grid.laue_group)}
    metric = np.array(grid.cell.reciprocal().metrical_matrix())
    g = metric[[0, 3, 4, 3, 1, 5, 4, 5, 2]].reshape(3, 3)
    for op in operators:
        r = np.array(op.r().as_double()).reshape(3, 3)
        assert r.round().astype(np.int32).tobytes() not in laue
        np.testing.assert_allclose(r @ g @ r.T, g, atol=1e-9)  # lengths are kept


def contrasts(grid, rng, others=(), n_stills=30, n_seen=300, noise=1.0):
    """Each still sees some reflections of one crystal, in one setting or the other."""
    asu = Grid(grid.unit_cell, (1, 1, 1), grid.space_group, grid.d_min).asu_indices()
    truth = rng.normal(size=len(asu))
    rotations = symmetry.rotation_matrices(grid.laue_group)
    operator = reindexing_operators(grid)[0]
    swap = np.array(operator.r().as_double()).reshape(3, 3).round().astype(np.int32)
    result = {}
    for i in range(n_stills):
        seen = rng.choice(len(asu), n_seen, replace=False)
        hkl = asu[seen] @ rotations[rng.integers(len(rotations))]
        if i in others:
            hkl = hkl @ np.linalg.inv(swap).round().astype(np.int32)
        value = truth[seen] + noise * rng.normal(size=n_seen)
        result[i] = Contrasts(hkl.astype(np.int32), value)
    return result


@pytest.mark.parametrize("others", [(), (3,), (0, 2, 5, 11, 17, 21, 28)])
def test_stills_in_another_setting_are_named(others):
    data = contrasts(TETRAGONAL, np.random.default_rng(7), others)
    (check,) = check_settings(data, TETRAGONAL)
    assert check.is_telling
    assert tuple(check.others) == others


def test_reindexing_all_changes_nothing():
    """Which setting is the right one the data cannot say."""
    data = contrasts(TETRAGONAL, np.random.default_rng(7), others=range(30))
    (check,) = check_settings(data, TETRAGONAL)
    assert check.is_telling and check.others == []


def test_noise_does_not_tell():
    data = contrasts(TETRAGONAL, np.random.default_rng(7), noise=30.0)
    (check,) = check_settings(data, TETRAGONAL)
    assert not check.is_telling
    assert check.others == []


def test_two_stills_cannot_be_compared():
    data = contrasts(TETRAGONAL, np.random.default_rng(7), n_stills=2)
    assert check_settings(data, TETRAGONAL) == []


@pytest.mark.parametrize(
    "others, noise, text",
    [
        ((), 1.0, "all 30 stills compared are in the same one"),
        ((4, 9), 1.0, "Warning: 2 of 30 stills compared are in another indexing"),
        ((4, 9), 30.0, "do not tell"),
    ],
)
def test_log(caplog, others, noise, text):
    data = contrasts(TETRAGONAL, np.random.default_rng(7), others, noise=noise)
    with caplog.at_level(logging.INFO, logger="dials.diffuse.extract"):
        log_settings(check_settings(data, TETRAGONAL))
    assert text in " ".join(caplog.text.split())
