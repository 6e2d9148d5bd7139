from __future__ import annotations

import numpy as np
import pytest
from simulate_images import (
    import_images,
    make_crystal,
    make_detector,
    make_scan,
    memory_experiment,
    random_images,
    write_images,
)

from cctbx import sgtbx
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.bragg.lattices import shared_images
from dials_diffuse.bragg.points import is_absent
from dials_diffuse.bragg.shoeboxes import (
    Boxes,
    Shoeboxes,
    SpotSize,
    predict_still,
    predicted_boxes,
    spot_size,
)
from dials_diffuse.geometry.orientation import frame_model

DETECTOR = make_detector(2, parallax=True)
D_MIN = 2.5


def still(seed: int, space_group: str = "P 1", identifier: str = "0"):
    return memory_experiment(
        random_images(1, DETECTOR),
        DETECTOR,
        make_crystal(space_group, seed),
        identifier=identifier,
    )


def sweep(n_images: int = 10, width: float = 0.5, seed: int = 7):
    return memory_experiment(
        random_images(n_images, DETECTOR),
        DETECTOR,
        make_crystal("P 1", seed),
        scan=make_scan(n_images, width, first=3),
    )


def table_of(rows) -> flex.reflection_table:
    """Rows of id, panel, bbox and Miller index."""
    table = flex.reflection_table()
    table["id"] = flex.int([row[0] for row in rows])
    table["panel"] = flex.size_t([row[1] for row in rows])
    table["bbox"] = flex.int6([row[2] for row in rows])
    table["miller_index"] = flex.miller_index([row[3] for row in rows])
    return table


def test_boxes_of_each_image_of_a_sweep():
    rng = np.random.default_rng(7)
    rows = []
    for _ in range(300):
        x, y, z = rng.integers(0, 40), rng.integers(0, 40), rng.integers(0, 14)
        size = rng.integers(1, 6, 3)
        box = tuple(map(int, (x, x + size[0], y, y + size[1], z, z + size[2])))
        rows.append((0, int(rng.integers(0, 2)), box, (1, 2, 3)))
    experiments = ExperimentList([sweep()])
    number, panel, box, _ = zip(*rows)
    boxes = Boxes(*(np.array(column, np.int32) for column in (number, panel, box)))
    shoeboxes = Shoeboxes(experiments, boxes)
    for index in range(2, 12):
        found = shoeboxes.boxes_of_image(0, index)
        for panel in range(2):
            expected = [
                r[2][:4] for r in rows if r[1] == panel and r[2][4] <= index < r[2][5]
            ]
            assert sorted(map(tuple, found[panel].tolist())) == sorted(expected)


def test_predicted_reflections_of_a_still_lie_where_their_points_are():
    experiment = still(7)
    hkl, panel, px = predict_still(experiment, D_MIN, 0.5)
    assert set(panel) == {0, 1}
    model = frame_model(experiment, 0)
    s = np.linalg.norm(hkl @ model.setting.T, axis=1)
    for i in range(len(hkl)):
        # with parallax the direction is that of the pixel by the panel's strategy
        mm = DETECTOR[int(panel[i])].pixel_to_millimeter(tuple(px[i]))
        s1 = np.array(DETECTOR[int(panel[i])].get_lab_coord(mm))
        rlp = s1 / np.linalg.norm(s1) * np.linalg.norm(model.s0) - model.s0
        dh = np.linalg.inv(model.setting) @ rlp - hkl[i]
        away = np.linalg.norm(model.setting @ dh) / s[i]
        assert away <= np.radians(0.5) * 1.01


def test_no_reflection_of_a_still_is_forgotten():
    experiment = still(7)
    model = frame_model(experiment, 0)
    hkl, _, _ = predict_still(experiment, D_MIN, 0.5)
    found = set(map(tuple, hkl.tolist()))
    panel = DETECTOR[0]
    for x in np.arange(2.5, 70, 1):
        for y in np.arange(2.5, 60, 1):
            mm = panel.pixel_to_millimeter((x, y))
            s1 = np.array(panel.get_lab_coord(mm))
            rlp = s1 / np.linalg.norm(s1) * np.linalg.norm(model.s0) - model.s0
            h = np.linalg.inv(model.setting) @ rlp
            delta = model.setting @ (h - np.rint(h))
            s = np.linalg.norm(model.setting @ np.rint(h))
            if (
                0.1 < s < 1 / D_MIN
                and np.linalg.norm(delta) < 0.2 * np.radians(0.5) * s
            ):
                assert tuple(np.rint(h).astype(int).tolist()) in found


def test_boxes_of_a_still_are_not_those_of_its_neighbour():
    experiments = ExperimentList([still(7), still(8, identifier="1")])
    boxes = predicted_boxes(experiments, D_MIN, SpotSize(1.5, 1.5, 0.8))
    shoeboxes = Shoeboxes(experiments, boxes)
    for number, e in enumerate(experiments):
        _, panel, px = predict_still(e, D_MIN, 0.8)
        own, other = (shoeboxes.boxes_of_image(i, 0)[0] for i in (number, 1 - number))
        x, y = px[panel == 0].T

        def inside(b):
            return np.any(
                (b[:, :1] <= x) & (x < b[:, 1:2]) & (b[:, 2:3] <= y) & (y < b[:, 3:]),
                axis=0,
            )

        assert len(x) > 10
        assert inside(own).all()
        assert inside(other).mean() < 0.5


def test_predictions_of_a_sweep_contain_the_reflecting_points():
    experiments = ExperimentList([sweep()])
    size = SpotSize(2, 1, 0.2)
    boxes = predicted_boxes(experiments, D_MIN, size)
    table = flex.reflection_table.from_predictions_multi(experiments, dmin=D_MIN)
    shoeboxes = Shoeboxes(experiments, boxes)
    n = 0
    for panel, (x, y, z) in zip(table["panel"], table["xyzcal.px"]):
        if not 2 <= z < 12:
            continue
        b = shoeboxes.boxes_of_image(0, int(z))[panel]
        n += 1
        assert np.any(
            (b[:, 0] <= x - 1.9) & (x + 1.9 < b[:, 1]) & (b[:, 2] <= y) & (y < b[:, 3])
        )
    assert n > 10
    assert np.all(np.diff(boxes.box[:, 4:])[:, 0] >= 2 * 0.2 / 0.5)


def test_predictions_leave_out_absences():
    experiments = ExperimentList([still(7, "P 21 21 21")])
    size = SpotSize(1, 1, 5.0)
    some = predicted_boxes(experiments, D_MIN, size)
    all_of_them = predicted_boxes(experiments, D_MIN, size, absences=True)
    hkl, _, _ = predict_still(experiments[0], D_MIN, 5.0)
    absent = is_absent(hkl, sgtbx.space_group_info("P 21 21 21").group())
    assert absent.sum() == len(all_of_them.box) - len(some.box) > 0


def partners_of(experiments) -> list[list[int]]:
    return [[p.experiment for p in partners] for partners in shared_images(experiments)]


def test_all_lattices_of_an_image(tmp_path):
    """Two lattices in the same images, as separate image sets, one starting later."""
    images = [np.zeros((50, 60), np.int32)] * 4
    paths = write_images(tmp_path, images, width=0.5)
    experiments = import_images(paths)
    experiments.extend(import_images(paths[1:], lambda i: make_crystal(seed=8)))
    other = tmp_path / "other"
    other.mkdir()
    experiments.extend(import_images(write_images(other, images, width=0.5)))
    assert partners_of(experiments) == [[1], [0], []]
    first = experiments[1].scan.get_array_range()[0]
    boxes = Boxes(
        np.array([0, 1, 2], np.int32),
        np.zeros(3, np.int32),
        np.array(
            [[1, 2, 1, 2, 1, 2], [3, 4, 3, 4, first, first + 1], [5, 6, 5, 6, 1, 2]]
        ),
    )
    shoeboxes = Shoeboxes(experiments, boxes)
    assert shoeboxes.boxes_of_image(0, 1)[0][:, 0].tolist() == [1, 3]
    assert shoeboxes.boxes_of_image(1, first)[0][:, 0].tolist() == [3, 1]
    assert shoeboxes.boxes_of_image(0, 0)[0].tolist() == []
    assert shoeboxes.boxes_of_image(2, 1)[0][:, 0].tolist() == [5]


def test_lattices_of_stills_in_memory():
    one = still(7)
    second = Experiment(
        identifier="2",
        beam=one.beam,
        detector=one.detector,
        crystal=make_crystal("P 1", 9),
        imageset=one.imageset,
    )
    experiments = ExperimentList([one, still(8, identifier="1"), second])
    assert partners_of(experiments) == [[2], [], [0]]


def test_size_of_spots():
    rows = [(0, 0, (1, 6, 2, 5, 3, 7), (1, 2, 3))] * 20
    experiments = ExperimentList([sweep(width=0.5)])
    assert spot_size(table_of(rows), experiments) == pytest.approx((2.5, 1.5, 1.0))
    with pytest.raises(ValueError, match="do not tell how far"):
        spot_size(table_of(rows), ExperimentList([still(7)]))
