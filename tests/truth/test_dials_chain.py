"""From image files through DIALS' own import, spot finding, indexing and refinement.

The map with the refined models must be as near to the truth as that with the true ones.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dials_diffuse.command_line import (
    diffuse_extract,
    diffuse_merge,
    diffuse_process,
    diffuse_simulate,
)
from dials_diffuse.simulation.comparison import compare

CELL = "34,38,42,90,90,90"
SIMULATION = [
    "crystal.space_group=P212121",
    f"crystal.unit_cell={CELL}",
    "detector.preset=given",
    "detector.size=400,400",
    "detector.pixel=0.2",
    "detector.distance=85",
    "beam.flux=1e10",
    "mp.nproc=2",
]
KINDS = {
    "rotation": (["n_images=95", "scan.width=1"], 0.95),
    "stills": (
        [
            "n_images=50",
            "scan.orientations=random",
            "scan.exposure=1",
            "bragg.mosaicity=0.02",
            "bragg.sigma=0.0012",
        ],
        0.90,
    ),
}
# the polarization is not in the header of the images
CORRECTIONS = "corrections.polarization_fraction=0.98"
EXCLUSION = (16.0, 16.0, 16.0, 0.0, 0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_refined_models_are_as_good_as_the_true_ones(tmp_path, monkeypatch, kind):
    options, least_indexed = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    diffuse_simulate.run([f"mode={kind}", *SIMULATION, *options])
    diffuse_process.run(
        [
            *sorted(map(str, Path.cwd().glob("sim_1_*.cbf"))),
            "space_group=P212121",
            f"unit_cell={CELL}",
            "input.mask=simulated.mask",
            "truth=truth.h5",
            f"extract.{CORRECTIONS}",
            "output.directory=map",
        ]
    )
    record = json.loads(Path("map/diffuse.json").read_text())
    assert record["mode"] == kind
    assert record["spots"]["fraction_indexed"] >= least_indexed
    if kind == "stills":
        assert record["spots"]["n_images_indexed"] >= 0.9 * 50
    assert record["refinement"]["rmsd_x_px"] < 0.5
    assert Path("map/comparison.png").stat().st_size > 10_000
    assert "Comparison with the truth" in Path("map/diffuse.html").read_text()

    os.chdir(tmp_path)
    diffuse_extract.run(["simulated.expt", "mask=simulated.mask", CORRECTIONS])
    diffuse_merge.run(["extracted.expt", "extracted.refl"])
    true, refined = (
        compare(path, "truth.h5", exclusion=EXCLUSION).overall.cc_anisotropic
        for path in ("merged.h5", "map/merged.h5")
    )
    assert true > 0.9
    assert refined == pytest.approx(true, abs=0.01)
    assert record["truth"]["overall"]["cc_anisotropic"] == pytest.approx(refined)
