"""With bragg.exclusion=auto: the ellipsoids fitted to spots, by the map that they leave.

The ellipsoids are fitted to counts; the map is made of expected photons, so that what the
peaks leave in it is not hidden by noise: the difference of the maps of the same images
with and without peaks. Lost are voxels near the peaks that have pixels outside the region
of 99.9 % of the true peaks, and none outside the fitted one.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import chi2
from truth_ladder import (
    extraction_settings,
    merged_map,
    report,
    simulated_experiments,
    vary,
)

from cctbx import uctbx

from dials_diffuse.bragg.ellipsoid import Ellipsoid, b_matrix, default_ellipsoid
from dials_diffuse.extraction.prepare import prepare
from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.grid import Grid
from dials_diffuse.io.maps import MapFile
from dials_diffuse.simulation.bragg import PeakShape
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.simulate import Simulation

SETTINGS = vary(
    SimulationSettings(),
    n_images=60,
    crystal={
        "space_group": "P 21 21 21",
        "unit_cell": uctbx.unit_cell((34, 38, 42, 90, 90, 90)),
    },
    detector={
        "preset": "given",
        "size": (256, 256),
        "pixel": 0.172,
        "distance": 85.0,
    },
    scan={"width": 1.0},
    grid={"ndiv": (6, 6, 6)},
)

STRONG_HALOS = 0.8  # rms displacement, Å


def true_ellipsoid(cell: uctbx.unit_cell, shape: PeakShape, grid: Grid) -> Ellipsoid:
    """The region that holds 99.9 % of the peaks."""
    radius = shape.sigma * math.sqrt(chi2.ppf(0.999, 3))
    b = b_matrix(cell)
    g = b.T @ b / radius**2
    return dataclasses.replace(
        default_ellipsoid(cell, grid.rotations, grid.d_min),
        metric=(g[0, 0], g[1, 1], g[2, 2], g[0, 1], g[0, 2], g[1, 2]),
        growth=(shape.mosaicity / shape.sigma) ** 2,
        growth_radial=0.0,
        radius=radius,
    )


def counts(path) -> dict[str, np.ndarray]:
    """Index, counts and normalisation of the voxels that were observed."""
    with MapFile(path) as handle:
        c = handle.columns(["index", "intensity", "normalisation"])
    seen = c["normalisation"] > 0
    return {
        "index": c["index"][seen],
        "counts": (c["intensity"] * c["normalisation"])[seen],
        "normalisation": c["normalisation"][seen],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "mosaicity, displacement",
    [
        (0.02, 0.25),
        (0.3, 0.25),
        # strong halos, of which many spots consist
        pytest.param(0.02, STRONG_HALOS, id="halos"),
    ],
)
def test_fitted_exclusion(tmp_path, mosaicity, displacement):
    peaks = {"on": True, "mosaicity": mosaicity, "sigma": 0.0012}
    with_halos = vary(SETTINGS, diffuse={"halo_displacement": displacement})
    simulation = Simulation(vary(with_halos, bragg=peaks))
    without = Simulation(vary(with_halos, bragg={**peaks, "on": False}))
    series = simulation.series[0]
    photons = [simulation.photons(series, i) for i in range(series.n_images)]
    rng = np.random.default_rng(7)
    images = {
        "peaks": simulated_experiments(simulation, image=lambda _, i: photons[i]),
        "none": simulated_experiments(without),
    }
    noisy = simulated_experiments(
        simulation,
        image=lambda _, i: [rng.poisson(p).astype(np.int32) for p in photons[i]],
    )
    own = extraction_settings(simulation, BraggSettings(exclusion="auto"))
    prepared = prepare(noisy, None, own)
    fit = prepared.settings.ellipsoids[noisy[0].identifier]
    assert fit.fitted
    cell = noisy[0].crystal.get_unit_cell()
    true = true_ellipsoid(cell, simulation.sample.peak_shape, prepared.grid)
    half = dataclasses.replace(
        true, metric=tuple(4 * x for x in true.metric), radius=true.radius / 2
    )
    regions = {"fitted": fit, "true": true, "half": half, "no": None}
    maps = {}
    for kind, experiments in images.items():
        for name, region in regions.items():
            names = {e.identifier: region for e in experiments} if region else None
            folder = tmp_path / f"{kind}-{name}"
            folder.mkdir()
            settings = dataclasses.replace(
                own, d_min=prepared.grid.d_min, ellipsoids=names
            )
            maps[kind, name] = counts(merged_map(experiments, settings, folder))
    bragg, diffuse = (
        maps["peaks", "no"]["counts"].sum() - maps["none", "no"]["counts"].sum(),
        maps["none", "no"]["counts"].sum(),
    )
    left = {}
    for name in regions:
        a, b = maps["peaks", name], maps["none", name]
        np.testing.assert_array_equal(a["index"], b["index"])
        np.testing.assert_allclose(a["normalisation"], b["normalisation"])
        left[name] = (a["counts"] - b["counts"]).sum()
    n = {name: len(maps["none", name]["counts"]) for name in regions}
    m = {name: maps["none", name]["normalisation"].sum() for name in regions}
    lost = (n["true"] - n["fitted"]) / n["no"]
    report(
        f"fitted exclusion, mosaicity {mosaicity}, halos of {displacement} A",
        bragg_to_diffuse=bragg / diffuse,
        left_of_bragg=f"{left['fitted'] / bragg:.4%}",
        by_true_region=f"{left['true'] / bragg:.4%}",
        left_to_diffuse=f"{left['fitted'] / maps['none', 'fitted']['counts'].sum():.4%}",
        voxels_lost=f"{lost:.3%}",
        voxels_excluded=f"{1 - n['fitted'] / n['no']:.2%}",
        pixels_used=f"{m['fitted'] / m['no']:.2%} (true region {m['true'] / m['no']:.2%})",
        sigma=fit.sigma,
        spread=fit.mosaic_spread,
        mostly_halo=f"{fit.n_halos} of {fit.n_halos + fit.n_peaks} spots",
    )
    assert left["fitted"] < 1e-3 * bragg < left["half"] / 20  # negative control
    assert left["fitted"] < 0.002 * maps["none", "fitted"]["counts"].sum()
    assert lost < 0.01
    assert (m["true"] - m["fitted"]) / m["no"] < 0.01
