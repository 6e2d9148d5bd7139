"""The memory that scaling needs does not depend on the length of the table.

Of arrays: files that are mapped, and memory left in pieces, show in benchmarks/scale.py.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from simulated_observations import ROTATION, draw, observe, read_all
from truth_ladder import vary

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.command_line import diffuse_scale
from dials_diffuse.io.observations import ObservationFile, ObservationWriter
from dials_diffuse.scaling import apply, block, portions

ROWS_PER_SLAB = 5000
ROWS_REFINED = 6000
REFINED = f"refinement.max_rows={ROWS_REFINED}"
SETTINGS = (
    "output.html=None",
    "output.json=None",
    "output.log=None",
    "model.scale.interval=20",
    *(f"model.{name}.use=no" for name in ("decay", "absorption", "detector", "offset")),
)


def write_repeated(
    experiments: ExperimentList, source: str, target: Path, times: int
) -> tuple[str, str]:
    """The same table with each row so many times, in slabs of half the usual size."""
    expt, refl = target.with_suffix(".expt"), target.with_suffix(".refl")
    experiments.as_file(str(expt))
    rows = {name: x.repeat(times, axis=0) for name, x in read_all(source).items()}
    with ObservationFile(source) as table:
        grid, identifiers = table.grid, table.identifiers
    key = grid.key(rows["miller_index"])
    limits = np.unique(np.searchsorted(key, key[:: ROWS_PER_SLAB // 2]))
    with ObservationWriter(refl, grid, identifiers) as writer:
        for start, stop in zip(limits, [*limits[1:], len(key)]):
            writer.append({name: x[start:stop] for name, x in rows.items()})
    return str(expt), str(refl)


def peak(files: tuple[str, str], *options: str) -> int:
    """Most memory in use at once while a table is scaled, bytes."""
    tracemalloc.start()
    try:
        diffuse_scale.run([*files, *SETTINGS, *options])
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_is_that_of_a_slab_and_of_the_rows_refined(tmp_path, monkeypatch):
    """Of five times the rows; control: where all rows are refined, it grows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(block, "ROWS_PER_SLAB", ROWS_PER_SLAB)
    monkeypatch.setattr(apply, "ROWS_PER_SLAB", ROWS_PER_SLAB)
    monkeypatch.setattr(portions, "ROWS_PER_PORTION", ROWS_PER_SLAB)
    mapped = []
    monkeypatch.setattr(
        diffuse_scale, "return_large_arrays", lambda: mapped.append(True)
    )
    detector = {"size": (60, 60), "pixel": 1.5}
    geometry = observe(vary(ROTATION, n_images=30, detector=detector), tmp_path)
    observed = draw(geometry, tmp_path, np.ones(geometry.n_rows), counts_per_pixel=20)
    short, long = (
        write_repeated(
            geometry.experiments, observed.files[1], tmp_path / f"{n}_times", n
        )
        for n in (1, 5)
    )
    with ObservationFile(short[1]) as table:
        assert table.n_rows > 4 * ROWS_PER_SLAB
    for files in (short, long):
        peak(files, REFINED)  # imports, and caches of what does not change
    few, many = peak(short, REFINED), peak(long, REFINED)
    assert many < 1.1 * few
    assert len(mapped) == 4  # of each run: what is freed is not left in pieces
    everything = peak(long, "refinement.max_rows=None")
    assert everything > 5 * many
