"""A map as one more observation: its errors, and what it does to a refinement."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
from simulated_observations import STILLS, Observed, draw, observe, write
from truth_ladder import vary

from dials_diffuse.command_line import diffuse_merge, diffuse_scale
from dials_diffuse.io.maps import read_map
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.sums import pack
from dials_diffuse.report.scaling import Observations, scaling_record
from dials_diffuse.scaling.apply import all_outliers
from dials_diffuse.scaling.models import scaling_models
from dials_diffuse.scaling.outliers import THRESHOLD
from dials_diffuse.scaling.reference import NEEDED, Reference, read_reference
from dials_diffuse.scaling.scale import scale
from dials_diffuse.scaling.selection import agreement
from dials_diffuse.util.command import parse_arguments

SCALES = np.array([1.0, 1.0, 1.0, 1.0, 0.5, 2.0])
OPTIONS = [f"model.{n}.use=no" for n in ("decay", "detector", "absorption", "offset")]


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> Observed:
    """Six stills; the first four, of scale 1, make the map."""
    folder = tmp_path_factory.mktemp("stills")
    settings = vary(STILLS, n_images=6, detector={"size": (90, 90), "pixel": 1.0})
    geometry = observe(settings, folder)
    factor = SCALES[geometry.experiment]
    return draw(geometry, folder, factor, background=0.5, counts_per_pixel=10)


@pytest.fixture(scope="module")
def merged(observed, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("map")
    use = observed.geometry.experiment < 4
    files = redraw(observed, folder, use)
    path = folder / "merged.h5"
    outputs = [f"output.{name}=None" for name in ("plot", "log", "json")]
    diffuse_merge.run(
        [*files, "scale_experiments=False", f"output.map={path}", *outputs]
    )
    return str(path)


def redraw(observed: Observed, folder, use: np.ndarray) -> tuple[str, str]:
    """The same counts of some rows."""
    geometry = observed.geometry
    factor = SCALES[geometry.experiment]
    again = draw(geometry, folder, factor, background=0.5, counts_per_pixel=10, use=use)
    np.testing.assert_array_equal(again.counts, observed.counts)
    return again.files


def scaled(*arguments):
    """The result of ``scaling_of``, without its table."""
    with scaling_of(*arguments) as found:
        return found


@contextlib.contextmanager
def scaling_of(
    observed: Observed, files: tuple[str, str], reference: str, *options: str
):
    """The result, and what reads the observations as long as their table is open."""
    arguments = [*files, *OPTIONS, *options]
    params, _, (name,) = parse_arguments(diffuse_scale.make_parser(), arguments)
    with ObservationFile(name) as table:
        known = read_reference(reference, table.grid, name)
        numbers = [{i: i for i in range(6)}]
        experiments = observed.geometry.experiments
        yield scale(experiments, [table], numbers, params, reference=known)


def test_errors_are_those_of_the_map(merged):
    """Where the counts of a voxel say all about it, and where they are expected."""
    voxels = read_map(merged, NEEDED)
    found = read_reference(merged, voxels.grid, "x")
    assert np.all(np.diff(found.voxel) > 0)
    many = voxels["counts"] > 200
    assert many.sum() > 100
    own = found.of(pack(voxels["index"][many]))
    sigma = 1 / np.sqrt(own.weights(own.intensity))
    # Below the mean of a shell, σ is of a few counts more than those of the voxel.
    np.testing.assert_allclose(sigma, voxels["sigma"][many], rtol=2e-3)
    assert np.median(np.abs(sigma / voxels["sigma"][many] - 1)) < 1e-9
    np.testing.assert_array_equal(own.intensity, voxels["intensity"][many])


def test_weights_by_hand():
    voxel = np.array([3, 5])
    map_of_two = Reference(voxel, *(np.array([x, x]) for x in (2.0, 10.0, 0.1, 0.01)))
    own = map_of_two.of(np.array([1, 5, 5, 9]))
    assert list(own.known) == [False, True, True, False]
    found = own.weights(np.array([1.0, 1.0, 4.0, 1.0]))
    # 1/10 + 0.1 + 0.01 and 4/10 + 0.1 + 0.16
    np.testing.assert_allclose(found, [0, 1 / 0.21, 1 / 0.66, 0])


def test_scales_are_those_of_scaling_everything_together(observed, merged, tmp_path):
    """A map of four stills says what the stills say."""
    new = redraw(observed, tmp_path, observed.geometry.experiment >= 4)
    found = scaled(observed, new, merged)[0].experiment_scales()[4:]
    params, _, (name,) = parse_arguments(
        diffuse_scale.make_parser(), [*observed.files, *OPTIONS]
    )
    with ObservationFile(name) as table:
        numbers = [{i: i for i in range(6)}]
        together, _ = scale(observed.geometry.experiments, [table], numbers, params)
    scales = together.experiment_scales()
    expected = scales[4:] / scales[:4].mean()
    assert found == pytest.approx(expected, rel=0.003)
    assert found == pytest.approx(SCALES[4:], rel=0.03)


def test_map_counts_as_an_observation(observed, merged, tmp_path):
    """In χ² and the number of degrees of freedom; voxels that only it shares count."""
    new = redraw(observed, tmp_path, observed.geometry.experiment == 5)
    refiner = scaled(observed, new, merged)[0].refiner
    known = refiner.reference.known
    assert known.sum() > 200 and not known.all()
    n_used = np.add.reduceat(refiner.used.astype(int), refiner.block.start[:-1])
    n_obs, n_intensities = refiner.count_used()
    several = (n_used > 0) & (n_used + known > 1)
    assert n_intensities == several.sum()
    assert n_obs == n_used[several].sum() + np.sum(several & known)
    assert refiner.fit().reduced == pytest.approx(1, abs=0.1)
    # The map is left alone where it agrees, and drawn to the others by its error only.
    refiner.reference = dataclasses.replace(
        refiner.reference, intensity=1.2 * refiner.reference.intensity
    )
    refiner.update_weights()
    assert refiner.fit().reduced > 1.5


@pytest.mark.parametrize("wrong", [4, 5])
def test_agreement_is_that_with_the_map(observed, merged, tmp_path, wrong):
    """Of two stills alone it could not be told which is the one that disagrees."""
    geometry = observed.geometry
    use = geometry.experiment >= 4
    columns = {
        **geometry.columns,
        "counts": observed.counts.copy(),
        "background.sum.value": observed.background,
    }
    rng = np.random.default_rng(3)
    mine = np.flatnonzero(geometry.experiment == wrong)
    for part in np.array_split(mine[np.argsort(geometry.s[mine])], 20):
        other = rng.permutation(part)
        for name in ("counts", "normalisation", "background.sum.value"):
            columns[name] = columns[name].copy()
            columns[name][part] = columns[name][other]
    columns = {name: values[use] for name, values in columns.items()}
    files = write(geometry, columns, tmp_path, "wrong")
    result, _ = scaled(observed, files, merged)
    found = agreement(result.refiner, 6)
    good = 9 - wrong
    assert np.all(np.isnan(found.cc[:4]))
    assert found.cc[good] > 0.45 and found.cc[wrong] < 0.2
    assert found.delta[wrong] > 0 > found.delta[good]
    result.refiner.reference = None  # control
    alone = agreement(result.refiner, 6).cc[4:]
    assert np.all(np.isnan(alone)) or alone[0] == pytest.approx(alone[1], abs=0.05)


def with_hot_rows(observed: Observed, folder, n_hot: int) -> tuple[tuple, np.ndarray]:
    """Still 5 alone, with 3000 counts too many in some rows; those that have them."""
    geometry = observed.geometry
    use = geometry.experiment == 5
    rng = np.random.default_rng(1)
    hot = rng.choice(np.flatnonzero(use), n_hot, replace=False)
    counts = observed.counts.copy()
    counts[hot] += 3000
    columns = {
        **geometry.columns,
        "counts": counts,
        "background.sum.value": observed.background,
    }
    is_hot = np.isin(np.flatnonzero(use), hot)
    columns = {name: values[use] for name, values in columns.items()}
    return write(geometry, columns, folder, "hot"), is_hot


@pytest.mark.parametrize("n_hot", [0, 5, 20])
def test_rows_that_the_map_contradicts_are_outliers(observed, merged, tmp_path, n_hot):
    """Even the only row of a voxel; what the map does not know cannot be judged."""
    files, is_hot = with_hot_rows(observed, tmp_path, n_hot)
    with scaling_of(observed, files, merged) as (result, reader):
        outliers = all_outliers(reader, result, THRESHOLD, tmp_path)
        flags = outliers.flags(0, 0, reader.n_rows)
    refiner = result.refiner
    block, known = refiner.block, refiner.reference.known
    hot = block.counts > 2500
    assert hot.sum() == n_hot
    assert refiner.used[hot & ~known[block.group]].all()
    assert not refiner.used[hot & known[block.group]].any()
    assert np.sum(~refiner.used & ~hot) <= 0.001 * block.n_rows
    if n_hot == 20:
        assert np.sum(hot & known[block.group]) > 10
    assert result.experiment_scales()[5] == pytest.approx(SCALES[5], rel=0.03)
    assert result.after == pytest.approx(1, abs=0.1)
    model = result.error_model
    assert model.is_refined and model.b == 0
    assert abs(model.a - 1) < 3 * model.sigma_a < 0.2
    # The whole table is judged like the block.
    assert flags.sum() == np.sum(~refiner.used)
    assert np.sum(flags & ~is_hot) == np.sum(~refiner.used & ~hot)


def test_other_voxels_are_judged_by_the_map_too(observed, merged, tmp_path):
    files, _ = with_hot_rows(observed, tmp_path, 20)
    result = scaled(observed, files, merged, "refinement.max_rows=1000")[0]
    assert result.step == 2
    assert result.control == pytest.approx(1, abs=0.15)


def test_few_good_rows_are_outliers(observed, merged, tmp_path):
    geometry = observed.geometry
    n_rows, n_outliers, use = 0, 0, geometry.experiment == 5
    for seed in range(20, 26):
        factor = SCALES[geometry.experiment]
        options = {"background": 0.5, "counts_per_pixel": 10, "use": use}
        again = draw(geometry, tmp_path, factor, seed=seed, **options)
        refiner = scaled(observed, again.files, merged)[0].refiner
        n_rows += refiner.block.n_rows
        n_outliers += np.sum(~refiner.used)
    assert n_outliers < 0.001 * n_rows


def test_report_counts_the_map(observed, merged, tmp_path):
    """χ² of the page is that of all rows that the map knows; the summary is the log's."""
    files, _ = with_hot_rows(observed, tmp_path, 20)
    experiments = copy.deepcopy(observed.geometry.experiments)
    with scaling_of(observed, files, merged) as (result, reader):
        for experiment, model in zip(experiments, scaling_models(result)):
            experiment.scaling_model = model
        record = scaling_record(experiments, reader, result)
    rows = Observations(result)
    block, known = result.refiner.block, result.refiner.reference.known
    several = np.diff(block.start) > 1
    np.testing.assert_array_equal(
        rows.kept[(known & ~several)[block.group]],
        rows.used[(known & ~several)[block.group]],
    )
    assert rows.kept.sum() == len(rows.after.square)
    own = record["chi_square"]
    assert own["before"] == pytest.approx(result.before)
    assert own["model"] == pytest.approx(result.counting)
    assert own["error_model"] == pytest.approx(result.after)
    found = record["refined_against"]
    assert found["chi_square_after"] == pytest.approx(1, abs=0.15)
    assert found["chi_square_error_model"] == pytest.approx(1, abs=0.1)
    assert found["n_too_high"] == np.sum(~result.refiner.used)
    assert found["n_too_low"] == 0


def test_map_of_other_voxels(observed, merged, tmp_path):
    known = read_reference(merged, observed.geometry.grid, "x")
    away = dataclasses.replace(known, voxel=known.voxel - known.voxel.max())
    params, _, (name,) = parse_arguments(
        diffuse_scale.make_parser(), [*observed.files, *OPTIONS]
    )
    with ObservationFile(name) as table:
        numbers = [{i: i for i in range(6)}]
        with pytest.raises(ValueError, match="no voxel in common"):
            scale(observed.geometry.experiments, [table], numbers, params, (), away)
