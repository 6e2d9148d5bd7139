"""Extraction of whole experiments against an independent calculation pixel by pixel."""

from __future__ import annotations

import copy
import dataclasses
import json

import h5py
import numpy as np
import pytest
from simulate_images import (
    import_images,
    make_beam,
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
    memory_experiment,
    random_images,
    write_images,
    write_nexus,
)

from cctbx import uctbx
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory
from scitbx import matrix

from dials.algorithms.integration import Corrections
from dials.command_line import dials_import
from dials_diffuse.extraction import loop, report, runs
from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.report import count_static_pixels
from dials_diffuse.extraction.settings import (
    BraggSettings,
    CorrectionSettings,
    ExtractionSettings,
)
from dials_diffuse.extraction.tables import (
    detector_numbers,
    share_equal_detectors,
    table_keys,
)
from dials_diffuse.grid import Grid
from dials_diffuse.io.bragg import bragg_table
from dials_diffuse.io.observations import COLUMNS, GROUP, ObservationFile

SMALL = (34, 28)
MARGIN = 1e-3  # voxels: nearer to a limit, single precision decides
KEEP_ALL = BraggSettings(exclusion="none")
EXTRA = 1.7  # exposure time, s


def truth(hkl: np.ndarray) -> np.ndarray:
    """Scattering of the crystal, smooth and different everywhere."""
    h, k, l = hkl
    return 2e7 * (3 + np.sin(0.9 * h + 0.3) * np.cos(0.7 * k) + 0.1 * l)


def independent_setting(e: Experiment, image: int) -> np.ndarray:
    a = np.array(e.crystal.get_A()).reshape(3, 3)
    if e.scan is None:
        return a
    start, width = e.scan.get_oscillation()
    axis = matrix.col(e.goniometer.get_rotation_axis_datum())
    angle = start + (image + 0.5) * width
    r = axis.axis_and_angle_as_r3_rotation_matrix(angle, deg=True)
    s, f = e.goniometer.get_setting_rotation(), e.goniometer.get_fixed_rotation()
    sra = matrix.sqr(s) * r * matrix.sqr(f) * matrix.sqr(e.crystal.get_A())
    return np.array(sra).reshape(3, 3)


def pixel_centres(e: Experiment) -> list[np.ndarray]:
    """Lab coordinates of the centres of each panel's pixels, (3, n_slow, n_fast)."""
    result = []
    for panel in e.detector:
        nfast, nslow = panel.get_image_size()
        r = [
            panel.get_pixel_lab_coord((i + 0.5, j + 0.5))
            for j in range(nslow)
            for i in range(nfast)
        ]
        result.append(np.array(r).T.reshape(3, nslow, nfast))
    return result


def hkl_of_pixels(e: Experiment, image: int) -> list[np.ndarray]:
    s0 = np.array(e.beam.get_s0())
    inverse = np.linalg.inv(independent_setting(e, image))
    result = []
    for r in pixel_centres(e):
        s1 = r / np.linalg.norm(r, axis=0) / e.beam.get_wavelength()
        result.append(np.tensordot(inverse, s1 - s0[:, None, None], axes=1))
    return result


def norm_of_pixels(e: Experiment) -> list[np.ndarray]:
    """P, solid angle and efficiency by DIALS' functions and a plain formula."""
    dials = Corrections(e.beam, e.detector)
    result = []
    for number, (panel, r) in enumerate(zip(e.detector, pixel_centres(e))):
        nfast, nslow = panel.get_image_size()
        s1 = (r / np.linalg.norm(r, axis=0) / e.beam.get_wavelength()).reshape(3, -1).T
        lp = np.array([dials.lp(tuple(s)) for s in s1]).reshape(nslow, nfast)
        qe = np.array([dials.qe(tuple(s), number) for s in s1]).reshape(nslow, nfast)
        size, normal = panel.get_pixel_size(), np.array(panel.get_normal())
        x, y = np.meshgrid(
            (np.arange(nfast) + 0.5) * size[0], (np.arange(nslow) + 0.5) * size[1]
        )
        flat = (
            np.array(panel.get_origin())[:, None, None]
            + np.array(panel.get_fast_axis())[:, None, None] * x
            + np.array(panel.get_slow_axis())[:, None, None] * y
        )
        distance = np.linalg.norm(flat, axis=0)
        cosine = np.abs(np.tensordot(normal, flat, axes=1)) / distance
        result.append(qe / lp * size[0] * size[1] * cosine / distance**2)
    return result


@dataclasses.dataclass
class Case:
    experiment: Experiment
    mask: tuple[np.ndarray, ...]
    images: list[list[np.ndarray]]


def true_case(rotation: bool, n_images: int, grid: Grid, seed=7) -> Case:
    """Noise-free floating-point images of ``truth``, and a mask of doubtful pixels."""
    detector = make_detector(2, SMALL, 12.0, 13.0, parallax=True)
    crystal = make_crystal("P 1", seed)
    models = {"detector": detector, "crystal": crystal}
    if rotation:
        models["scan"] = make_scan(n_images, 0.8, first=4, exposure=EXTRA)
        models["goniometer"] = make_goniometer("multi")
    blank = [[np.zeros((1, 1))] * 2] * n_images
    e = memory_experiment(blank, **models, identifier=str(seed))
    norm = norm_of_pixels(e)
    mask = [np.ones(n.shape, dtype=bool) for n in norm]
    images = []
    for image in range(n_images):
        hkl = hkl_of_pixels(e, image)
        exposure = EXTRA if rotation else 1.0
        images.append([truth(h) * n * exposure for h, n in zip(hkl, norm)])
        for good, h in zip(mask, hkl):
            v = h * np.array(grid.ndiv)[:, None, None] + 0.5
            good &= np.all(np.abs(v - np.rint(v)) > MARGIN, axis=0)
    e = memory_experiment(images, **models, identifier=str(seed))
    return Case(e, tuple(mask), images)


def expected_rows(case, number, grid, blocks):
    """Sums for each (voxel, block, panel): independent of the code under test."""
    e, result = case.experiment, {}
    exposure = EXTRA if e.scan else 1.0
    first = e.scan.get_array_range()[0] if e.scan else 0
    norm = norm_of_pixels(e)
    for block in blocks:
        for image in block:
            for panel, hkl in enumerate(hkl_of_pixels(e, image)):
                index = np.floor(hkl * np.array(grid.ndiv)[:, None, None] + 0.5)
                for j, i in zip(*np.nonzero(case.mask[panel])):
                    key = (*map(int, index[:, j, i]), number, block[0], panel)
                    sums = result.setdefault(key, np.zeros(6))
                    sums += (
                        1,
                        case.images[image][panel][j, i],
                        norm[panel][j, i] * exposure,
                        i + 0.5,
                        j + 0.5,
                        first + image + 0.5,
                    )
    return result


def read_table(path) -> dict[str, np.ndarray]:
    with ObservationFile(path) as f:
        return f.read(0, f.n_rows, list(COLUMNS))


def triclinic_grid(ndiv=(2, 3, 2)) -> Grid:
    cell = make_crystal("P 1").get_unit_cell().parameters()
    return Grid(cell, ndiv, "P 1", d_min=0.6)


def test_known_truth_comes_back_from_rotation_and_stills(tmp_path):
    """Each observation: its sums are those of its pixels, its mean is the truth's."""
    grid = triclinic_grid()
    cases = [
        true_case(True, 5, grid, seed=7),
        true_case(False, 1, grid, seed=8),
        true_case(False, 1, grid, seed=9),
    ]
    mask = tuple(np.logical_and.reduce(m) for m in zip(*(c.mask for c in cases)))
    assert all(np.mean(m) > 0.9 for m in mask)
    for case in cases:
        case.mask = mask
    settings = ExtractionSettings(
        ndiv=grid.ndiv,
        block_width=1.6,
        phi_sampling="middle",
        bragg=KEEP_ALL,
        corrections=CorrectionSettings(path="vacuum"),
        mask=mask,
        trusted_range=(-1e9, 1e9),
    )
    path = tmp_path / "out.refl"
    experiments = ExperimentList([case.experiment for case in cases])
    n_rows = extract(experiments, grid, settings, path).n_rows
    expected = {}
    for number, (case, blocks) in enumerate(
        zip(cases, [([0, 1], [2, 3], [4]), ([0],), ([0],)])
    ):
        expected |= expected_rows(case, number, grid, blocks)
    table = read_table(path)
    assert n_rows == len(table["id"]) == len(expected) > 3000
    found = {}
    for row in range(n_rows):
        frame = table["xyzobs.px.value"][row, 2]
        number = int(table["id"][row])
        block = 2 * ((int(np.floor(frame)) - 3) // 2) if number == 0 else 0
        key = (
            *map(int, table["miller_index"][row]),
            number,
            block,
            int(table["panel"][row]),
        )
        n = table["num_pixels.valid"][row]
        found[key] = (
            n,
            table["counts"][row],
            table["normalisation"][row],
            *(table["xyzobs.px.value"][row] * n),
        )
    assert found.keys() == expected.keys()
    keys = list(expected)
    a, b = (np.array([d[key] for key in keys]) for d in (found, expected))
    np.testing.assert_array_equal(a[:, 0], b[:, 0])
    np.testing.assert_allclose(a[:, 1], b[:, 1], rtol=1e-9)
    # the parallax is interpolated to 1e-3 pixels, which is 2.5e-5 of the distance
    np.testing.assert_allclose(a[:, 2], b[:, 2], rtol=5e-5)
    np.testing.assert_allclose(a[:, 3:], b[:, 3:], rtol=1e-12)
    # the truth, at the voxel's centre, to half the steepest slope over a voxel
    hkl = np.array([key[:3] for key in keys]).T / np.array(grid.ndiv)[:, None]
    intensity = a[:, 1] / a[:, 2]
    slope = 2e7 * (0.9 / 2 + 0.7 / 3 + 0.1 / 2) / 2
    assert np.abs(intensity - truth(hkl)).max() < slope
    assert np.std(truth(hkl)) > slope  # so this says something


def datasets(path) -> dict[str, np.ndarray]:
    """All datasets of a file but its date."""
    result = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and not name.endswith("/date"):
            result[name] = item[()]

    with h5py.File(path) as f:
        f.visititems(visit)
    return result


def assert_files_identical(one, two):
    a, b = datasets(one), datasets(two)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def mixed_experiments() -> ExperimentList:
    """Two sweeps and two stills on two detectors, integer images."""
    result = ExperimentList()
    for i, n_images in enumerate((7, 1, 4, 1)):
        detector = make_detector(2 - i % 2, SMALL, 11.0 + i // 2, 9.0, parallax=True)
        result.append(
            memory_experiment(
                random_images(n_images, detector, seed=i),
                detector,
                make_crystal("P 21 21 21", seed=i),
                scan=make_scan(n_images, 0.4, exposure=0.3) if n_images > 1 else None,
                goniometer=make_goniometer("general"),
                identifier=f"id{i}",
            )
        )
    return result


def test_result_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    experiments = mixed_experiments()
    settings = ExtractionSettings(ndiv=(3, 3, 3), d_min=2.2, gain=1.3, nproc=1)
    grid = make_grid(experiments, settings)
    extract(experiments, grid, settings, tmp_path / "1.refl")
    assert len(read_table(tmp_path / "1.refl")["id"]) > 3000
    for nproc in (2, 3, 20):
        path = tmp_path / f"{nproc}.refl"
        other = dataclasses.replace(settings, nproc=nproc)
        extract(experiments, grid, other, path)
        assert_files_identical(tmp_path / "1.refl", path)
    # small runs, and images of a block that do not fit into memory together
    monkeypatch.setattr(runs, "RUN_ROWS", 100)
    monkeypatch.setattr(loop, "BATCH_PIXELS", 1000)
    extract(experiments, grid, settings, tmp_path / "small.refl")
    assert_files_identical(tmp_path / "1.refl", tmp_path / "small.refl")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".refl"] * 5


def test_blocks_are_in_the_table(tmp_path):
    """Where images are left out, blocks start anew; every row is of one of them."""
    experiments = mixed_experiments()
    settings = ExtractionSettings(d_min=2.2, block_width=0.8)
    grid = make_grid(experiments, settings)
    extract(experiments, grid, settings, tmp_path / "x.refl", rejected={(0, 2), (2, 0)})
    with ObservationFile(tmp_path / "x.refl") as table:
        blocks = table.blocks
    assert blocks.tolist() == [
        [0, 0, 2],
        [0, 3, 5],
        [0, 5, 7],
        [1, 0, 1],
        [2, 1, 3],
        [2, 3, 4],
        [3, 0, 1],
    ]
    rows = read_table(tmp_path / "x.refl")
    frame = rows["xyzobs.px.value"][:, 2]
    inside = (rows["id"][:, None] == blocks[:, 0]) & (frame[:, None] >= blocks[:, 1])
    inside &= frame[:, None] < blocks[:, 2]
    assert (inside.sum(axis=1) == 1).all() and inside.any(axis=0).all()
    # A voxel has no more than one row of a block and panel.
    place = np.column_stack(
        [rows["miller_index"], rows["panel"], np.argmax(inside, axis=1)]
    )
    assert len(np.unique(place, axis=0)) == len(place)


def whole_peaks(parts: list) -> dict[str, np.ndarray]:
    names = [field.name for field in dataclasses.fields(parts[0])]
    return {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}


def test_peaks_do_not_depend_on_the_parts_they_come_in(tmp_path, monkeypatch):
    """Few rows at a time make the table and the sums that all together make."""
    experiments = mixed_experiments()
    settings = ExtractionSettings(ndiv=(3, 3, 3), d_min=2.2, gain=1.3)
    grid = make_grid(experiments, settings)
    found, parts = [], []
    for name in ("whole", "parts"):
        if name == "parts":
            monkeypatch.setattr(runs, "PEAK_ROWS", 1)
            monkeypatch.setattr(runs.sorted_slabs, "__defaults__", (100,))
            monkeypatch.setattr(runs, "SAMPLE", 7)
        parts.append([])
        with bragg_table(tmp_path / f"bragg_{name}.refl", experiments) as append:

            def take(peaks):
                append(peaks)
                parts[-1].append(peaks)

            path = tmp_path / f"{name}.refl"
            found.append(extract(experiments, grid, settings, path, take_peaks=take))
    assert len(parts[0]) == 1 and len(parts[1]) > 3
    tables = [datasets(tmp_path / f"{name}.refl") for name in ("whole", "parts")]
    for name in COLUMNS:
        np.testing.assert_array_equal(*(table[f"{GROUP}/{name}"] for table in tables))
    whole, together = (tmp_path / f"bragg_{x}.refl" for x in ("whole", "parts"))
    assert whole.read_bytes() == together.read_bytes()
    sums, others = (x.peaks for x in found)
    for name in ("n_peaks", "n_complete", "n_unique", "n_pixels"):
        assert getattr(sums, name) == getattr(others, name)
    for name, values in sums.shells.items():
        np.testing.assert_allclose(others.shells[name], values, rtol=1e-12)


def test_sums_over_the_peaks(tmp_path):
    """Against a selection peak by peak."""
    experiments = mixed_experiments()
    settings = ExtractionSettings(ndiv=(3, 3, 3), d_min=2.2, d_max=20.0)
    grid = make_grid(experiments, settings)
    parts = []
    path = tmp_path / "x.refl"
    sums = extract(experiments, grid, settings, path, take_peaks=parts.append).peaks
    p = whole_peaks(parts)
    assert (sums.n_peaks, sums.n_pixels) == (len(p["id"]), p["n_pixels"].sum())
    assert sums.n_complete == np.count_nonzero(p["complete"]) > 0
    assert sums.n_unique == len({tuple(hkl) for hkl in p["hkl"].tolist()})
    edges = np.linspace(1 / 20.0, 1 / 2.2, 21)
    expected = np.zeros((4, 20))
    for i, hkl in enumerate(p["hkl"].tolist()):
        if not (p["complete"][i] or experiments[int(p["id"][i])].is_still()):
            continue
        s = 1 / uctbx.unit_cell(grid.unit_cell).d(hkl) if any(hkl) else 0.0
        shell = np.clip(np.searchsorted(edges, s) - 1, 0, 19)
        w, value, sigma = p["weight"][i], p["intensity"][i], p["variance"][i] ** 0.5
        expected[:, shell] += (1, w, w * value, value / sigma) if sigma > 0 else 0
    found = [sums.shells[x] for x in ("n_peaks", "weight", "intensity", "i_over_sigma")]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert 0 < expected[0].sum() < sums.n_peaks


def test_pixels_counted_with_the_tables(tmp_path, monkeypatch):
    """Those of the first images are not counted again, and the count is the same."""
    experiments = mixed_experiments()
    rng = np.random.default_rng(7)
    masks = {
        e.identifier: tuple(rng.random(SMALL[::-1]) < 0.8 for _ in e.detector)
        for e in experiments
    }
    settings = ExtractionSettings(d_min=2.6, d_max=12.0, masks=masks, nproc=2)
    grid = make_grid(experiments, settings)
    found = extract(experiments, grid, settings, tmp_path / "x.refl")
    assert list(found.pixels) == [table_keys(experiments, masks)[0]]
    every = count_static_pixels(experiments, found.blocks, grid, settings)
    (pixels,) = found.pixels.values()
    assert pixels.masked == sum(int((~mask).sum()) for mask in masks["id0"])
    first = [block for block in found.blocks if block.experiment == 0]
    alone = count_static_pixels(experiments, first, grid, settings)
    assert tuple(7 * n for n in pixels) == (alone.total, alone.masked, alone.outside)
    assert 0 < pixels.outside < pixels.total - pixels.masked
    monkeypatch.setattr(report, "n_outside", lambda *args: 0)
    fewer = count_static_pixels(experiments, found.blocks, grid, settings, found.pixels)
    assert fewer.outside == alone.outside < every.outside
    assert (fewer.total, fewer.masked) == (every.total, every.masked)


def test_one_still_on_many_threads(tmp_path):
    experiments = mixed_experiments()[1:2]
    settings = ExtractionSettings(ndiv=(3, 3, 3), d_min=2.2, gain=0.3)
    grid = make_grid(experiments, settings)
    for nproc in (1, 3):
        other = dataclasses.replace(settings, nproc=nproc)
        extract(experiments, grid, other, tmp_path / f"{nproc}.refl")
    assert_files_identical(tmp_path / "1.refl", tmp_path / "3.refl")


def test_rows_are_sorted_by_voxel_then_experiment_and_frame(tmp_path):
    experiments = mixed_experiments()
    settings = ExtractionSettings(d_min=2.2, block_width=0.4, nproc=2)
    grid = make_grid(experiments, settings)
    extract(experiments, grid, settings, tmp_path / "out.refl")
    table = read_table(tmp_path / "out.refl")
    order = np.lexsort(
        [
            table["panel"],
            table["xyzobs.px.value"][:, 2],
            table["id"],
            grid.key(table["miller_index"]),
        ]
    )
    np.testing.assert_array_equal(order, np.arange(len(order)))


def test_gain_pedestal_and_exposure(tmp_path):
    """Photons are (value - pedestal)/gain; the normalisation goes with the exposure."""
    detector = make_detector(1, SMALL, 12.0)
    detector[0].set_gain(2.5)
    detector[0].set_pedestal(2.0)
    images = random_images(2, detector, mean=20)
    crystal = make_crystal("P 1")
    tables = []
    for exposure in (1.0, 0.25, 0.0):
        e = memory_experiment(
            images, detector, crystal, scan=make_scan(2, 0.5, 1, exposure)
        )
        settings = ExtractionSettings(bragg=KEEP_ALL, d_min=2.2)
        experiments = ExperimentList([e])
        grid = make_grid(experiments, settings)
        extract(experiments, grid, settings, tmp_path / "out.refl")
        tables.append(read_table(tmp_path / "out.refl"))
    b = np.array(crystal.get_B()).reshape(3, 3)
    raw = 0
    for i, image in enumerate(images):
        rlp = np.tensordot(b, hkl_of_pixels(e, i)[0], axes=1)
        raw += image[0][np.linalg.norm(rlp, axis=0) <= 1 / 2.2].sum()
    n = tables[0]["num_pixels.valid"].sum()
    assert tables[0]["counts"].sum() == pytest.approx((raw - 2.0 * n) / 2.5, rel=1e-12)
    for table, factor in zip(tables[1:], (0.25, 1.0)):  # no exposure: not known
        np.testing.assert_allclose(
            table["normalisation"], factor * tables[0]["normalisation"], rtol=1e-12
        )
        np.testing.assert_array_equal(table["counts"], tables[0]["counts"])


def test_images_of_single_precision(tmp_path):
    """Some formats give float images; they count as the same values in double."""
    detector = make_detector(1, SMALL, 12.0)
    values = random_images(1, detector)[0][0] * 0.37
    settings = ExtractionSettings(bragg=KEEP_ALL, d_min=2.2)
    for dtype in (np.float32, np.float64):
        image = values.astype(np.float32).astype(dtype)
        e = memory_experiment([[image]], detector, make_crystal("P 1"))
        grid = make_grid(ExperimentList([e]), settings)
        extract(ExperimentList([e]), grid, settings, tmp_path / np.dtype(dtype).name)
    assert_files_identical(tmp_path / "float32", tmp_path / "float64")


def test_masked_and_untrusted_pixels_add_nothing(tmp_path):
    """Images with junk in the pixels that are left out give the same table."""
    detector = make_detector(1, SMALL, 12.0)
    detector[0].add_mask(3, 4, 8, 9)  # untrusted rectangle
    clean = random_images(1, detector)[0][0]
    good = np.random.default_rng(3).random(clean.shape) < 0.9
    junk = clean.copy()
    junk[~good] = 999
    junk[4:9, 3:8] = 777
    untrusted = np.zeros_like(good)
    untrusted[::5, ::7] = True
    junk[untrusted & good] = -1
    junk[0, 0] = 10**7
    settings = ExtractionSettings(bragg=KEEP_ALL, d_min=2.2, mask=(good,))
    all_good = good & ~untrusted
    all_good[4:9, 3:8] = all_good[0, 0] = False
    for name, image, mask in (("junk", junk, good), ("clean", clean, all_good)):
        e = memory_experiment([[image]], detector, make_crystal("P 1"))
        other = dataclasses.replace(settings, mask=(mask,))
        grid = make_grid(ExperimentList([e]), other)
        extract(ExperimentList([e]), grid, other, tmp_path / name)
    assert_files_identical(tmp_path / "junk", tmp_path / "clean")
    assert read_table(tmp_path / "junk")["num_pixels.valid"].sum() <= all_good.sum()


def test_splitting_a_panel_leaves_the_sums_of_voxels(tmp_path):
    whole = make_detector(1, SMALL, 12.0, 11.0)
    image = random_images(1, whole)[0][0]
    width = SMALL[0] // 2
    halves = make_detector(2, (width, SMALL[1]), 12.0)
    fast = np.array(whole[0].get_fast_axis())
    for i, panel in enumerate(halves):
        offset = fast * i * width * panel.get_pixel_size()[0]
        origin = np.array(whole[0].get_origin()) + offset
        panel.set_frame(fast, whole[0].get_slow_axis(), origin)
    totals = []
    settings = ExtractionSettings(d_min=2.2)
    for detector, panels in (
        (whole, [image]),
        (halves, [image[:, :width], image[:, width:]]),
    ):
        e = memory_experiment([panels], detector, make_crystal("P 1"))
        grid = make_grid(ExperimentList([e]), settings)
        extract(ExperimentList([e]), grid, settings, tmp_path / "out.refl")
        table = read_table(tmp_path / "out.refl")
        key, row = np.unique(grid.key(table["miller_index"]), return_inverse=True)
        totals.append(
            [key]
            + [
                np.bincount(row, table[name])
                for name in ("counts", "num_pixels.valid", "normalisation")
            ]
        )
    for one, two in zip(*totals):
        np.testing.assert_allclose(two, one, rtol=1e-8)


def test_bragg_sphere_in_a_triclinic_cell(tmp_path):
    """Pixels within the radius of a reciprocal lattice point are left out, no others."""
    detector = make_detector(1, SMALL, 12.0)
    crystal = make_crystal("P 1")
    e = memory_experiment(random_images(1, detector), detector, crystal)
    radius = 0.012
    grid = triclinic_grid()
    (hkl,) = hkl_of_pixels(e, 0)
    b = np.array(crystal.get_B()).reshape(3, 3)
    steps = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3), axis=-1).reshape(-1, 3)
    away = np.min(
        [
            np.linalg.norm(
                np.tensordot(b, hkl - np.rint(hkl) - s[:, None, None], axes=1), axis=0
            )
            for s in steps
        ],
        axis=0,
    )
    settings = ExtractionSettings(
        ndiv=grid.ndiv,
        bragg=BraggSettings("ellipsoid", (radius,) * 3, "inverse_angstrom"),
    )
    extract(ExperimentList([e]), grid, settings, tmp_path / "out.refl")
    table = read_table(tmp_path / "out.refl")
    index = grid.voxel_index(np.moveaxis(hkl, 0, -1)[away >= radius])
    size = int(np.prod(grid.shape))
    expected = np.bincount(grid.key(index), minlength=size)
    key = grid.key(table["miller_index"])
    found = np.bincount(key, table["num_pixels.valid"], size)
    assert 0.1 < np.mean(away < radius) < 0.9
    # a pixel or two may lie on a boundary to single precision
    assert np.abs(found - expected).sum() <= 3


def test_each_still_reads_its_own_image(tmp_path):
    """Stills that DIALS imports as zero-width sequences share one image set."""
    paths = write_images(tmp_path, [np.full((50, 60), 10 + i) for i in range(4)])
    experiments = import_images(paths)
    assert len({id(imageset) for imageset in experiments.imagesets()}) == 1
    keep = ExperimentList([experiments[i] for i in (3, 1)])  # not all were indexed
    settings = ExtractionSettings(d_min=2.0, bragg=KEEP_ALL)
    for nproc in (1, 2):
        settings = dataclasses.replace(settings, nproc=nproc)
        extract(keep, make_grid(keep, settings), settings, tmp_path / "out.refl")
        table = read_table(tmp_path / "out.refl")
        per_pixel = table["counts"] / table["num_pixels.valid"]
        assert np.all(per_pixel == np.array([13.0, 11.0])[table["id"]])


def assert_uniform_counts(experiments, expected, folder):
    """Stills, saved and loaded, whose pixels all have one value, each its own."""
    experiments.as_file(folder / "stills.expt")
    experiments = ExperimentListFactory.from_json_file(folder / "stills.expt")
    settings = ExtractionSettings(d_min=2.0, bragg=KEEP_ALL)
    extract(experiments, make_grid(experiments, settings), settings, folder / "o.refl")
    table = read_table(folder / "o.refl")
    per_pixel = table["counts"] / table["num_pixels.valid"]
    assert set(table["id"]) == set(range(len(expected)))
    assert np.all(per_pixel == np.array(expected)[table["id"]])


def test_each_still_reads_its_own_image_from_file(tmp_path):
    paths = write_images(tmp_path, [np.full((50, 60), 10 + i) for i in range(4)])
    experiments = import_images(paths)
    del experiments[2]
    assert_uniform_counts(experiments, [10.0, 11.0, 13.0], tmp_path)


def test_stills_converted_from_sequences(tmp_path):
    paths = write_images(tmp_path, [np.full((50, 60), 10 + i) for i in range(3)])
    dials_import.run(
        [
            *map(str, paths),
            "convert_sequences_to_stills=True",
            f"output.experiments={tmp_path}/imported.expt",
            f"output.log={tmp_path}/import.log",
        ]
    )
    experiments = ExperimentListFactory.from_json_file(tmp_path / "imported.expt")
    for i, e in enumerate(experiments):
        e.crystal, e.identifier = make_crystal(), str(i)
    assert all(e.scan is None and e.goniometer is None for e in experiments)
    assert_uniform_counts(experiments, [10.0, 11.0, 12.0], tmp_path)


def test_rotation_images_from_files_equal_those_in_memory(tmp_path):
    rng = np.random.default_rng(3)
    images = [rng.poisson(4.0, (50, 60)).astype(np.int32) for _ in range(5)]
    experiments = import_images(write_images(tmp_path, images, width=0.5))
    e = experiments[0]
    memory = memory_experiment(
        [[image] for image in images],
        e.detector,
        e.crystal,
        e.beam,
        e.scan,
        e.goniometer,
        e.identifier,
    )
    settings = ExtractionSettings(d_min=2.0, block_width=1.0)
    for name, experiment in (("files", e), ("memory", memory)):
        one = ExperimentList([experiment])
        extract(one, make_grid(one, settings), settings, tmp_path / name)
    assert_files_identical(tmp_path / "files", tmp_path / "memory")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_in_a_nexus_file(tmp_path, dtype):
    """Many images in one open file, read by several processes; it has its own mask."""
    rng = np.random.default_rng(3)
    images = [rng.poisson(3.0, (50, 60)).astype(dtype) for _ in range(12)]
    bad = rng.random((50, 60)) < 0.1
    path = write_nexus(tmp_path / "images.nxs", images, bad)
    experiments = import_images([path])
    assert experiments[0].scan.get_image_range() == (1, 12)
    settings = ExtractionSettings(d_min=2.0, block_width=0.5, bragg=KEEP_ALL)
    grid = make_grid(experiments, settings)
    for nproc in (1, 2, 4):
        other = dataclasses.replace(settings, nproc=nproc)
        extract(experiments, grid, other, tmp_path / f"{nproc}.refl")
    for nproc in (2, 4):
        assert_files_identical(tmp_path / "1.refl", tmp_path / f"{nproc}.refl")
    e = experiments[0]
    memory = memory_experiment(
        [[image] for image in images],
        e.detector,
        e.crystal,
        e.beam,
        e.scan,
        e.goniometer,
        e.identifier,
    )
    masked = dataclasses.replace(settings, mask=(~bad,))
    extract(ExperimentList([memory]), grid, masked, tmp_path / "memory.refl")
    assert_files_identical(tmp_path / "1.refl", tmp_path / "memory.refl")


def test_zero_counts_are_observations(tmp_path):
    detector = make_detector(1, SMALL, 12.0)
    image = np.zeros(SMALL[::-1], dtype=np.int32)
    e = memory_experiment([[image]], detector, make_crystal("P 1"))
    settings = ExtractionSettings(d_min=2.2)
    extract(
        ExperimentList([e]),
        make_grid(ExperimentList([e]), settings),
        settings,
        tmp_path / "out.refl",
    )
    table = read_table(tmp_path / "out.refl")
    assert len(table["id"]) > 100
    assert np.all(table["counts"] == 0)
    assert np.all(table["normalisation"] > 0)


def test_no_pixel_left(tmp_path):
    detector = make_detector(1, SMALL, 12.0)
    e = memory_experiment(random_images(1, detector), detector, make_crystal("P 1"))
    mask = (np.zeros(SMALL[::-1], dtype=bool),)
    settings = ExtractionSettings(d_min=2.2, mask=mask)
    experiments = ExperimentList([e])
    grid = make_grid(experiments, settings)
    with pytest.raises(ValueError, match="No pixel is left: check the mask"):
        extract(experiments, grid, settings, tmp_path / "out.refl")


def test_provenance(tmp_path):
    experiments = mixed_experiments()
    settings = ExtractionSettings(d_min=2.2)
    grid = make_grid(experiments, settings)
    extract(experiments, grid, settings, tmp_path / "o.refl", "a = 1", ["in.expt"])
    with h5py.File(tmp_path / "o.refl") as f:
        assert f["dials_diffuse/phil"].asstr()[()] == "a = 1"
        assert json.loads(f["dials_diffuse/inputs"].asstr()[()]) == ["in.expt"]
        assert list(f[GROUP].attrs["identifiers"]) == ["id0", "id1", "id2", "id3"]
    with ObservationFile(tmp_path / "o.refl") as f:
        assert uctbx.unit_cell(f.grid.unit_cell).is_similar_to(grid.cell, 1e-9, 1e-9)


def test_tables_are_shared_by_experiments_of_one_detector_only():
    detector = make_detector(1, SMALL, 12.0)
    images = random_images(1, detector)
    moved = make_detector(1, SMALL, 12.001)
    beam = make_beam()
    beam.set_polarization_fraction(0.8)
    members = [
        memory_experiment(images, detector, make_crystal()),
        memory_experiment(images, copy.deepcopy(detector), make_crystal()),
        memory_experiment(images, moved, make_crystal()),
        memory_experiment(images, detector, make_crystal(), beam),
    ]
    for identifier, experiment in zip("abcd", members):
        experiment.identifier = identifier
    experiments = ExperimentList(members)
    first, equal, other_detector, other_beam = table_keys(experiments)
    assert first == equal
    assert len({first, other_detector, other_beam}) == 3
    assert detector_numbers(experiments) == [0, 1, 2, 0]
    share_equal_detectors(experiments)
    assert detector_numbers(experiments) == [0, 0, 1, 0]
    assert table_keys(experiments) == (first, equal, other_detector, other_beam)
