"""What the unit cell holds, and what follows from it: form factors and |F|².

The atoms come from a structure file, or are put at random into the part of the cell
that is not solvent, in the composition of a protein. Bulk waters are a number only:
they count in sums over all atoms (absolute scale, Compton scattering), but have no
positions and no part in |F|². Intensities are in electrons² per unit cell.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Union

import numpy as np

import iotbx.pdb
from cctbx import adptbx, crystal, miller, sgtbx, uctbx, xray
from cctbx.eltbx import tiny_pse
from cctbx.eltbx.xray_scattering import wk1995
from dxtbx import flumpy
from libtbx.utils import Sorry
from scitbx.array_family import flex

from dials_diffuse import symmetry
from dials_diffuse.simulation.settings import (
    DEFAULT_CELL,
    DEFAULT_SPACE_GROUP,
    SimulationSettings,
    comma_separated,
)
from dials_diffuse.util.compat import miller_index_to_numpy

Cell = Union[uctbx.unit_cell, Sequence[float]]

FORM_FACTOR_TABLE = "wk1995"  # Waasmaier & Kirfel; H is the bonded hydrogen

# Partial specific volume of protein, 0.73 cm³/g, in Å³ per dalton.
VOLUME_PER_DALTON = 0.73 / 0.602214
# Of the non-hydrogen atoms of a protein; their mean mass with one H each is 14.24 Da.
PROTEIN_COMPOSITION = {"C": 0.63, "N": 0.17, "O": 0.19, "S": 0.006}
VOLUME_PER_ATOM = 17.3  # Å³ per non-hydrogen atom: 14.24 Da times VOLUME_PER_DALTON
WATER_DENSITY = 0.0334  # waters per Å³
BOND_TO_HYDROGEN = 1.0  # Å
SMALLEST_CELL = 20.0  # Å³; files without a crystal have a cell of 1 Å³
HYDROGEN = ("H", "D", "T")
# With the defaults of cctbx |F|² is wrong by 6 % of its mean (r.m.s.), with these by
# 1e-4, in three times the time.
FFT_SETTINGS = {
    "wing_cutoff": 1e-6,
    "quality_factor": 1e4,
    "exp_table_one_over_step_size": 0,
}
MOST_ATOMS = 200_000  # not hydrogen, at random in the asymmetric unit
MAX_TRIES = 1000  # for a random position off all symmetry elements


class Atoms(NamedTuple):
    """The atoms of the structure, one entry for each of the asymmetric unit."""

    element: np.ndarray  # symbols
    number: np.ndarray  # in the unit cell, occupancy times multiplicity
    b_iso: np.ndarray  # Å²


@dataclasses.dataclass(frozen=True, eq=False)
class CellContents:
    """All that the unit cell holds.

    Args:
        structure: Atoms of the asymmetric unit, with element symbols as scattering
            types.
        n_waters: Number of bulk waters in the unit cell.
    """

    structure: xray.structure
    n_waters: float

    @property
    def unit_cell(self) -> uctbx.unit_cell:
        return self.structure.unit_cell()

    @property
    def space_group(self) -> sgtbx.space_group:
        return self.structure.space_group()

    @property
    def volume(self) -> float:
        """Volume of the unit cell, Å³."""
        return float(self.unit_cell.volume())

    @functools.cached_property
    def atoms(self) -> Atoms:
        """Element, number in the cell and equivalent isotropic B, bulk water left out."""
        scatterers = self.structure.scatterers()
        u_iso = flumpy.to_numpy(self.structure.extract_u_iso_or_u_equiv())
        return Atoms(
            np.array([x.scattering_type for x in scatterers]),
            np.array([x.occupancy * x.multiplicity() for x in scatterers]),
            adptbx.u_as_b(1.0) * u_iso,
        )

    @functools.cached_property
    def composition(self) -> dict[str, float]:
        """Number of atoms of each element in the unit cell, bulk water included."""
        counts: dict[str, float] = {}
        for element in np.unique(self.atoms.element).tolist():
            selected = self.atoms.element == element
            counts[element] = float(self.atoms.number[selected].sum())
        if self.n_waters:
            counts["H"] = counts.get("H", 0.0) + 2 * self.n_waters
            counts["O"] = counts.get("O", 0.0) + self.n_waters
        return counts


def atomic_number(element: str) -> int:
    return int(tiny_pse.table(element).atomic_number())


def form_factor(element: str, s: np.ndarray) -> np.ndarray:
    """Form factor of a neutral atom at rest, in electrons.

    Waasmaier & Kirfel (1995) Acta Cryst. A51, 416, doi:10.1107/S0108767394013292, for
    s to 12 Å⁻¹; hydrogen is that of a bond: Stewart, Davidson & Simpson (1965) J. Chem.
    Phys. 42, 3175, doi:10.1063/1.1696397.

    Args:
        element: Symbol.
        s: 1/d, Å⁻¹, any shape.

    Raises:
        ValueError: There is no form factor of this name.
    """
    try:
        gaussians = wk1995(element, True).fetch()
    except (RuntimeError, ValueError):
        raise ValueError(f"there is no form factor of the element {element}") from None
    s = np.asarray(s, dtype=float)
    d_star_sq = flumpy.from_numpy(np.ascontiguousarray(s.ravel() ** 2))
    return flumpy.to_numpy(gaussians.at_d_star_sq(d_star_sq)).reshape(s.shape)


def random_contents(
    space_group_symbol: str,
    unit_cell: Cell,
    solvent_fraction: float,
    b_iso: float,
    seed: int,
) -> CellContents:
    """A unit cell filled at random with the atoms of a protein.

    The protein takes the volume V(1 - x), with 17.3 Å³ for each non-hydrogen atom and
    its hydrogen, as follows from a partial specific volume of 0.73 cm³/g. The atoms are
    at general positions, one hydrogen 1 Å from every other atom.

    Args:
        space_group_symbol: In any setting.
        unit_cell: Å and degrees.
        solvent_fraction: Fraction x of the cell that is bulk water.
        b_iso: B of all atoms, Å².
        seed: The same number gives the same structure.

    Raises:
        ValueError: Cell and space group do not fit, or the cell is too small or too large.
    """
    settings = _special_positions(space_group_symbol, unit_cell)
    cell, group = settings.unit_cell(), settings.space_group()
    rng = np.random.default_rng([seed, 0])
    protein = (1 - solvent_fraction) * cell.volume() / group.order_z()
    n_atoms = max(1, round(protein / VOLUME_PER_ATOM))
    if n_atoms > MOST_ATOMS:
        raise ValueError(
            f"the cell {comma_separated(cell.parameters())} is too large for a random "
            f"structure: {n_atoms} atoms in the asymmetric unit, at most {MOST_ATOMS} are "
            "possible. Give crystal.structure or a smaller crystal.unit_cell"
        )
    elements = _protein_elements(n_atoms)
    structure = xray.structure(settings)
    for i, element in enumerate(elements):
        site = _general_site(settings, lambda: rng.random(3))
        bonded = _general_site(settings, lambda: _neighbour(cell, site, rng))
        for symbol, position in ((element, site), ("H", bonded)):
            structure.add_scatterer(
                xray.scatterer(
                    label=f"{symbol}{i + 1}",
                    site=tuple(position),
                    b=b_iso,
                    scattering_type=symbol,
                )
            )
    return CellContents(structure, solvent_fraction * cell.volume() * WATER_DENSITY)


def _protein_elements(n_atoms: int) -> list[str]:
    """Symbols of the non-hydrogen atoms in the composition of a protein."""
    elements = []
    for element in ("S", "O", "N"):
        elements += [element] * round(PROTEIN_COMPOSITION[element] * n_atoms)
    return elements + ["C"] * (n_atoms - len(elements))


def _neighbour(
    cell: uctbx.unit_cell, site: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A fractional site at the distance of a bonded hydrogen, in a random direction."""
    direction = rng.normal(size=3)
    direction *= BOND_TO_HYDROGEN / np.linalg.norm(direction)
    return site + np.array(cell.fractionalize(tuple(direction)))


def _general_site(
    settings: crystal.special_position_settings, draw: Callable[[], np.ndarray]
) -> np.ndarray:
    """The first site drawn that is off all symmetry elements."""
    try:
        for _ in range(MAX_TRIES):
            site = draw()
            if settings.site_symmetry(tuple(site)).is_point_group_1():
                return site
    except RuntimeError:  # the cell is not larger than the distance of equivalent atoms
        pass
    raise ValueError(
        f"the cell {comma_separated(settings.unit_cell().parameters())} has no room between the symmetry "
        f"elements of {settings.space_group_info()}: use a larger crystal.unit_cell"
    )


def _special_positions(
    space_group: str | sgtbx.space_group_info, unit_cell: Cell
) -> crystal.special_position_settings:
    """Space group and cell, which is made to have exactly its symmetry.

    Raises:
        ValueError: There is no such space group, or the cell does not have its symmetry.
    """
    try:
        info = sgtbx.space_group_info(str(space_group))
    except RuntimeError:
        raise ValueError(
            f"crystal.space_group={space_group} is not the symbol of a space group"
        ) from None
    unit_cell = _unit_cell(unit_cell)
    if not info.group().is_compatible_unit_cell(unit_cell, 0.01, 0.1):
        raise ValueError(
            f"the cell {comma_separated(unit_cell.parameters())} does not have the symmetry of the space group "
            f"{info}: set both crystal.unit_cell and crystal.space_group"
        )
    return crystal.special_position_settings(
        crystal.symmetry(
            unit_cell=info.group().average_unit_cell(unit_cell), space_group_info=info
        )
    )


def contents_from_file(
    path: str, space_group: str | None = None, unit_cell: Cell | None = None
) -> CellContents:
    """The unit cell of a PDB or mmCIF file.

    The first model is taken, hydrogens as they are in the file, all atoms as neutral.
    Bulk waters fill the volume that the atoms of the file leave, at 1.212 Å³/Da for all
    that is not water, less the waters of the file.

    Args:
        path: Name of the file.
        space_group: Symbol that replaces the space group of the file.
        unit_cell: Cell that replaces that of the file; Cartesian coordinates stay.

    Raises:
        ValueError: The file cannot be read, or has no atoms, or cell or space group are
            missing or do not fit.
    """
    try:
        model = iotbx.pdb.input(file_name=str(path))
        hierarchy = model.construct_hierarchy()
        found = model.crystal_symmetry()
    except (AssertionError, OSError, RuntimeError, ValueError, Sorry) as e:
        # An assertion of iotbx: the cell in the file does not fit its space group.
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"cannot read the structure {path}: {reason}") from None
    if hierarchy.atoms_size() == 0:
        raise ValueError(f"there are no atoms in the structure {path}")
    if unit_cell is None:
        unit_cell = found.unit_cell() if found else None
    if unit_cell is None or _unit_cell(unit_cell).volume() < SMALLEST_CELL:
        raise ValueError(
            f"there is no unit cell in the structure {path}: give crystal.unit_cell"
        )
    if space_group is None:
        space_group = found.space_group_info() if found else None
    if space_group is None:
        raise ValueError(
            f"there is no space group in the structure {path}: give crystal.space_group"
        )
    settings = _special_positions(space_group, unit_cell)
    structure = _structure_of_file(model, settings, path)
    return CellContents(structure, _bulk_waters(hierarchy, settings))


def _unit_cell(cell: Cell) -> uctbx.unit_cell:
    return (
        cell if isinstance(cell, uctbx.ext.unit_cell) else uctbx.unit_cell(tuple(cell))
    )


def _structure_of_file(
    model: iotbx.pdb.input, settings: crystal.special_position_settings, path: str
) -> xray.structure:
    """The atoms of the first model, as neutral elements."""
    try:
        # The SCALE matrix of a file belongs to the cell of the file.
        structure = model.xray_structures_simple(
            crystal_symmetry=settings, use_scale_matrix_if_available=False
        )[0]
    except (RuntimeError, Sorry) as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"cannot use the structure {path}: {reason}") from None
    for scatterer in structure.scatterers():
        # Electrons of deuterium are those of hydrogen.
        symbol = scatterer.element_symbol()
        scatterer.scattering_type = "H" if symbol in HYDROGEN else symbol
        form_factor(scatterer.scattering_type, np.zeros(1))  # is there one?
    structure.scattering_type_registry(table=FORM_FACTOR_TABLE)
    return structure


def _bulk_waters(
    hierarchy: iotbx.pdb.hierarchy.root, settings: crystal.special_position_settings
) -> float:
    """Waters per unit cell that are not in the model: what it leaves of the volume."""
    mass = n_waters = 0.0
    for atom in hierarchy.models()[0].atoms():
        residue = atom.parent().resname.strip()
        element = (atom.determine_chemical_element_simple() or "C").strip()
        if iotbx.pdb.common_residue_names_get_class(residue) != "common_water":
            mass += atom.occ * tiny_pse.table(element).weight()
        elif element not in HYDROGEN:
            n_waters += atom.occ
    order = settings.space_group().order_z()
    room = settings.unit_cell().volume() - order * mass * VOLUME_PER_DALTON
    return max(0.0, room * WATER_DENSITY - order * n_waters)


def make_contents(settings: SimulationSettings) -> CellContents:
    """The unit cell that the settings ask for: of a file, or random.

    Raises:
        ValueError: The file is no structure, or cell and space group do not fit.
    """
    wanted = settings.crystal
    if wanted.structure is not None:
        return contents_from_file(
            wanted.structure, wanted.space_group, wanted.unit_cell
        )
    return random_contents(
        wanted.space_group or DEFAULT_SPACE_GROUP,
        wanted.unit_cell or DEFAULT_CELL,
        wanted.solvent_fraction,
        wanted.b_iso,
        settings.seed,
    )


class BraggIntensities:
    """|F|² of all reflections to d_min, in a dense array.

    The atoms scatter with their displacements, bulk water not at all. One asymmetric unit
    is calculated and expanded, which makes the array exactly symmetric. Systematically
    absent reflections and 000 are zero.

    Args:
        contents: The unit cell.
        d_min: High resolution limit, Å.
        algorithm: "fft", "direct", or None for the faster one.

    Attributes:
        values: |F|², electrons², float32, shape (2n_h + 1, 2n_k + 1, 2n_l + 1), centred on
            000, with zeros on its outermost layers.
    """

    def __init__(
        self, contents: CellContents, d_min: float, algorithm: str | None = None
    ) -> None:
        self.d_min = d_min
        structure = contents.structure
        structure.scattering_type_registry(table=FORM_FACTOR_TABLE)
        unique = miller.build_set(structure, anomalous_flag=False, d_min=d_min)
        f_calc = unique.structure_factors_from_scatterers(
            structure, algorithm=algorithm, **FFT_SETTINGS
        ).f_calc()
        index = miller_index_to_numpy(f_calc.indices())
        intensity = flumpy.to_numpy(flex.norm(f_calc.data())).astype(np.float32)
        # |h| <= a/d_min, and one more layer
        lengths = contents.unit_cell.parameters()[:3]
        half = np.array([int(a / d_min) + 1 for a in lengths])
        self.values = np.zeros(2 * half + 1, dtype=np.float32)
        laue = symmetry.laue_group(contents.space_group)
        for rotation in symmetry.rotation_matrices(laue):
            self.values[tuple((index @ rotation + half).T)] = intensity

    def at(self, h: np.ndarray, k: np.ndarray, l: np.ndarray) -> np.ndarray:
        """|F|² of reflections, zero for those beyond d_min.

        Args:
            h, k, l: Integers, any shape.

        Returns:
            float32 array of the same shape, electrons².
        """
        place = np.zeros(np.shape(h), dtype=np.int64)
        for index, size in zip((h, k, l), self.values.shape):
            # The outermost layers hold zeros: all that is outside ends up there.
            place *= size
            place += np.clip(index, -(size // 2), size // 2)
            place += size // 2
        return self.values.ravel()[place]
