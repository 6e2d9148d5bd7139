"""What is taken off the images, by the map that is left: background to extraction to map.

*images*: air scattering, off by what images without the crystal show. The map is the truth
within the errors that it states, in which those of the background have their part. Pixels
that were smoothed together err together, which the errors of the map do not contain: with
120 images, 40 % background, chi^2 is

    images without crystal    smoothing 1    smoothing 5    of shells at most
    30                        0.998          1.009          1.03, 1.04
    3                         0.988          1.052          1.04, 1.20

*radial, modal*: the profile of each still is the median of its pixels at each s, and takes
the isotropic part of the crystal's scattering with it. What is left is the truth less its
isotropic part, but for the difference of the median from the mean.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from simulated_background import background_settings, crystals_and_blanks
from truth_ladder import (
    QUARTERS,
    extraction_settings,
    merged_map,
    report,
    report_agreement,
    simulated_experiments,
    true_map_file,
    vary,
)

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.background.make import background_axes, make_background
from dials_diffuse.background.settings import (
    BackgroundSettings,
    ImagesSettings,
    ProfileSettings,
)
from dials_diffuse.extraction.settings import BraggSettings
from dials_diffuse.io.background import BackgroundWriter
from dials_diffuse.merging.statistics import IsotropicMean
from dials_diffuse.simulation.comparison import Comparison, compare
from dials_diffuse.simulation.simulate import Simulation

KEEP_ALL = BraggSettings(exclusion="none")

# Half of all photons are of the air, most of them at low angles.
AIR = vary(
    QUARTERS, beam={"flux": 5e8}, background={"air": 30, "n_images": 30}, n_images=120
)


def write_background(
    experiments: ExperimentList,
    settings: BackgroundSettings,
    path: Path,
    blanks: ExperimentList | None = None,
) -> str:
    axes, _ = background_axes(experiments, settings)
    with BackgroundWriter(path, settings.method, settings.corrections, axes) as writer:
        make_background(experiments, settings, writer, blanks)
    return str(path)


def map_without(
    simulation: Simulation,
    experiments: ExperimentList,
    background: str | None,
    folder: Path,
    exclusion: BraggSettings = KEEP_ALL,
) -> Comparison:
    """The map of images less their background, and the truth."""
    settings = extraction_settings(simulation, exclusion)
    settings = dataclasses.replace(settings, background=background)
    merged = merged_map(experiments, settings, folder)
    return compare(merged, true_map_file(simulation, folder), scale="absolute")


def report_noise(name: str, comparison: Comparison) -> None:
    o = comparison.overall
    report(
        name,
        photons=o.counts,
        chi2=f"{o.chi2:.4f}±{o.chi2_error:.4f}",
        of_shells=f"{min(s.chi2 for s in comparison.shells):.3f}.."
        f"{max(s.chi2 for s in comparison.shells):.3f}",
        mean_pull=f"{o.mean_pull:+.4f}±{o.mean_pull_error:.4f}",
        ratios=" ".join(f"{s.ratio - 1:+.3%}" for s in comparison.shells),
    )


@pytest.fixture(scope="module")
def air():
    """Images with and without the crystal."""
    simulation = Simulation(AIR)
    return simulation, *crystals_and_blanks(simulation)


@pytest.mark.slow
@pytest.mark.parametrize("n_blanks, smoothing", [(30, 1), (30, 5), (3, 1), (3, 5)])
def test_images_without_the_crystal(tmp_path, air, n_blanks, smoothing):
    simulation, data, blanks = air
    blanks = ExperimentList(blanks)
    blanks[0].scan = blanks[0].scan[:n_blanks]
    own = background_settings(
        simulation,
        method="images",
        images=ImagesSettings(phi_width=360.0, smoothing=smoothing),
    )
    background = write_background(data, own, tmp_path / "background.h5", blanks)
    found = map_without(simulation, data, background, tmp_path)
    name = f"background of {n_blanks} images, smoothing {smoothing}"
    report_noise(name, found)
    report_agreement(name, found)
    voxels = found.voxels
    assert 0.3 < voxels.background.sum() / voxels.expected_counts(1).sum() < 0.5
    few_and_smooth = n_blanks == 3 and smoothing == 5
    assert 0.95 < found.overall.chi2 < (1.1 if few_and_smooth else 1.05)
    for shell in found.shells:
        assert 0.9 < shell.chi2 < (1.3 if few_and_smooth else 1.1)
        # smoothed pixels err together
        error = shell.ratio_error * (3 if few_and_smooth else 1)
        assert shell.ratio == pytest.approx(1, abs=4 * error)


@pytest.mark.slow
def test_no_background_is_taken_off(tmp_path, air):
    """Negative control."""
    simulation, data, _ = air
    found = map_without(simulation, data, None, tmp_path)
    report_noise("background left in", found)
    assert found.overall.chi2 > 50
    assert found.shells[0].ratio > 2.5
    assert min(shell.ratio for shell in found.shells) > 1.2


def rest_of_truth(found: Comparison) -> tuple[float, np.ndarray, np.ndarray]:
    """What a map without isotropic part has of the truth.

    Returns:
        Slope of the anisotropic part of the map on that of the truth; in ten shells of
        equal numbers of voxels, the mean of the map, and the anisotropic part of the
        truth (root mean square), both relative to its isotropic part.
    """
    v = found.voxels
    mean = IsotropicMean(float(v.s.max()), ("map", "truth"))
    mean.add(v.s, {"map": v.intensity, "truth": v.truth})
    isotropic = mean.isotropic("truth", v.s)
    rest = v.truth - isotropic
    observed = v.intensity - mean.isotropic("map", v.s)
    w = v.normalisation
    slope = float(np.sum(w * observed * rest) / np.sum(w * rest**2))
    shells = np.array_split(np.argsort(v.s), 10)
    left = [np.sum((w * v.intensity)[i]) / np.sum((w * isotropic)[i]) for i in shells]
    size = [np.sqrt(np.mean((rest / isotropic)[i] ** 2)) for i in shells]
    return slope, np.array(left), np.array(size)


def report_rest(name: str, found: Comparison) -> tuple[float, np.ndarray]:
    slope, left, size = rest_of_truth(found)
    report(
        name,
        cc_aniso=f"{found.overall.cc_anisotropic:.4f} "
        f"(expected {found.overall.cc_expected:.4f})",
        slope=slope,
        left_of_isotropic=" ".join(f"{x:+.2%}" for x in left),
        anisotropic=" ".join(f"{x:.1%}" for x in size),
    )
    return slope, left


STILLS = vary(
    QUARTERS,
    mode="stills",
    n_images=40,
    beam={"flux": 5e8},
    background={"air": 30.0, "solvent": 0.3, "compton": True},
    scan={"exposure": 1.0, "orientations": "random"},
)


def off_centre(simulation: Simulation) -> np.ndarray:
    """Photons of a background that is not round about the beam, (n_slow, n_fast)."""
    y, x = np.indices(simulation.detector.panels[0].shape) / 180
    level = 2 * np.mean(simulation.photons(simulation.series[0], 0))
    return level * np.exp(-((x - 0.62) ** 2 + (y - 0.35) ** 2) / (2 * 0.35**2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra, expected",
    [
        (False, {"none": (1.0, 3.0), "radial": (0.93, 0.01)}),
        (True, {"radial": (0.97, 0.07), "modal": (0.88, 0.03)}),
    ],
    ids=["round", "off centre"],
)
def test_stills(tmp_path, extra, expected):
    """The slope, and what is left of the isotropic part at most.

    Profiles of single stills take part of the structure with them, as each ring has few
    features; grids of nodes 60 px apart, two lengths of the features, take more.
    """
    simulation = Simulation(STILLS)
    rng = np.random.default_rng(7)
    more = off_centre(simulation) if extra else 0.0

    def image(series, i):
        photons = simulation.photons(series, i)[0] + more
        return [rng.poisson(photons).astype(np.int32)]

    experiments = simulated_experiments(simulation, image=image)
    found = {}
    for method, (slope, most) in expected.items():
        background = None
        if method != "none":
            own = background_settings(
                simulation,
                method=method,
                bragg=KEEP_ALL,
                profile=ProfileSettings(spacing=60 if method == "modal" else None),
            )
            path = tmp_path / f"{method}.h5"
            background = write_background(experiments, own, path)
        comparison = map_without(simulation, experiments, background, tmp_path)
        (tmp_path / "extracted.refl").unlink()
        (tmp_path / "merged.h5").unlink()
        (tmp_path / "truth.h5").unlink()
        name = f"stills, {'off-centre' if extra else 'round'} background, {method}"
        found[method] = comparison.overall.cc_anisotropic
        found_slope, left = report_rest(name, comparison)
        assert found_slope == pytest.approx(slope, abs=0.04)
        assert np.abs(left).max() < most
        if method == "none":
            assert left.min() > 1
    if extra:
        assert found["modal"] > found["radial"] + 0.08
    else:
        assert found["radial"] > 0.6
