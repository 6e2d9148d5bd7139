"""A map as one more observation: its errors, and what it does to a refinement."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from simulated_observations import STILLS, Observed, draw, observe, write
from truth_ladder import vary

from dials_diffuse.command_line import diffuse_merge, diffuse_scale
from dials_diffuse.io.maps import read_map
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.merging.sums import pack
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


def scaled(observed: Observed, files: tuple[str, str], reference: str, *options: str):
    arguments = [*files, *OPTIONS, *options]
    params, _, (name,) = parse_arguments(diffuse_scale.make_parser(), arguments)
    with ObservationFile(name) as table:
        known = read_reference(reference, table.grid, name)
        numbers = [{i: i for i in range(6)}]
        return scale(
            observed.geometry.experiments, [table], numbers, params, reference=known
        )


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
