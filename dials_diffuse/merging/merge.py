"""From tables of voxel observations to a merged map, in bounded memory.

1. The observations are added up under the symmetry-unique voxels. If these are too many
   for the memory, the tables are read several times, each time for a range of voxels.
2. Intensities and errors are formed from the sums.
3. The halves are compared in resolution shells.
4. The unique voxels are spread over the sphere.

The only dense array in memory is the one that leads from each voxel of the bounding box
to its unique voxel. Between the steps the unique voxels are kept by the writer, which has
them on disk.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, Mapping, Protocol, Sequence

import numpy as np

from dials_diffuse.grid import Grid
from dials_diffuse.merging import estimate, sums
from dials_diffuse.merging.observations import (
    ObservationTable,
    check_tables,
    error_model,
    names_of_sums,
    read_observations,
)
from dials_diffuse.merging.statistics import (
    IsotropicMean,
    MergingStatistics,
    ShellSums,
    shell_edges,
)

HALF_NAMES = ("half_1/", "half_2/")


@dataclasses.dataclass(frozen=True)
class MergingSettings:
    """How to merge.

    Args:
        n_shells: Resolution shells of the statistics.
        seed: Seed of the split in halves.
        half_split: What goes to one half as a whole: observations (voxels seen by one
            experiment) or experiments.
        voxels_per_pass: Unique voxels to hold in memory (about 100 bytes each).
    """

    n_shells: int = 20
    seed: int = 42
    half_split: str = "observations"
    voxels_per_pass: int = 5_000_000

    @classmethod
    def from_phil(cls, params: Any) -> MergingSettings:
        return cls(
            n_shells=params.n_shells,
            seed=params.seed,
            half_split=params.half_split,
            voxels_per_pass=params.voxels_per_pass,
        )


class VoxelStore(Protocol):
    """What merging needs of a ``MapWriter``."""

    def append(self, columns: Mapping[str, np.ndarray]) -> None: ...

    def update(self, start: int, columns: Mapping[str, np.ndarray]) -> None: ...

    def blocks(
        self, names: Sequence[str], max_rows: int
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]: ...

    def write_box(self, name: str, values: np.ndarray, numbers: np.ndarray) -> None: ...

    def write_table(self, name: str, columns: Mapping[str, np.ndarray]) -> None: ...


def merge(
    tables: Sequence[ObservationTable], settings: MergingSettings, store: VoxelStore
) -> MergingStatistics:
    """Merge tables of observations on the same grid.

    Args:
        tables: The tables; no experiment may be in two of them.
        settings: How to merge.
        store: Gets the map.

    Returns:
        The statistics in resolution shells.

    Raises:
        ValueError: The tables do not fit together, or hold no observations.
    """
    check_tables(tables)
    grid = tables[0].grid
    voxels = sums.unique_voxels(grid)
    numbers = sums.number_voxels(grid, voxels)
    observed, counting = sum_observations(tables, voxels, numbers, settings, store)
    a = max(error_model(t).a for t in tables)
    mean = estimate_intensities(grid, store, a, counting)
    statistics = compare_halves(grid, voxels, mean, settings.n_shells, store)
    write_tables(statistics, mean, store)
    renumber(numbers, observed, len(voxels))
    for name, column, dtype, fill in (
        ("map/intensity", "intensity", "float32", np.nan),
        ("map/intensity_errors", "sigma", "float32", np.nan),
        ("map/n_obs", "n_obs", "int32", 0),
        ("half_1/intensity", "half_1/intensity", "float32", np.nan),
        ("half_2/intensity", "half_2/intensity", "float32", np.nan),
    ):
        blocks = store.blocks([column], sums.VOXELS_PER_BLOCK)
        values = [block[column].astype(dtype) for _, block in blocks]
        # The number -1 of a voxel that was not observed takes the last value.
        values.append(np.array([fill], dtype))
        store.write_box(name, np.concatenate(values), numbers)
    return statistics


def renumber(numbers: np.ndarray, observed: np.ndarray, n_voxels: int) -> None:
    """Change places among all unique voxels to places among the observed ones.

    Args:
        numbers: Places among all, -1 for none; changed in place.
        observed: Place among all of each observed voxel, ascending.
        n_voxels: Number of all unique voxels.
    """
    table = np.full(n_voxels + 1, -1, dtype=np.int32)
    table[observed] = np.arange(len(observed))
    for plane in numbers:
        plane[...] = table[plane]


def sum_observations(
    tables: Sequence[ObservationTable],
    voxels: np.ndarray,
    numbers: np.ndarray,
    settings: MergingSettings,
    store: VoxelStore,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Add up the observations of each unique voxel, and append them to the store.

    Args:
        tables: The tables.
        voxels: All unique voxels, packed.
        numbers: Place of the unique voxel of each voxel of the bounding box.
        settings: How to merge.
        store: Gets the voxels that were observed.

    Returns:
        Place among all unique voxels of the observed ones, ascending; and the mean r of
        signal and background (see ``estimate``) of the map and its halves, float32,
        shape (2, 3, n), None if the tables have the same a.
    """
    grid = tables[0].grid
    names = names_of_sums(tables)
    observed, counting = [], []
    n_added = 0
    for start in range(0, len(voxels), settings.voxels_per_pass):
        stop = min(start + settings.voxels_per_pass, len(voxels))
        accumulator = sums.Accumulator(start, stop, names)
        n_obs = 0
        for observations, half in read_observations(
            tables, settings.seed, settings.half_split, report=start == 0
        ):
            number = numbers.reshape(-1)[grid.key(observations.index)]
            n_obs += len(number)
            n_added += accumulator.add(observations, number, half)
        for places, halves in accumulator.observed():
            observed.append(places)
            if sums.COUNTING[0] in halves:
                counting.append(_counting(halves))
            _append(sums.unpack(voxels[places]), halves, grid, store)
        del accumulator  # before the next is made
    if n_added != n_obs:
        raise ValueError(
            f"{n_obs - n_added} of {n_obs} observations lie beyond d_min={grid.d_min:g} "
            "of their own grid: the table is damaged, extract it again"
        )
    return (
        np.concatenate(observed),
        np.concatenate(counting, axis=-1) if counting else None,
    )


def _counting(halves: dict[str, np.ndarray]) -> np.ndarray:
    """Mean r of signal and background; takes their sums from among the others.

    Returns:
        Of all observations and of each half, shape (2, 3, n).
    """
    result = []
    for name, weight in zip(sums.COUNTING, ("normalisation", "background")):
        weighted, weights = (
            np.vstack([x.sum(axis=0), x]) for x in (halves.pop(name), halves[weight])
        )
        one = np.ones(weights.shape)
        result.append(np.divide(weighted, weights, out=one, where=weights > 0))
    return np.array(result, dtype=np.float32)


def _s_limit(grid: Grid) -> float:
    """Upper limit of the s of voxel centres, Å⁻¹."""
    return 1 / grid.d_min + 1.1 * sums.MARGIN * grid.half_diagonal


def _append(
    index: np.ndarray,
    halves: Mapping[str, np.ndarray],
    grid: Grid,
    store: VoxelStore,
) -> None:
    """Append observed voxels and their sums to the store."""
    s = grid.s(index)
    d = np.divide(1.0, s, out=np.full(len(s), np.inf), where=s > 0)
    columns = {"index": index, "d": d}
    for name, values in halves.items():
        columns[name] = values.sum(axis=0)
        columns.update({half + name: v for half, v in zip(HALF_NAMES, values)})
    store.append(columns)


def mean_rate(grid: Grid, store: VoxelStore) -> np.ndarray:
    """Mean counts per unit normalisation in shells of 0.01 Å⁻¹."""
    names = ("counts", "normalisation")
    shells = IsotropicMean(_s_limit(grid), names)
    for _, block in store.blocks(["index", *names], sums.VOXELS_PER_BLOCK):
        shells.add(grid.s(block["index"]), block)
    return estimate.shell_rate(shells.total["counts"], shells.total["normalisation"])


def estimate_intensities(
    grid: Grid,
    store: VoxelStore,
    a: float = 1.0,
    counting: np.ndarray | None = None,
) -> IsotropicMean:
    """Form the intensities and errors of the map and its halves from their sums.

    Args:
        grid: The grid.
        store: Has the sums, gets the intensities and errors.
        a: Of the error model of scaling.
        counting: Mean r of signal and background (see ``estimate``), of the map and its
            halves, shape (2, 3, n); 1 if None.

    Returns:
        Mean of the three intensities in shells of 0.01 Å⁻¹.
    """
    rate = mean_rate(grid, store)
    prefixes = ("", *HALF_NAMES)
    mean = IsotropicMean(_s_limit(grid), tuple(p + "intensity" for p in prefixes))
    names = [p + name for p in prefixes for name in sums.SUMS if name != "n_pixels"]
    for start, block in store.blocks(["index", *names], sums.VOXELS_PER_BLOCK):
        s = grid.s(block["index"])
        result = {}
        for number, p in enumerate(prefixes):
            n, m = block[p + "counts"], block[p + "normalisation"]
            intensity = estimate.intensity(n, block[p + "background"], m)
            result[p + "intensity"] = intensity
            result[p + "sigma"] = estimate.sigma(
                n,
                block[p + "background_variance"],
                m,
                rate[estimate.thin_shell(s)],
                block[p + "fractional"] * np.maximum(intensity, 0) ** 2,
                a,
                block[p + "background"],
                (1.0, 1.0)
                if counting is None
                else counting[:, number, start : start + len(s)],
            )
        store.update(start, result)
        mean.add(s, result)
    return mean


def compare_halves(
    grid: Grid,
    voxels: np.ndarray,
    mean: IsotropicMean,
    n_shells: int,
    store: VoxelStore,
) -> MergingStatistics:
    """The statistics in resolution shells.

    Args:
        grid: The grid.
        voxels: All unique voxels, packed.
        mean: Isotropic part of the map and its halves.
        n_shells: Number of shells.
        store: Has the voxels.
    """
    possible = _in_range(grid, voxels)
    if len(possible) == 0:
        raise ValueError(
            f"the grid has no voxel between d_min={grid.d_min:g} and d_max={grid.d_max}:"
            " use a larger ndiv or wider limits"
        )
    shells = ShellSums(shell_edges(possible.min(), possible.max(), n_shells))
    shells.add_possible(possible)
    del possible
    half_1, half_2 = (name + "intensity" for name in HALF_NAMES)
    names = ["index", "n_obs", "intensity", "sigma", half_1, half_2]
    for _, block in store.blocks(names, sums.VOXELS_PER_BLOCK):
        s = grid.s(block["index"])
        inside = grid.in_resolution_range(s)
        s, block = s[inside], {name: values[inside] for name, values in block.items()}
        shells.add_observed(s, block["n_obs"], block["intensity"], block["sigma"])
        x, y = (block[name] - mean.isotropic(name, s) for name in (half_1, half_2))
        shells.add_pairs(s, x, y)
    return shells.statistics()


def _in_range(grid: Grid, voxels: np.ndarray) -> np.ndarray:
    """s of those packed voxels whose centres lie in the resolution range."""
    parts = []
    for start in range(0, len(voxels), sums.VOXELS_PER_BLOCK):
        s = grid.s(sums.unpack(voxels[start : start + sums.VOXELS_PER_BLOCK]))
        parts.append(s[grid.in_resolution_range(s)])
    return np.concatenate(parts)


def write_tables(
    statistics: MergingStatistics, mean: IsotropicMean, store: VoxelStore
) -> None:
    """Store the statistics in resolution shells and the isotropic part."""
    shells = [shell.as_dict() for shell in statistics.shells]
    columns = {
        name: np.array(
            [np.nan if shell[name] is None else shell[name] for shell in shells]
        )
        for name in shells[0]
    }
    columns["s"] = (1 / columns["d_max"] + 1 / columns["d_min"]) / 2
    store.write_table("shells", columns)
    filled = mean.number["intensity"] > 0
    store.write_table(
        "isotropic",
        {
            "s": mean.mean_s("intensity")[filled],
            "intensity": mean.mean("intensity")[filled],
            "n_voxels": mean.number["intensity"][filled],
        },
    )
