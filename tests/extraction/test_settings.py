from __future__ import annotations

import numpy as np
import pytest

import libtbx.phil
from cctbx import sgtbx, uctbx

from dials_diffuse import symmetry
from dials_diffuse.extraction.settings import (
    BraggSettings,
    CorrectionSettings,
    ExtractionSettings,
    GeometrySettings,
    IndexingSettings,
)
from dials_diffuse.util.command import load_phil

CELL = uctbx.unit_cell((23, 27, 31, 82, 97, 104))


def settings_of(text: str) -> ExtractionSettings:
    scope = load_phil("extract")
    working, unused = scope.fetch(
        libtbx.phil.parse(text), track_unused_definitions=True
    )
    assert not unused
    return ExtractionSettings.from_phil(working.extract())


def test_defaults_of_phil_are_those_of_the_settings():
    assert settings_of("mp.nproc=1") == ExtractionSettings()


@pytest.mark.parametrize("word", ["auto", "none", "Auto", "None"])
def test_words_that_mean_something_to_phil(word):
    found = settings_of(f"bragg.exclusion={word}\nindexing.consistent={word}")
    assert found.bragg.exclusion == found.indexing.consistent == word.lower()
    assert settings_of("phi_sampling=auto").phi_sampling == "auto"


def test_every_parameter_arrives():
    found = settings_of(
        """
        grid.ndiv=3,4,5
        grid.d_min=1.5
        grid.d_max=20
        grid.reference_cell=given
        grid.unit_cell=10,11,12,90,91,92
        block_width=0.3
        bragg.exclusion=none
        bragg.semi_axes=0.1,0.2,0.3
        bragg.unit=inverse_angstrom
        corrections.polarization=False
        corrections.solid_angle=False
        corrections.efficiency=False
        corrections.path=helium
        corrections.temperature=100
        corrections.pressure=5
        corrections.exposure=False
        corrections.polarization_fraction=0.7
        corrections.polarization_normal=1,0,0
        bragg.absent=True
        phi_sampling=spread
        indexing.consistent=none
        indexing.in_doubt=keep
        geometry.reject_images=True
        geometry.tolerance=0.01
        gain=2
        trusted_range=-1,99
        mp.nproc=3
        """
    )
    assert found == ExtractionSettings(
        ndiv=(3, 4, 5),
        d_min=1.5,
        d_max=20,
        reference_cell="given",
        unit_cell=(10, 11, 12, 90, 91, 92),
        block_width=0.3,
        phi_sampling="spread",
        bragg=BraggSettings("none", (0.1, 0.2, 0.3), "inverse_angstrom", absent=True),
        indexing=IndexingSettings("none", "keep"),
        geometry=GeometrySettings(True, 0.01),
        corrections=CorrectionSettings(
            False, False, False, "helium", 100, 5, False, 0.7, (1, 0, 0)
        ),
        gain=2,
        trusted_range=(-1, 99),
        nproc=3,
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("grid.ndiv=2,3", "grid.ndiv takes one number or three"),
        ("bragg.semi_axes=0.1,0.2", "bragg.semi_axes takes one number or three"),
        ("bragg.semi_axes=0", "semi_axes must be positive: use bragg.exclusion=none"),
        ("grid.reference_cell=given", "reference_cell=given needs unit_cell"),
        ("grid.unit_cell=9,9,9,90,90,90", "only with reference_cell=given"),
        ("trusted_range=5,1", "trusted_range needs the smaller value first"),
        ("trusted_range=5,5", "trusted_range needs the smaller value first"),
        ("corrections.polarization_normal=0,0,0", "must not have zero length"),
    ],
)
def test_wrong_settings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        settings_of(text)


def test_one_number_stands_for_three():
    found = settings_of("grid.ndiv=4\nbragg.semi_axes=0.1")
    assert found.ndiv == (4, 4, 4)
    assert found.bragg.semi_axes == (0.1, 0.1, 0.1)


def distance(metric, dh) -> float:
    g11, g22, g33, g12, g13, g23 = metric
    g = np.array([[g11, g12, g13], [g12, g22, g23], [g13, g23, g33]])
    return float(dh @ g @ dh)


IDENTITY = np.eye(3, dtype=int)[None]


@pytest.mark.parametrize("unit", ["hkl", "inverse_angstrom"])
@pytest.mark.parametrize(
    "symbol, cell",
    [
        ("P 6", (93, 93, 130, 90, 90, 120)),
        ("R 3 :R", (60, 60, 60, 80, 80, 80)),
        ("P 4", (48, 48, 63, 90, 90, 90)),
        ("P 2 3", (60, 60, 60, 90, 90, 90)),
        ("C 1 2 1", (80, 40, 50, 90, 110, 90)),
        ("C 1 2 1 (x-y,x+y,z)", None),  # primitive setting: the operator mixes a and b
    ],
)
def test_ellipsoid_treats_equivalent_pixels_alike(symbol, cell, unit):
    crystal_symmetry = sgtbx.space_group_info(symbol)
    uc = (
        uctbx.unit_cell(cell)
        if cell
        else crystal_symmetry.any_compatible_unit_cell(9e4)
    )
    rotations = symmetry.rotation_matrices(
        symmetry.laue_group(crystal_symmetry.group())
    )
    axes = (0.2, 0.2, 0.2) if unit == "hkl" else (0.002, 0.002, 0.003)
    metric = BraggSettings("ellipsoid", axes, unit).metric(uc, rotations)
    for dh in np.random.default_rng(7).uniform(-0.4, 0.4, (20, 3)):
        values = [distance(metric, dh @ r) for r in rotations]
        assert values == pytest.approx([values[0]] * len(values))


def test_ellipsoid_in_fractional_indices():
    metric = BraggSettings("ellipsoid", (0.1, 0.2, 0.3), "hkl").metric(CELL, IDENTITY)
    for axis, length in enumerate((0.1, 0.2, 0.3)):
        assert distance(metric, np.eye(3)[axis] * length) == pytest.approx(1)
    assert BraggSettings("none").metric(CELL, IDENTITY) is None


def test_sphere_in_a_triclinic_cell():
    """Every point at the radius from the lattice point is on the ellipsoid."""
    radius = 0.01
    metric = BraggSettings("ellipsoid", (radius,) * 3, "inverse_angstrom").metric(
        CELL, IDENTITY
    )
    b = np.array(CELL.fractionalization_matrix()).reshape(3, 3).T
    rlp = np.random.default_rng(3).normal(size=(50, 3))
    rlp *= radius / np.linalg.norm(rlp, axis=1)[:, None]
    for r in rlp:
        assert distance(metric, np.linalg.solve(b, r)) == pytest.approx(1)


def test_semi_axes_in_inverse_angstrom_lie_along_the_reciprocal_axes():
    axes = (0.01, 0.02, 0.03)
    metric = BraggSettings("ellipsoid", axes, "inverse_angstrom").metric(CELL, IDENTITY)
    lengths = CELL.reciprocal().parameters()[:3]
    for i in range(3):
        assert distance(metric, np.eye(3)[i] * axes[i] / lengths[i]) == pytest.approx(1)
