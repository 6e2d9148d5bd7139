from __future__ import annotations

import logging

import numpy as np
import pytest
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    memory_experiment,
    random_images,
)

from cctbx import sgtbx, uctbx
from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.extraction.reference import (
    common_space_group,
    crystal_spread,
    detector_limits,
    make_grid,
    mean_cell,
    reference_cell,
)
from dials_diffuse.extraction.report import log_crystals
from dials_diffuse.extraction.settings import ExtractionSettings

CELL = (25.0, 25.0, 34.0, 90.0, 90.0, 90.0)


def crystals(*cells, space_group="P 41 21 2"):
    return [make_crystal(space_group, seed, cell) for seed, cell in enumerate(cells)]


def scaled(factor, cell=CELL):
    return (*(factor * edge for edge in cell[:3]), *cell[3:])


def stills(models, size=(34, 28), distance=20.0) -> ExperimentList:
    result = ExperimentList()
    for i, model in enumerate(models):
        detector = make_detector(1, size, distance)
        result.append(
            memory_experiment(
                random_images(1, detector), detector, model, identifier=str(i)
            )
        )
    return result


def group_of(models):
    return models[0].get_space_group()


def test_mean_cell_is_the_mean_of_the_metric_tensors():
    cells = [uctbx.unit_cell(scaled(f)) for f in (0.99, 1.01)]
    mean = mean_cell(cells)
    edge = np.sqrt((0.99**2 + 1.01**2) / 2)
    assert mean.is_similar_to(uctbx.unit_cell(scaled(edge)), 1e-9, 1e-9)


def test_mean_reference_cell_obeys_the_symmetry():
    # refined without constraints
    models = crystals((25.1, 24.9, 34, 90.2, 89.9, 90), (25.0, 25.0, 34.2, 90, 90, 90))
    cell = reference_cell(models, group_of(models), ExtractionSettings()).parameters()
    assert cell[0] == pytest.approx(cell[1], abs=1e-9)
    assert cell[0] == pytest.approx(25.0, abs=0.01)
    assert cell[2] == pytest.approx(34.1, abs=0.01)
    assert cell[3:] == pytest.approx((90, 90, 90))


def test_first_reference_cell():
    models = crystals(scaled(1.01), CELL)
    settings = ExtractionSettings(reference_cell="first")
    cell = reference_cell(models, group_of(models), settings)
    assert cell.parameters() == pytest.approx(scaled(1.01))


def test_given_reference_cell():
    models = crystals(CELL)
    settings = ExtractionSettings(reference_cell="given", unit_cell=scaled(1.02))
    cell = reference_cell(models, group_of(models), settings)
    assert cell.parameters() == pytest.approx(scaled(1.02))
    wrong = ExtractionSettings(
        reference_cell="given", unit_cell=(25, 27, 34, 90, 90, 90)
    )
    with pytest.raises(ValueError, match="unit_cell.* does not obey .*P 41 21 2"):
        reference_cell(models, group_of(models), wrong)


def test_enantiomorphs_and_screw_axes_go_together():
    models = [*crystals(CELL), *crystals(CELL, space_group="P 43 21 2")]
    assert common_space_group(models) == models[0].get_space_group()
    assert common_space_group(models[::-1]) == models[1].get_space_group()


@pytest.mark.parametrize("other", ["P 41", "P 2 2 2", "P 1"])
def test_different_laue_groups_are_refused(other):
    models = [*crystals(CELL), *crystals(CELL, space_group=other)]
    with pytest.raises(ValueError, match="different Laue symmetry.*reindex"):
        common_space_group(models)


def test_two_settings_of_a_group_are_refused():
    one = make_crystal("P 1 2 1", cell=(24, 31, 28, 90, 106, 90))
    two = make_crystal("P 1 1 2", cell=(24, 28, 31, 90, 90, 106))
    with pytest.raises(ValueError, match="different Laue symmetry"):
        common_space_group([one, two])


def test_grid_of_stills():
    experiments = stills(crystals(CELL, scaled(1.01)))
    grid = make_grid(experiments, ExtractionSettings(ndiv=(2, 2, 3)))
    assert grid.ndiv == (2, 2, 3)
    patterson = sgtbx.space_group_info("P 4/m m m").group()
    assert grid.laue_group == patterson
    with pytest.raises(ValueError, match="symmetry mixes the axes h and k"):
        make_grid(experiments, ExtractionSettings(ndiv=(2, 3, 2)))


def test_resolution_limits_of_the_detector():
    """Against the angles of the pixels at the edges and corners."""
    (e,) = stills(crystals(CELL))
    panel = e.detector[0]
    s0 = np.array(e.beam.get_s0())

    def d(x, y):
        s1 = np.array(panel.get_lab_coord((x, y)))
        s1 *= np.linalg.norm(s0) / np.linalg.norm(s1)
        return 1 / np.linalg.norm(s1 - s0)

    width, height = panel.get_image_size_mm()
    circle, corner = detector_limits(e)
    corners = [d(x, y) for x in (0, width) for y in (0, height)]
    assert corner == pytest.approx(min(corners), rel=1e-6)
    edges = [
        d(x, y)
        for x in np.linspace(0, width, 200)
        for y in np.linspace(0, height, 200)
        if x in (0, width) or y in (0, height)
    ]
    assert circle == pytest.approx(max(edges), rel=1e-3)
    grid = make_grid(ExperimentList([e]), ExtractionSettings())
    assert grid.d_min == circle


def test_limits_are_those_of_the_farthest_reaching_detector():
    near, far = stills(crystals(CELL), distance=15.0), stills(crystals(CELL))
    near[0].identifier = "near"
    both = ExperimentList([far[0], near[0]])
    expected = detector_limits(near[0])
    assert make_grid(both, ExtractionSettings()).d_min == expected[0]
    d_min = expected[1] + 0.01  # beyond the far detector
    assert make_grid(both, ExtractionSettings(d_min=d_min)).d_min == d_min
    with pytest.raises(ValueError, match="d_min=.* beyond the detector.* or more"):
        make_grid(both, ExtractionSettings(d_min=expected[1] - 0.01))


def test_detector_that_the_beam_misses():
    (e,) = stills(crystals(CELL))
    panel = e.detector[0]
    panel.set_frame(panel.get_fast_axis(), panel.get_slow_axis(), (12.0, 3.5, -20.0))
    circle, corner = detector_limits(e)
    assert circle >= corner > 0.5
    assert make_grid(ExperimentList([e]), ExtractionSettings()).d_min > 0


def test_spread_of_crystals_of_another_size():
    """A cell larger by a factor f has indices larger by f at the same vector."""
    models = crystals(CELL, scaled(1.01))
    grid = make_grid(
        stills(models), ExtractionSettings(reference_cell="first", d_min=3.3)
    )
    spread = crystal_spread(models, grid).rms
    assert spread[0] == pytest.approx(0, abs=1e-9)
    # mean square of h over the sphere of radius 1/d: (a^2 + b^2 + c^2) / 3 d^2
    h = np.sqrt(sum(a**2 for a in CELL[:3]) / 3) / 3.3
    assert spread[1] == pytest.approx(0.01 * h, rel=0.05)


def test_spread_of_triclinic_crystals():
    """The mean over the sphere has a closed form: |B2^-1 - B1^-1|^2 / 3 d^2."""
    cells = ((23, 27, 31, 82, 97, 104), (23.3, 26.8, 31.1, 81, 97.5, 105))
    models = crystals(*cells, space_group="P 1")
    grid = make_grid(
        stills(models), ExtractionSettings(reference_cell="first", d_min=3.3)
    )
    one, two = (np.linalg.inv(np.array(m.get_B()).reshape(3, 3)) for m in models)
    expected = np.linalg.norm(two - one) / np.sqrt(3) / 3.3
    assert crystal_spread(models, grid).rms[1] == pytest.approx(expected, rel=0.05)


def test_spread_does_not_depend_on_the_orientation():
    models = [make_crystal("P 41 21 2", seed, scaled(1.01)) for seed in (1, 2)]
    grid = make_grid(
        stills([*crystals(CELL), *models]),
        ExtractionSettings(reference_cell="first", d_min=3.3),
    )
    one, two = crystal_spread(models, grid).rms
    assert one == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize("factor, warned", [(1.001, False), (1.07, True)])
def test_warning_of_crystals_far_from_the_reference_cell(caplog, factor, warned):
    experiments = stills(crystals(CELL, CELL, scaled(factor)))
    grid = make_grid(experiments, ExtractionSettings(reference_cell="first", d_min=3.3))
    with caplog.at_level(logging.INFO, logger="dials.diffuse.extract"):
        log_crystals(experiments, grid)
    assert "rms difference in hkl" in caplog.text
    assert ("1 of 3 crystals" in caplog.text) == warned
    assert ("experiment 2" in caplog.text) == warned


def test_other_wavelength_has_its_own_limits():
    experiments = stills(crystals(CELL, CELL))
    detector = experiments[0].detector
    experiments[1].detector = detector
    experiments[1].beam = make_beam(0.7)
    expected = detector_limits(experiments[1])[0]
    assert make_grid(experiments, ExtractionSettings()).d_min == expected


@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_beam_near_an_edge(shift):
    """A whole circle there is tiny: the corners are the limit instead."""
    detector = make_detector(size=(100, 100), distance=60.0, pixel=(0.3, 0.3))
    panel = detector[0]
    origin = np.array(panel.get_origin()) + [shift, 0, 0]
    panel.set_frame(panel.get_fast_axis(), panel.get_slow_axis(), tuple(origin))
    e = memory_experiment(random_images(1, detector), detector, make_crystal())
    circle, corner = detector_limits(e)
    assert (circle == corner) == (shift > 0)
