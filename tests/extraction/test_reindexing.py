from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
from simulate_images import (
    make_crystal,
    make_detector,
    memory_experiment,
    random_images,
)
from truth_ladder import SMALL, extraction_settings, simulated_experiments, vary

from cctbx import sgtbx, uctbx
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory

from dials.array_family import flex
from dials_diffuse import symmetry
from dials_diffuse.extraction.blocks import Block
from dials_diffuse.extraction.contrasts import (
    Contrasts,
    contrast_grid,
    contrasts_of_sums,
    spread_evenly,
)
from dials_diffuse.extraction.indexing_report import log_indexing
from dials_diffuse.extraction.lattice_settings import Operator, candidates
from dials_diffuse.extraction.loop import SUMS
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.reindexing import (
    apply_to_experiments,
    apply_to_reflections,
    crystal_units,
    decide,
    find_indexing,
    reindexed_crystal,
    telling_threshold,
)
from dials_diffuse.extraction.settings import BraggSettings, ExtractionSettings
from dials_diffuse.grid import MAX_VOXELS, Grid
from dials_diffuse.simulation.simulate import Simulation
from dials_diffuse.util.compat import (
    miller_index_from_numpy,
    miller_index_to_numpy,
)


def hall(symbol: str) -> str:
    return sgtbx.space_group_info(symbol).group().type().hall_symbol()


def make_grid_of(symbol: str, cell: tuple[float, ...], d_min: float = 3.0) -> Grid:
    return Grid(tuple(map(float, cell)), (2, 2, 2), hall(symbol), d_min)


TETRAGONAL = make_grid_of("P 41", (48, 48, 63, 90, 90, 90), 2.5)
TRIGONAL = make_grid_of("P 3", (50, 50, 60, 90, 90, 120))
CUBIC_METRIC = make_grid_of("P 1 2 1", (40, 40, 40, 90, 90, 90))


@pytest.mark.parametrize(
    "symbol, cell, n_settings",
    [
        ("P 41", (48, 48, 63, 90, 90, 90), 2),
        ("P 41 21 2", (48, 48, 63, 90, 90, 90), 1),  # all of the lattice's symmetry
        ("P 3", (50, 50, 80, 90, 90, 120), 4),
        ("P 2 3", (60, 60, 60, 90, 90, 90), 2),
        ("P 4 3 2", (60, 60, 60, 90, 90, 90), 1),
        ("P 21 21 21", (40, 50, 60, 90, 90, 90), 1),
        ("P 21 21 21", (50, 50.2, 60, 90, 90, 90), 2),  # two axes of one length
        ("P 1 2 1", (40, 40, 40, 90, 90, 90), 12),
        ("C 1 2 1", (80, 40, 50, 90, 110, 90), 1),
        ("P 1", (30, 40, 50, 80, 95, 100), 1),
        ("I 4", (48, 48, 63, 90, 90, 90), 2),
    ],
)
def test_candidates_are_the_cosets_of_the_lattice(symbol, cell, n_settings):
    grid = make_grid_of(symbol, cell)
    operators = candidates(grid)
    assert len(operators) == n_settings
    np.testing.assert_array_equal(operators[0].rotation, np.eye(3))
    laue = {r.tobytes() for r in symmetry.rotation_matrices(grid.laue_group)}
    metric = np.array(grid.cell.reciprocal().metrical_matrix())
    g = metric[[0, 3, 4, 3, 1, 5, 4, 5, 2]].reshape(3, 3)
    for op in operators[1:]:
        r = op.rotation
        assert r.tobytes() not in laue
        assert round(np.linalg.det(r)) == 1
        np.testing.assert_allclose(r @ g @ r.T, g, atol=0.02 * g.max())


@pytest.mark.parametrize("rotation", [[[0, -1, 0], [1, -1, 0], [0, 0, 1]], np.eye(3)])
def test_crystal_and_indices_turn_alike(rotation):
    """rlp = A h stays; here with an operator that is not its own inverse."""
    operator = Operator(np.array(rotation, dtype=np.int32))
    crystal = make_crystal("P 1", cell=(50, 50, 60, 90, 90, 120))
    a = np.array(crystal.get_A()).reshape(3, 3)
    crystal.set_A_at_scan_points([tuple((x * a).ravel()) for x in (1.0, 1.01, 1.02)])
    new = reindexed_crystal(crystal, operator)
    hkl = np.array([[1, 2, 3], [-4, 0, 5]])
    expected = hkl @ operator.rotation
    found = operator.change_of_basis.apply(miller_index_from_numpy(hkl))
    np.testing.assert_array_equal(miller_index_to_numpy(found), expected)
    for at in (lambda c: c.get_A(), lambda c: c.get_A_at_scan_point(2)):
        before, after = (np.array(at(c)).reshape(3, 3) for c in (crystal, new))
        np.testing.assert_allclose(after @ expected.T, before @ hkl.T)
    assert new.num_scan_points == 3
    assert new.get_unit_cell().is_similar_to(crystal.get_unit_cell())


def random_contrasts(
    grid: Grid,
    settings: np.ndarray,
    n_seen: int = 300,
    noise: float = 1.0,
    invariant: list[Operator] = (),
    seed: int = 7,
) -> list[Contrasts]:
    """Each crystal sees some reflections, with the indices of the given setting.

    Args:
        settings: Number of the operator that takes each crystal's indices to the truth.
        invariant: Operators that the truth obeys besides those of the Laue group.
    """
    rng = np.random.default_rng(seed)
    asu = dataclasses.replace(grid, ndiv=(1, 1, 1)).asu_indices()
    truth = rng.normal(size=len(asu))
    place = {tuple(h): i for i, h in enumerate(asu)}
    for op in invariant:
        mate = symmetry.map_to_asu(asu @ op.rotation, grid.laue_group)
        truth = truth + truth[[place[tuple(h)] for h in mate]]
    operators = candidates(grid)
    result = []
    for setting in settings:
        seen = rng.choice(len(asu), n_seen, replace=False)
        rotations = grid.rotations[rng.integers(len(grid.rotations), size=n_seen)]
        hkl = np.einsum("ni,nij->nj", asu[seen], rotations)
        inverse = np.linalg.inv(operators[setting].rotation).round().astype(np.int32)
        value = truth[seen] + noise * rng.normal(size=n_seen)
        result.append(Contrasts((hkl @ inverse).astype(np.int32), value))
    return result


def singles(n: int) -> list[list[int]]:
    return [[i] for i in range(n)]


def n_in_one_setting(grid: Grid, truth: np.ndarray, chosen: list[Operator]) -> int:
    """Size of the largest group of crystals whose setting is the same in the end."""
    laue = symmetry.rotation_matrices(grid.laue_group)
    operators = candidates(grid)
    groups: dict[bytes, int] = {}
    for setting, operator in zip(truth, chosen):
        # from indices that are right to those after the choice
        inverse = np.linalg.inv(operators[setting].rotation).round().astype(np.int32)
        coset = np.array([inverse @ operator.rotation @ r for r in laue])
        name = min(np.ascontiguousarray(r, dtype=np.int32).tobytes() for r in coset)
        groups[name] = groups.get(name, 0) + 1
    return max(groups.values())


@pytest.mark.parametrize("n", [3, 30, 130])
@pytest.mark.parametrize("grid", [TETRAGONAL, TRIGONAL, CUBIC_METRIC])
def test_all_come_into_one_setting(grid, n):
    truth = np.random.default_rng(n).integers(len(candidates(grid)), size=n)
    found = decide(random_contrasts(grid, truth, 600, 0.5), singles(n), grid)
    assert found.is_telling and not found.ambiguous and not found.untold
    chosen = [found.operators[i] for i in found.applied]
    assert n_in_one_setting(grid, truth, chosen) == n


def test_right_crystals_stay_as_they_are():
    truth = np.zeros(30, dtype=int)
    found = decide(random_contrasts(TRIGONAL, truth), singles(30), TRIGONAL)
    assert found.is_telling and found.reindexed == []


def test_most_crystals_stay_as_they_are():
    truth = np.array([1] * 8 + [2] * 15 + [3] * 7)
    found = decide(random_contrasts(TRIGONAL, truth), singles(30), TRIGONAL)
    assert found.reindexed == [*range(8), *range(23, 30)]


@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("grid", [TETRAGONAL, TRIGONAL, CUBIC_METRIC])
def test_noise_does_not_tell(grid, n):
    truth = np.random.default_rng(7).integers(len(candidates(grid)), size=n)
    data = random_contrasts(grid, truth, noise=1000.0)
    found = decide(data, singles(n), grid)
    assert not found.is_telling
    assert found.reindexed == [] and found.ambiguous == []
    assert len(found.untold) == len(candidates(grid)) - 1


def test_true_symmetry_is_not_told_but_the_rest_is():
    """Of the four settings of P3 two are equivalent if the crystal has a twofold axis."""
    twofold = candidates(TRIGONAL)[1]
    truth = np.random.default_rng(7).integers(4, size=40)
    data = random_contrasts(TRIGONAL, truth, invariant=[twofold], noise=0.5)
    found = decide(data, singles(40), TRIGONAL)
    assert list(map(str, found.untold)) == [str(twofold)]
    assert len(found.operators) == 2 and not found.ambiguous
    higher = make_grid_of("P 6", TRIGONAL.unit_cell)
    assert twofold.rotation.tobytes() in {
        r.tobytes() for r in symmetry.rotation_matrices(higher.laue_group)
    }
    chosen = [found.operators[i] for i in found.applied]
    laue = symmetry.rotation_matrices(higher.laue_group)
    relative = {
        min(
            np.ascontiguousarray(
                np.linalg.inv(candidates(TRIGONAL)[t].rotation).round().astype(np.int32)
                @ op.rotation
                @ r,
                dtype=np.int32,
            ).tobytes()
            for r in laue
        )
        for t, op in zip(truth, chosen)
    }
    assert len(relative) == 1


@pytest.mark.parametrize(
    "in_doubt, applied, left_out",
    [("keep", 0, []), ("best", 1, []), ("leave_out", 0, [3])],
)
def test_crystal_in_doubt(in_doubt, applied, left_out, caplog):
    """Too few reflections of the fourth crystal, which is in the other setting."""
    truth = np.zeros(30, dtype=int)
    truth[3] = 1
    data = random_contrasts(TETRAGONAL, truth, noise=0.5)
    data[3] = Contrasts(data[3].hkl[:14], data[3].value[:14])
    found = decide(data, singles(30), TETRAGONAL, in_doubt)
    assert found.ambiguous == [3] and found.choice[3] == 1
    assert found.applied[3] == applied and found.left_out == left_out
    with caplog.at_level(logging.INFO, logger="dials.diffuse.extract"):
        log_indexing(found)
    assert "the setting of 1 experiments is in doubt" in caplog.text
    assert json.loads(json.dumps(found.as_dict()))["crystals"][3]["sure"] is False


def test_log_of_many_crystals_is_short(caplog):
    truth = np.random.default_rng(7).integers(2, size=50)
    found = decide(random_contrasts(TETRAGONAL, truth), singles(50), TETRAGONAL)
    with caplog.at_level(logging.INFO, logger="dials.diffuse.extract"):
        log_indexing(found)
    assert len(caplog.text.splitlines()) < 32
    assert f"Reindexed {len(found.reindexed)} experiments" in caplog.text
    assert "(30 more)" in caplog.text


def test_threshold_is_above_sorted_noise():
    """Figures of the docstring, measured over many seeds."""
    for n_settings, noise in ((2, 1.40), (4, 1.73), (24, 2.56)):
        assert telling_threshold(40, n_settings) > noise + 0.3


def test_contrast_of_sums():
    """Pixels of a 3 x 3 x 3 grid about one reflection: one peak, two beside it."""
    grid = contrast_grid(make_grid_of("P 1", (10, 10, 10, 90, 90, 90)))
    index = np.array([[6, -3, 0], [5, -3, 0], [7, -2, 1], [9, 0, 0]])
    rows = np.zeros(5, dtype=SUMS)
    rows["key"] = [*grid.key(index), np.prod(grid.shape)]
    rows["counts"] = [100, 3, 5, 7, 1000]
    rows["normalisation"] = [2, 1, 3, 1, 1]
    found = contrasts_of_sums(rows, grid)
    np.testing.assert_array_equal(found.hkl, [[2, -1, 0]])  # no surroundings of 3, 0, 0
    assert found.value == pytest.approx(np.log(100.5 / 2 / (8.5 / 4)))


def test_grid_of_contrasts_fits_the_pixel_loop():
    cell = make_grid_of("P 1", (900, 900, 900, 90, 90, 90), 4.0)
    found = contrast_grid(cell)
    assert found.d_min > 4.0
    assert np.prod([n + 3.0 for n in found.shape]) <= MAX_VOXELS


def test_images_of_a_sweep_are_spread():
    blocks = [Block(0, range(0, 30), 1.0), Block(0, range(30, 47), 2.0)]
    found = spread_evenly(blocks, 5)
    assert [b.array_indices[0] for b in found] == [0, 12, 23, 34, 46]
    assert [b.exposure for b in found] == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert len(spread_evenly(blocks, 100)) == 47


STILLS = vary(
    SMALL,
    mode="stills",
    n_images=40,
    detector={"size": (120, 120), "pixel": 0.75},
    crystal={
        "space_group": "P 41",
        "unit_cell": uctbx.unit_cell((36, 36, 44, 90, 90, 90)),
    },
    bragg={"on": True, "mosaicity": 0.1},
    background={"solvent": 0.3},
    scan={"orientations": "random"},
    grid={"d_min": 2.0},
)
P3 = {"space_group": "P 3", "unit_cell": uctbx.unit_cell((36, 36, 44, 90, 90, 120))}
SWEEPS = vary(
    STILLS, mode="rotation", n_images=10, n_crystals=4, crystal=P3, scan={"width": 1.0}
)


def mixed(simulation_settings):
    """Simulated images with crystals in random settings; grid, settings and truth."""
    simulation = Simulation(simulation_settings)
    experiments = simulated_experiments(simulation, noise=True)
    settings = extraction_settings(simulation, BraggSettings())
    grid = make_grid(experiments, settings)
    operators = candidates(grid)
    truth = np.random.default_rng(5).integers(len(operators), size=len(experiments))
    for experiment, setting in zip(experiments, truth):
        r = operators[setting].rotation
        back = Operator(np.linalg.inv(r).round().astype(np.int32))
        experiment.crystal = reindexed_crystal(experiment.crystal, back)
    return experiments, grid, settings, truth


@pytest.mark.parametrize(
    "simulation_settings", [STILLS, vary(STILLS, crystal=P3), SWEEPS]
)
def test_simulated_images(simulation_settings):
    """All stills and all sweeps come back to one setting, and their spots with them."""
    experiments, grid, settings, truth = mixed(simulation_settings)
    assert len(set(truth)) > 1
    found = find_indexing(experiments, grid, settings)
    assert not found.ambiguous
    chosen = [found.operators[i] for i in found.applied]
    assert n_in_one_setting(grid, truth, chosen) == len(experiments)
    reflections = flex.reflection_table()
    reflections["id"] = flex.int(range(len(experiments)))
    reflections["miller_index"] = flex.miller_index([(1, 2, 3)] * len(experiments))
    new = apply_to_experiments(experiments, found)
    spots = apply_to_reflections(reflections, found)
    for i, (old, e) in enumerate(zip(experiments, new)):
        assert (e.identifier, e.imageset) == (old.identifier, old.imageset)
        rlp, expected = (
            np.array(crystal.get_A()).reshape(3, 3) @ h
            for crystal, h in (
                (e.crystal, spots["miller_index"][i]),
                (old.crystal, (1, 2, 3)),
            )
        )
        np.testing.assert_allclose(rlp, expected)
    assert find_indexing(new, grid, settings).reindexed == []


def test_few_photons_are_in_doubt():
    """31 photons per wide pixel; those that are called sure are right."""
    experiments, grid, settings, truth = mixed(vary(STILLS, beam={"flux": 1e10}))
    found = find_indexing(experiments, grid, settings)
    sure = found.is_sure
    assert found.is_telling and 5 < np.count_nonzero(sure) < 40
    chosen = [found.operators[i] for i in found.choice[sure]]
    assert n_in_one_setting(grid, truth[sure], chosen) == np.count_nonzero(sure)


def test_too_few_photons_do_not_tell():
    experiments, grid, settings, _ = mixed(vary(STILLS, beam={"flux": 1e8}))
    found = find_indexing(experiments, grid, settings)
    assert not found.is_telling and found.reindexed == []


def experiments_of(crystals) -> ExperimentList:
    detector = make_detector()
    return ExperimentList(
        [
            memory_experiment(
                random_images(1, detector)[0:1], detector, c, identifier=str(i)
            )
            for i, c in enumerate(crystals)
        ]
    )


def test_experiments_of_one_crystal_go_together():
    a, b = make_crystal("P 1"), make_crystal("P 1", seed=8)
    assert crystal_units(experiments_of([a, b, a])) == [[0, 2], [1]]


def test_left_out_experiments_and_their_reflections():
    truth = np.zeros(30, dtype=int)
    data = random_contrasts(TETRAGONAL, truth, noise=0.5)
    data[1] = Contrasts(data[1].hkl[:3], data[1].value[:3])
    found = decide(data, singles(30), TETRAGONAL, "leave_out")
    experiments = experiments_of([make_crystal("P 1", seed=i) for i in range(30)])
    reflections = flex.reflection_table()
    reflections["id"] = flex.int([0, 1, 2, 2, 29])
    reflections["miller_index"] = flex.miller_index([(i, 0, 0) for i in range(5)])
    new = apply_to_experiments(experiments, found)
    assert [e.identifier for e in new] == ["0", *map(str, range(2, 30))]
    spots = apply_to_reflections(reflections, found)
    assert list(spots["id"]) == [0, 1, 1, 28]
    assert list(spots["miller_index"]) == [(i, 0, 0) for i in (0, 2, 3, 4)]


def test_nothing_to_decide():
    one = experiments_of([make_crystal("P 1")])
    settings = dataclasses.replace(
        extraction_settings_of_small(), d_min=None, mask=None
    )
    assert find_indexing(one, make_grid(one, settings), settings) is None


def extraction_settings_of_small():
    return extraction_settings(Simulation(vary(SMALL, n_images=1)), BraggSettings())


@pytest.mark.slow
@pytest.mark.regression
def test_snase_stills_in_random_settings(diffuse_data):
    """Real stills of which half are reindexed: all come back, with 3.5 sigma or more."""
    path = diffuse_data("snase_stills") / "processed" / "refined.expt"
    experiments = ExperimentListFactory.from_json_file(str(path))
    settings = ExtractionSettings(d_min=2.0, trusted_range=(1, 10000))
    grid = make_grid(experiments, settings)
    truth = np.random.default_rng(3).integers(2, size=len(experiments))
    operators = candidates(grid)
    for experiment, setting in zip(experiments, truth):
        # a twofold axis is its own inverse
        operator = operators[setting]
        experiment.crystal = reindexed_crystal(experiment.crystal, operator)
    found = find_indexing(experiments, grid, settings)
    assert not found.ambiguous and found.evidence.mean() > 5
    chosen = [found.operators[i] for i in found.applied]
    assert n_in_one_setting(grid, truth, chosen) == len(experiments) == 96
