from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from simulate_images import (
    count_images,
    import_images,
    make_beam,
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
    memory_experiment,
    random_images,
    write_images,
)

from dxtbx.imageset import ImageSequence
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory

from dials_diffuse.export.experiments import (
    centroids,
    imageset_numbers,
    voxel_crystal,
    voxel_experiments,
)
from dials_diffuse.grid import Grid

NDIV = (3, 2, 4)


def grid_of(crystal) -> Grid:
    group = crystal.get_space_group().type().hall_symbol()
    return Grid(crystal.get_unit_cell().parameters(), NDIV, group, 2.0)


def sweep(n_images: int = 3) -> Experiment:
    detector = make_detector(2, tilt=6.0, parallax=True)
    return memory_experiment(
        random_images(n_images, detector),
        detector,
        make_crystal("P 21 21 21"),
        make_beam(),
        make_scan(n_images, width=0.5, first=5),
        make_goniometer("general"),
        "sweep",
    )


def still(wavelength: float = 1.0) -> Experiment:
    detector = make_detector(3, tilt=4.0)
    return memory_experiment(
        random_images(1, detector),
        detector,
        make_crystal("P 21 21 21", seed=8),
        make_beam(wavelength),
        identifier=f"still {wavelength}",
    )


@pytest.mark.parametrize("space_group", ["P 1", "P 21 21 21"])
def test_a_voxel_has_the_scattering_vector_of_its_centre(space_group):
    crystal = make_crystal(space_group)
    a = np.array(crystal.get_A()).reshape(3, 3)
    turns = [Rotation.from_euler("x", 0.1 * i).as_matrix() @ a for i in range(4)]
    crystal.set_A_at_scan_points([tuple(m.ravel()) for m in turns])
    found = voxel_crystal(crystal, grid_of(crystal))
    voxel = np.array([5, -7, 2])
    np.testing.assert_allclose(
        np.array(found.get_A()).reshape(3, 3) @ voxel, a @ (voxel / NDIV), rtol=1e-10
    )
    assert found.num_scan_points == 4
    for i, m in enumerate(turns):
        at_point = np.array(found.get_A_at_scan_point(i)).reshape(3, 3)
        np.testing.assert_allclose(at_point @ voxel, m @ (voxel / NDIV), rtol=1e-10)
    edges = np.array(crystal.get_unit_cell().parameters()[:3])
    cell = found.get_unit_cell().parameters()
    np.testing.assert_allclose(cell[:3], edges * NDIV)
    np.testing.assert_allclose(cell[3:], crystal.get_unit_cell().parameters()[3:])
    np.testing.assert_allclose(found.get_U(), crystal.get_U(), atol=1e-10)


def test_the_space_group_has_no_absences():
    crystal = make_crystal("P 1", cell=(24, 31, 28, 90, 106, 90))
    grid = Grid(crystal.get_unit_cell().parameters(), (2, 2, 2), " C 2y", 2.0)
    group = voxel_crystal(crystal, grid).get_space_group()
    assert str(group.info()) == "P 1 2/m 1"
    assert not group.is_sys_absent((1, 0, 0)) and group.order_z() == 4


def test_centroids_are_those_of_dxtbx():
    experiments = ExperimentList([still(), sweep(), still(1.3)])
    rng = np.random.default_rng(7)
    n = 60
    number = rng.integers(0, 3, n)
    panel = rng.integers(0, 2, n).astype(np.uint64)
    px = np.column_stack([rng.uniform(0, 60, (n, 2)), rng.uniform(4, 7, n)])
    mm, s1 = centroids(experiments, number, panel, px)
    for i in range(n):
        e = experiments[int(number[i])]
        one = e.detector[int(panel[i])]
        x, y = one.pixel_to_millimeter(tuple(px[i, :2]))
        phi = 0.0
        if e.scan is not None:
            phi = e.scan.get_angle_from_array_index(px[i, 2], deg=False)
        np.testing.assert_allclose(mm[i], (x, y, phi), atol=1e-9)
        lab = np.array(one.get_lab_coord((x, y)))
        expected = lab / np.linalg.norm(lab) / e.beam.get_wavelength()
        np.testing.assert_allclose(s1[i], expected, atol=1e-9)


def test_experiments_keep_all_but_crystal_and_scaling(tmp_path):
    experiments = [sweep(), still()]
    found = voxel_experiments(experiments, grid_of(experiments[0].crystal))
    assert list(found.identifiers()) == ["sweep", "still 1.0"]
    for new, old in zip(found, experiments):
        assert new.beam is old.beam or new.beam == old.beam
        assert new.detector == old.detector
        assert new.scan == old.scan and new.goniometer == old.goniometer
        ratio = np.divide(
            new.crystal.get_unit_cell().parameters(),
            old.crystal.get_unit_cell().parameters(),
        )
        np.testing.assert_allclose(ratio, [*NDIV, 1, 1, 1])
    assert imageset_numbers(found) == [0, 1]


def test_stills_of_one_sequence_get_an_image_each(tmp_path):
    stills = import_images(write_images(tmp_path, count_images(3)))
    assert all(isinstance(e.imageset, ImageSequence) and e.scan for e in stills)
    found = voxel_experiments(stills, grid_of(stills[0].crystal))
    found.as_file(str(tmp_path / "diffuse.expt"))
    read = ExperimentListFactory.from_json_file(str(tmp_path / "diffuse.expt"))
    assert len(read) == 3 and imageset_numbers(read) == [0, 1, 2]
    for number, (e, data) in enumerate(zip(read, count_images(3))):
        assert e.is_still() and e.scan is None and e.goniometer is None
        assert e.imageset.get_path(0).endswith(f"image_{number + 1:04d}.cbf")
        np.testing.assert_array_equal(
            e.imageset.get_raw_data(0)[0].as_numpy_array(), data
        )


def test_an_experiment_without_detector_is_refused():
    e = Experiment(identifier="x", crystal=make_crystal(), beam=make_beam())
    with pytest.raises(ValueError, match="Experiment x has no detector"):
        voxel_experiments([e], grid_of(make_crystal()))
