from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
    memory_experiment,
    random_images,
)

from cctbx import uctbx
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.extraction.geometry_report import log_images
from dials_diffuse.geometry.orientation import frame_model
from dials_diffuse.geometry.validation import (
    ImageResiduals,
    automatic_tolerance,
    image_residuals,
    images_to_reject,
    spot_residuals,
)

DISTANCE, PIXEL = 20.0, 0.3  # mm, as in make_detector
CELL = uctbx.unit_cell((26, 31, 22, 90, 90, 90))


def still(seed: int, detector=None) -> Experiment:
    detector = detector or make_detector(
        2, (200, 400), distance=80.0, tilt=3.0, parallax=True, pixel=(0.2, 0.2)
    )
    crystal = make_crystal("P 21 21 21", seed=seed)
    images = random_images(1, detector)
    return memory_experiment(images, detector, crystal, identifier=str(seed))


def sweep(n_images: int = 8) -> Experiment:
    """Scan-varying crystal on a goniometer with fixed and setting rotations."""
    detector = make_detector(parallax=True)
    crystal = make_crystal("P 21 21 21")
    experiment = memory_experiment(
        random_images(n_images, detector),
        detector,
        crystal,
        scan=make_scan(n_images, first=3),
        goniometer=make_goniometer("general"),
    )
    a = np.array(crystal.get_A()).reshape(3, 3)
    turns = Rotation.from_rotvec(np.outer(np.arange(n_images + 1), [0.002, 0, 0.001]))
    crystal.set_A_at_scan_points([tuple((r @ a).ravel()) for r in turns.as_matrix()])
    return experiment


def spots(experiment: Experiment, number: int = 0, noise: float = 0.0, n: int = 25):
    """The lattice points nearest to the Ewald sphere, seen along their s1."""
    rng = np.random.default_rng(number + 7)
    first, last = experiment.scan.get_array_range() if experiment.scan else (0, 1)
    table = flex.reflection_table()
    hkl, panels, xyz = [], [], []
    indices = np.array(np.meshgrid(*[np.arange(-9, 10)] * 3)).reshape(3, -1).T
    for image in range(first, last):
        frame = frame_model(experiment, image)
        s1 = indices @ frame.setting.T + frame.s0
        excess = np.abs(np.linalg.norm(s1, axis=1) - np.linalg.norm(frame.s0))
        for at in np.argsort(excess)[:n]:
            if not indices[at].any():
                continue
            try:
                panel, mm = experiment.detector.get_ray_intersection(tuple(s1[at]))
            except RuntimeError:
                continue
            px = experiment.detector[panel].millimeter_to_pixel(mm)
            xyz.append((*(px + noise * rng.normal(size=2)), image + rng.uniform(0, 1)))
            hkl.append(tuple(map(int, indices[at])))
            panels.append(panel)
    table["miller_index"] = flex.miller_index(hkl)
    table["panel"] = flex.size_t(panels)
    table["xyzobs.px.value"] = flex.vec3_double(xyz)
    table["id"] = flex.int(len(hkl), number)
    return table


def joined(experiments: ExperimentList, noise: float = 0.05) -> flex.reflection_table:
    result = flex.reflection_table()
    for number, experiment in enumerate(experiments):
        result.extend(spots(experiment, number, noise))
    return result


def turn(crystal, degrees: float) -> None:
    axis = np.array([0.6, 0.8, 0.0])  # across the beam
    crystal.rotate_around_origin(tuple(axis), degrees, deg=True)


def test_right_models_leave_the_distance_to_the_ewald_sphere():
    """Independent figure: spots were projected onto the sphere along s1."""
    experiment = still(1)
    table = spots(experiment, n=60)
    residuals = spot_residuals(experiment, table)
    a = np.array(experiment.crystal.get_A()).reshape(3, 3)
    s0 = np.array(experiment.beam.get_s0())
    s1 = np.array([a @ h for h in table["miller_index"]]) + s0
    excess = np.linalg.norm(s1, axis=1) - np.linalg.norm(s0)
    np.testing.assert_allclose(
        np.linalg.norm(residuals.rlp, axis=1), np.abs(excess), atol=1e-5
    )
    np.testing.assert_allclose(residuals.hkl @ a.T, residuals.rlp, atol=1e-12)


def test_the_spoiled_still_is_named(caplog):
    experiments = ExperimentList([still(i) for i in range(12)])
    reflections = joined(experiments)
    before = image_residuals(experiments, reflections)
    tolerance = automatic_tolerance(before, CELL, (4, 4, 4))
    assert images_to_reject(before, tolerance) == frozenset()
    turn(experiments[5].crystal, 0.5)
    images = image_residuals(experiments, reflections)
    tolerance = automatic_tolerance(images, CELL, (4, 4, 4))
    assert images_to_reject(images, tolerance) == {(5, 0)}
    # 0.5 degrees at |rlp| move a spot by up to 0.0087 |rlp|
    rlp = np.array(
        [
            np.array(experiments[5].crystal.get_A()).reshape(3, 3) @ h
            for h in reflections.select(reflections["id"] == 5)["miller_index"]
        ]
    )
    most = np.radians(0.5) * np.linalg.norm(rlp, axis=1).mean()
    moved = images.mean[5] - before.mean[5]
    assert 0.2 * most < moved < 1.1 * most
    with caplog.at_level(logging.INFO, logger="dials.diffuse.extract"):
        log_images(images, tolerance, reject=True)
    assert "the spots of 1 of 12 images" in caplog.text and "left out" in caplog.text
    assert json.loads(json.dumps(images.as_dict()))["experiment"] == list(range(12))


def test_half_a_pixel_is_seen_in_the_mean():
    detector = make_detector(1, parallax=False)
    experiments = ExperimentList([still(i, detector) for i in range(4)])
    reflections = joined(experiments)
    before = image_residuals(experiments, reflections)
    x, y, z = reflections["xyzobs.px.value"].parts()
    reflections["xyzobs.px.value"] = flex.vec3_double(x + 0.5, y, z)
    after = image_residuals(experiments, reflections)
    # at the centre of the detector, wavelength 1 Å; less towards its edge
    expected = 0.5 * PIXEL / DISTANCE / make_beam().get_wavelength()
    assert before.shift.max() < 0.35 * expected
    assert np.all(after.shift > 0.7 * expected) and np.all(after.shift < 1.2 * expected)


def test_rotation_takes_each_spots_own_image():
    """A wrong orientation at two scan points spoils the three images that use them."""
    experiments = ExperimentList([sweep()])
    reflections = joined(experiments, noise=0.0)
    images = image_residuals(experiments, reflections)
    assert images.array_index.tolist() == list(range(2, 10))  # images 3 to 10
    good = images.mean.max()
    crystal = experiments[0].crystal
    a = [np.array(crystal.get_A_at_scan_point(i)).reshape(3, 3) for i in range(9)]
    for i in (4, 5):
        a[i] = Rotation.from_rotvec([0.0, 0.02, 0.01]).as_matrix() @ a[i]
    crystal.set_A_at_scan_points([tuple(x.ravel()) for x in a])
    images = image_residuals(experiments, reflections)
    assert images_to_reject(images, 1.3 * good) == {(0, 5), (0, 6), (0, 7)}


def test_spots_that_an_end_of_the_scan_cuts_are_not_judged():
    """Their centroids are those of what is left of them."""
    experiments = ExperimentList([sweep()])
    reflections = joined(experiments, noise=0.0)
    first, last = experiments[0].scan.get_array_range()
    x, y, z = (part.as_numpy_array() for part in reflections["xyzobs.px.value"].parts())
    z0, z1 = np.floor(z).astype(int), np.floor(z).astype(int) + 1
    cut = (z0 == first) | (z1 == last)
    x = np.where(cut, x + 5, x)
    reflections["xyzobs.px.value"] = flex.vec3_double(*map(flex.double, (x, y, z)))
    names = image_residuals(experiments, reflections).array_index
    assert names.tolist() == list(range(first, last))
    zero = [0] * len(z)
    box = zip(zero, zero, zero, zero, map(int, z0), map(int, z1))
    reflections["bbox"] = flex.int6(list(box))
    images = image_residuals(experiments, reflections)
    assert images.array_index.tolist() == list(range(first + 1, last - 1))
    exact = image_residuals(experiments, joined(experiments, noise=0.0))
    np.testing.assert_allclose(images.mean, exact.mean[1:-1])
    alone = reflections.select(flex.bool(list(map(bool, cut))))
    assert len(image_residuals(experiments, alone)) == 2  # better than none


def images_of_spots(distances: list) -> ImageResiduals:
    """An image for each list of distances of its spots, by the formula of textbooks."""
    n = np.array([len(d) for d in distances])
    return ImageResiduals(
        experiment=np.arange(len(n)),
        array_index=np.zeros(len(n), dtype=int),
        n_spots=n,
        mean=np.array([np.mean(d) for d in distances]),
        largest=np.array([np.max(d) for d in distances]),
        shift=np.zeros(len(n)),
        rms_hkl=np.zeros(len(n)),
        mean_error=np.array(
            [
                np.std(d, ddof=1) / np.sqrt(len(d)) if len(d) > 1 else 0
                for d in distances
            ]
        ),
    )


def test_standard_error_of_the_mean_is_that_of_the_spots():
    experiments = ExperimentList([still(i) for i in range(3)])
    reflections = joined(experiments)
    images = image_residuals(experiments, reflections)
    for i, experiment in enumerate(experiments):
        own = reflections.select(reflections["id"] == i)
        distance = np.linalg.norm(spot_residuals(experiment, own).rlp, axis=1)
        expected = np.std(distance, ddof=1) / np.sqrt(len(distance))
        assert images.mean_error[i] == pytest.approx(expected)


def test_images_of_few_spots_are_named_only_if_that_is_sure():
    """A few spots that happen to be far off, against many or more that surely are."""
    rng = np.random.default_rng(11)
    usual = [0.001 * np.hypot(*rng.normal(size=(2, 200))) for _ in range(40)]
    tolerance = 0.0019  # 1.5 times the mean of the usual
    borderline = 0.0020  # wanted mean of an image
    few, many = (0.001 * np.hypot(*rng.normal(size=(2, n))) for n in (14, 400))
    few, many = (d * borderline / d.mean() for d in (few, many))
    outlier = np.append(np.full(13, 0.0012), 0.03)  # one spot of another index
    single, far = np.array([0.0025]), np.array([0.03])
    images = images_of_spots([*usual, few, many, outlier, single, far])
    assert np.all(images.mean[40:] > tolerance)
    named = {number for number, _ in images_to_reject(images, tolerance)}
    assert named == {41, 44}  # the one of many spots, and the one beyond all doubt


def test_usual_images_of_few_spots_are_not_named():
    """Of two thousand images of four spots each, drawn from one distribution."""
    rng = np.random.default_rng(12)
    many = [np.hypot(*rng.normal(size=(2, 100))) for _ in range(2000)]
    few = [np.hypot(*rng.normal(size=(2, 4))) for _ in range(2000)]
    images = images_of_spots(many + few)
    tolerance = 1.5 * float(np.median(images.mean))
    beyond = images.is_beyond(tolerance)
    assert np.sum(images.mean > tolerance) > 30  # by the mean alone
    assert beyond.sum() <= 8


def test_automatic_tolerance():
    images = image_residuals(
        ExperimentList([still(i) for i in range(10)]), ten_stills()
    )
    for means, expected in (
        ([0.0] * 10, 0.1 / 31 / 4),  # a tenth of a voxel
        ([0.002] * 10, 0.003),  # 1.5 times the median
        ([0.0018, 0.0022] * 4 + [0.001, 0.008], 0.002 + 5 * 1.4826 * 0.0002),
        ([0.02] * 10, 0.3 / 31),  # not the spots of these indices
    ):
        images.mean[:] = means
        found = automatic_tolerance(images, CELL, (2, 4, 2))
        assert found == pytest.approx(expected)


def test_automatic_tolerance_of_few_images():
    images = image_residuals(ExperimentList([still(1)]), spots(still(1)))
    images.mean[:] = 0.002
    assert automatic_tolerance(images, CELL) == pytest.approx(0.006)


def ten_stills() -> flex.reflection_table:
    result = flex.reflection_table()
    for number in range(10):
        table = spots(still(1))
        table["id"] = flex.int(len(table), number)
        result.extend(table)
    return result


def test_no_spots(caplog):
    none = spots(still(1))[:0]
    images = image_residuals(ExperimentList([still(1)]), none)
    assert len(images) == 0
    log_images(images, 0.01, reject=False)
    assert "no indexed reflection belongs to the experiments" in caplog.text
