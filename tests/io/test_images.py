from __future__ import annotations

import h5py
import numpy as np
import pytest

from cctbx import sgtbx, uctbx
from dxtbx import flumpy
from dxtbx.format.FormatCBFMini import FormatCBFMini
from dxtbx.model.experiment_list import ExperimentListFactory

from dials_diffuse.io.images import write_cbf, write_nexus
from dials_diffuse.simulation.models import make_series
from dials_diffuse.simulation.settings import (
    BeamSettings,
    DetectorSettings,
    GoniometerSettings,
    ScanSettings,
    SimulationSettings,
)
from dials_diffuse.util.compat import trusted_range_is_inclusive

SIZE = (60, 50)
CELL = uctbx.unit_cell((30, 41, 53, 90, 90, 90))
GROUP = sgtbx.space_group_info("P 21 21 21").group()
GENERAL = GoniometerSettings((0.9, 0.1, -0.2), (10, 20, 30), (-5, 6, 7))
TOLERANCE = 1e-6  # pixels


def experiment(n_images=3, width=1 / 3, stills=False, goniometer=None, **detector):
    """The models of a series, none of its numbers short in decimals."""
    values = {
        "size": SIZE,
        "pixel": 0.172,
        "distance": 31.23456789,
        "beam_centre": (33.123456, 21.987654),
        "count_cutoff": 1048575,
        **detector,
    }
    s = SimulationSettings(
        mode="stills" if stills else "rotation",
        n_images=n_images,
        beam=BeamSettings(wavelength=0.97951234567),
        detector=DetectorSettings(preset="given", **values),
        goniometer=goniometer or GoniometerSettings(),
        scan=ScanSettings(start=-12.3456789, width=width, exposure=0.123456789),
    )
    return make_series(s, CELL, GROUP)[0].experiments[0]


def counts(n: int, detector, seed: int = 3) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(-1, 70000, SIZE[::-1], dtype=np.int32) for _ in detector]
        for _ in range(n)
    ]


def write_cbf_files(folder, e, images, width: float = 1 / 3) -> list[str]:
    paths = [folder / f"x_1_{i:05d}.cbf" for i in range(1, len(images) + 1)]
    for i, (path, (image,)) in enumerate(zip(paths, images)):
        start = -12.3456789 + i * width
        write_cbf(path, image, e, 0.123456789, start, width)
    return [str(path) for path in paths]


def read(paths):
    return ExperimentListFactory.from_filenames([str(path) for path in paths])


def assert_same_detector(found, expected) -> None:
    """Every position in pixels, sensor and trusted range."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.get_image_size() == b.get_image_size()
        pixel = b.get_pixel_size()
        assert a.get_pixel_size() == pytest.approx(pixel, rel=1e-12)
        for px in ((0, 0), (60, 0), (0, 50), (60, 50), (17.5, 33.5)):
            shift = np.subtract(a.get_pixel_lab_coord(px), b.get_pixel_lab_coord(px))
            assert np.abs(shift).max() < TOLERANCE * pixel[0]
            # where no parallax reaches
            mm = tuple(np.multiply(px, pixel))
            shift = np.subtract(a.get_lab_coord(mm), b.get_lab_coord(mm))
            assert np.abs(shift).max() < TOLERANCE * pixel[0]
        assert a.get_trusted_range() == b.get_trusted_range()
        assert a.get_material() == b.get_material()
        assert a.get_thickness() == pytest.approx(b.get_thickness(), rel=1e-12)
        assert a.get_mu() == pytest.approx(b.get_mu(), rel=1e-12)
        strategy = a.get_px_mm_strategy()
        assert strategy.name() == b.get_px_mm_strategy().name()


def assert_same_images(experiment, images, first: int = 0) -> None:
    for i, panels in enumerate(images):
        data = experiment.imageset.get_raw_data(first + i)
        assert len(data) == len(panels)
        for a, b in zip(data, panels):
            np.testing.assert_array_equal(a.as_numpy_array(), b)


def laboratory_axis(goniometer) -> np.ndarray:
    setting = np.reshape(goniometer.get_setting_rotation(), (3, 3))
    return setting @ goniometer.get_rotation_axis_datum()


def rotation_at(experiment, angle: float) -> np.ndarray:
    """S R(angle) F by dxtbx' own formula."""
    goniometer = experiment.goniometer
    axis = np.array(goniometer.get_rotation_axis_datum())
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    cross = np.cross(np.eye(3), axis).T  # axis x v is cross @ v
    r = c * np.eye(3) + s * cross + (1 - c) * np.outer(axis, axis)
    setting = np.reshape(goniometer.get_setting_rotation(), (3, 3))
    return setting @ r @ np.reshape(goniometer.get_fixed_rotation(), (3, 3))


def test_a_sweep_of_cbf_files(tmp_path):
    e = experiment()
    images = counts(3, e.detector)
    (found,) = read(write_cbf_files(tmp_path, e, images))
    assert_same_detector(found.detector, e.detector)
    assert found.beam.get_s0() == pytest.approx(e.beam.get_s0(), rel=1e-12)
    assert found.beam.get_flux() == e.beam.get_flux()
    assert found.goniometer == e.goniometer
    assert found.scan.get_image_range() == (1, 3)
    assert found.scan.get_oscillation() == pytest.approx(e.scan.get_oscillation())
    exposures = list(found.scan.get_exposure_times())
    assert exposures == pytest.approx([0.123456789] * 3)
    assert_same_images(found, images)


@pytest.mark.parametrize(
    "goniometer",
    [
        GoniometerSettings(fixed_rotation=(10, 20, 30)),
        GoniometerSettings(setting_rotation=(40, 0, 0)),
        GoniometerSettings((0, 1, 0), (10, 20, 30), (0, 0, -90)),
    ],
)
def test_the_rotation_axis_of_cbf_files(tmp_path, goniometer):
    """The crystal turns as it did, apart from a rotation on the goniometer head."""
    e = experiment(goniometer=goniometer)
    (found,) = read(write_cbf_files(tmp_path, e, counts(3, e.detector)))
    np.testing.assert_allclose(
        laboratory_axis(found.goniometer), laboratory_axis(e.goniometer), atol=1e-9
    )
    start, end = 3.0, 40.0
    turns = [rotation_at(x, end) @ rotation_at(x, start).T for x in (found, e)]
    np.testing.assert_allclose(*turns, atol=1e-9)


def test_full_precision_matters(tmp_path):
    """What the writer of dxtbx loses, for comparison."""
    e = experiment(beam_centre=(2033.123456, 1921.987654))
    (image,) = counts(1, e.detector)[0]
    path = tmp_path / "x_00001.cbf"
    FormatCBFMini.as_file(
        e.detector, e.beam, e.goniometer, e.scan, flumpy.from_numpy(image), str(path)
    )
    (found,) = read([path])
    shift = np.subtract(found.detector[0].get_origin(), e.detector[0].get_origin())
    assert np.abs(shift).max() / 0.172 > 1000 * TOLERANCE


def test_stills_in_cbf_files(tmp_path):
    """As dials.import makes them: a zero-width scan and one shared sequence."""
    e = experiment(stills=True)
    images = counts(3, e.detector)
    paths = write_cbf_files(tmp_path, e, images, width=0)
    found = read(paths)
    assert len(found) == 3
    assert all(x.is_still() for x in found)
    assert {x.scan.get_oscillation()[1] for x in found} == {0.0}
    assert_same_detector(found[0].detector, e.detector)
    assert_same_images(found[0], images)


def test_stills_at_different_angles_are_no_sweep(tmp_path):
    e = experiment(stills=True)
    paths = [tmp_path / f"x_{i:05d}.cbf" for i in (1, 2, 3)]
    for i, path in enumerate(paths):
        (image,) = counts(1, e.detector)[0]
        write_cbf(path, image, e, 0.1, start=5.0 * i, width=0)
    found = read(paths)
    assert [x.scan.get_image_range() for x in found] == [(1, 1), (2, 2), (3, 3)]
    assert {x.scan.get_oscillation() for x in found} == {(0.0, 0.0)}


def test_a_cbf_file_without_parallax(tmp_path):
    e = experiment(thickness=0.0)
    (found,) = read(write_cbf_files(tmp_path, e, counts(1, e.detector)))
    assert_same_detector(found.detector, e.detector)
    assert found.detector[0].get_px_mm_strategy().name() == "SimplePxMmStrategy"


def test_files_are_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        e = experiment()
        write_cbf_files(tmp_path / name, e, counts(1, e.detector))
        write_nexus(tmp_path / name / "x.nxs", e, counts(3, e.detector), 0.1)
    for name in ("x_1_00001.cbf", "x.nxs"):
        a, b = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        assert a == b


@pytest.mark.parametrize(
    "goniometer",
    [
        GoniometerSettings((0, 1, 0)),
        GoniometerSettings((-1, 0, 0)),
        GoniometerSettings((1, 0, 1e-5)),
        GoniometerSettings(setting_rotation=(0, 5, 0)),
    ],
)
def test_rotation_that_cbf_cannot_tell(tmp_path, goniometer):
    e = experiment(goniometer=goniometer)
    image = np.zeros(SIZE[::-1], np.int32)
    with pytest.raises(ValueError, match="not about x of the laboratory: write NeXus"):
        write_cbf(tmp_path / "x_1.cbf", image, e, 0.1)
    assert not list(tmp_path.iterdir())
    stills = experiment(goniometer=goniometer, stills=True)
    write_cbf(tmp_path / "x_1.cbf", image, stills, 0.1)


@pytest.mark.parametrize(
    "detector, shape, dtype, message",
    [
        ({"panels": (1, 2)}, (50, 60), np.int32, "one panel, but the detector has 2"),
        ({"two_theta": 0.01}, (50, 60), np.int32, "not perpendicular to the beam"),
        ({}, (60, 50), np.int32, r"50 x 60 pixels \(slow, fast\)"),
        ({}, (50, 60), np.float32, "integers, not float32"),
    ],
)
def test_what_cbf_cannot_tell(tmp_path, detector, shape, dtype, message):
    e = experiment(**detector)
    with pytest.raises(ValueError, match=message):
        write_cbf(tmp_path / "x_1.cbf", np.zeros(shape, dtype), e, 0.1)
    assert not list(tmp_path.iterdir())


GONIOMETERS = [
    GoniometerSettings(),
    GoniometerSettings((0, 1, 0)),
    GoniometerSettings(setting_rotation=(0, 0, 25)),
    GENERAL,
]
DETECTORS = [
    {},
    {"two_theta": 20.0},
    {"beam_centre": (0, 0)},
    {"panels": (3, 1), "panel_tilt": 15.0, "beam_centre": None},
    {"panels": (2, 2), "panel_tilt": -9.0, "two_theta": 14.0},
]


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("goniometer", GONIOMETERS)
def test_a_sweep_in_nexus(tmp_path, detector, goniometer):
    e = experiment(goniometer=goniometer, **detector)
    images = counts(3, e.detector)
    write_nexus(tmp_path / "x.nxs", e, iter(images), 0.123456789)
    (found,) = read([tmp_path / "x.nxs"])
    assert_same_detector(found.detector, e.detector)
    assert found.beam.get_s0() == pytest.approx(e.beam.get_s0(), rel=1e-12)
    assert found.scan.get_image_range() == (1, 3)
    assert found.scan.get_oscillation() == pytest.approx(e.scan.get_oscillation())
    exposures = list(found.scan.get_exposure_times())
    assert exposures == pytest.approx([0.123456789] * 3)
    for angle in (-12.3456789, 0.0, 77.0):
        np.testing.assert_allclose(
            rotation_at(found, angle), rotation_at(e, angle), atol=1e-9
        )
    assert_same_images(found, images)


@pytest.mark.parametrize("detector", DETECTORS)
def test_stills_in_nexus(tmp_path, detector):
    """True stills, each with its own image."""
    e = experiment(stills=True, **detector)
    images = counts(4, e.detector)
    write_nexus(tmp_path / "x.nxs", e, images, 0.1)
    found = read([tmp_path / "x.nxs"])
    assert len(found) == 4
    for x, image in zip(found, images):
        assert x.is_still() and x.scan is None and x.goniometer is None
        assert_same_detector(x.detector, e.detector)
        assert_same_images(x, [image])


@pytest.mark.parametrize("goniometer", GONIOMETERS)
def test_one_image_of_a_sweep_in_nexus(tmp_path, goniometer):
    """No axis moves: the file holds one, that of the rotation in the laboratory."""
    e = experiment(n_images=1, goniometer=goniometer)
    write_nexus(tmp_path / "x.nxs", e, counts(1, e.detector), 0.1)
    (found,) = read([tmp_path / "x.nxs"])
    assert found.scan.get_oscillation() == pytest.approx(e.scan.get_oscillation())
    np.testing.assert_allclose(
        laboratory_axis(found.goniometer), laboratory_axis(e.goniometer), atol=1e-9
    )
    turns = [rotation_at(x, 40.0) @ rotation_at(x, 3.0).T for x in (found, e)]
    np.testing.assert_allclose(*turns, atol=1e-9)
    assert np.reshape(found.goniometer.get_fixed_rotation(), (3, 3)) == pytest.approx(
        np.eye(3)
    )


def test_gaps_in_nexus_are_masked(tmp_path):
    e = experiment(panels=(1, 2))
    rng = np.random.default_rng(8)
    active = [rng.random(SIZE[::-1]) < 0.9 for _ in e.detector]
    ones = [np.ones(SIZE[::-1], np.int32) for _ in e.detector]
    write_nexus(tmp_path / "x.nxs", e, [ones] * 3, 0.1, active)
    (found,) = read([tmp_path / "x.nxs"])
    for mask, expected in zip(found.imageset.get_mask(0), active):
        np.testing.assert_array_equal(mask.as_numpy_array(), expected)


def test_gain_in_nexus(tmp_path):
    e = experiment(gain=2.5)
    write_nexus(tmp_path / "x.nxs", e, counts(3, e.detector), 0.1)
    with h5py.File(tmp_path / "x.nxs") as f:
        assert f["entry/data/data_scale_factor"][()] == 0.4
    (found,) = read([tmp_path / "x.nxs"])
    # dxtbx 3.11 does not read it, like the inclusive limits
    gain = 2.5 if trusted_range_is_inclusive() else 1.0
    assert found.detector[0].get_gain() == gain
    assert_same_images(found, counts(3, e.detector))


def test_floating_point_images_in_nexus(tmp_path):
    e = experiment()
    images = [[image.astype(np.float32) / 8] for (image,) in counts(3, e.detector)]
    write_nexus(tmp_path / "x.nxs", e, images, 0.1)
    (found,) = read([tmp_path / "x.nxs"])
    assert_same_images(found, images)


@pytest.mark.parametrize(
    "detector, n, shape, message",
    [
        ({}, 2, (50, 60), "2 images for a scan of 3"),
        ({}, 0, (50, 60), "no images to write"),
        ({}, 3, (60, 50), r"shape \(60, 50\) is not an image of a panel"),
        ({"panels": (2, 1)}, 3, (50, 60), "1 arrays for 2 panels"),
        ({"thickness": 0.0}, 3, (50, 60), "without material and thickness"),
    ],
)
def test_what_nexus_cannot_tell(tmp_path, detector, n, shape, message):
    e = experiment(**detector)
    with pytest.raises(ValueError, match=message):
        write_nexus(tmp_path / "x.nxs", e, [[np.zeros(shape, np.int32)]] * n, 0.1)
    assert not list(tmp_path.iterdir())


def test_panels_of_different_sizes(tmp_path):
    e = experiment(panels=(2, 1))
    e.detector[1].set_image_size((60, 51))
    with pytest.raises(ValueError, match=r"\(60, 50\), \(60, 51\).*one NeXus array"):
        write_nexus(tmp_path / "x.nxs", e, counts(3, e.detector), 0.1)
