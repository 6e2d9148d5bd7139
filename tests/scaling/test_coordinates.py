from __future__ import annotations

import itertools

import numpy as np
import pytest

from dxtbx.model import (
    Beam,
    Detector,
    Experiment,
    GoniometerFactory,
    ScanFactory,
)

from dials_diffuse.scaling.coordinates import (
    CoordinateFinder,
    directions_of,
    find_extents,
    project,
)

NAMES = {"phi", "s", "panel", "fast", "slow", "u", "v"}
SIZE = (100, 60)  # pixels along fast and slow
PIXEL = 0.2  # mm
BEAMS = [(0, 0, 1), (0, 0, -1), (0.02, -0.03, 1), (1, 0, 0), (0.99, 0.1, 0)]


def make_detector(n_panels: int = 2, distance: float = 20.0, tilt: float = 0.3):
    """Panels below each other, the lowest tilted towards the sample."""
    detector = Detector()
    height = SIZE[1] * PIXEL
    for i in range(n_panels):
        angle = tilt if i == n_panels - 1 else 0.0
        panel = detector.add_panel()
        slow = (0, -np.cos(angle), -np.sin(angle))
        panel.set_local_frame((1, 0, 0), slow, (-9.0, 11.0 - i * height, distance))
        panel.set_pixel_size((PIXEL, PIXEL))
        panel.set_image_size(SIZE)
    return detector


def make_scan(first: int, n: int, start: float, width: float):
    images = range(first, first + n)
    return ScanFactory.make_scan(
        (first, first + n - 1), [0.1] * n, (start, width), dict.fromkeys(images, 0.0)
    )


def make_experiment(detector, beam=(0, 0, 1), scan=None) -> Experiment:
    direction = np.array(beam) / np.linalg.norm(beam)
    goniometer = None if scan is None else GoniometerFactory.known_axis((1, 0, 0))
    s0 = Beam(tuple(map(float, direction)), 1.0)
    s0.set_unit_s0(tuple(map(float, direction)))
    return Experiment(beam=s0, detector=detector, goniometer=goniometer, scan=scan)


def rows(n: int = 200, n_panels: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    xyz = rng.uniform(0, 1, (n, 3)) * [*SIZE, 10]
    panel = rng.integers(0, n_panels, n).astype(np.uint64)
    return {"panel": panel, "xyzobs.px.value": xyz, "d": rng.uniform(1, 9, n)}


def find(experiments, experiment, columns, names=NAMES) -> dict[str, np.ndarray]:
    finder = CoordinateFinder(experiments, find_extents(experiments, (0.1, 0.5)))
    return finder.find(np.asarray(experiment), columns, names)


@pytest.mark.parametrize("beam", BEAMS)
def test_length_of_the_projection_is_twice_the_sine_of_theta(beam):
    rng = np.random.default_rng(8)
    directions = rng.normal(size=(300, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    along = np.array(beam) / np.linalg.norm(beam)
    two_theta = np.arccos(np.clip(directions @ along, -1, 1))
    length = np.linalg.norm(project(directions, beam), axis=1)
    np.testing.assert_allclose(length, 2 * np.sin(two_theta / 2), atol=1e-9)
    # It is that of s1 - s0, in units of 1/λ.
    np.testing.assert_allclose(length, np.linalg.norm(directions - along, axis=1))


def test_projection_keeps_areas():
    """Lambert: points evenly on the sphere are evenly in the disc of radius 2."""
    rng = np.random.default_rng(9)
    directions = rng.normal(size=(40000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    u, v = project(directions, (0, 0, 1)).T
    counts, *_ = np.histogram2d(u, v, bins=5, range=[(-1.2, 1.2)] * 2)
    expected = len(u) * 0.48**2 / (4 * np.pi)
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected)


def test_u_is_horizontal():
    assert project(np.array([np.sin(0.2), 0, np.cos(0.2)]), (0, 0, 1)) == pytest.approx(
        [2 * np.sin(0.1), 0]
    )


def test_directions_are_those_of_dxtbx():
    panel = make_detector()[1]
    fraction = np.array([[0.1, 0.9], [0.5, 0.2]])
    expected = [panel.get_pixel_lab_coord(tuple(f * SIZE)) for f in fraction]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(directions_of(panel, fraction), expected, rtol=1e-12)


def test_coordinates_of_several_experiments_and_panels():
    near, far = make_detector(2), make_detector(1, 50.0)
    experiments = [
        make_experiment(near, scan=make_scan(5, 10, 20.0, 0.5)),
        make_experiment(far),
        make_experiment(near, scan=make_scan(1, 10, -90.0, 1.0)),
    ]
    columns = rows()
    experiment = np.random.default_rng(10).integers(0, 3, 200)
    columns["panel"][experiment == 1] = 0
    columns["xyzobs.px.value"][experiment == 0, 2] += 4  # the array index of image 5
    found = find(experiments, experiment, columns)
    for i, (x, y, z) in enumerate(columns["xyzobs.px.value"]):
        own = experiments[experiment[i]]
        panel = own.detector[int(columns["panel"][i])]
        direction = np.array(panel.get_pixel_lab_coord((x, y)))
        direction /= np.linalg.norm(direction)
        u, v = project(direction, own.beam.get_unit_s0())
        phi = own.scan.get_angle_from_array_index(z) if own.scan else 0.0
        expected = {"phi": phi, "s": 1 / columns["d"][i], "u": u, "v": v}
        expected |= {"fast": x / SIZE[0], "slow": y / SIZE[1]}
        assert {k: found[k][i] for k in expected} == pytest.approx(expected, abs=1e-9)
    np.testing.assert_array_equal(found["panel"], columns["panel"])


def test_only_what_is_asked_for():
    experiments = [make_experiment(make_detector())]
    found = find(experiments, np.zeros(200, dtype=int), rows(), {"u", "phi"})
    assert set(found) == {"u", "phi"}


def test_the_origin_of_reciprocal_space():
    columns = {name: values[:2] for name, values in rows().items()}
    columns["d"] = np.array([0.0, 2.0])
    found = find([make_experiment(make_detector())], [0, 0], columns, {"s"})
    np.testing.assert_array_equal(found["s"], [0, 0.5])


def test_u_and_v_do_not_depend_on_panels_and_distance():
    whole, halves = make_detector(1, tilt=0), Detector()
    for i in range(2):
        panel = halves.add_panel(whole[0])
        origin = np.array(whole[0].get_origin()) + [i * SIZE[0] / 2 * PIXEL, 0, 0]
        panel.set_frame((1, 0, 0), (0, -1, 0), tuple(origin))
        panel.set_image_size((SIZE[0] // 2, SIZE[1]))
    columns = rows(n_panels=1)
    expected = find([make_experiment(whole)], np.zeros(200, dtype=int), columns)
    x = columns["xyzobs.px.value"][:, 0]
    columns["panel"] = (x >= SIZE[0] / 2).astype(np.uint64)
    x -= columns["panel"] * (SIZE[0] / 2)
    found = find([make_experiment(halves)], np.zeros(200, dtype=int), columns)
    for name in ("u", "v"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12)
    assert np.ptp(expected["u"]) > 0.5


def test_extents():
    scan = make_scan(1, 20, 20.0, 0.5)
    experiments = [
        make_experiment(make_detector(2), scan=scan),
        make_experiment(make_detector(2)),  # the same, read from another file
        make_experiment(make_detector(2, 21.0)),
    ]
    extents = find_extents(experiments, (0.1, 0.5))
    assert [extent.detector for extent in extents] == [0, 0, 1]
    assert [extent.is_still for extent in extents] == [False, True, True]
    np.testing.assert_allclose(
        [extent.phi for extent in extents], [(20, 30), (0, 0), (0, 0)]
    )
    assert [extent.n_panels for extent in extents] == [2, 2, 2]
    assert extents[0].number == 0
    assert extents[2].s == (0.1, 0.5)
    found = find(experiments, np.repeat([0], 200), rows())
    for name in "uv":
        low, high = getattr(extents[0], name)
        slack = 0.05 * (high - low)  # edges of panels are arcs between the corners
        assert low - slack <= found[name].min() < found[name].max() <= high + slack
        assert np.ptp(found[name]) > 0.8 * (high - low)


def test_a_scan_of_no_width_is_a_still():
    experiment = make_experiment(make_detector(), scan=make_scan(1, 1, 0.0, 0.0))
    (extent,) = find_extents([experiment], (0.1, 0.5))
    assert extent.is_still


def test_every_experiment_has_its_own_beam():
    """Stills of one detector whose beams differ by a degree and more."""
    detector = make_detector()
    experiments = [make_experiment(detector, beam) for beam in BEAMS[::2]]
    columns = rows(30)
    found = [find(experiments, np.full(30, i), columns, {"u", "v"}) for i in range(3)]
    mixed = find(experiments, np.arange(30) % 3, columns, {"u", "v"})
    for i, (x, y, _) in enumerate(columns["xyzobs.px.value"]):
        direction = detector[int(columns["panel"][i])].get_pixel_lab_coord((x, y))
        direction = np.array(direction) / np.linalg.norm(direction)
        for j, experiment in enumerate(experiments):
            expected = project(direction, experiment.beam.get_unit_s0())
            assert (found[j]["u"][i], found[j]["v"][i]) == pytest.approx(expected)
        assert mixed["u"][i] == found[i % 3]["u"][i]
    extents = find_extents(experiments, (0.1, 0.5))
    assert [extent.detector for extent in extents] == [0, 0, 0]
    assert extents[0].u != extents[1].u


def test_detectors_are_told_apart_wherever_they_stand():
    """Also when equal ones are not neighbours."""
    kinds = [0, 1, 0, 2, 1, 1, 0]
    experiments = [make_experiment(make_detector(2, 20.0 + kind)) for kind in kinds]
    extents = find_extents(experiments, (0.1, 0.5))
    assert [extent.detector for extent in extents] == kinds


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_detectors_that_nearly_agree(order):
    """Dxtbx takes the first two for equal; the order of experiments does not matter."""
    distances = (20.0, 20.0 + 1e-9, 25.0, 20.0 + 1e-9)
    detectors = [make_detector(2, distances[i]) for i in order]
    assert make_detector(2, distances[0]) == make_detector(2, distances[1])
    extents = find_extents([make_experiment(d) for d in detectors], (0.1, 0.5))
    numbers = [extent.detector for extent in extents]
    for (i, a), (j, b) in itertools.combinations(zip(order, numbers), 2):
        assert (a == b) == (distances[i] == distances[j])


def test_unknown_panel():
    experiments = [make_experiment(make_detector(3)), make_experiment(make_detector(2))]
    columns = rows(5)
    columns["panel"] = np.array([2, 0, 1, 2, 0], dtype=np.uint64)
    assert len(find(experiments, [0, 0, 0, 0, 0], columns, {"s"})["s"]) == 5
    with pytest.raises(ValueError, match="experiment 1 are on panel 2, .* 2 panels"):
        find(experiments, [0, 0, 0, 1, 1], columns, {"s"})
