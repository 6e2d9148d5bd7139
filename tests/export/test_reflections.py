from __future__ import annotations

import h5py
import numpy as np
import pytest
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    memory_experiment,
    random_images,
)

from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.export.reflections import export_reflections
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.estimate import expected_counts, thin_shell
from dials_diffuse.util.compat import miller_index_to_numpy

GRID = Grid((9.1, 10.3, 12.2, 90, 90, 90), (2, 3, 2), " P 2ac 2ab", 1.8)


def stills(*names: str) -> ExperimentList:
    detector = make_detector(2)
    crystals = [
        make_crystal("P 21 21 21", i, GRID.unit_cell) for i in range(len(names))
    ]
    return ExperimentList(
        [
            memory_experiment(
                random_images(1, detector), detector, c, make_beam(), identifier=name
            )
            for name, c in zip(names, crystals)
        ]
    )


def random_rows(n: int, n_experiments: int = 3, mean: float = 0.5) -> dict:
    """Rows of voxels chosen at random, of Poisson counts of one mean."""
    rng = np.random.default_rng(7)
    index = GRID.asu_indices()
    index = index[rng.integers(0, len(index), n)] * rng.choice([-1, 1], (n, 3))
    weight = rng.uniform(0.5, 2, n)
    return {
        "miller_index": index.astype(np.int32),
        "id": rng.integers(0, n_experiments, n),
        "counts": rng.poisson(mean * weight).astype(float),
        "normalisation": weight,
        "background.sum.value": rng.uniform(0, 0.1, n),
        "background.sum.variance": rng.uniform(0, 0.01, n),
        "panel": rng.integers(0, 2, n).astype(np.uint64),
        "xyzobs.px.value": rng.uniform(5, 50, (n, 3)),
        "d": 1 / GRID.s(index),
    }


@pytest.fixture
def export(write_observations):
    """Returns a function that exports rows, with other columns added to their file."""

    def run(rows, names=("a", "b", "c"), extra=None, **options):
        _, refl = write_observations("rows", GRID, rows, names)
        if extra:
            with h5py.File(refl, "r+") as handle:
                group = handle["dials/processing/group_0"]
                for name, column in extra.items():
                    group[name] = column(group)
        with ObservationFile(refl) as table:
            return export_reflections([table], stills(*names), **options)

    return run


def column(table: flex.reflection_table, name: str) -> np.ndarray:
    return flumpy.to_numpy(table[name])


def test_hand_values(export):
    """Two observations of a voxel share its expected counts, one is by itself."""
    rows = {
        "miller_index": np.array([[1, 2, 3], [-1, 2, -3], [3, 2, 1]], np.int32),
        "id": np.array([0, 1, 0]),
        "counts": np.array([0.0, 12.0, 0.0]),
        "normalisation": np.array([2.0, 4.0, 1.0]),
        "background.sum.value": np.array([1.0, 0.0, 0.0]),
        "background.sum.variance": np.array([0.5, 0.0, 0.0]),
        "xyzobs.px.value": np.full((3, 3), 20.0),
    }
    rows["d"] = 1 / GRID.s(rows["miller_index"])
    table = export(rows, ("a", "b")).table
    found = dict(
        zip(
            map(tuple, miller_index_to_numpy(table["miller_index"]).tolist()),
            zip(
                column(table, "intensity.sum.value"),
                column(table, "intensity.sum.variance"),
            ),
        )
    )
    shells = thin_shell(GRID.s(rows["miller_index"]))
    assert shells[0] == shells[1] != shells[2]
    # rate (12 + 1)/6 of the first shell; 12 photons are less than the 13 expected
    expected = 13 * (12 + 1) / (13 + 1)
    first = (-0.5, (expected * 2 / 6 + 0.5) / 4)
    assert found[1, 2, 3] == pytest.approx(first)
    assert found[-1, 2, -3] == pytest.approx((3.0, expected * 4 / 6 / 16))
    assert found[3, 2, 1] == pytest.approx((0.0, 1 * 1 / 2))  # rate (0 + 1)/1


def fitted_scales(table, variance: np.ndarray) -> np.ndarray:
    """Scales of experiments by least squares, as dials.scale finds them."""
    index = np.abs(miller_index_to_numpy(table["miller_index"]))  # Laue group mmm
    _, voxel = np.unique(index, axis=0, return_inverse=True)
    voxel = voxel.ravel()
    value, number = column(table, "intensity.sum.value"), column(table, "id")
    k, w = np.ones(3), 1 / variance
    for _ in range(50):
        g = k[number]
        mean = np.bincount(voxel, w * g * value) / np.bincount(voxel, w * g * g)
        mean = mean[voxel]
        k = np.bincount(number, w * value * mean) / np.bincount(number, w * mean**2)
        k /= k.mean()
    return k


def test_weights_from_expected_counts_do_not_bias_scales(export):
    rows = random_rows(60_000)
    rng = np.random.default_rng(3)
    truth = np.array([0.4, 0.8, 1.8])
    mean = 1.5 * truth[rows["id"]] * rows["normalisation"]
    rows["counts"] = rng.poisson(mean).astype(float)
    rows["background.sum.value"][:] = rows["background.sum.variance"][:] = 0
    table = export(rows).table
    variance = column(table, "intensity.sum.variance")
    assert variance.min() > 0
    np.testing.assert_allclose(fitted_scales(table, variance), truth, rtol=0.02)
    # negative control: counts as their own weights, at least one
    value = column(table, "intensity.sum.value")
    own = np.maximum(value, 0.5)
    assert abs(fitted_scales(table, own)[0] / truth[0] - 1) > 0.04


def test_intensities_have_the_variance_that_they_scatter_with(export):
    rows = random_rows(40_000, mean=2.0)
    table = export(rows).table
    value, variance = (
        column(table, f"intensity.sum.{x}") for x in ("value", "variance")
    )
    expected = 2.0 - np.mean(rows["background.sum.value"] / rows["normalisation"])
    assert value.mean() == pytest.approx(expected, abs=0.05)
    pull2 = (value - 2.0) ** 2 / variance
    assert pull2.mean() == pytest.approx(1, abs=0.08)


def test_scaled_observations_keep_their_factors_and_lose_their_offsets(export):
    rows = random_rows(3000)
    rng = np.random.default_rng(5)
    truth = 7.0
    scale, offset = rng.uniform(0.5, 2, 3000), rng.uniform(0, 3, 3000)
    rows["counts"] = rows["background.sum.value"] + rows["normalisation"] * (
        scale * truth + offset
    )
    rows["xyzobs.px.value"][:, 0], rows["xyzobs.px.value"][:, 1] = scale, offset
    extra = {
        "inverse_scale_factor": lambda group: group["xyzobs.px.value"][:, 0],
        "additive_offset": lambda group: group["xyzobs.px.value"][:, 1],
    }
    table = export(rows, extra=extra).table
    factor = column(table, "inverse_scale_factor")
    for kind in ("sum", "scale"):
        value = column(table, f"intensity.{kind}.value")
        np.testing.assert_allclose(value / factor, truth, rtol=1e-9)
    np.testing.assert_array_equal(
        column(table, "intensity.scale.variance"),
        column(table, "intensity.sum.variance"),
    )
    assert table.get_flags(table.flags.scaled).count(False) == 0
    np.testing.assert_array_equal(factor, column(table, "xyzobs.px.value")[:, 0])


def test_columns_for_programs_of_dials(export, tmp_path):
    rows = random_rows(500)
    found = export(rows)
    found.table.as_file(str(tmp_path / "diffuse.refl"))
    table = flex.reflection_table.from_file(str(tmp_path / "diffuse.refl"))
    assert dict(table.experiment_identifiers()) == {0: "a", 1: "b", 2: "c"}
    assert table.are_experiment_identifiers_consistent(found.experiments)
    assert table.get_flags(table.flags.integrated_sum).count(False) == 0
    for name in ("partiality", "lp"):
        assert set(table[name]) == {1.0}
    np.testing.assert_array_equal(
        column(table, "imageset_id"), column(table, "id")
    )  # each still has its own
    assert set(column(table, "xyzobs.px.value")[:, 2]) == {0.5}
    s1 = column(table, "s1")
    np.testing.assert_allclose(np.linalg.norm(s1, axis=1), 1.0)
    cell = found.experiments[0].crystal.get_unit_cell()
    d = cell.d(table["miller_index"])
    np.testing.assert_allclose(column(table, "d"), flumpy.to_numpy(d), rtol=1e-6)


def test_limit_of_rows_and_experiments_without_rows(export):
    rows = random_rows(2000)
    rows["id"][rows["id"] == 1] = 2
    found = export(rows, max_rows=800)
    assert 0.8 * 800 < len(found.table) <= 800
    assert found.fraction == pytest.approx(0.4, abs=0.1)
    assert list(found.experiments.identifiers()) == ["a", "c"]
    assert dict(found.table.experiment_identifiers()) == {0: "a", 1: "c"}
    assert set(found.table["id"]) == {0, 1}
    # the variances of a voxel are those of the whole table
    whole = export(rows)
    assert len(whole.table) == 2000 and whole.fraction == 1
    values = [set(t.table["intensity.sum.variance"]) for t in (found, whole)]
    assert values[0] < values[1]


def test_several_tables(write_observations):
    rows = random_rows(600)
    paths = [
        write_observations(name, GRID, rows, tuple(name + x for x in "abc"))[1]
        for name in ("one", "two")
    ]
    names = [name + x for name in ("two", "one") for x in "abc"]
    with ObservationFile(paths[0]) as one, ObservationFile(paths[1]) as two:
        found = export_reflections([one, two], stills(*names))
    assert len(found.table) == 1200
    assert list(found.experiments.identifiers()) == names
    ids = column(found.table, "id")
    np.testing.assert_array_equal(ids[:600], ids[600:] + 3)
    with h5py.File(paths[0], "r+") as handle:
        group = handle["dials/processing/group_0"]
        group["inverse_scale_factor"] = np.ones(600)
    tables = [ObservationFile(path) for path in paths]
    with pytest.raises(
        ValueError, match="one.refl has been scaled, .*two.refl has not"
    ):
        export_reflections(tables, stills(*names))


def test_expected_counts_are_never_less_than_those_of_an_empty_voxel(export):
    rows = random_rows(300, mean=0.01)
    rows["background.sum.variance"][:] = 0
    table = export(rows).table
    assert column(table, "intensity.sum.variance").min() > 0
    assert expected_counts(np.zeros(1), np.array([0.3]))[0] > 0


def test_indices_too_large_for_dials_scale_are_refused(write_observations):
    long = Grid((10, 10, 10, 90, 90, 90), (4000, 1, 1), " P 2 2", 4.0)
    rows = {"miller_index": np.array([[9000, 0, 0]], np.int32)}
    with ObservationFile(write_observations("long", long, rows, ("a",))[1]) as table:
        with pytest.raises(ValueError, match="indices reach 10000, .* below 10000"):
            export_reflections([table], stills("a"))


def test_experiments_of_another_run_are_refused(write_observations):
    _, refl = write_observations("rows", GRID, random_rows(100))
    with ObservationFile(refl) as table:
        with pytest.raises(ValueError, match="1 of its 3 identifiers .* first is c"):
            export_reflections([table], stills("a", "b"))
