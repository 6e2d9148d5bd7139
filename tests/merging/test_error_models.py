"""Tables of different error models: each gives its own errors to its rows."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from dials_diffuse.command_line import diffuse_merge
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import read_map

GRID = Grid((20.0, 20.0, 30.0, 90.0, 90.0, 90.0), (2, 2, 2), "P 4w", 2.5)
MODELS = [(1.5, 0.05), (0.8, 0.2)]
BACKGROUNDS = [(10, 50), (3000, 9000)]  # photons of a row


def make_rows(seed: int) -> dict[str, np.ndarray]:
    """Bright observations of the same voxels, those of the tables on other backgrounds."""
    rng = np.random.default_rng(seed)
    index = GRID.asu_indices()
    n = len(index)
    norm = rng.uniform(1, 3, n)
    base = rng.uniform(*BACKGROUNDS[seed - 1], n)
    return {
        "miller_index": index,
        "id": np.zeros(n, dtype=int),
        "counts": rng.poisson(1000 * norm + base).astype(float),
        "background.sum.value": base,
        "background.sum.variance": base,
        "normalisation": norm,
        "num_pixels.valid": np.ones(n, dtype=int),
    }


@pytest.fixture
def files(write_observations):
    """Two tables, the second without every other voxel."""
    names, tables = [], [make_rows(1), make_rows(2)]
    tables[1] = {name: values[::2] for name, values in tables[1].items()}
    for i, (rows, model) in enumerate(zip(tables, MODELS)):
        name = write_observations(f"table{i}", GRID, rows, (f"e{i}",))
        with h5py.File(name[1], "r+") as handle:
            handle["dials_diffuse"].attrs["error_model"] = model
        names.append(name)
    return names, tables


def merge(folder, *files):
    outputs = [f"output.{name}=None" for name in ("plot", "log", "json")]
    path = folder / "merged.h5"
    diffuse_merge.run(
        [*np.ravel(files), "scale_experiments=False", f"output.map={path}", *outputs]
    )
    names = ("index", "intensity", "sigma", "half_1/sigma", "half_2/sigma")
    return read_map(path, (*names, "half_1/n_obs", "half_2/n_obs"))


def test_errors_are_those_of_the_own_table(files, tmp_path):
    """By hand, from the rows; counts are far above the mean of no shell."""
    names, tables = files
    found = merge(tmp_path, *names)
    variance, norm, photons = np.zeros((3, *GRID.shape))
    n_rows = np.zeros(GRID.shape, dtype=int)
    mean = {}
    for rows in tables:
        for name, values in (
            ("m", rows["normalisation"]),
            ("n", rows["counts"] - rows["background.sum.value"]),
        ):
            mean.setdefault(name, np.zeros(GRID.shape))
            place = np.unravel_index(GRID.key(rows["miller_index"]), GRID.shape)
            np.add.at(mean[name], place, values)
    for rows, (a, b) in zip(tables, MODELS):
        place = np.unravel_index(GRID.key(rows["miller_index"]), GRID.shape)
        intensity = mean["n"][place] / mean["m"][place]
        m = rows["normalisation"]
        own = m * intensity + rows["background.sum.value"]
        own = own + rows["background.sum.variance"] + (b * m * intensity) ** 2
        np.add.at(variance, place, a**2 * own)
        np.add.at(norm, place, m)
        np.add.at(n_rows, place, 1)
    place = np.unravel_index(GRID.key(found["index"]), GRID.shape)
    expected = np.sqrt(variance[place]) / norm[place]
    assert set(n_rows[place]) == {1, 2}
    np.testing.assert_allclose(found["sigma"], expected, rtol=0.02)
    # The largest a for all would be far off.
    alone = n_rows[place] == 2
    assert np.median(found["sigma"][alone] / expected[alone]) == pytest.approx(
        1, abs=0.002
    )


def test_table_of_its_own(files, tmp_path):
    """Voxels of one table alone have the errors of that table merged alone."""
    (first, second), _ = files
    together = merge(tmp_path, first, second)
    alone = merge(tmp_path, first)
    packed = {tuple(h): i for i, h in enumerate(alone["index"])}
    place = [packed[tuple(h)] for h in together["index"]]
    single = together["half_1/n_obs"] + together["half_2/n_obs"] == 1
    assert single.sum() > 50
    np.testing.assert_allclose(
        together["sigma"][single], alone["sigma"][place][single], rtol=0.01
    )


def test_a_table_in_two_gives_the_same_map(files, tmp_path, write_observations):
    """With the same model in both, as if it were one; only that counts."""
    _, (rows, _) = files
    whole = {name: np.repeat(values, 2, axis=0) for name, values in rows.items()}
    whole["id"] = np.tile([0, 1], len(rows["id"]))
    one = write_observations("one", GRID, whole, ("a", "b"))
    two = [write_observations(name, GRID, rows, (name,)) for name in "ab"]
    for _, name in (one, *two):
        with h5py.File(name, "r+") as handle:
            handle["dials_diffuse"].attrs["error_model"] = MODELS[0]
    together, apart = merge(tmp_path, one), merge(tmp_path, *two)
    for name in ("intensity", "sigma", "half_1/sigma", "half_2/sigma"):
        np.testing.assert_allclose(apart[name], together[name], rtol=1e-12)
