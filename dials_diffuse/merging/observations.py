"""Independent observations from tables of voxel observations, slab by slab.

Rows that scaling has flagged, or that have no pixels, are left out. The others are put on
the scale of the map, and the rows of a voxel and an experiment are joined.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Iterator, Mapping, NamedTuple, Protocol, Sequence

import numpy as np

from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse import symmetry
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ROWS_PER_SLAB
from dials_diffuse.merging import sums
from dials_diffuse.util.signals import progress_bar

logger = logging.getLogger("dials.diffuse.merge")

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
            same = mine == other
            if field.name == "unit_cell" and table.grid.shape == first.grid.shape:
                same = table.grid.has_cell_of(first.grid)
            if not same:
                raise ValueError(
                    f"{table.path} has a grid with {field.name}={mine}, {first.path} "
                    f"one with {field.name}={other}: extract both on the same grid "
                    "(grid.reference_cell=given grid.unit_cell=..., grid.d_min, "
                    "grid.ndiv)"
                )
        for identifier in table.identifiers.values():
            if identifier in seen:
                raise ValueError(
                    f"Experiment {identifier} is in {seen[identifier]} and in "
                    f"{table.path}: give each experiment once"
                )
        seen.update(dict.fromkeys(table.identifiers.values(), table.path))


def experiment_numbers(
    experiments: ExperimentList, tables: Sequence[ObservationTable]
) -> list[dict[int, int]]:
    """For each table, the place in the list of each of its experiments, by ``id``.

    Raises:
        ValueError: Observations belong to an experiment that is not in the list.
    """
    place = {name: i for i, name in enumerate(experiments.identifiers())}
    numbers = []
    for table in tables:
        missing = [name for name in table.identifiers.values() if name not in place]
        if missing:
            raise ValueError(
                f"{table.path} belongs to other experiments than the experiment list: "
                f"{len(missing)} of its {len(table.identifiers)} identifiers are not "
                f"in it, the first is {missing[0]}. Give the .expt and .refl of one "
                "program run"
            )
        numbers.append({i: place[name] for i, name in table.identifiers.items()})
    return numbers


def read_observations(
    tables: Sequence[ObservationTable],
    seed: int,
    half_split: str = "observations",
    report: bool = True,
) -> Iterator[tuple[sums.Observations, np.ndarray]]:
    """The independent observations of tables and their halves, slab by slab.

    Args:
        tables: The tables.
        seed: Seed of the split in halves.
        half_split: What goes to one half as a whole: observations or experiments.
        report: Whether to log the number of rows that are left out.
    """
    n_all = 0
    a_max = max(error_model(table).a for table in tables)
    names_of_columns = names_of_sums(tables)
    for table in tables:
        names = [*REQUIRED_COLUMNS, *set(OPTIONAL_COLUMNS).intersection(table.columns)]
        hashes = _hashes_by_id(table.identifiers)
        n_used = 0
        slabs = list(table.slabs(ROWS_PER_SLAB))
        for start, stop in progress_bar(slabs, desc="Merging", unit="slab"):
            rows = usable_rows(table.read(start, stop, names))
            n_used += len(rows["id"])
            if len(rows["id"]) == 0:
                continue
            found = _sums_of_rows(rows, error_model(table), a_max)
            observations = sums.group_observations(
                rows["miller_index"],
                rows["id"],
                {name: found[name] for name in names_of_columns},
            )
            experiment = lookup(hashes, observations.experiment, table.path)
            if half_split == "experiments":
                yield observations, sums.split_experiments(experiment, seed)
            else:
                half = sums.split_halves(observations.index, experiment, seed)
                yield observations, half
        if report:
            logger.info(
                "%s: %d of %d rows used, %d left out: outliers, without pixels or of "
                "blank experiments",
                table.path,
                n_used,
                table.n_rows,
                table.n_rows - n_used,
            )
        n_all += n_used
    if n_all == 0:
        raise ValueError(
            f"{tables[0].path} has no usable observations: all "
            f"{sum(table.n_rows for table in tables)} are flagged as outliers or have "
            "no pixels"
        )


def _hashes_by_id(identifiers: Mapping[int, str]) -> dict[int, np.uint64]:
    hashes = sums.hash_identifiers(list(identifiers.values()))
    return dict(zip(identifiers, hashes))


def lookup(values: Mapping[int, int], ids: np.ndarray, path: str) -> np.ndarray:
    """A value of its experiment, such as the hash, for each observation.

    Args:
        values: The values by the ``id`` of the experiment.
        ids: ``id`` of each observation, shape (n,).
        path: Of the table, for the message.

    Raises:
        ValueError: An experiment has no value.
    """
    if len(ids) == 0:
        return np.empty(0, dtype=np.int64)
    numbers = np.flatnonzero(np.bincount(ids))
    unknown = [int(i) for i in numbers if int(i) not in values]
    if unknown:
        raise ValueError(
            f"{path} has observations of experiment number {unknown[0]}, which it has "
            "no identifier for: extract it again"
        )
    found = np.array([values[int(i)] for i in numbers])
    return found[np.searchsorted(numbers, ids)]


def usable_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
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


def names_of_sums(tables: Sequence[ObservationTable]) -> tuple[str, ...]:
    """What ``read_observations`` sums up."""
    differ = len({error_model(table).a for table in tables}) > 1
    return (*sums.SUMS, *sums.COUNTING) if differ else sums.SUMS


def asu_voxels(index: np.ndarray, laue_group: str) -> np.ndarray:
    """The packed symmetry-unique voxel of each row, int64; fast where equal rows adjoin.

    Args:
        index: Voxel indices, shape (n, 3).
        laue_group: Of the grid.
    """
    if len(index) == 0:
        return np.empty(0, dtype=np.int64)
    new = np.ones(len(index), dtype=bool)
    new[1:] = np.any(index[1:] != index[:-1], axis=1)
    unique = sums.pack(symmetry.map_to_asu(index[new], laue_group))
    return unique[np.cumsum(new) - 1]


class Scatter(NamedTuple):
    """Scatter beyond that of counting: a² (var + (b x I)²)."""

    a: float = 1.0
    b: float = 0.0


def error_model(table: ObservationTable) -> Scatter:
    """The error model that scaling has left in a table."""
    return Scatter(*getattr(table, "error_model", ()))


def _sums_of_rows(
    rows: Mapping[str, np.ndarray], model: Scatter, a_max: float
) -> dict[str, np.ndarray]:
    """The sums of each row, on the scale of the map.

    A scaled row obeys (N - B)/M = g I + b with the inverse scale factor g and the
    additive offset b. So M b is one more background, and g M the normalisation of I.
    Variances are in units of the square of the largest a of the tables.
    """
    ratio = (model.a / a_max) ** 2
    background, normalisation = rows["background.sum.value"], rows["normalisation"]
    if "additive_offset" in rows:
        background = background + normalisation * rows["additive_offset"]
    if "inverse_scale_factor" in rows:
        normalisation = normalisation * rows["inverse_scale_factor"]
    return {
        "counts": rows["counts"],
        "background": background,
        "background_variance": ratio * rows["background.sum.variance"],
        "normalisation": normalisation,
        "fractional": ratio * (model.b * normalisation) ** 2,
        sums.COUNTING[0]: ratio * normalisation,
        sums.COUNTING[1]: ratio * background,
        "n_pixels": rows["num_pixels.valid"],
    }
