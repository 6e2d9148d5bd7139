from __future__ import annotations

import numpy as np
import pytest
from simulate_images import cbf_models, make_crystal, make_goniometer, make_scan

from cctbx import sgtbx
from dxtbx import flumpy
from dxtbx.model import Beam, Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.geometry.validation import ImageResiduals
from dials_diffuse.process.summary import (
    crystal_summary,
    geometry_summary,
    indexing_summary,
    mask_summary,
    read_table,
    refinement_summary,
    spots_summary,
)

WIDTHS = (0.5, 0.1)


def experiments(rotation: bool = True) -> ExperimentList:
    detector, _ = cbf_models()
    return ExperimentList(
        [
            Experiment(
                identifier=str(i),
                beam=Beam((0, 0, 1), 1.0),
                detector=detector,
                crystal=make_crystal("P 21 21 21", cell=(26, 31, 22 + i, 90, 90, 90)),
                scan=make_scan(10, width) if rotation else None,
                goniometer=make_goniometer() if rotation else None,
            )
            for i, width in enumerate(WIDTHS)
        ]
    )


def reflections(n: int = 40, n_used: int = 30) -> flex.reflection_table:
    """Reflections of two experiments, of which the first ones were used."""
    rng = np.random.default_rng(5)
    table = flex.reflection_table()
    table["id"] = flumpy.from_numpy((np.arange(n) % 2).astype(np.int32)).deep_copy()
    for name in ("xyzobs.px.value", "xyzcal.px"):
        table[name] = flumpy.vec_from_numpy(rng.normal(20, 1, (n, 3))).deep_copy()
    table["delpsical.rad"] = flumpy.from_numpy(rng.normal(0, 0.01, n)).deep_copy()
    table["flags"] = flex.size_t(n, 0)
    table.set_flags(flex.bool(n, True), table.flags.indexed)
    used = flex.bool([i < n_used for i in range(n)])
    table.set_flags(used, table.flags.used_in_refinement)
    return table


def test_rmsd_of_rotation_data():
    table = reflections()
    found = refinement_summary(experiments(), table)
    assert found["n_reflections"] == 30
    squares = np.zeros(3)
    for i in range(30):
        for axis in range(3):
            step = table["xyzcal.px"][i][axis] - table["xyzobs.px.value"][i][axis]
            squares[axis] += (step * (WIDTHS[i % 2] if axis == 2 else 1)) ** 2
    names = ("rmsd_x_px", "rmsd_y_px", "rmsd_angle_deg")
    assert [found[name] for name in names] == pytest.approx(np.sqrt(squares / 30))
    parts = found["experiments"]
    assert [part["n_reflections"] for part in parts] == [15, 15]
    for name in names:
        both = np.sqrt((parts[0][name] ** 2 + parts[1][name] ** 2) / 2)
        assert both == pytest.approx(found[name])


def test_rmsd_of_stills_is_the_angle_to_the_ewald_sphere():
    table = reflections()
    found = refinement_summary(experiments(rotation=False), table)
    angles = [table["delpsical.rad"][i] * 180 / np.pi for i in range(30)]
    expected = np.sqrt(np.mean(np.square(angles)))
    assert found["rmsd_angle_deg"] == pytest.approx(expected)


def test_nothing_was_used_in_refinement():
    found = refinement_summary(experiments(), reflections(n_used=0))
    assert found["n_reflections"] == 0
    assert found["rmsd_x_px"] is None


def test_crystals():
    found = crystal_summary(experiments())
    assert found["n_crystals"] == 2
    assert found["unit_cell"] == pytest.approx([26, 31, 22.5, 90, 90, 90])
    assert found["unit_cell_sd"] == pytest.approx([0, 0, 0.5, 0, 0, 0], abs=1e-9)
    assert found["space_group"] == "P 21 21 21"


def test_spots(tmp_path):
    assert spots_summary("rotation", tmp_path, 10) is None
    reflections(50).as_file(str(tmp_path / "strong.refl"))
    reflections(40).as_file(str(tmp_path / "indexed.refl"))
    assert spots_summary("rotation", tmp_path, 10) == {
        "n_images": 10,
        "n_found": 50,
        "n_indexed": 40,
        "fraction_indexed": 0.8,
    }


def test_no_spots(tmp_path):
    reflections()[:0].as_file(str(tmp_path / "strong.refl"))
    found = spots_summary("rotation", tmp_path, 10)
    assert (found["n_found"], found["fraction_indexed"]) == (0, 0)


def four_crystals() -> ExperimentList:
    result = ExperimentList()
    for i in range(4):
        result.append(Experiment(identifier=str(i), crystal=make_crystal()))
    return result


def test_reindexed_and_left_out_experiments():
    """One of four is reindexed, another left out; small shifts do not matter."""
    before, after = (four_crystals() for _ in range(2))
    operator = sgtbx.change_of_basis_op("-h,-k,l")
    after[1].crystal = after[1].crystal.change_basis(operator)
    after[2].crystal.set_A([1.001 * x for x in after[2].crystal.get_A()])
    del after[0]
    expected = {"n_experiments": 4, "n_reindexed": 1, "n_left_out": 1}
    assert indexing_summary(before, after) == expected
    assert indexing_summary(before[:1], after[:1]) is None


def test_distances_are_weighted_by_spots():
    images = ImageResiduals(
        experiment=np.array([0, 1, 2]),
        array_index=np.zeros(3, dtype=int),
        n_spots=np.array([10, 20, 10]),
        mean=np.array([0.001, 0.002, 0.007]),
        largest=np.array([0.002, 0.004, 0.01]),
        shift=np.zeros(3),
        rms_hkl=np.array([0.1, 0.1, 0.3]),
    )
    found = geometry_summary(images, 0.005, True)
    assert found["n_spots"] == 40
    assert found["mean_distance"] == pytest.approx(0.003)
    assert found["largest_mean_distance"] == 0.007
    assert found["rms_delta_hkl"] == pytest.approx(np.sqrt((0.1**2 * 3 + 0.3**2) / 4))
    assert found["n_images_beyond"] == 1
    assert found["rejected"]
    nothing = ImageResiduals(*(np.zeros(0) for _ in range(7)))
    assert geometry_summary(nothing, 0.005, True) is None


def test_mask_without_its_panels():
    layer = {"name": "hot", "meaning": "too many", "n_pixels": 3, "n_only": 2}
    detector = {"mask": "a.mask", "n_images": 5, "n_pixels": 100, "n_masked": 3}
    full = {**detector, "identifiers": ["0"], "layers": [{**layer, "panels": [1, 2]}]}
    assert mask_summary([full]) == [{**detector, "layers": [layer]}]


def test_damaged_reflections_are_named(tmp_path):
    """As a program of DIALS leaves them when the disk is full."""
    path = tmp_path / "indexed.refl"
    path.write_bytes(b"\x82\x00\x00")
    with pytest.raises(ValueError, match=f"Cannot read {path} .*disk"):
        read_table(path)
