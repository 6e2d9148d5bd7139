from __future__ import annotations

import numpy as np
import pytest

from cctbx import adptbx, crystal, sgtbx, uctbx, xray
from cctbx.eltbx.xray_scattering import it1992

from dials_diffuse import symmetry
from dials_diffuse.simulation.settings import CrystalSettings, SimulationSettings
from dials_diffuse.simulation.structure import (
    BraggIntensities,
    CellContents,
    atomic_number,
    contents_from_file,
    form_factor,
    make_contents,
    random_contents,
)

CELLS = {
    "P 1": (13.0, 15.0, 17.0, 80.0, 97.0, 104.0),
    "P 1 1 21": (14.0, 16.0, 13.0, 90.0, 90.0, 103.0),
    "I 1 2 1": (16.0, 14.0, 18.0, 90.0, 106.0, 90.0),
    "P 21 21 21": (13.0, 15.0, 17.0, 90.0, 90.0, 90.0),
    "P 41": (15.0, 15.0, 19.0, 90.0, 90.0, 90.0),
    "R 3 :R": (16.0, 16.0, 16.0, 82.0, 82.0, 82.0),
    "P 61": (16.0, 16.0, 18.0, 90.0, 90.0, 120.0),
    "F 2 3": (24.0, 24.0, 24.0, 90.0, 90.0, 90.0),
}
PDB = """\
CRYST1   20.000   22.000   24.000  90.00  90.00  90.00 P 21 21 21
MODEL        1
ATOM      1  N   GLY A   1       1.000   2.000   3.000  1.00 10.00           N
ATOM      2  H   GLY A   1       1.500   2.700   3.500  1.00 10.00           H
ATOM      3 ZN    ZN A   2       4.500   2.700   3.500  0.50 12.00          ZN2+
HETATM    4  O   HOH A   3       7.000   2.000   3.000  0.75 20.00           O
HETATM    5  D1  HOH A   3       7.700   2.000   3.600  0.75 20.00           D
ENDMDL
MODEL        2
ATOM      6  N   GLY A   1       1.200   2.000   3.000  1.00 10.00           N
ENDMDL
END
"""
CIF = """\
data_test
_cell.length_a 20
_cell.length_b 22
_cell.length_c 24
_cell.angle_alpha 90
_cell.angle_beta 90
_cell.angle_gamma 90
_symmetry.space_group_name_H-M 'P 21 21 21'
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.pdbx_PDB_model_num
ATOM 1 N N . GLY A 1 1 1.0 2.0 3.0 1.0 10.0 1 A 1
ATOM 2 C CA . GLY A 1 1 2.3 2.5 3.1 0.5 11.0 1 A 1
"""


def small_contents(symbol: str) -> CellContents:
    """A few atoms at general positions and one at the origin, perhaps special."""
    structure = xray.structure(
        crystal.special_position_settings(
            crystal.symmetry(CELLS[symbol], space_group_symbol=symbol)
        )
    )
    atoms = [
        ("C", (0.11, 0.23, 0.34), 1.0, 12.0),
        ("S", (0.41, 0.19, 0.07), 0.6, 25.0),
        ("H", (0.15, 0.38, 0.27), 1.0, 8.0),
        ("O", (0.0, 0.0, 0.0), 1.0, 15.0),
    ]
    for element, site, occupancy, b in atoms:
        structure.add_scatterer(xray.scatterer(element, site, occupancy=occupancy, b=b))
    return CellContents(structure, 0.0)


def summed_intensities(contents: CellContents, hkl: np.ndarray) -> np.ndarray:
    """|F|² by summing over all operators and atoms, shape (n, 3) -> (n,)."""
    s = np.array([contents.unit_cell.d_star_sq(h) for h in hkl.tolist()]) ** 0.5
    operators = list(contents.space_group.all_ops())
    f = np.zeros(len(hkl), dtype=complex)
    for atom in contents.structure.scatterers():
        share = atom.occupancy * atom.multiplicity() / len(operators)
        f_j = share * form_factor(atom.scattering_type, s)
        f_j = f_j * np.exp(-adptbx.u_as_b(atom.u_iso) * s**2 / 4)
        for op in operators:
            f += f_j * np.exp(2j * np.pi * (hkl @ np.array(op * atom.site)))
    return np.abs(f) ** 2


@pytest.mark.parametrize("algorithm, tolerance", [("direct", 1e-6), ("fft", 3e-3)])
@pytest.mark.parametrize("symbol", CELLS)
def test_bragg_intensities_are_sums_over_all_atoms_of_the_cell(
    symbol, algorithm, tolerance
):
    contents = small_contents(symbol)
    bragg = BraggIntensities(contents, 2.0, algorithm)
    hkl = np.random.default_rng(7).integers(-7, 8, (300, 3))
    d = np.array([contents.unit_cell.d(h) for h in hkl.tolist()])
    hkl = hkl[(d > 2.0) & np.any(hkl != 0, axis=1)]
    expected = summed_intensities(contents, hkl)
    assert len(hkl) > 100 and expected.max() > 10 * np.median(expected)
    np.testing.assert_allclose(
        bragg.at(*hkl.T), expected, rtol=1e-6, atol=tolerance * expected.mean()
    )


@pytest.mark.parametrize("symbol", CELLS)
def test_bragg_intensities_have_exactly_the_laue_symmetry(symbol):
    contents = small_contents(symbol)
    bragg = BraggIntensities(contents, 2.0)
    hkl = np.random.default_rng(7).integers(-9, 10, (500, 3))
    reference = bragg.at(*hkl.T)
    assert np.count_nonzero(reference) > 50
    np.testing.assert_array_equal(bragg.at(*-hkl.T), reference)  # Friedel
    laue = symmetry.laue_group(contents.space_group)
    for rotation in symmetry.rotation_matrices(laue):
        np.testing.assert_array_equal(bragg.at(*(hkl @ rotation).T), reference)


def test_reflections_that_do_not_exist_are_zero():
    bragg = BraggIntensities(small_contents("F 2 3"), 2.0)
    h, k, l = np.indices((8, 8, 8))
    mixed = (h + k) % 2 + (k + l) % 2 > 0  # odd and even indices
    d = 24.0 / np.sqrt(np.maximum(h**2 + k**2 + l**2, 1))
    values = bragg.at(h, k, l)
    assert values.shape == (8, 8, 8)
    np.testing.assert_array_equal(values[mixed], 0.0)
    assert bragg.at(0, 0, 0) == 0
    exist = ~mixed & (h + k + l > 0)
    assert np.all(values[exist & (d > 2.0)] > 0)
    np.testing.assert_array_equal(bragg.at(h + 13, k, l), 0.0)
    far = np.array([10**6, -(10**6), 13, -13])
    np.testing.assert_array_equal(bragg.at(far, 0 * far, 0 * far), 0.0)


@pytest.mark.parametrize("element", ["C", "N", "O", "S", "H", "Zn"])
def test_form_factor_agrees_with_the_other_table(element):
    s = np.linspace(0, 1.6, 33).reshape(3, 11)
    other = it1992(element, True).fetch()
    expected = np.array([other.at_stol(x / 2) for x in s.ravel()]).reshape(s.shape)
    np.testing.assert_allclose(form_factor(element, s), expected, atol=0.02)


def test_hydrogen_is_contracted_by_its_bond():
    # International Tables C, tables 6.1.1.1 and 6.1.1.2, at sin(theta)/lambda = 0.3
    assert form_factor("H", np.array([0.6]))[0] == pytest.approx(0.331, abs=0.002)


def test_form_factor_of_an_unknown_element():
    with pytest.raises(ValueError, match="no form factor of the element Xx"):
        form_factor("Xx", np.zeros(1))


def test_composition():
    contents = small_contents("P 21 21 21")
    contents = CellContents(contents.structure, 10.0)
    # The atom at the origin is no special position in this group
    expected = {"C": 4.0, "S": 2.4, "H": 24.0, "O": 14.0}
    assert contents.composition == pytest.approx(expected)


@pytest.mark.parametrize("element, number", [("H", 1), ("C", 6), ("S", 16), ("Zn", 30)])
def test_atomic_number_is_the_form_factor_at_zero(element, number):
    assert atomic_number(element) == number
    assert form_factor(element, np.zeros(1))[0] == pytest.approx(number, rel=1e-3)


def test_special_positions_count_once():
    composition = small_contents("F 2 3").composition
    assert composition == pytest.approx({"C": 48, "S": 28.8, "H": 48, "O": 4})


@pytest.mark.parametrize("symbol", ["P 1", "I 1 2 1", "P 61", "F 2 3"])
def test_random_contents(symbol):
    cell = uctbx.unit_cell([3 * x for x in CELLS[symbol][:3]] + [*CELLS[symbol][3:]])
    contents = random_contents(symbol, cell, 0.4, 17.0, 3)
    assert contents.space_group == sgtbx.space_group_info(symbol).group()
    assert contents.n_waters == pytest.approx(0.4 * cell.volume() * 0.0334)
    order = contents.space_group.order_z()
    assert all(x.multiplicity() == order for x in contents.structure.scatterers())
    np.testing.assert_allclose(contents.atoms.b_iso, 17.0)
    mass = {"C": 12.011, "N": 14.007, "O": 15.999, "S": 32.06, "H": 1.008}
    elements, counts = np.unique(contents.atoms.element, return_counts=True)
    count = {e: n * order for e, n in zip(elements.tolist(), counts.tolist())}
    assert count["H"] == count["C"] + count["N"] + count["O"] + count["S"]
    # Partial specific volume in cm³/g: Å³ per dalton times Avogadro's number
    protein = 0.6 * cell.volume() / sum(mass[e] * n for e, n in count.items())
    assert protein * 0.602214 == pytest.approx(0.73, abs=0.01)
    assert count["C"] / count["H"] == pytest.approx(0.63, abs=0.01)
    sites = np.array(contents.structure.sites_cart())
    np.testing.assert_allclose(np.linalg.norm(sites[1::2] - sites[::2], axis=1), 1.0)


def test_random_contents_follow_from_the_seed():
    def sites(seed):
        contents = random_contents("P 41", CELLS["P 41"], 0.5, 20.0, seed)
        return np.array(contents.structure.sites_frac())

    np.testing.assert_array_equal(sites(1), sites(1))
    assert np.abs(sites(1) - sites(2)).max() > 0.1


def test_cell_gets_exactly_the_symmetry_of_the_group():
    contents = random_contents("P 41", (15, 15.04, 19, 90, 90.05, 90), 0.5, 20.0, 1)
    a, b, _, *angles = contents.unit_cell.parameters()
    assert a == pytest.approx(b, abs=1e-12)
    assert angles == pytest.approx([90, 90, 90], abs=1e-12)


@pytest.mark.parametrize("a", [0.5, 1.5])
def test_no_room_for_atoms(a):
    cell = (a, a, a, 90, 90, 90)
    with pytest.raises(ValueError, match="no room between the symmetry elements"):
        random_contents("F 2 3", cell, 0.5, 20.0, 1)


def test_too_many_atoms():
    cell = (500, 500, 500, 90, 90, 90)
    with pytest.raises(
        ValueError, match="too large for a random structure: 993[0-9]{3} "
    ):
        random_contents("P 21 21 21", cell, 0.45, 20.0, 1)


def test_pdb_file(tmp_path):
    path = tmp_path / "model.pdb"
    path.write_text(PDB)
    contents = contents_from_file(str(path))
    assert contents.space_group == sgtbx.space_group_info("P 21 21 21").group()
    np.testing.assert_array_equal(contents.atoms.element, ["N", "H", "Zn", "O", "H"])
    np.testing.assert_allclose(contents.atoms.number, [4, 4, 2, 3, 3])
    np.testing.assert_allclose(contents.atoms.b_iso, [10, 10, 12, 20, 20])
    np.testing.assert_allclose(
        contents.structure.sites_frac()[0], [1 / 20, 2 / 22, 3 / 24]
    )
    mass = 4 * (14.007 + 1.008 + 0.5 * 65.39)
    room = 20 * 22 * 24 - mass * 0.73 / 0.602214
    assert contents.n_waters == pytest.approx(room * 0.0334 - 3, rel=1e-5)
    waters = contents.n_waters
    assert contents.composition == pytest.approx(
        {"N": 4, "H": 7 + 2 * waters, "Zn": 2, "O": 3 + waters}
    )


def test_mmcif_file(tmp_path):
    path = tmp_path / "model.cif"
    path.write_text(CIF)
    contents = contents_from_file(str(path))
    np.testing.assert_array_equal(contents.atoms.element, ["N", "C"])
    np.testing.assert_allclose(contents.atoms.number, [4, 2])
    np.testing.assert_allclose(contents.atoms.b_iso, [10, 11])


def test_cell_and_group_given_replace_those_of_the_file(tmp_path):
    path = tmp_path / "model.pdb"
    path.write_text(PDB)
    contents = contents_from_file(str(path), "P 1", (25, 30, 35, 80, 90, 90))
    assert contents.space_group.order_z() == 1
    assert contents.unit_cell.parameters() == pytest.approx((25, 30, 35, 80, 90, 90))
    np.testing.assert_allclose(contents.structure.sites_cart()[0], [1, 2, 3])
    assert contents.composition["N"] == 1


def test_a_full_cell_has_no_bulk_water(tmp_path):
    path = tmp_path / "model.pdb"
    path.write_text(PDB)
    contents = contents_from_file(str(path), "P 1", (3, 3, 3, 90, 90, 90))
    assert contents.n_waters == 0


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read the structure .*model.pdb: Cannot open"),
        (b"\xff\x80" * 30, "cannot read the structure"),
        (b"hello\n", "cannot read the structure"),
        (PDB.replace("   2.000   3.000", "   abc     3.000").encode(), "cannot read"),
        (PDB.split("\n", 1)[1].encode(), "no unit cell .*give crystal.unit_cell"),
        (
            PDB.replace(
                "20.000   22.000   24.000", " 1.000    1.000    1.000"
            ).encode(),
            "there is no unit cell",
        ),
        (PDB.replace("P 21 21 21", "P 21 99 21").encode(), "give crystal.space_group"),
        (PDB.replace("P 21 21 21", "P 41").encode(), "incompatible with unit cell"),
        (PDB.split("\n", 1)[0].encode() + b"\nEND\n", "there are no atoms"),
        (PDB.replace("           N", "           Q").encode(), "cannot use"),
    ],
)
def test_files_that_are_no_structure(tmp_path, text, message):
    path = tmp_path / "model.pdb"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as error:
        contents_from_file(str(path))
    assert "\n" not in str(error.value)


def test_make_contents(tmp_path):
    contents = make_contents(SimulationSettings())
    assert contents.unit_cell.parameters() == pytest.approx((36, 40, 44, 90, 90, 90))
    assert str(contents.space_group.info()) == "P 21 21 21"
    path = tmp_path / "model.pdb"
    path.write_text(PDB)
    settings = SimulationSettings(crystal=CrystalSettings(structure=str(path)))
    assert make_contents(settings).volume == pytest.approx(20 * 22 * 24)


@pytest.mark.parametrize(
    "crystal_settings, message",
    [
        # with the default of the other
        (CrystalSettings(space_group="P 61"), "symmetry of the space group P 61: set"),
        (
            CrystalSettings(unit_cell=uctbx.unit_cell((20, 22, 24, 80, 90, 90))),
            "the cell 20, 22, 24, 80, 90, 90 does not have.*P 21 21 21: set both",
        ),
        (
            CrystalSettings(
                space_group="P 41",
                unit_cell=uctbx.unit_cell((30, 31, 40, 90, 90, 90)),
            ),
            "30, 31, 40, 90, 90, 90 does not have the symmetry of the space group P 41",
        ),
        (
            CrystalSettings(space_group="P 5"),
            "crystal.space_group=P 5 is not the symbol",
        ),
    ],
)
def test_cell_and_group_that_do_not_fit(crystal_settings, message):
    settings = SimulationSettings(crystal=crystal_settings)
    with pytest.raises(ValueError, match=message):
        make_contents(settings)
