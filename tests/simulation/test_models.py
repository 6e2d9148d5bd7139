from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.stats
import simulate_images

from cctbx import sgtbx, uctbx
from cctbx.array_family import flex
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.geometry.orientation import goniometer_rotation
from dials_diffuse.io.images import write_cbf, write_nexus
from dials_diffuse.simulation import models
from dials_diffuse.simulation.settings import (
    BackgroundSettings,
    BeamSettings,
    CrystalSettings,
    DetectorSettings,
    GoniometerSettings,
    ScanSettings,
    SimulationSettings,
)

SIZE, PIXEL, DISTANCE = (60, 50), 0.172, 30.0
CELL = uctbx.unit_cell((30, 41, 53, 90, 90, 90))
GROUP = sgtbx.space_group_info("P 21 21 21").group()
GENERAL = GoniometerSettings((0.9, 0.1, -0.2), (10, 20, 30), (-5, 6, 7))
TURNED = GoniometerSettings((1.0, 0.0, 0.0), (10, 20, 30), (40, 0, 0))  # about x


def small_detector(**kwargs) -> DetectorSettings:
    values = {"size": SIZE, "pixel": PIXEL, "distance": DISTANCE, **kwargs}
    return DetectorSettings(preset="given", **values)


def settings(detector: dict | None = None, **kwargs) -> SimulationSettings:
    values = {"n_images": 4, "detector": small_detector(**(detector or {})), **kwargs}
    return SimulationSettings(**values)


def matrix(values) -> np.ndarray:
    return np.array(values).reshape(3, 3)


def axis_rotation(axis: int, degrees: float) -> np.ndarray:
    """Right-handed rotation about x, y or z."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    r = np.eye(3)
    r[i, i], r[i, j], r[j, i], r[j, j] = c, -s, s, c
    return r


def crystals_of(s: SimulationSettings, cell=CELL, group=GROUP) -> list:
    """The crystals of all series, in their order."""
    return [
        crystal
        for number in range(1, s.n_crystals + 1)
        for crystal in models.series_crystals(s, cell, group, number)
    ]


def settings_matrix(crystals) -> np.ndarray:
    return np.array([matrix(crystal.get_A()) for crystal in crystals])


def test_beam():
    beam = models.make_beam(
        settings(
            beam=BeamSettings(
                wavelength=1.25,
                flux=3e11,
                polarization_fraction=0.9,
                polarization_normal=(3, 4, 0),
            )
        )
    )
    assert beam.get_s0() == pytest.approx((0, 0, -0.8))
    assert beam.get_polarization_normal() == pytest.approx((0.6, 0.8, 0))
    assert beam.get_polarization_fraction() == 0.9
    assert beam.get_flux() == 3e11


def test_one_panel():
    detector = models.make_detector(
        settings({"beam_centre": (20.5, 10.25), "gain": 2.5, "count_cutoff": 100})
    )
    (panel,) = detector
    x, y = -20.5 * PIXEL, 10.25 * PIXEL
    assert panel.get_origin() == pytest.approx((x, y, -DISTANCE))
    assert panel.get_fast_axis() == pytest.approx((1, 0, 0))
    assert panel.get_slow_axis() == pytest.approx((0, -1, 0))
    assert panel.get_gain() == 2.5
    assert panel.get_material() == "Si"
    # at 12.66 keV; NIST gives mu/rho = 33.89 cm2/g at 10 keV and 10.34 at 15 keV
    assert 10.34 < panel.get_mu() * 10 / 2.33 < 33.89
    assert panel.get_thickness() == 0.45
    data = flex.int(flex.grid(*SIZE[::-1]), 0)
    for i, value in enumerate((-1, 0, 99, 101)):
        data[0, i] = value
    trusted = panel.get_trusted_range_mask(data)
    assert [trusted[0, i] for i in range(4)] == [False, True, True, False]


def test_parallax_only_for_a_thick_sensor():
    thin = models.make_detector(settings({"thickness": 0.0}))[0]
    thick = models.make_detector(settings({"thickness": 1.0}))[0]
    corner = (59.5, 49.5)
    flat = np.array(corner) * PIXEL
    assert thin.get_px_mm_strategy().name() == "SimplePxMmStrategy"
    assert thin.pixel_to_millimeter(corner) == pytest.approx(flat)
    shift = np.array(thick.pixel_to_millimeter(corner)) - flat
    assert np.all(shift < -0.01)  # towards the beam


@pytest.mark.parametrize("panels", [(1, 1), (3, 1), (2, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("beam_centre", [None, (31.3, 20.7), (-8.0, 60.5)])
@pytest.mark.parametrize("two_theta", [0, 25])
def test_the_beam_meets_its_pixel_at_the_distance(panels, beam_centre, two_theta):
    s = settings(
        {
            "panels": panels,
            "panel_tilt": 12,
            "beam_centre": beam_centre,
            "two_theta": two_theta,
            "thickness": 0.0,
        }
    )
    x, y = beam_centre or (panels[0] * SIZE[0] / 2, panels[1] * SIZE[1] / 2)
    i = min(max(int(x // SIZE[0]), 0), panels[0] - 1)
    j = min(max(int(y // SIZE[1]), 0), panels[1] - 1)
    panel = models.make_detector(s)[j * panels[0] + i]
    hit = panel.get_pixel_lab_coord((x - i * SIZE[0], y - j * SIZE[1]))
    # the arm lifts the detector
    angle = np.radians(two_theta)
    expected = DISTANCE * np.array([0, np.sin(angle), -np.cos(angle)])
    np.testing.assert_allclose(hit, expected, atol=1e-9)


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("n", [3, 5])
def test_panels_are_a_polygon_about_the_sample(along, n):
    """With the angle of a circumscribed polygon, all are at the distance."""
    length = SIZE[along] * PIXEL
    tilt = 2 * np.degrees(np.arctan(length / 2 / DISTANCE))
    panels = (n, 1) if along == 0 else (1, n)
    detector = models.make_detector(
        settings({"panels": panels, "panel_tilt": tilt, "two_theta": 7})
    )
    assert len(detector) == n
    for panel in detector:
        normal = np.array(panel.get_normal())
        assert np.dot(normal, panel.get_origin()) == pytest.approx(DISTANCE)
        centre = panel.get_lab_coord(tuple(np.array(SIZE) * PIXEL / 2))
        np.testing.assert_allclose(centre, DISTANCE * normal, atol=1e-9)
    # they follow each other along the axis and touch
    width, height = np.array(SIZE) * PIXEL
    ends = (
        ((width, 0), (width, height)) if along == 0 else ((0, height), (width, height))
    )
    starts = ((0, 0), (0, height)) if along == 0 else ((0, 0), (width, 0))
    for a, b in zip(detector, list(detector)[1:]):
        for end, start in zip(ends, starts):
            np.testing.assert_allclose(
                a.get_lab_coord(end), b.get_lab_coord(start), atol=1e-9
            )


def test_panels_without_tilt_are_one_plane():
    whole = models.make_detector(settings({"size": (120, 150)}))[0]
    parts = models.make_detector(settings({"panels": (2, 3)}))
    for k, part in enumerate(parts):
        offset = (k % 2 * SIZE[0] + 3.5, k // 2 * SIZE[1] + 7.5)
        np.testing.assert_allclose(
            part.get_pixel_lab_coord((3.5, 7.5)),
            whole.get_pixel_lab_coord(offset),
            atol=1e-9,
        )


def test_panels_must_face_the_sample():
    with pytest.raises(ValueError, match="panel_tilt=60 degrees.*do not all face"):
        models.make_detector(settings({"panels": (6, 1), "panel_tilt": 60}))
    models.make_detector(settings({"panels": (3, 1), "panel_tilt": 60}))


@pytest.mark.parametrize("mode", ["rotation", "stills"])
@pytest.mark.parametrize(
    "detector, nexus",
    [({}, False), ({"panels": (1, 2)}, True), ({"two_theta": -3.0}, True)],
)
def test_which_detectors_need_nexus(detector, nexus, mode):
    assert models.needs_nexus(settings(detector, mode=mode)) is nexus


@pytest.mark.parametrize(
    "goniometer, nexus",
    [
        (GoniometerSettings((2.5, 0, 0)), False),
        (GoniometerSettings((1, 0, 1e-9)), False),
        (GoniometerSettings((1, 0, 0), fixed_rotation=(10, 20, 30)), False),
        (GoniometerSettings((1, 0, 0), setting_rotation=(35, 0, 0)), False),
        # what the setting rotation puts back
        (GoniometerSettings((0, 1, 0), setting_rotation=(0, 0, -90)), False),
        (GoniometerSettings((0, 1, 0)), True),
        (GoniometerSettings((-1, 0, 0)), True),
        (GoniometerSettings((1, 0, 1e-5)), True),
        (GoniometerSettings((1, 0, 0), setting_rotation=(0, 0, 2)), True),
    ],
)
def test_which_goniometers_need_nexus(goniometer, nexus):
    assert models.needs_nexus(settings(goniometer=goniometer)) is nexus
    assert not models.needs_nexus(settings(goniometer=goniometer, mode="stills"))


def test_goniometer():
    goniometer = models.make_goniometer(settings(goniometer=GENERAL))
    axis = np.array(GENERAL.axis)
    assert goniometer.get_rotation_axis_datum() == pytest.approx(
        axis / np.linalg.norm(axis)
    )
    for angles, found in (
        (GENERAL.fixed_rotation, goniometer.get_fixed_rotation()),
        (GENERAL.setting_rotation, goniometer.get_setting_rotation()),
    ):
        x, y, z = (axis_rotation(i, angle) for i, angle in enumerate(angles))
        np.testing.assert_allclose(matrix(found), z @ y @ x, atol=1e-12)


CELLS = {
    **simulate_images.CELLS,
    "I 1 2 1": (24, 31, 28, 90, 106, 90),
    "R 3 :R": (30, 30, 30, 75, 75, 75),
    "F m -3 m": (40, 40, 40, 90, 90, 90),
}
N_TIED = {"P 41 21 2": 2, "P 61": 2, "R 3 :R": 1, "F m -3 m": 1}  # free edges


@pytest.mark.parametrize("symbol", CELLS)
def test_a_crystal_without_rotation_has_a_star_along_x(symbol):
    group = sgtbx.space_group_info(symbol).group()
    cell = uctbx.unit_cell(CELLS[symbol])
    (crystal,) = crystals_of(
        settings(crystal=CrystalSettings(orientation=(0, 0, 0))), cell, group
    )
    a = matrix(crystal.get_A())
    np.testing.assert_allclose(a[[1, 2, 2], [0, 0, 1]], 0, atol=1e-12)
    assert np.all(np.diag(a) > 0)
    assert crystal.get_unit_cell().parameters() == pytest.approx(CELLS[symbol])
    assert crystal.get_space_group() == group


def test_orientation_of_the_first_crystal():
    angles = (20.0, -35.0, 70.0)
    crystals = crystals_of(
        settings(n_crystals=3, crystal=CrystalSettings(orientation=angles))
    )
    x, y, z = (axis_rotation(i, angle) for i, angle in enumerate(angles))
    u = settings_matrix(crystals) @ np.diag(CELL.parameters()[:3])
    np.testing.assert_allclose(u[0], z @ y @ x, atol=1e-12)
    # the others are as without it
    others = crystals_of(settings(n_crystals=3))
    np.testing.assert_array_equal(
        settings_matrix(crystals)[1:], settings_matrix(others)[1:]
    )
    assert np.abs(u[1] - u[2]).max() > 0.1


@pytest.mark.parametrize("symbol", CELLS)
def test_spread_cells_have_the_symmetry(symbol):
    group = sgtbx.space_group_info(symbol).group()
    cell = uctbx.unit_cell(CELLS[symbol])
    spread = 0.03
    rng = np.random.default_rng(5)
    cells = [models.spread_cell(cell, group, spread, rng) for _ in range(300)]
    assert all(group.is_compatible_unit_cell(c, 1e-9, 1e-9) for c in cells)
    found = np.array([c.parameters() for c in cells])
    np.testing.assert_allclose(found[:, 3:] - CELLS[symbol][3:], 0, atol=1e-9)
    relative = found[:, :3] / CELLS[symbol][:3] - 1
    assert relative.std(axis=0) == pytest.approx(spread, rel=0.15)
    rank = np.linalg.matrix_rank(relative, tol=1e-6)
    assert rank == N_TIED.get(symbol, 3)


def test_each_crystal_has_its_own_cell():
    s = settings(n_crystals=3, crystal=CrystalSettings(cell_spread=0.01))
    cells = [c.get_unit_cell() for c in crystals_of(s)]
    edges = np.array([c.parameters()[0] for c in cells])
    assert np.abs(np.diff(edges)).min() > 1e-3
    assert edges == pytest.approx(30, rel=0.05)
    # the spread leaves the orientations alone
    flat = dataclasses.replace(s, crystal=CrystalSettings())
    for a, b in zip(*(crystals_of(x) for x in (s, flat))):
        assert np.array(a.get_U()) == pytest.approx(np.array(b.get_U()))


@pytest.mark.parametrize("goniometer", [GoniometerSettings(), GENERAL])
def test_stepped_stills_are_the_frames_of_a_sweep(goniometer):
    s = settings(
        goniometer=goniometer,
        scan=ScanSettings(start=12.0, width=7.5),
        n_images=5,
        n_crystals=2,
    )
    stills = dataclasses.replace(s, mode="stills")
    pairs = zip(
        models.make_series(s, CELL, GROUP), models.make_series(stills, CELL, GROUP)
    )
    for sweep, series in pairs:
        (e,) = sweep.experiments
        a = matrix(e.crystal.get_A())
        for i, still in enumerate(series.experiments):
            # goniometer_rotation is that of the middle of the image
            expected = goniometer_rotation(e, i - 0.5) @ a
            found = matrix(still.crystal.get_A())
            np.testing.assert_allclose(found, expected, atol=1e-14)
            assert np.abs(found - goniometer_rotation(e, i) @ a).max() > 1e-4


def random_stills(n_images: int, **kwargs) -> np.ndarray:
    s = settings(
        mode="stills",
        n_images=n_images,
        scan=ScanSettings(orientations="random"),
        **kwargs,
    )
    a = settings_matrix(crystals_of(s))
    return a @ np.diag(CELL.parameters()[:3])


def test_random_stills_are_uniformly_distributed():
    u = random_stills(1500)
    np.testing.assert_allclose(u @ u.transpose(0, 2, 1) - np.eye(3), 0, atol=1e-9)
    assert np.abs(u.mean(axis=0)).max() < 4 / np.sqrt(3 * len(u))
    assert (u**2).mean(axis=0) == pytest.approx(1 / 3, abs=0.04)
    # any direction is uniform on the sphere (Archimedes), and the angle of rotation has
    # the density (1 - cos)/pi of the Haar measure
    for row in u.reshape(-1, 9).T:
        assert scipy.stats.kstest(row, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    angle = np.arccos(np.clip((np.trace(u, axis1=1, axis2=2) - 1) / 2, -1, 1))
    test = scipy.stats.kstest(angle, lambda x: (x - np.sin(x)) / np.pi)
    assert test.pvalue > 1e-3


def test_random_orientations_do_not_depend_on_what_else_is_made():
    few, many = random_stills(3), random_stills(8, n_crystals=2)
    np.testing.assert_array_equal(few, many[:3])
    assert np.abs(many[:8] - many[8:]).max() > 0.1
    assert np.abs(few - random_stills(3, seed=43)).max() > 0.1


def test_random_stills_have_no_given_orientation():
    with pytest.raises(ValueError, match="scan.orientations=random makes all"):
        random_stills(3, crystal=CrystalSettings(orientation=(0, 0, 0)))


@pytest.mark.parametrize("mode", ["rotation", "stills"])
def test_series(mode):
    s = settings(
        mode=mode, n_crystals=2, n_images=3, background=BackgroundSettings(n_images=2)
    )
    series = models.make_series(s, CELL, GROUP, prefix="x")
    assert [x.number for x in series] == [1, 2, 3]
    assert [x.name for x in series] == ["1", "2", "background"]
    assert [x.n_images for x in series] == [3, 3, 2]
    stills = mode == "stills"
    assert {x.width for x in series} == {0.0 if stills else s.scan.width}
    experiments = [e for x in series for e in x.experiments]
    identifiers = [e.identifier for e in experiments]
    if stills:
        assert identifiers[:2] == ["x-42-1-00001", "x-42-1-00002"]
        assert len(set(identifiers)) == 8
        assert all(e.is_still() and e.goniometer is None for e in experiments)
    else:
        assert identifiers == ["x-42-1", "x-42-2", "x-42-3"]
        ranges = [e.scan.get_image_range() for e in experiments]
        assert ranges == [(1, 3), (1, 3), (1, 2)]
        assert {e.scan.get_oscillation() for e in experiments} == {(0.0, 0.5)}
    assert [e.crystal is None for e in experiments] == [
        x.is_background for x in series for _ in x.experiments
    ]
    everything = ExperimentList(experiments)
    assert len(everything.detectors()) == len(everything.beams()) == 1


def test_series_are_the_same_each_time():
    s = settings(n_crystals=2, crystal=CrystalSettings(cell_spread=0.01))
    first, second = (models.make_series(s, CELL, GROUP) for _ in range(2))
    for a, b in zip(first, second):
        assert a.experiments.to_dict() == b.experiments.to_dict()


def test_names_of_image_files(tmp_path):
    s = settings(n_images=2, background=BackgroundSettings(n_images=1))
    one, background = models.make_series(s, CELL, GROUP)
    names = [p.name for p in models.image_paths(one, tmp_path, "a.b", nexus=False)]
    assert names == ["a.b_1_00001.cbf", "a.b_1_00002.cbf"]
    (path,) = models.image_paths(background, tmp_path, "a.b", nexus=True)
    assert path == tmp_path / "a.b_background.nxs"


def write_series(folder, s: SimulationSettings) -> list[models.Series]:
    """All series, with images that hold 100·series + 10·image + panel."""
    result = models.make_series(s, CELL, GROUP)
    nexus = models.needs_nexus(s)
    for series in result:
        paths = models.image_paths(series, folder, "sim", nexus)
        e = series.experiments[0]
        images = [
            [
                np.full(SIZE[::-1], 100 * series.number + 10 * i + k, np.int32)
                for k in range(len(e.detector))
            ]
            for i in range(series.n_images)
        ]
        if nexus:
            write_nexus(paths[0], e, images, 0.1)
        else:
            for path, image in zip(paths, images):
                write_cbf(path, image[0], e, 0.1)
        assert models.attach_images(series, paths) is series.experiments
    return result


def values(imageset, i: int) -> list[int]:
    return [int(panel[0]) for panel in imageset.get_raw_data(i)]


@pytest.mark.parametrize("mode", ["rotation", "stills"])
@pytest.mark.parametrize("goniometer", [GENERAL, TURNED])
@pytest.mark.parametrize("panels", [(1, 1), (2, 1)])
def test_experiment_lists_open_again_with_their_images(
    tmp_path, mode, panels, goniometer
):
    """Each still its own image, with the exact models; a background of one image."""
    s = settings(
        {"panels": panels, "panel_tilt": 10, "distance": 1e3 / 33},
        mode=mode,
        n_crystals=2,
        n_images=3,
        goniometer=goniometer,
        background=BackgroundSettings(n_images=1),
    )
    series = write_series(tmp_path, s)
    made = ExperimentList([e for x in series for e in x.experiments])
    made.as_file(str(tmp_path / "made.expt"))
    opened = ExperimentList.from_file(str(tmp_path / "made.expt"))
    n_panels = panels[0]
    for experiments in (made, opened):
        images = [
            values(e.imageset, i) for e in experiments for i in range(len(e.imageset))
        ]
        expected = [100 + 10 * i for i in range(3)] + [200 + 10 * i for i in range(3)]
        expected.append(300)
        assert images == [[v + k for k in range(n_panels)] for v in expected]
    assert len(made) == len(opened) == (7 if mode == "stills" else 3)
    for a, b in zip(made, opened):
        assert b.identifier == a.identifier
        assert b.beam == a.beam == b.imageset.get_beam(0)
        assert b.detector == a.detector == b.imageset.get_detector(0)
        assert b.goniometer == a.goniometer
        assert b.scan == a.scan
        assert (b.crystal is None) == (a.crystal is None)
        if a.crystal is not None:
            assert b.crystal.get_A() == pytest.approx(a.crystal.get_A(), abs=1e-12)


def test_the_number_of_files_must_fit(tmp_path):
    (series,) = models.make_series(settings(n_images=3), CELL, GROUP)
    paths = models.image_paths(series, tmp_path, "sim", nexus=False)
    with pytest.raises(ValueError, match="2 files for the 3 images of series 1"):
        models.attach_images(series, paths[:2])
