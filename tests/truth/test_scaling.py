"""Scaling finds the factors and offsets that observations were made with.

The counts are drawn from the model itself, on the geometry of real experiments (see
``simulated_observations``), so that nothing but counting and the program makes errors.

No observation tells some changes of the model from other intensities, and truths are
injected and compared without them:

* a common factor of all scales;
* a factor f(q) with the symmetry of the intensities, of which one of s alone is the
  simplest: it goes into I. Absorption and sensitivity as functions of the place on the
  detector and the rotation angle can take such a form; what is compared is what is left
  without the mean over the observations of each voxel;
* an offset δ(s) b, by which I may be the less.

So the map is compared with the truth up to a factor and an offset for each shell of s.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from simulated_observations import (
    ROTATION,
    STILLS,
    Geometry,
    Observed,
    draw,
    observe,
    read_all,
    read_models,
    rms,
    term_values,
    without_means,
    write,
)
from truth_ladder import (
    SMALL,
    extraction_settings,
    report,
    simulated_experiments,
    true_map_file,
    vary,
)

from cctbx import uctbx

from dials.array_family import flex
from dials_diffuse.command_line import diffuse_merge, diffuse_scale
from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import BraggSettings, ExclusionRegion
from dials_diffuse.io.maps import VoxelList
from dials_diffuse.io.observations import GROUP
from dials_diffuse.merging.sums import pack
from dials_diffuse.scaling import apply, reference
from dials_diffuse.scaling import scale as scale_module
from dials_diffuse.scaling.outliers import find_outliers
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.refinement import Refiner
from dials_diffuse.simulation.comparison import Comparison, compare
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.simulate import Simulation, series_scales
from dials_diffuse.util.command import parse_arguments

OUTLIER = np.uint64(int(flex.reflection_table.flags.outlier_in_scaling))
N_SHELLS = 40
TERMS = ("scale", "decay", "absorption", "detector", "offset")


def only(*names: str) -> list[str]:
    """Options that switch the other terms off."""
    return [f"model.{name}.use=no" for name in TERMS if name not in names]


@pytest.fixture(scope="module")
def stills(tmp_path_factory) -> Geometry:
    """100 stills of random orientation."""
    return observe(STILLS, tmp_path_factory.mktemp("stills"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Geometry:
    """180° of one crystal."""
    return observe(ROTATION, tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def four_sweeps(tmp_path_factory) -> Geometry:
    """Half of the rotation of each of four crystals."""
    settings = vary(ROTATION, n_crystals=4, n_images=45)
    return observe(settings, tmp_path_factory.mktemp("sweeps"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def still_scales(geometry: Geometry) -> np.ndarray:
    """Lognormal, 35 %, for each row."""
    rng = np.random.default_rng(11)
    return np.exp(0.35 * rng.standard_normal(100))[geometry.experiment]


def sweep_scales(geometry: Geometry) -> np.ndarray:
    """Waves of 25 % with a period of 90°, and 35 % between crystals."""
    n = len(geometry.experiments)
    rng = np.random.default_rng(11)
    crystal = np.exp(0.35 * rng.standard_normal(n)) if n > 1 else np.ones(1)
    _, width = geometry.experiments[0].scan.get_oscillation()
    phase = geometry.frame * width / 90 + 0.1 * geometry.experiment
    return crystal[geometry.experiment] * np.exp(0.25 * np.sin(2 * np.pi * phase))


def absorption(geometry: Geometry) -> np.ndarray:
    """A crystal that absorbs the more the further the beam goes along a direction of it.

    ln a = 0.5 u·R⁻¹(e - e0) is odd in q = e - e0, so that it has no part with the
    symmetry of the intensities.
    """
    e = geometry.experiments[0]
    panel = e.detector[0]
    mm = geometry.columns["xyzobs.px.value"][:, :2] * panel.get_pixel_size()
    direction = (
        np.array(panel.get_origin())
        + mm[:, :1] * np.array(panel.get_fast_axis())
        + mm[:, 1:] * np.array(panel.get_slow_axis())
    )
    direction /= np.linalg.norm(direction, axis=1)[:, None]
    start, width = e.scan.get_oscillation()
    phi = np.radians(start + width * geometry.frame)
    axis = np.array(e.goniometer.get_rotation_axis())
    back = Rotation.from_rotvec(-phi[:, None] * axis)
    q = back.apply(direction - np.array(e.beam.get_unit_s0()))
    return np.exp(0.5 * q @ np.array([0.6, 0.64, -0.48]))


def sensitivity(geometry: Geometry) -> np.ndarray:
    """A wrong flat field: waves of 6 % on the detector."""
    x, y = geometry.place.T
    return np.exp(0.06 * np.sin(9 * x + 1) * np.cos(7 * y))


def ring(geometry: Geometry) -> np.ndarray:
    """Up to half of the mean intensity about 1/0.3 Å, once in the sweep."""
    wave = 0.25 * (1 + np.sin(2 * np.pi * geometry.turn))
    return wave * np.exp(-((geometry.s - 0.3) ** 2) / 0.02)


@dataclasses.dataclass
class Found:
    """What scaling made of observations."""

    observed: Observed
    rows: dict[str, np.ndarray]
    chi_square: float

    def __post_init__(self) -> None:
        self.geometry = self.observed.geometry
        self.good = (self.rows["flags"] & OUTLIER) == 0
        self.photons = self.rows["normalisation"] * (
            self.observed.factor * self.observed.intensity
        )
        limits = np.linspace(0, self.geometry.s.max(), N_SHELLS)
        self.shell = np.digitize(self.geometry.s, limits)
        frame = np.floor(self.geometry.frame).astype(int)
        image = self.geometry.experiment * (frame.max() + 1) + frame
        self.image = np.unique(image, return_inverse=True)[1]

    def error_of_term(self, name: str, truth: np.ndarray) -> tuple[float, float]:
        """Relative error of what is determined of a term, and its size.

        Means of voxels and images are removed: the latter belong to the scale.
        """
        values = term_values(read_models("scaled.expt"), self.rows, name)
        groups = [self.geometry.voxel, self.image]
        error = without_means(np.log(values / truth), self.photons, groups)
        size = without_means(np.log(truth), self.photons, groups)
        return rms(error, self.photons), rms(size, self.photons)

    def error_of_factor(self) -> np.ndarray:
        """ln of the found over the true factor, without its mean of each shell."""
        error = np.log(self.rows["inverse_scale_factor"] / self.observed.factor)
        return without_means(error, self.photons, [self.shell])

    def error_of_images(self) -> float:
        """Of the mean factor of each image, rms."""
        n = np.bincount(self.image, self.photons)
        mean = np.bincount(self.image, self.photons * self.error_of_factor()) / n
        return float(np.std(mean))

    def error_of_counting(self) -> float:
        """That of the images, if all but their scales were known."""
        return float(np.sqrt(np.mean(1 / np.bincount(self.image, self.photons))))

    def error_of_offset(self) -> tuple[float, float]:
        """Error of the offset, and its size, relative to the mean signal; rms.

        By least squares in each shell δ(s) b is removed.
        """
        o, m = self.observed, self.rows["normalisation"]
        unit = self.photons.sum() / m.sum()
        error = (self.rows["additive_offset"] - o.offset) / unit
        weight = m / (o.factor * o.intensity + o.offset)
        delta = np.bincount(self.shell, weight * o.factor * error) / np.maximum(
            np.bincount(self.shell, weight * o.factor**2), 1e-30
        )
        error -= delta[self.shell] * o.factor
        return rms(error, m), rms(o.offset / unit, m)

    def merged(self, factor: np.ndarray, offset: np.ndarray, use: np.ndarray):
        """I of each voxel, from sums of counts."""
        m, voxel = self.rows["normalisation"] * use, self.geometry.voxel
        signal = (self.observed.counts - self.observed.background) * use - m * offset
        return np.bincount(voxel, signal) / np.bincount(voxel, m * factor)

    def error_of_map(self, intensity: np.ndarray, smooth: bool = False) -> float:
        """In standard errors of the true expected counts, rms.

        A factor and an offset of each shell are fitted.

        Args:
            intensity: I of each voxel.
            smooth: Fit a smooth factor with the symmetry mmm too, a polynomial of the
                squares of the three components of q.
        """
        o, m, voxel = self.observed, self.rows["normalisation"], self.geometry.voxel
        n = np.bincount(voxel)
        truth = np.bincount(voxel, o.intensity) / n
        shell = np.rint(np.bincount(voxel, self.shell) / n).astype(int)
        counts = m * (o.factor * o.intensity + o.offset) + o.background
        sigma = np.sqrt(np.bincount(voxel, counts)) / np.bincount(voxel, m * o.factor)
        columns = (shell[:, None] == np.unique(shell)).astype(float)
        columns = np.hstack([columns * truth[:, None], columns])
        if smooth:
            index = np.zeros((len(n), 3))
            index[voxel] = np.abs(self.rows["miller_index"])
            q2 = (index / index.max(axis=0)) ** 2
            powers = [p for p in np.ndindex(5, 5, 5) if 0 < sum(p) < 5]
            terms = [truth * np.prod(q2**p, axis=1) for p in powers]
            columns = np.hstack([columns, np.stack(terms, axis=1)])
        seen = truth > 0  # all but the origin
        columns, pulls = (x[seen].T / sigma[seen] for x in (columns, intensity))
        fit = np.linalg.lstsq(columns.T, pulls, rcond=None)[0]
        return float(np.sqrt(np.mean((pulls - columns.T @ fit) ** 2)))

    def _scale(self) -> float:
        """The common factor, which the command chooses."""
        return float(
            np.average(
                self.observed.factor / self.rows["inverse_scale_factor"],
                weights=self.photons,
            )
        )

    def ratio_of_map(
        self, clean: np.ndarray | None = None, smooth: bool = False
    ) -> float:
        """Error of the map over that with the true scales.

        Args:
            clean: Rows that are no outliers.
            smooth: See ``error_of_map``.
        """
        rows, o = self.rows, self.observed
        factor = rows["inverse_scale_factor"] * self._scale()
        clean = np.ones(len(factor), dtype=bool) if clean is None else clean
        found = self.merged(factor, rows["additive_offset"], self.good)
        true = self.merged(o.factor, o.offset, clean)
        return self.error_of_map(found, smooth) / self.error_of_map(true, smooth)


def scaled(observed: Observed, *options: str, error_model: bool = False) -> Found:
    """Run the command, all but its log file and report.

    Without an error model, which would take up whatever the other terms leave.
    """
    arguments = [*observed.files, *options, "output.html=None", "output.json=None"]
    arguments.append(f"error_model.refine={error_model}")
    params, _, files = parse_arguments(diffuse_scale.make_parser(), arguments)
    result = diffuse_scale.process(params, "", files)
    chi_square = np.nan if result.after is None else result.after
    return Found(observed, read_all("scaled.refl"), chi_square)


def report_scales(rung: str, found: Found, **figures: float | str) -> None:
    report(
        f"scaling, {rung}",
        images=f"{found.error_of_images():.3%} (counting {found.error_of_counting():.3%})",
        chi2=f"{found.chi_square:.4f}",
        map_ratio=f"{found.ratio_of_map():.4f}",
        but_for_smooth_factors=f"{found.ratio_of_map(smooth=True):.4f}",
        **figures,
    )


def assert_scaled(found: Found) -> None:
    assert 0.97 < found.chi_square < 1.03
    assert found.error_of_images() < 0.003
    assert found.ratio_of_map() < 1.05


def test_scales_of_stills(stills, tmp_path):
    """2.5 photons per pixel, 230 000 per still; terms without use are switched off."""
    found = scaled(draw(stills, tmp_path, still_scales(stills)))
    report_scales("100 stills", found)
    assert_scaled(found)


@pytest.mark.slow
def test_scales_of_stills_with_an_offset_of_each(stills, tmp_path):
    """The offset leaves only the anisotropic part, 40 % of the intensity, to tell scales.

    By counting alone their error is then 0.6 %. The map suffers less: what offsets and
    scales have in common is nearly the same in all voxels of a shell.
    """
    found = scaled(draw(stills, tmp_path, still_scales(stills)), "model.offset.use=yes")
    report_scales("100 stills, offsets refined", found)
    assert 0.97 < found.chi_square < 1.03
    assert found.error_of_images() < 0.006
    assert found.ratio_of_map() < 1.05


def test_scales_of_a_sweep(sweep, tmp_path):
    found = scaled(draw(sweep, tmp_path, sweep_scales(sweep)), *only("scale"))
    report_scales("sweep", found)
    assert_scaled(found)


@pytest.mark.slow
def test_scales_of_a_sweep_with_all_factors_refined(sweep, tmp_path):
    options = [f"model.{name}.use=yes" for name in TERMS[1:-1]]
    observed = draw(sweep, tmp_path, sweep_scales(sweep))
    found = scaled(observed, *options, "model.offset.use=no")
    report_scales("sweep, all factors refined", found)
    assert_scaled(found)


@pytest.mark.slow
def test_scales_of_four_crystals(four_sweeps, tmp_path):
    found = scaled(
        draw(four_sweeps, tmp_path, sweep_scales(four_sweeps)), *only("scale")
    )
    report_scales("four crystals", found)
    assert_scaled(found)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [2.5, 25])
def test_absorption(sweep, tmp_path, counts):
    """25 photons per pixel stand for a detector with more pixels.

    With so many, smooth factors that no observation determines are all that is left.
    """
    truth = absorption(sweep)
    factor = truth * sweep_scales(sweep)
    observed = draw(sweep, tmp_path, factor, counts_per_pixel=counts)
    found = scaled(observed, *only("scale", "absorption"))
    error, size = found.error_of_term("absorption", truth)
    rung = f"absorption, {counts} counts per pixel"
    report_scales(rung, found, error=f"{error:.3%} of {size:.1%}")
    assert 0.97 < found.chi_square < 1.03
    assert error < 0.01 < 0.05 < size
    assert found.ratio_of_map(smooth=counts > 10) < 1.05
    # Without the term it is in the scaled data.
    found = scaled(observed, *only("scale"))
    assert found.chi_square > (2 if counts > 10 else 1.5)


def test_sensitivity_of_the_detector(sweep, tmp_path):
    truth = sensitivity(sweep)
    observed = draw(sweep, tmp_path, truth * sweep_scales(sweep))
    found = scaled(observed, *only("scale", "detector"))
    error, size = found.error_of_term("detector", truth)
    report_scales("detector", found, error=f"{error:.3%} of {size:.1%}")
    assert error < 0.005 < 0.01 < size
    assert_scaled(found)


@pytest.mark.slow
def test_offset(sweep, tmp_path):
    scales = sweep_scales(sweep)
    observed = draw(sweep, tmp_path, scales, offset=ring(sweep), background=0.3)
    found = scaled(observed, *only("scale", "offset"))
    error, size = found.error_of_offset()
    report_scales("offset", found, error=f"{error:.3%} of {size:.1%}")
    assert error < 0.02 < 0.15 < size
    assert 0.97 < found.chi_square < 1.03
    assert found.ratio_of_map() < 1.05


@pytest.mark.slow
def test_everything_at_once(sweep, tmp_path):
    """The whole factor is found, though its terms take over from each other."""
    a = absorption(sweep) * sensitivity(sweep)
    scales = sweep_scales(sweep)
    observed = draw(sweep, tmp_path, a * scales, offset=a * ring(sweep), background=0.3)
    found = scaled(observed)
    voxel = without_means(found.error_of_factor(), found.photons, [sweep.voxel])
    error = rms(voxel, found.photons)
    offset, size = found.error_of_offset()
    report_scales(
        "all terms", found, factor=f"{error:.3%}", offset=f"{offset:.3%} of {size:.1%}"
    )
    assert error < 0.01
    assert offset < 0.02
    assert 0.97 < found.chi_square < 1.03
    assert found.ratio_of_map() < 1.05


def inject_outliers(observed: Observed) -> tuple[Observed, np.ndarray]:
    """Make one in 100 rows deviate by 5 σ, up or down; returns the sign for each row."""
    g, o = observed.geometry, observed
    rng = np.random.default_rng(17)
    sign = np.where(rng.random(g.n_rows) < 0.01, rng.choice([-1, 1], g.n_rows), 0)
    expected = g.columns["normalisation"] * (o.factor * o.intensity + o.offset)
    # Below 40 photons a row cannot be 5 σ too low, and others hardly say what it is.
    sign[expected < 40] = 0
    counts = np.where(
        sign == 0, o.counts, np.rint(expected + 5 * sign * np.sqrt(expected))
    )
    return dataclasses.replace(observed, counts=counts), sign


def rewrite(observed: Observed, folder: Path) -> Observed:
    columns = {**observed.geometry.columns, "counts": observed.counts}
    files = write(observed.geometry, columns, folder, "outliers")
    return dataclasses.replace(observed, files=files)


def test_outliers(sweep, tmp_path):
    observed, sign = inject_outliers(draw(sweep, tmp_path, sweep_scales(sweep)))
    found = scaled(rewrite(observed, tmp_path), *only("scale"), error_model=True)
    high, low = (np.mean(~found.good[sign == value]) for value in (1, -1))
    lost = np.mean(~found.good[sign == 0])
    ratio = found.ratio_of_map(sign == 0)
    report(
        "scaling, outliers",
        high=f"{high:.2%}",
        low=f"{low:.2%}",
        lost=f"{lost:.4%}",
        chi2=found.chi_square,
        map_ratio=ratio,
    )
    assert np.count_nonzero(sign == 1) > 400 and np.count_nonzero(sign == -1) > 400
    assert high > 0.95 and low > 0.95
    assert lost < 0.001
    assert 0.97 < found.chi_square < 1.03
    assert ratio < 1.05


def change_of_intensity(found: Found) -> float:
    """Relative change of all intensity by the rejection of outliers."""
    m = found.rows["normalisation"] * found.rows["inverse_scale_factor"]
    n = found.observed.counts
    good = found.good
    return float(n[good].sum() / m[good].sum() * m.sum() / n.sum() - 1)


def one_sided(counts, response, base, variance, start, **options):
    """Rejects high observations alone."""
    outlier = find_outliers(counts, response, base, variance, start, **options)
    group = np.repeat(np.arange(len(start) - 1), np.diff(start))
    mean = np.bincount(group, counts - base) / np.bincount(group, response)
    return outlier & (counts > base + response * mean[group])


def test_one_sided_rejection_biases(sweep, tmp_path, monkeypatch):
    """Negative control, with a low threshold to make it plain."""
    options = [*only("scale"), "outliers.threshold=2"]
    observed = draw(sweep, tmp_path, sweep_scales(sweep))
    both = change_of_intensity(scaled(observed, *options))
    for module in (apply, scale_module):
        monkeypatch.setattr(module, "find_outliers", one_sided)
    biased = change_of_intensity(scaled(observed, *options))
    report("scaling, rejection", of_both_tails=f"{both:.4%}", one_sided=f"{biased:.4%}")
    assert abs(both) < 5e-4
    assert biased < -2e-3


def slope_of_scales(found: Found) -> tuple[float, float]:
    """Of ln(found/true) of the stills by ln(true), and its standard error by counting."""
    g, o = found.geometry, found.observed
    n = np.bincount(g.experiment, found.photons)
    true = np.log(np.bincount(g.experiment, o.factor) / np.bincount(g.experiment))
    error = np.log(found.rows["inverse_scale_factor"] / o.factor)
    error = np.bincount(g.experiment, error) / np.bincount(g.experiment)
    dx = true - np.average(true, weights=n)
    norm = np.sum(n * dx**2)
    return float(np.sum(n * dx * error) / norm), float(1 / np.sqrt(norm))


def test_weights_from_the_counts_themselves_bias(stills, tmp_path, monkeypatch):
    """Negative control: weak images would be found weaker than they are."""
    observed = draw(stills, tmp_path, still_scales(stills), counts_per_pixel=0.1)
    options = [*only("scale"), "outliers.reject=False"]
    slope, sigma = slope_of_scales(scaled(observed, *options))

    def variances(self: Refiner, a: float = 1.0, b: float = 0.0) -> np.ndarray:
        return np.maximum(self.block.counts, 1.0)

    monkeypatch.setattr(Refiner, "variances", variances)
    biased, _ = slope_of_scales(scaled(observed, *options))
    report(
        "scaling, weights",
        expected=f"{slope:+.4f}±{sigma:.4f}",
        counts=f"{biased:+.4f}",
    )
    assert abs(slope) < 4 * sigma
    assert abs(biased) > 10 * sigma


def test_without_scaling(stills, tmp_path):
    """Negative control."""
    observed = draw(stills, tmp_path, still_scales(stills))
    found = scaled(observed, *only())
    assert found.error_of_images() > 0.2
    assert found.chi_square > 1.5
    assert found.ratio_of_map() > 1.5


def part_of(observed: Observed, first: int, stop: int, name: str) -> tuple[str, str]:
    """Write some of the experiments; returns the names of the files."""
    g = observed.geometry
    mine = (g.experiment >= first) & (g.experiment < stop)
    columns = {
        **g.columns,
        "counts": observed.counts,
        "background.sum.value": observed.background,
    }
    columns = {key: values[mine] for key, values in columns.items()}
    columns["id"] = columns["id"] - first
    own = dataclasses.replace(g, experiments=g.experiments[first:stop])
    return write(own, columns, Path("."), name)


def error_to_reference(
    stills: Geometry, seed: int, background: float, scale_of_map: float = 1.0
) -> float:
    """Mean of ln(found/true) of the scales of 50 stills, to a map of 20 others."""
    scales = np.exp(0.35 * np.random.default_rng(11).standard_normal(100))
    scales[:50] = scale_of_map
    factor = scales[stills.experiment]
    observed = draw(stills, Path("."), factor, background=background, seed=seed)
    old = part_of(observed, 0, 20, "old")
    diffuse_merge.run([*old, "scale_experiments=False", "output.plot=None"])
    options = ["reference=merged.h5", "output.html=None", "output.json=None"]
    arguments = [*part_of(observed, 50, 100, "new"), *options, *only("scale")]
    params, _, files = parse_arguments(diffuse_scale.make_parser(), arguments)
    found = diffuse_scale.process(params, "", files).experiment_scales()
    return float(np.mean(np.log(found / scales[50:])))


@pytest.mark.slow
@pytest.mark.parametrize("background", [0.0, 10.0])
def test_scales_to_a_noisy_reference(stills, background):
    """They are unbiased, though a voxel of the map has but a few standard errors.

    The statistical error of the mean of two draws is 0.03 %, with background 0.08 %.
    """
    mean = np.mean([error_to_reference(stills, seed, background) for seed in (1, 2)])
    report(f"scaling, reference, background {background:g}", mean=f"{mean:+.3%}")
    assert abs(mean) < 0.002


@pytest.mark.slow
def test_reference_taken_as_exact_biases(stills, monkeypatch):
    """Negative control: its best voxels, without errors; and a map of another scale."""
    right = reference.reference_from_sums

    def exact(voxels: VoxelList) -> Reference:
        found = right(voxels)
        best = voxels["intensity"] >= 3 * voxels["sigma"]
        best = np.isin(found.voxel, pack(voxels["index"][best]))
        zero = np.zeros(best.sum())
        chosen = found.voxel[best], found.intensity[best]
        return Reference(*chosen, zero + 1e12, zero, zero)

    other = error_to_reference(stills, 1, 10.0, scale_of_map=1.1)
    monkeypatch.setattr(reference, "reference_from_sums", exact)
    biased = error_to_reference(stills, 1, 10.0)
    report("scaling, wrong reference", exact=f"{biased:+.3%}", scale=f"{other:+.3%}")
    assert biased < -0.008
    assert other == pytest.approx(-np.log(1.1), abs=0.003)


IMAGES = vary(
    SMALL,
    beam={"flux": 1e9},
    crystal={"unit_cell": uctbx.unit_cell((15, 18, 21, 90, 90, 90))},
    grid={"ndiv": (3, 3, 3)},
    scale={"variation": 0.35},
)
SIMULATED = {
    "stills": (vary(IMAGES, mode="stills", n_images=100), ["model.offset.use=no"]),
    "rotation": (
        vary(IMAGES, n_images=120, scale={"absorption": 0.4}),
        ["model.offset.use=no", "model.detector.use=no", "model.decay.use=no"],
    ),
}


def merged_and_compared(truth: Path) -> Comparison:
    """The map of scaled.expt and scaled.refl against the truth, up to a factor."""
    diffuse_merge.run(["scaled.expt", "scaled.refl", "output.plot=None"])
    return compare("merged.h5", truth, scale="fit")


def replace_factors(factor: np.ndarray) -> None:
    """Put other factors into scaled.refl."""
    with h5py.File("scaled.refl", "r+") as handle:
        handle[GROUP]["inverse_scale_factor"][...] = factor


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_images(tmp_path, name):
    """Images of unequal scales through extraction, scaling and merging."""
    settings, options = SIMULATED[name]
    simulation = Simulation(settings)
    experiments = simulated_experiments(simulation, noise=True)
    own = extraction_settings(simulation, BraggSettings(exclusion="none"))
    extract(experiments, make_grid(experiments, own), own, "extracted.refl")
    series = simulation.series[0]
    series.experiments.as_file("extracted.expt")
    truth = true_map_file(simulation, tmp_path)
    files = ["extracted.expt", "extracted.refl"]
    diffuse_scale.run([*files, *options, "output.html=None", "output.json=None"])
    rows = read_all("scaled.refl")
    factor = rows["inverse_scale_factor"].copy()
    found = merged_and_compared(truth)
    frame = np.floor(rows["xyzobs.px.value"][:, 2]).astype(int)
    image = rows["id"] if series.is_stills else frame
    scales = series_scales(settings, series.number)[image]
    replace_factors(scales)
    true = merged_and_compared(truth)
    replace_factors(np.ones(len(factor)))
    unscaled = merged_and_compared(truth)
    n = np.bincount(image, rows["counts"])
    change = np.log(factor / scales)
    mean = np.bincount(image, rows["counts"] * change) / n
    error = np.sqrt(np.average((mean - np.average(mean, weights=n)) ** 2, weights=n))
    counting = np.sqrt(np.mean(1 / n))
    report(
        f"scaling, simulated images, {name}",
        images=f"{error:.3%} (counting {counting:.3%})",
        chi2=f"{found.overall.chi2:.3f} (true scales {true.overall.chi2:.3f}, none "
        f"{unscaled.overall.chi2:.1f})",
        cc_aniso=f"{found.overall.cc_anisotropic:.4f} "
        f"({true.overall.cc_anisotropic:.4f})",
    )
    assert unscaled.overall.chi2 > 2 * true.overall.chi2
    if settings.scale.absorption == 0:
        assert error < 1.2 * counting
        assert np.sqrt(found.overall.chi2 / true.overall.chi2) < 1.05
    else:  # the true scales are without absorption, but the model is not
        assert found.overall.chi2 < true.overall.chi2


SHORT = vary(
    SimulationSettings(), n_images=40, beam={"flux": 1e12}, scan={"width": 1.0}
)


@pytest.mark.slow
def test_short_sweep_without_faults(tmp_path, monkeypatch):
    """40° of images that need no scaling, with tails of Bragg peaks beyond the exclusion.

    Surfaces would describe these a little, and bend the map.
    """
    simulation = Simulation(SHORT)
    experiments = simulated_experiments(simulation, noise=True)
    own = extraction_settings(simulation, BraggSettings())
    grid = make_grid(experiments, own)
    extract(experiments, grid, own, "extracted.refl")
    simulation.series[0].experiments.as_file("extracted.expt")
    truth = true_map_file(simulation, tmp_path)
    region = ExclusionRegion(BraggSettings().metric(grid.cell, grid.rotations))
    files = ["extracted.expt", "extracted.refl"]

    def chi_square(*options: str) -> float:
        diffuse_scale.run([*files, *options, "output.html=None", "output.json=None"])
        diffuse_merge.run(["scaled.expt", "scaled.refl", "output.plot=None"])
        return compare("merged.h5", truth, exclusion=[region]).overall.chi2

    default, none = chi_square(), chi_square(*only())
    monkeypatch.setattr(scale_module, "VISIBLE", 0.0)
    bent = chi_square()
    report(
        "scaling, short sweep without faults",
        chi2=f"{default:.2f} (without scaling {none:.2f}, surfaces kept {bent:.2f})",
    )
    assert default < 1.2 * none
    assert bent > 2 * none
