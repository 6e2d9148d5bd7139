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
import logging
from typing import Any, Iterator, Mapping, Protocol, Sequence

import numpy as np

from dials.array_family import flex
from dials.util import progress
from dials_diffuse.grid import Grid
from dials_diffuse.merging import estimate, sums
from dials_diffuse.merging.statistics import (
    IsotropicMean,
    MergingStatistics,
    ShellSums,
    shell_edges,
)

logger = logging.getLogger("dials.diffuse.merge")

# Rows of the observation tables that are in memory at once.
ROWS_PER_SLAB = 1_000_000

REQUIRED_COLUMNS = (
    "miller_index",
    "id",
    "counts",
    "background.sum.value",
    "background.sum.variance",
    "normalisation",
    "num_pixels.valid",
)
OPTIONAL_COLUMNS = ("flags", "inverse_scale_factor", "additive_offset")

HALF_NAMES = ("half_1/", "half_2/")


@dataclasses.dataclass(frozen=True)
class MergingSettings:
    """How to merge.

    Args:
        n_shells: Resolution shells of the statistics.
        seed: Seed of the split in halves.
        voxels_per_pass: Unique voxels to hold in memory (about 100 bytes each).
    """

    n_shells: int = 20
    seed: int = 42
    voxels_per_pass: int = 8_000_000

    @classmethod
    def from_phil(cls, params: Any) -> MergingSettings:
        return cls(
            n_shells=params.n_shells,
            seed=params.seed,
            voxels_per_pass=params.voxels_per_pass,
        )


class ObservationTable(Protocol):
    """What merging needs of an ``ObservationFile``."""

    path: str
    grid: Grid
    identifiers: Mapping[int, str]
    columns: Sequence[str]
    n_rows: int

    def slabs(self, max_rows: int) -> Iterator[tuple[int, int]]: ...

    def read(
        self, start: int, stop: int, names: list[str]
    ) -> dict[str, np.ndarray]: ...


class VoxelStore(Protocol):
    """What merging needs of a ``MapWriter``."""

    def append(self, columns: Mapping[str, np.ndarray]) -> None: ...

    def update(self, start: int, columns: Mapping[str, np.ndarray]) -> None: ...

    def blocks(
        self, names: Sequence[str], max_rows: int
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]: ...

    def write_box(self, name: str, values: np.ndarray, numbers: np.ndarray) -> None: ...

    def write_table(
        self,
        name: str,
        signal: str,
        axis: str,
        columns: Mapping[str, tuple[np.ndarray, str, str]],
    ) -> None: ...


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
    observed, rate = sum_observations(tables, voxels, numbers, settings, store)
    mean = estimate_intensities(grid, rate, store)
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


def check_tables(tables: Sequence[ObservationTable]) -> None:
    """Check that tables can be merged with each other.

    Raises:
        ValueError: They have different grids, experiments in common, or no rows.
    """
    first = tables[0]
    seen: dict[str, str] = {}
    for table in tables:
        if table.n_rows == 0:
            raise ValueError(
                f"{table.path} has no observations: check the masks and the resolution "
                "limits of dials.diffuse_extract"
            )
        for field in dataclasses.fields(Grid):
            mine, other = (getattr(t.grid, field.name) for t in (table, first))
            if mine != other:
                raise ValueError(
                    f"{table.path} has a grid with {field.name}={mine}, {first.path} "
                    f"one with {field.name}={other}: extract both on the same grid"
                )
        for identifier in table.identifiers.values():
            if identifier in seen:
                raise ValueError(
                    f"Experiment {identifier} is in {seen[identifier]} and in "
                    f"{table.path}: give each experiment once"
                )
        seen.update(dict.fromkeys(table.identifiers.values(), table.path))


def sum_observations(
    tables: Sequence[ObservationTable],
    voxels: np.ndarray,
    numbers: np.ndarray,
    settings: MergingSettings,
    store: VoxelStore,
) -> tuple[np.ndarray, np.ndarray]:
    """Add up the observations of each unique voxel, and append them to the store.

    Args:
        tables: The tables.
        voxels: All unique voxels, packed.
        numbers: Place of the unique voxel of each voxel of the bounding box.
        settings: How to merge.
        store: Gets the voxels that were observed.

    Returns:
        observed: Place among all unique voxels of the observed ones.
        rate: Mean counts per unit normalisation in shells of 0.01 Å⁻¹.
    """
    grid = tables[0].grid
    shells = IsotropicMean(_s_limit(grid), ("counts", "normalisation"))
    observed = []
    n_added = 0
    for start in range(0, len(voxels), settings.voxels_per_pass):
        stop = min(start + settings.voxels_per_pass, len(voxels))
        accumulator = sums.Accumulator(start, stop)
        n_obs = 0
        for observations, half in read_observations(tables, settings.seed, start == 0):
            number = numbers.reshape(-1)[grid.key(observations.index)]
            n_obs += len(number)
            n_added += accumulator.add(observations, number, half)
        places, columns = accumulator.observed()
        del accumulator
        _append(sums.unpack(voxels[places]), columns, grid, store, shells)
        observed.append(places)
    if n_added != n_obs:
        raise ValueError(
            f"{n_obs - n_added} of {n_obs} observations lie beyond d_min={grid.d_min:g} "
            "of their own grid: the table is damaged, extract it again"
        )
    rate = estimate.shell_rate(shells.total["counts"], shells.total["normalisation"])
    return np.concatenate(observed), rate


def _s_limit(grid: Grid) -> float:
    """Upper limit of the s of voxel centres, Å⁻¹."""
    return 1 / grid.d_min + 1.1 * sums.MARGIN * grid.half_diagonal


def _append(
    index: np.ndarray,
    halves: Mapping[str, np.ndarray],
    grid: Grid,
    store: VoxelStore,
    shells: IsotropicMean,
) -> None:
    """Append observed voxels to the store, and add their sums to the thin shells."""
    for start in range(0, len(index), sums.VOXELS_PER_BLOCK):
        part = slice(start, start + sums.VOXELS_PER_BLOCK)
        s = grid.s(index[part])
        d = np.divide(1.0, s, out=np.full(len(s), np.inf), where=s > 0)
        columns = {"index": index[part], "d": d}
        for name, values in halves.items():
            columns[name] = values[:, part].sum(axis=0)
            columns.update({h + name: v for h, v in zip(HALF_NAMES, values[:, part])})
        store.append(columns)
        shells.add(s, columns)


def read_observations(
    tables: Sequence[ObservationTable], seed: int, report: bool = True
) -> Iterator[tuple[sums.Observations, np.ndarray]]:
    """The independent observations of tables and their halves, slab by slab.

    Args:
        tables: The tables.
        seed: Seed of the split in halves.
        report: Whether to log the number of rows that are left out.
    """
    for table in tables:
        names = [*REQUIRED_COLUMNS, *set(OPTIONAL_COLUMNS).intersection(table.columns)]
        hashes = _hashes_by_id(table.identifiers)
        n_used = 0
        slabs = list(table.slabs(ROWS_PER_SLAB))
        for start, stop in progress(slabs, desc="Merging", unit="slab"):
            rows = _usable_rows(table.read(start, stop, names))
            n_used += len(rows["id"])
            if len(rows["id"]) == 0:
                continue
            observations = sums.group_observations(
                rows["miller_index"], rows["id"], _sums_of_rows(rows)
            )
            experiment = _lookup(hashes, observations.experiment, table.path)
            yield observations, sums.split_halves(observations.index, experiment, seed)
        if n_used == 0:
            raise ValueError(
                f"{table.path} has no usable observations: all {table.n_rows} are "
                "flagged as outliers or have no pixels"
            )
        if report:
            logger.info(
                "%s: %d of %d rows used, %d left out as outliers or without pixels",
                table.path,
                n_used,
                table.n_rows,
                table.n_rows - n_used,
            )


def _hashes_by_id(identifiers: Mapping[int, str]) -> dict[int, np.uint64]:
    hashes = sums.hash_identifiers(list(identifiers.values()))
    return dict(zip(identifiers, hashes))


def _lookup(hashes: dict[int, np.uint64], ids: np.ndarray, path: str) -> np.ndarray:
    """The hash of the experiment of each observation."""
    numbers, inverse = np.unique(ids, return_inverse=True)
    unknown = [int(i) for i in numbers if int(i) not in hashes]
    if unknown:
        raise ValueError(
            f"{path} has observations of experiment number {unknown[0]}, which it has "
            "no identifier for: extract it again"
        )
    table = np.array([hashes[int(i)] for i in numbers], dtype=np.uint64)
    return table[inverse]


def _usable_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows that are not flagged by scaling and that have pixels."""
    usable = (rows["num_pixels.valid"] > 0) & (rows["normalisation"] > 0)
    if "flags" in rows:
        bad = np.uint64(int(flex.reflection_table.flags.bad_for_scaling))
        usable &= (rows["flags"].astype(np.uint64) & bad) == 0
    if "inverse_scale_factor" in rows:
        usable &= rows["inverse_scale_factor"] > 0
    if usable.all():
        return rows
    return {name: values[usable] for name, values in rows.items()}


def _sums_of_rows(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The sums of each row, on the scale of the map.

    A scaled row obeys (N - B)/M = g I + b with the inverse scale factor g and the
    additive offset b. So M b is one more background, and g M the normalisation of I.
    """
    background, normalisation = rows["background.sum.value"], rows["normalisation"]
    if "additive_offset" in rows:
        background = background + normalisation * rows["additive_offset"]
    if "inverse_scale_factor" in rows:
        normalisation = normalisation * rows["inverse_scale_factor"]
    return {
        "counts": rows["counts"],
        "background": background,
        "background_variance": rows["background.sum.variance"],
        "normalisation": normalisation,
        "n_pixels": rows["num_pixels.valid"],
    }


def estimate_intensities(
    grid: Grid, rate: np.ndarray, store: VoxelStore
) -> IsotropicMean:
    """Form the intensities and errors of the map and its halves from their sums.

    Args:
        grid: The grid.
        rate: Mean counts per unit normalisation in shells of 0.01 Å⁻¹.
        store: Has the sums, gets the intensities and errors.

    Returns:
        Mean of the three intensities in shells of 0.01 Å⁻¹.
    """
    prefixes = ("", *HALF_NAMES)
    mean = IsotropicMean(_s_limit(grid), tuple(p + "intensity" for p in prefixes))
    names = [p + name for p in prefixes for name in sums.SUMS if name != "n_pixels"]
    for start, block in store.blocks(["index", *names], sums.VOXELS_PER_BLOCK):
        s = grid.s(block["index"])
        result = {}
        for p in prefixes:
            n, m = block[p + "counts"], block[p + "normalisation"]
            result[p + "intensity"] = estimate.intensity(n, block[p + "background"], m)
            result[p + "sigma"] = estimate.sigma(
                n, block[p + "background_variance"], m, rate[estimate.thin_shell(s)]
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
        thin = estimate.thin_shell(s)
        x, y = (block[name] - mean.mean(name)[thin] for name in (half_1, half_2))
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

    def column(name: str, dtype: str = "float64") -> np.ndarray:
        values = [shell.as_dict()[name] for shell in statistics.shells]
        return np.array([np.nan if v is None else v for v in values], dtype=dtype)

    d_max, d_min = column("d_max"), column("d_min")
    intensity = "photons/(s.sr)"
    store.write_table(
        "shells",
        "cc_half",
        "s",
        {
            "s": (
                (1 / d_max + 1 / d_min) / 2,
                "1/angstrom",
                "1/d, middle of the shell",
            ),
            "d_max": (d_max, "angstrom", "upper limit of d"),
            "d_min": (d_min, "angstrom", "lower limit of d"),
            "n_obs": (column("n_obs", "int64"), "1", "observations"),
            "n_voxels": (column("n_voxels", "int64"), "1", "observed unique voxels"),
            "n_possible": (
                column("n_possible", "int64"),
                "1",
                "possible unique voxels",
            ),
            "completeness": (column("completeness"), "1", "fraction observed"),
            "multiplicity": (column("multiplicity"), "1", "observations per voxel"),
            "mean_intensity": (column("mean_intensity"), intensity, "mean intensity"),
            "mean_i_over_sigma": (
                column("mean_i_over_sigma"),
                "1",
                "mean of intensity / standard error",
            ),
            "n_pairs": (
                column("n_pairs", "int64"),
                "1",
                "voxels observed in both halves",
            ),
            "cc_half": (column("cc_half"), "1", "CC1/2 of the anisotropic part"),
        },
    )
    s = (np.arange(mean.n_shells) + 0.5) * estimate.THIN_SHELL
    number = mean.number["intensity"].astype(np.int64)
    store.write_table(
        "isotropic",
        "intensity",
        "s",
        {
            "s": (s, "1/angstrom", "1/d, middle of the shell"),
            "intensity": (mean.mean("intensity"), intensity, "mean intensity"),
            "n_voxels": (number, "1", "observed unique voxels"),
        },
    )
