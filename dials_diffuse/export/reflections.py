"""Voxel observations as the integrated reflections of a crystal of voxels.

    I = (N - B)/M - b        var I = (N' + V)/M²

with counts N, background B and its variance V, normalisation M and, after scaling, the
additive offset b. No count serves as its own weight. The expected counts N' of a row are
its share, in proportion to its normalisation, of those of all rows of its
symmetry-unique voxel (see ``merging.estimate``). So the weights 1/var I of the rows of a
voxel are as their normalisations but for V, and what least squares find from them is
what the likelihood of Poisson counts would.

Scaled rows keep their inverse scale factor g: I/g is on the scale of the map.
"""

from __future__ import annotations

import dataclasses
from typing import Mapping, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.export.choice import (
    N_SHARES,
    Slab,
    Survey,
    chosen_rows,
    scaled_weight,
    survey,
)
from dials_diffuse.export.experiments import (
    centroids,
    imageset_numbers,
    voxel_experiments,
)
from dials_diffuse.grid import Grid
from dials_diffuse.merging import estimate
from dials_diffuse.merging.observations import (
    ObservationTable,
    check_tables,
    experiment_numbers,
    lookup,
)
from dials_diffuse.util.compat import miller_index_from_numpy

# A place-holder beyond all indices in the tables of dials.scale.
MAX_INDEX = 10000


@dataclasses.dataclass(frozen=True)
class Reflections:
    """A table with its experiments.

    Attributes:
        table: The table.
        experiments: Those that have reflections, in the order of their numbers.
        counted: What there was to choose from.
        fraction: Of the symmetry-unique voxels, the part that was chosen.
    """

    table: flex.reflection_table
    experiments: ExperimentList
    counted: Survey
    fraction: float


def check_indices(grid: Grid) -> None:
    """Check that dials.scale can hold the indices of a grid.

    Raises:
        ValueError: They are too large.
    """
    largest = max(grid.half_size)
    if largest >= MAX_INDEX:
        raise ValueError(
            f"The voxel indices reach {largest}, those of dials.scale must stay below "
            f"{MAX_INDEX}: extract with a smaller grid.ndiv or a larger grid.d_min"
        )


def check_scales(tables: Sequence[ObservationTable]) -> None:
    """Check that either all tables or none have been scaled.

    Raises:
        ValueError: Only some have.
    """
    scaled = ["inverse_scale_factor" in table.columns for table in tables]
    if any(scaled) and not all(scaled):
        raise ValueError(
            f"{tables[scaled.index(True)].path} has been scaled, "
            f"{tables[scaled.index(False)].path} has not: scale all files together or "
            "give them all unscaled"
        )


def export_reflections(
    tables: Sequence[ObservationTable],
    experiments: ExperimentList,
    max_rows: int | None = None,
) -> Reflections:
    """The table and the experiments of a choice of voxels.

    Args:
        tables: Observations on the same grid.
        experiments: Their experiments, others allowed.
        max_rows: About how many rows there may be at most; None for no limit.

    Raises:
        ValueError: The tables and experiments do not go together, or dials.scale cannot
            hold the indices.
    """
    check_tables(tables)
    check_scales(tables)
    grid = tables[0].grid
    check_indices(grid)
    numbers = experiment_numbers(experiments, tables)
    counted = survey(tables)
    n_shares = counted.shares_within(max_rows)
    parts = []
    for table, number in zip(tables, numbers):
        slab = chosen_rows(table, n_shares)
        if len(slab.unique):
            slab.rows["id"] = lookup(number, slab.rows["id"], table.path)
            slab.rows.setdefault("additive_offset", np.zeros(len(slab.unique)))
            parts.append(slab)
    chosen = _join(parts)
    used, chosen.rows["id"] = np.unique(chosen.rows["id"], return_inverse=True)
    kept = voxel_experiments([experiments[int(i)] for i in used], grid)
    columns = intensity_columns(chosen, grid, counted.rate)
    table = reflection_table(chosen.rows, columns, kept)
    return Reflections(table, kept, counted, n_shares / N_SHARES)


def _join(parts: Sequence[Slab]) -> Slab:
    names = set.intersection(*(set(part.rows) for part in parts))
    rows = {name: np.concatenate([p.rows[name] for p in parts]) for name in names}
    return Slab(rows, np.concatenate([p.unique for p in parts]))


def expected_counts(chosen: Slab, grid: Grid, rate: np.ndarray) -> np.ndarray:
    """N', the expected counts of each row, photons (see the module).

    Args:
        chosen: Rows; all that there are of their voxels.
        grid: The grid.
        rate: ``estimate.shell_rate`` of the shells of 0.01 Å⁻¹.
    """
    _, first, voxel = np.unique(chosen.unique, return_index=True, return_inverse=True)
    weight = scaled_weight(chosen.rows)
    counts = np.bincount(voxel, chosen.rows["counts"])
    total = np.bincount(voxel, weight)
    s = grid.s(chosen.rows["miller_index"][first])
    mean = total * rate[estimate.thin_shell(s)]
    return weight * (estimate.expected_counts(counts, mean) / total)[voxel]


def intensity_columns(
    chosen: Slab, grid: Grid, rate: np.ndarray
) -> dict[str, np.ndarray]:
    """Intensities, photons s⁻¹ sr⁻¹, their variances, and the inverse scale factors.

    Args: as those of ``expected_counts``.
    """
    rows = chosen.rows
    m = rows["normalisation"]
    value = estimate.intensity(rows["counts"], rows["background.sum.value"], m)
    variance = expected_counts(chosen, grid, rate) + rows["background.sum.variance"]
    variance /= m**2
    value -= rows["additive_offset"]
    result = {"intensity.sum.value": value, "intensity.sum.variance": variance}
    if "inverse_scale_factor" in rows:
        # dials.merge divides these by the factor itself
        result["intensity.scale.value"] = value
        result["intensity.scale.variance"] = variance
        result["inverse_scale_factor"] = rows["inverse_scale_factor"]
    return result


def reflection_table(
    rows: Mapping[str, np.ndarray],
    intensities: Mapping[str, np.ndarray],
    experiments: ExperimentList,
) -> flex.reflection_table:
    """The table of DIALS, with what its programs need besides the intensities.

    Args:
        rows: Columns of observations; ``id`` is the number in the list.
        intensities: From ``intensity_columns``.
        experiments: From ``voxel_experiments``.
    """
    n, number = len(rows["id"]), rows["id"]
    px = rows["xyzobs.px.value"].copy()
    still = np.array([e.is_still() for e in experiments])
    px[still[number], 2] = 0.5  # the middle of the only image
    mm, s1 = centroids(experiments, number, rows["panel"], px)
    table = flex.reflection_table()
    table["miller_index"] = miller_index_from_numpy(rows["miller_index"])
    table["id"] = _to_flex(number, np.int32)
    table["imageset_id"] = _to_flex(
        np.array(imageset_numbers(experiments))[number], np.int32
    )
    table["panel"] = _to_flex(rows["panel"], np.uint64)
    table["d"] = _to_flex(rows["d"])
    for name, column in intensities.items():
        table[name] = _to_flex(column)
    # All corrections are in the normalisation, and a voxel is never seen in part.
    table["lp"] = flex.double(n, 1.0)
    table["partiality"] = flex.double(n, 1.0)
    for name, vectors in (
        ("xyzobs.px.value", px),
        ("xyzobs.mm.value", mm),
        ("s1", s1),
    ):
        table[name] = flumpy.vec_from_numpy(np.ascontiguousarray(vectors)).deep_copy()
    table["flags"] = flex.size_t(n, 0)
    table.set_flags(flex.bool(n, True), table.flags.integrated_sum)
    if "intensity.scale.value" in intensities:
        table.set_flags(flex.bool(n, True), table.flags.scaled)
    for i, experiment in enumerate(experiments):
        table.experiment_identifiers()[i] = experiment.identifier
    return table


def _to_flex(column: np.ndarray, dtype: type = np.float64) -> flex.double:
    """A flex array of its own: see ``deep_copy`` in ``extraction.extras``."""
    return flumpy.from_numpy(np.ascontiguousarray(column, dtype=dtype)).deep_copy()
