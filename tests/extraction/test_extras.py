"""What extraction does with an image besides counting, against numpy pixel by pixel.

The orientation, the directions of the pixels and their normalisation are those of the
package, which other tests check; which pixels are used and what is taken off them is
calculated here. Pixels nearer to a limit than single precision tells are masked.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import pytest
from simulate_images import (
    import_images,
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
    memory_experiment,
    pixels_in_boxes,
    random_images,
    write_images,
)
from truth_ladder import (
    SMALL,
    extraction_settings,
    report,
    simulated_experiments,
    true_map_file,
    vary,
)

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.background.model import (
    BackgroundAxes,
    BackgroundModel,
    ImageBackground,
    grid_at,
    n_nodes,
    profile_at,
)
from dials_diffuse.bragg.ellipsoid import (
    FitSettings,
    default_ellipsoid,
    sample_of_images,
)
from dials_diffuse.bragg.shoeboxes import (
    Boxes,
    Shoeboxes,
    SpotSize,
    predicted_boxes,
)
from dials_diffuse.extraction.blocks import exposure_times, images_of
from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.prepare import prepare
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import (
    BraggSettings,
    CorrectionSettings,
    ExclusionRegion,
    ExtractionSettings,
    symmetric,
)
from dials_diffuse.extraction.tables import good_pixels, panel_arrays
from dials_diffuse.geometry.orientation import frame_model, inverse
from dials_diffuse.grid import Grid
from dials_diffuse.io.background import BackgroundFile, BackgroundWriter, check_images
from dials_diffuse.io.maps import MapWriter
from dials_diffuse.io.masks import DetectorMask, masks_of_experiments, write_masks
from dials_diffuse.io.observations import COLUMNS, ObservationFile
from dials_diffuse.merging.merge import MergingSettings, merge
from dials_diffuse.simulation.comparison import compare
from dials_diffuse.simulation.simulate import Simulation

SIZE = (36, 30)
MARGIN = 1e-3  # voxels: nearer to a limit, single precision decides
GRID = Grid(make_crystal("P 1").get_unit_cell().parameters(), (2, 3, 2), "P 1", 0.6)
KEEP_ALL = BraggSettings(exclusion="none")
ELLIPSOIDS = BraggSettings(semi_axes=(0.2, 0.25, 0.22))
SETTINGS = ExtractionSettings(
    ndiv=GRID.ndiv,
    bragg=KEEP_ALL,
    phi_sampling="middle",
    corrections=CorrectionSettings(path="helium"),
    trusted_range=(-1e9, 1e9),
)

Used = Callable[[int, int, int, np.ndarray], np.ndarray]


@dataclasses.dataclass
class PanelPixels:
    """What the calculation here needs of a panel: e (3, n_slow, n_fast), M (sr)."""

    e: np.ndarray
    normalisation: np.ndarray


def pixels_of(e: Experiment, settings: ExtractionSettings) -> list[PanelPixels]:
    result = []
    for number, panel in enumerate(e.detector):
        good = good_pixels(panel, number, e.imageset, None)
        arrays = panel_arrays(panel, e.beam, good, settings.corrections)
        weight = arrays.weight * arrays.weight_unit
        result.append(PanelPixels(arrays.e.astype(float), weight))
    return result


def hkl_of(e: Experiment, array_index: int, pixels: PanelPixels) -> np.ndarray:
    """Fractional Miller indices, shape (3, n_slow, n_fast)."""
    model = frame_model(e, array_index)
    rlp = pixels.e * np.linalg.norm(model.s0) - model.s0[:, None, None]
    return np.tensordot(inverse(model.setting), rlp, axes=1)


def from_lattice(hkl: np.ndarray, metric: Sequence[float]) -> np.ndarray:
    """g(dh, dh) of the nearest lattice points."""
    dh = hkl - np.floor(hkl + 0.5)
    return np.einsum("i...,ij,j...->...", dh, symmetric(metric), dh)


def sure_pixels(
    experiments: Sequence[Experiment], metric: Sequence[float] | None = None
) -> tuple[np.ndarray, ...]:
    """Pixels that no image of any experiment has near a limit; of one detector."""
    masks = [np.ones(p.get_image_size()[::-1], bool) for p in experiments[0].detector]
    for e in experiments:
        for mask, panel in zip(masks, pixels_of(e, SETTINGS)):
            for i in images_of(e):
                hkl = hkl_of(e, i, panel)
                edge = hkl * np.array(GRID.ndiv)[:, None, None] + 0.5
                mask &= np.all(np.abs(edge - np.rint(edge)) > MARGIN, axis=0)
                if metric is not None:
                    mask &= np.abs(from_lattice(hkl, metric) - 1) > 10 * MARGIN
    assert all(mask.mean() > 0.9 for mask in masks)
    return tuple(masks)


def recount(
    e: Experiment,
    number: int,
    settings: ExtractionSettings,
    used: Used = lambda i, panel, number, hkl: np.ones(hkl.shape[1:], bool),
    background: BackgroundModel | None = None,
) -> dict[tuple, np.ndarray]:
    """n, M and B of each voxel, experiment and panel; all images are one block.

    Args:
        used: Pixels that are used: of array index, panel, experiment and hkl.
    """
    result: dict[tuple, np.ndarray] = {}
    mask = settings.mask_of(e)
    for panel, pixels in enumerate(pixels_of(e, settings)):
        for i, time in zip(images_of(e), exposure_times(e)):
            hkl = hkl_of(e, i, pixels)
            chosen = used(i, panel, number, hkl) & (pixels.normalisation > 0)
            if mask is not None:
                chosen &= mask[panel]
            m = pixels.normalisation * (time if settings.corrections.exposure else 1)
            columns = [np.ones(m.shape), m, np.zeros(m.shape), np.zeros(m.shape)]
            if background is not None:
                terms = background.of_image(e.identifier, i)
                s0 = np.array(e.beam.get_s0())
                k = np.linalg.norm(s0)
                s = np.linalg.norm(pixels.e * k - s0[:, None, None], axis=0)
                columns[2], _ = background.evaluate(terms, panel, s, m)
                if terms.base_index is not None:
                    base = background.base_variances[terms.base_index][panel]
                    columns[3] = terms.rate_scale**2 * base
                chosen &= np.isfinite(columns[2])
            index = np.floor(hkl * np.array(GRID.ndiv)[:, None, None] + 0.5)
            voxels, place = np.unique(
                index[:, chosen].astype(int).T, axis=0, return_inverse=True
            )
            sums = [np.bincount(place.ravel(), c[chosen]) for c in columns]
            for voxel, row in zip(voxels.tolist(), np.transpose(sums)):
                key = (*voxel, number, panel)
                result[key] = result.get(key, 0) + row
    return result


def run(
    experiments: Sequence[Experiment], settings: ExtractionSettings, folder: Path
) -> dict[str, np.ndarray]:
    """The extracted table."""
    path = folder / "out.refl"
    extract(ExperimentList(experiments), GRID, settings, path)
    with ObservationFile(path) as f:
        return f.read(0, f.n_rows, list(COLUMNS))


def by_voxel(table: dict[str, np.ndarray], *names: str) -> dict[tuple, np.ndarray]:
    """Columns of each voxel, experiment and panel: one row each."""
    keys = np.column_stack([table["miller_index"], table["id"], table["panel"]])
    result = dict(zip(map(tuple, keys.tolist()), zip(*(table[n] for n in names))))
    assert len(result) == len(keys)
    return result


def assert_same_pixels(table, *expected: dict[tuple, np.ndarray]) -> None:
    """The table has the pixels of the recounts, and no others."""
    found = by_voxel(table, "num_pixels.valid")
    wanted = {key: row[0] for part in expected for key, row in part.items()}
    assert found.keys() == wanted.keys()
    assert all(found[key][0] == n for key, n in wanted.items())


def sweep(n_images: int = 3, panels: int = 1, **changes) -> Experiment:
    detector = make_detector(panels, SIZE, 12.0, 13.0, parallax=True)
    models = {
        "scan": make_scan(n_images, 0.8, first=4, exposure=1.7),
        "goniometer": make_goniometer("multi"),
        "crystal": make_crystal("P 1"),
        "identifier": "sweep",
        **changes,
    }
    return memory_experiment(
        random_images(n_images, detector, mean=9.0), detector, **models
    )


def still(seed: int = 8, panels: int = 1, identifier: str = "still") -> Experiment:
    detector = make_detector(panels, SIZE, 12.0, 13.0, parallax=True)
    images = random_images(1, detector, seed)
    crystal = make_crystal("P 1", seed)
    return memory_experiment(images, detector, crystal, identifier=identifier)


# Background

KINDS = {"images": ("base",), "radial": ("profile",), "modal": ("profile", "grids")}


def random_background(
    experiments: Sequence[Experiment], kinds: Sequence[str], seed: int = 3
) -> BackgroundModel:
    """Terms that differ from image to image; two bases, one with unmeasured pixels."""
    rng = np.random.default_rng(seed)
    shapes = [p.get_image_size()[::-1] for p in experiments[0].detector]
    axes = BackgroundAxes(0.0, 0.02, 8)
    nodes = [tuple(n_nodes(n, 8) for n in shape) for shape in shapes]
    bases = [tuple(rng.random(x).astype(np.float32) for x in shapes) for _ in "12"]
    for panel in bases[1]:
        panel[rng.random(panel.shape) < 0.05] = np.nan

    number_of = {e.identifier: n for n, e in enumerate(experiments)}

    def terms(number: int, identifier: str) -> ImageBackground:
        profile = 3e6 * (rng.random(60) - 0.2) if "profile" in kinds else None
        grids = [3e6 * (rng.random(n) - 0.5) for n in nodes]
        grids = tuple(g.astype(np.float32) for g in grids) if "grids" in kinds else None
        return ImageBackground(
            base_index=number_of[identifier] % 2 if "base" in kinds else None,
            rate_scale=0.3 + number if "base" in kinds else 0.0,
            profile=profile,
            profile_variance=None if profile is None else 1e10 * rng.random(60),
            grids=grids,
            grid_variances=None
            if grids is None
            else tuple(1e3 * abs(g) for g in grids),
        )

    images = [(e.identifier, i) for e in experiments for i in images_of(e)]
    return BackgroundModel(
        method={v: k for k, v in KINDS.items()}.get(tuple(kinds), "modal"),
        corrections=SETTINGS.corrections,
        axes=axes,
        images={image: terms(n, image[0]) for n, image in enumerate(images)},
        bases=bases if "base" in kinds else (),
        base_variances=[tuple(0.1 * b for b in base) for base in bases]
        if "base" in kinds
        else (),
    )


def write(model: BackgroundModel, path: Path) -> str:
    with BackgroundWriter(path, model.method, model.corrections, model.axes) as writer:
        for rates, variances in zip(model.bases, model.base_variances):
            writer.add_base(rates, variances, None, 1)
        for key, terms in model.images.items():
            writer.add_image(*key, terms)
    return str(path)


@pytest.mark.parametrize("panels", [1, 2])
@pytest.mark.parametrize("method", [*KINDS, "all"])
def test_background_of_each_voxel_is_the_sum_over_its_pixels(tmp_path, method, panels):
    experiments = [sweep(panels=panels), still(panels=panels)]
    kinds = KINDS.get(method, ("base", "profile", "grids"))
    model = random_background(experiments, kinds)
    settings = dataclasses.replace(
        SETTINGS,
        block_width=10.0,
        gain=2.5,  # a background in photons has none
        mask=sure_pixels(experiments),
        background=write(model, tmp_path / "background.h5"),
    )
    table = run(experiments, settings, tmp_path)
    expected = {}
    for number, e in enumerate(experiments):
        expected |= recount(e, number, settings, background=model)
    assert_same_pixels(table, expected)
    names = ("normalisation", "background.sum.value")
    found = np.array([*by_voxel(table, *names).values()])
    wanted = np.array([expected[key] for key in by_voxel(table, *names)])
    np.testing.assert_allclose(found[:, 0], wanted[:, 1], rtol=1e-5)
    scale = np.abs(wanted[:, 2]).mean()
    np.testing.assert_allclose(found[:, 1], wanted[:, 2], rtol=1e-4, atol=1e-4 * scale)
    assert np.std(found[:, 1]) > 0.1 * scale
    without = run(experiments, dataclasses.replace(settings, background=None), tmp_path)
    assert not without["background.sum.value"].any()
    if "base" not in kinds:  # whose unmeasured pixels are left out
        np.testing.assert_array_equal(table["counts"], without["counts"])


def images_in_voxel(e: Experiment, index: np.ndarray) -> np.ndarray:
    """One over the way of a pixel in an image, in voxels, by models of its neighbours."""
    first, last = images_of(e)[0], images_of(e)[-1]
    if first == last:
        return np.ones(len(index))
    ends = [inverse(frame_model(e, i).setting) for i in (first, last)]
    middle = frame_model(e, (first + last) // 2).setting
    rlp = (index / np.array(GRID.ndiv)) @ middle.T
    way = (rlp @ (ends[1] - ends[0]).T) * np.array(GRID.ndiv) / (last - first)
    speed = np.linalg.norm(way, axis=1)
    return np.clip(1 / np.maximum(speed, 1e-9), 1, last - first + 1)


@pytest.mark.parametrize("method", [*KINDS, "all"])
def test_variance_of_the_background(tmp_path, method):
    """K Σ Var of a base, the mean standard deviation of profiles and grids times M."""
    experiments = [sweep(n_images=3), still()]
    kinds = KINDS.get(method, ("base", "profile", "grids"))
    model = random_background(experiments, kinds)
    settings = dataclasses.replace(
        SETTINGS,
        block_width=10.0,
        mask=sure_pixels(experiments),
        background=write(model, tmp_path / "background.h5"),
    )
    table = run(experiments, settings, tmp_path)
    found = table["background.sum.variance"]
    x, y, _ = table["xyzobs.px.value"].T
    expected = np.zeros(len(found))
    for number, e in enumerate(experiments):
        own = table["id"] == number
        sums = recount(e, number, settings, background=model)
        part = {k: v[own] for k, v in table.items()}
        base = np.array([sums[key][3] for key in by_voxel(part, "id")])
        images = [model.of_image(e.identifier, i) for i in images_of(e)]
        sigma = np.zeros(own.sum())
        for terms in images:
            variance = np.zeros(own.sum())
            if terms.profile is not None:
                values = terms.profile, terms.profile_variance, model.axes
                variance += profile_at(GRID.s(table["miller_index"][own]), *values)[1]
            if terms.grids is not None:
                values = terms.grids[0], terms.grid_variances[0], 8
                variance += grid_at(x[own], y[own], *values)[1]
            sigma += np.sqrt(variance) / len(images)
        k = images_in_voxel(e, table["miller_index"][own])
        expected[own] = k * base + (sigma * table["normalisation"][own]) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert np.all(found > 0)


def test_a_background_that_was_made_again_is_read_again(tmp_path):
    """In one process, under the same name."""
    experiments = [still()]
    path = tmp_path / "background.h5"
    sums = []
    for seed in (3, 4):
        model = random_background(experiments, ("base", "profile"), seed)
        path.unlink(missing_ok=True)
        settings = dataclasses.replace(SETTINGS, background=write(model, path))
        table = run(experiments, settings, tmp_path)
        wanted = recount(experiments[0], 0, settings, background=model)
        sums.append(table["background.sum.value"].sum())
        assert sums[-1] == pytest.approx(sum(v[2] for v in wanted.values()), rel=1e-3)
    assert sums[0] != pytest.approx(sums[1], rel=0.01)


def test_background_in_several_processes(tmp_path):
    """Each opens the file for itself."""
    experiments = [sweep(n_images=6, panels=2)]
    model = random_background(experiments, ("base", "profile", "grids"))
    background = write(model, tmp_path / "background.h5")
    tables = []
    for nproc in (1, 2):
        settings = dataclasses.replace(SETTINGS, background=background, nproc=nproc)
        tables.append(run(experiments, settings, tmp_path))
    for name in ("miller_index", "background.sum.value", "background.sum.variance"):
        np.testing.assert_array_equal(tables[0][name], tables[1][name])


def one_line(error: pytest.ExceptionInfo) -> None:
    assert len(str(error.value).splitlines()) == 1


def test_background_of_other_experiments(tmp_path):
    model = random_background([sweep()], ("profile",))
    with BackgroundFile(write(model, tmp_path / "background.h5")) as handle:
        with pytest.raises(ValueError, match="lacks|has no background for 1 im") as e:
            check_images(handle, ExperimentList([sweep(), still()]))
        one_line(e)
        longer = ExperimentList([sweep(n_images=5)])
        with pytest.raises(ValueError, match="for 2 images, .* image 7 of exp") as e:
            check_images(handle, longer)
        one_line(e)
        check_images(handle, ExperimentList([sweep()]))
    settings = dataclasses.replace(SETTINGS, background=handle.path)
    with pytest.raises(ValueError, match="no image 1 of experiment still") as e:
        run([still()], settings, tmp_path)
    one_line(e)


@pytest.mark.parametrize("method", KINDS)
def test_background_of_other_corrections(tmp_path, method):
    """What was measured without the crystal does not depend on them."""
    model = random_background([still()], KINDS[method])
    with BackgroundFile(write(model, tmp_path / "background.h5")) as handle:
        handle.check_corrections(SETTINGS.corrections)
        other = dataclasses.replace(SETTINGS.corrections, polarization=False)
        if method == "images":
            handle.check_corrections(other)
            return
        with pytest.raises(ValueError, match="polarization=True, not False") as e:
            handle.check_corrections(other)
        one_line(e)


# Lattices that share images


def two_lattices(one: Experiment, seed: int = 9) -> list[Experiment]:
    """The same images with another crystal."""
    models = {"crystal": make_crystal("P 1", seed), "identifier": "other"}
    names = ("beam", "detector", "goniometer", "scan", "imageset")
    other = Experiment(**{name: getattr(one, name) for name in names}, **models)
    return [one, other]


def far_from_all(experiments, metric) -> Used:
    """Pixels that are near no point of any lattice in the image."""
    pixels = [pixels_of(e, SETTINGS) for e in experiments]

    def used(i, panel, number, hkl):
        return np.all(
            [
                from_lattice(hkl_of(e, i, p[panel]), metric) >= 1
                for e, p in zip(experiments, pixels)
                if i in images_of(e)
            ],
            axis=0,
        )

    return used


def slow_sweep(n_images: int = 3) -> Experiment:
    """Images so narrow that their width does not widen the ellipsoids."""
    return sweep(n_images, panels=2, scan=make_scan(n_images, 1e-4, first=4))


@pytest.mark.parametrize("make", [lambda: still(panels=2), slow_sweep])
def test_peaks_of_other_lattices_are_in_no_table(tmp_path, make):
    experiments = two_lattices(make())
    cell = experiments[0].crystal.get_unit_cell()
    metric = ELLIPSOIDS.metric(cell, GRID.rotations)
    settings = dataclasses.replace(
        SETTINGS,
        bragg=ELLIPSOIDS,
        block_width=10.0,
        mask=sure_pixels(experiments, metric),
    )
    used = far_from_all(experiments, metric)
    table = run(experiments, settings, tmp_path)
    parts = [recount(e, n, settings, used) for n, e in enumerate(experiments)]
    assert_same_pixels(table, *parts)
    alone = run(experiments[:1], settings, tmp_path)
    own = far_from_all(experiments[:1], metric)
    assert_same_pixels(alone, recount(experiments[0], 0, settings, own))
    both = table["num_pixels.valid"][table["id"] == 0].sum()
    assert 0.5 < both / alone["num_pixels.valid"].sum() < 0.98
    # what no other lattice touches is as it was
    found, before = (
        by_voxel(t, "num_pixels.valid", "counts", "normalisation")
        for t in (table, alone)
    )
    same = [key for key in before if found.get(key, [0])[0] == before[key][0]]
    assert len(same) > 100
    assert all(found[key] == before[key] for key in same)


def test_image_sets_of_the_same_files_share_their_peaks(tmp_path):
    rng = np.random.default_rng(7)
    images = [rng.poisson(9.0, (50, 60)).astype(np.int32) for _ in "12"]
    paths = write_images(tmp_path, images)
    own = list(import_images(paths, lambda i: make_crystal("P 1", 3 + i)))
    same_set = [two_lattices(e, 5 + i)[1] for i, e in enumerate(own)]
    own_sets = [
        import_images([path], lambda _, i=i: make_crystal("P 1", 5 + i))[0]
        for i, path in enumerate(paths)
    ]
    assert len(own[0].imageset) == 2 and len(own_sets[0].imageset) == 1
    settings = dataclasses.replace(SETTINGS, bragg=ELLIPSOIDS)
    tables = []
    for others in (same_set, own_sets):
        for e, name in zip(others, "ab"):
            e.identifier = name
        tables.append(run([*own, *others], settings, tmp_path))
    for name in ("miller_index", "id", "counts", "num_pixels.valid"):
        np.testing.assert_array_equal(tables[0][name], tables[1][name])
    apart = run(own, settings, tmp_path)["num_pixels.valid"].sum()
    assert tables[0]["num_pixels.valid"][tables[0]["id"] < 2].sum() < 0.98 * apart


def test_a_lattice_that_is_known_in_some_images(tmp_path):
    """Its orientation, refined image by image, says nothing of the others."""
    experiments = two_lattices(slow_sweep(4))
    other = experiments[1]
    other.scan = make_scan(2, 1e-4, first=5)
    other.scan.set_oscillation((12.0 + 1e-4, 1e-4))
    other.crystal.set_A_at_scan_points([other.crystal.get_A()] * 3)
    cell = other.crystal.get_unit_cell()
    metric = ELLIPSOIDS.metric(cell, GRID.rotations)
    settings = dataclasses.replace(
        SETTINGS,
        bragg=ELLIPSOIDS,
        block_width=10.0,
        mask=sure_pixels(experiments, metric),
    )
    used = far_from_all(experiments, metric)
    table = run(experiments, settings, tmp_path)
    parts = [recount(e, n, settings, used) for n, e in enumerate(experiments)]
    assert_same_pixels(table, *parts)


# Regions of Bragg peaks


def test_no_pixel_of_a_box_is_used(tmp_path):
    experiments = [sweep(panels=2), still(panels=2)]
    size = SpotSize(1.4, 1.1, 1.0)
    boxes = predicted_boxes(ExperimentList(experiments), 1.8, size)
    assert set(boxes.experiment) == {0, 1} and set(boxes.panel) == {0, 1}
    shoeboxes = Shoeboxes(ExperimentList(experiments), boxes, margin=1)
    settings = dataclasses.replace(
        SETTINGS,
        bragg=BraggSettings(exclusion="shoebox"),
        block_width=10.0,
        mask=sure_pixels(experiments),
        shoeboxes=shoeboxes,
    )

    def used(i, panel, number, hkl):
        of_image = (boxes.experiment == number) & (boxes.panel == panel)
        of_image &= (boxes.box[:, 4] <= i) & (i < boxes.box[:, 5])
        wider = boxes.box[of_image, :4] + np.array([-1, 1, -1, 1])
        return ~pixels_in_boxes(wider, hkl.shape[1:])

    table = run(experiments, settings, tmp_path)
    parts = [recount(e, n, settings, used) for n, e in enumerate(experiments)]
    assert_same_pixels(table, *parts)
    whole = [recount(e, n, settings) for n, e in enumerate(experiments)]
    n_used, n_all = (
        sum(row[0] for part in p for row in part.values()) for p in (parts, whole)
    )
    assert 0.3 < n_used / n_all < 0.95


def test_boxes_of_other_lattices_are_in_no_table(tmp_path):
    experiments = two_lattices(still(panels=2))
    boxes = Boxes(
        np.array([0, 1], np.int32),
        np.array([0, 1], np.int32),
        np.array([[3, 9, 4, 20, 0, 1], [-2, 7, 25, 99, 0, 1]], np.int32),
    )
    settings = dataclasses.replace(
        SETTINGS,
        bragg=BraggSettings(exclusion="shoebox"),
        mask=sure_pixels(experiments),
        shoeboxes=Shoeboxes(ExperimentList(experiments), boxes),
    )

    def used(i, panel, number, hkl):
        return ~pixels_in_boxes(boxes.box[[panel], :4], hkl.shape[1:])

    table = run(experiments, settings, tmp_path)
    parts = [recount(e, n, settings, used) for n, e in enumerate(experiments)]
    assert_same_pixels(table, *parts)


def test_boxes_need_a_table_of_spots():
    settings = dataclasses.replace(SETTINGS, bragg=BraggSettings(exclusion="shoebox"))
    with pytest.raises(ValueError, match="needs the reflection table") as e:
        prepare(ExperimentList([still()]), None, settings)
    one_line(e)


def test_size_of_boxes_is_that_of_the_spots():
    experiments = ExperimentList([sweep(panels=2)])
    n = 20
    table = flex.reflection_table()
    table["id"] = flex.int(n, 0)
    table["panel"] = flex.size_t(n, 0)
    table["bbox"] = flex.int6([(10, 13, 10, 15, 3, 5)] * n)
    table["miller_index"] = flex.miller_index([(1, 2, 3)] * n)
    table["xyzobs.px.value"] = flex.vec3_double([(11.5, 12.5, 4.0)] * n)
    settings = dataclasses.replace(SETTINGS, bragg=BraggSettings(exclusion="shoebox"))
    found = prepare(experiments, table, settings)
    size = SpotSize(1.5, 2.5, 0.8)
    expected = predicted_boxes(experiments, found.grid.d_min, size)
    assert len(found.settings.shoeboxes) == len(expected.box) > 20
    for i in images_of(experiments[0]):
        for panel, boxes in enumerate(found.settings.shoeboxes.boxes_of_image(0, i)):
            own = (expected.panel == panel) & (expected.box[:, 4] <= i)
            own &= i < expected.box[:, 5]
            assert sorted(boxes.tolist()) == sorted(expected.box[own, :4].tolist())


@pytest.mark.parametrize("growth_radial", [0.0, 4.0, 12.0])
def test_fitted_region_is_that_of_the_ellipsoid(tmp_path, growth_radial):
    """Narrower along the scattering vector than across, unless both grow alike."""
    experiments = [still(panels=2), still(9, 2, "second")]
    cell = experiments[0].crystal.get_unit_cell()
    ellipsoid = dataclasses.replace(
        default_ellipsoid(cell, GRID.rotations, GRID.d_min),
        metric=tuple(np.array(cell.reciprocal().metrical_matrix()) / 0.005**2),
        radius=0.005,
        growth=12.0,
        growth_radial=growth_radial,
    )
    names = [e.identifier for e in experiments]
    smaller = dataclasses.replace(ellipsoid, growth=6.0, growth_radial=1.0)
    own = dict(zip(names, (ellipsoid, smaller)))

    def inside(number, hkl, factor=1.0, at_point=False):
        h = hkl.reshape(3, -1).T
        point = np.floor(h + 0.5)
        # of the pixel, which differs little from that of the point
        place = point if at_point else h
        b = np.array(cell.fractionalization_matrix()).reshape(3, 3)
        s = np.linalg.norm(place @ b, axis=1)
        fit = own[names[number]]
        result = fit.is_inside(factor * (h - point), place, s, radial=True)
        return result.reshape(hkl.shape[1:])

    mask = sure_pixels(experiments)
    for number, e in enumerate(experiments):
        for panel, pixels in enumerate(pixels_of(e, SETTINGS)):
            hkl = hkl_of(e, 0, pixels)
            ends = [inside(number, hkl, factor) for factor in (0.99, 1.01)]
            mask[panel][ends[0] != ends[1]] = False
    settings = dataclasses.replace(
        SETTINGS, bragg=BraggSettings(exclusion="auto"), ellipsoids=own, mask=mask
    )

    def used(i, panel, number, hkl):
        return ~inside(number, hkl)

    table = run(experiments, settings, tmp_path)
    parts = [recount(e, n, settings, used) for n, e in enumerate(experiments)]
    assert_same_pixels(table, *parts)
    (path,) = tmp_path.glob("*.refl")
    with ObservationFile(path) as written:
        regions = list(map(ExclusionRegion.from_numbers, written.bragg_regions))
    assert set(regions) == {settings.region(e, GRID) for e in experiments}
    n_used, n_all, n_other = np.zeros(3)
    for pixels in pixels_of(experiments[0], SETTINGS):
        hkl = hkl_of(experiments[0], 0, pixels)
        found = inside(0, hkl)
        n_used, n_all = n_used + found.sum(), n_all + found.size
        n_other += np.sum(found != inside(0, hkl, at_point=True))
    assert n_used > 50
    assert n_other < 0.005 * n_all


# Masks


def random_mask(e: Experiment, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random(p.get_image_size()[::-1]) < 0.3 for p in e.detector]


def test_each_detector_has_its_mask(tmp_path):
    """Two detectors of different sizes, in the other order in the file."""
    experiments = [still(panels=2), sweep(panels=1)]
    layers = [
        {"one": [m | ~sure for m, sure in zip(random_mask(e, n), sure_pixels([e]))]}
        for n, e in enumerate(experiments)
    ]
    path = tmp_path / "diffuse_mask.h5"
    masks = [DetectorMask([e.identifier], x) for e, x in zip(experiments, layers)]
    write_masks(path, masks[::-1])
    masks = masks_of_experiments(path, ExperimentList(experiments))
    settings = dataclasses.replace(SETTINGS, masks=masks, block_width=10.0)
    table = run(experiments, settings, tmp_path)

    def used(i, panel, number, hkl):
        return ~layers[number]["one"][panel]

    unmasked = dataclasses.replace(settings, masks=None)
    parts = [recount(e, n, unmasked, used) for n, e in enumerate(experiments)]
    assert_same_pixels(table, *parts)


def test_equal_detectors_have_masks_of_their_own(tmp_path):
    """Of two series of images with one geometry, each with its own bad pixels."""
    experiments = [still(), still(9, identifier="second")]
    sure = sure_pixels(experiments)
    masks = {
        e.identifier: tuple(m & ~x for m, x in zip(sure, random_mask(e, n)))
        for n, e in enumerate(experiments)
    }
    settings = dataclasses.replace(SETTINGS, masks=masks)
    table = run(experiments, settings, tmp_path)
    parts = [recount(e, n, settings) for n, e in enumerate(experiments)]
    assert_same_pixels(table, *parts)


def test_experiments_without_a_mask(tmp_path):
    path = tmp_path / "diffuse_mask.h5"
    write_masks(path, [DetectorMask(["still"], {"one": random_mask(still(), 1)})])
    both = ExperimentList([still(), sweep()])
    with pytest.raises(ValueError, match="no mask for 1 of 2 experiments") as e:
        masks_of_experiments(path, both)
    one_line(e)


def test_ellipsoids_are_fitted_with_the_masks(monkeypatch):
    """Those by identifier too."""
    experiments = ExperimentList([still(n, identifier=str(n)) for n in range(3)])
    masks = {e.identifier: tuple(random_mask(e, 1)) for e in experiments}
    settings = dataclasses.replace(
        SETTINGS, bragg=BraggSettings(exclusion="auto"), masks=masks
    )
    seen = []

    def fit(experiments, rotations, fit_settings):
        seen.append(fit_settings)
        return [None] * len(experiments)

    monkeypatch.setattr("dials_diffuse.extraction.prepare.fit_data_sets", fit)
    prepare(experiments, None, settings)
    for e in experiments:
        assert seen[0].mask_of(e) is masks[e.identifier]


def test_ellipsoids_are_fitted_to_images_that_are_used():
    experiments = ExperimentList([sweep(n_images=6), still()])
    rejected = frozenset({(0, 4), (0, 6), (1, 0)})
    chosen = sample_of_images(experiments, [0, 1], FitSettings(rejected=rejected))
    assert chosen == [(0, 3), (0, 5), (0, 7), (0, 8)]


# Wide images


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Images of a smooth truth that sweep three voxels at d_min, and their truth."""
    settings = vary(
        SMALL,
        n_images=24,
        diffuse={"contrast": 0.3, "length": 2.0},
        scan={"width": 3.8},
    )
    settings = vary(settings, diffuse={"halo_displacement": 0.0})
    simulation = Simulation(settings)
    folder = tmp_path_factory.mktemp("wide")
    return (
        simulation,
        simulated_experiments(simulation),
        true_map_file(simulation, folder),
    )


@pytest.mark.slow
def test_images_that_are_wider_than_voxels(tmp_path, wide):
    """Rows spread over the rotation reach the voxels between the middles of images."""
    simulation, experiments, truth = wide
    own = extraction_settings(simulation, KEEP_ALL)
    grid = make_grid(experiments, own)
    n_seen = {}
    for phi_sampling in ("middle", "spread", "auto"):
        chosen = dataclasses.replace(own, phi_sampling=phi_sampling)
        refl, merged = tmp_path / "out.refl", tmp_path / "map.h5"
        extract(experiments, grid, chosen, refl)
        with ObservationFile(refl) as table, MapWriter(merged, grid, ["0"]) as writer:
            index = table.read(0, table.n_rows, ["miller_index"])["miller_index"]
            index = np.unique(index, axis=0)
            outer = grid.s(index) > 0.8 / grid.d_min
            n_seen[phi_sampling] = np.array([len(index), outer.sum()])
            merge([table], MergingSettings(), writer)
        comparison = compare(merged, truth, scale="absolute")
        worst = max(abs(s.ratio - 1) for s in comparison.shells)
        report(
            f"wide images, {phi_sampling}",
            voxels_seen="{}, outer {}".format(*n_seen[phi_sampling]),
            worst_ratio=f"{worst:.4%}",
            rms=f"{comparison.overall.rms_deviation:.3%}",
        )
        assert worst < 1e-3
        refl.unlink(), merged.unlink()
    np.testing.assert_array_equal(n_seen["auto"], n_seen["spread"])
    assert np.all(n_seen["spread"] > 1.15 * n_seen["middle"])
