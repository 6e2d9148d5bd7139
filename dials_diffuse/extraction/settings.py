"""The settings of extraction, checked once, built from the PHIL parameters."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Mapping, Sequence

import numpy as np

from cctbx import uctbx
from dxtbx.model import Experiment
from libtbx import Auto

from dials_diffuse.grid import Grid
from dials_diffuse.util.compat import available_cores

if TYPE_CHECKING:
    from dials_diffuse.bragg.ellipsoid import Ellipsoid
    from dials_diffuse.bragg.shoeboxes import Shoeboxes


@dataclasses.dataclass(frozen=True)
class CorrectionSettings:
    """Which factors make up the normalisation, and what they need to know."""

    polarization: bool = True
    solid_angle: bool = True
    efficiency: bool = True
    path: str = "air"
    temperature: float = 293.15
    pressure: float = 101325.0
    exposure: bool = True
    polarization_fraction: float | None = None
    polarization_normal: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        normal = self.polarization_normal
        if normal is not None and not np.linalg.norm(normal) > 0:
            raise ValueError("polarization_normal must not have zero length")

    @classmethod
    def from_phil(cls, params: Any) -> CorrectionSettings:
        """Settings of the extracted scope ``corrections`` of ``phil/extract.phil``."""
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: getattr(params, name) for name in names}
        normal = values["polarization_normal"]
        values["polarization_normal"] = tuple(normal) if normal else None
        return cls(**values)


def symmetric(elements: Sequence[float]) -> np.ndarray:
    """The symmetric matrix of elements 11, 22, 33, 12, 13, 23, shape (3, 3)."""
    g11, g22, g33, g12, g13, g23 = elements
    return np.array([[g11, g12, g13], [g12, g22, g23], [g13, g23, g33]])


def covered_fraction(metric: Sequence[float], limit: float = 1.0) -> float:
    """Fraction of a reciprocal cell for which g(dh, dh) < limit.

    By counting points; to about 0.002.
    """
    axis = (np.arange(48) + 0.5) / 48 - 0.5
    dh = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(-1, 3)
    return float(np.mean(np.einsum("ni,ij,nj->n", dh, symmetric(metric), dh) < limit))


@dataclasses.dataclass(frozen=True)
class ExclusionRegion:
    """The region about a reciprocal lattice point whose pixels are left out.

        g(dh, dh) + radial g(dh, h)² / (1 + growth_radial s²) < 1 + growth s²

    Attributes:
        metric: g11, g22, g33, g12, g13, g23, in fractional indices.
        growth, growth_radial, radial: Å².
    """

    metric: tuple[float, ...]
    growth: float = 0.0
    growth_radial: float = 0.0
    radial: float = 0.0

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> ExclusionRegion:
        """The region of the nine ``numbers``."""
        *metric, growth, growth_radial, radial = map(float, numbers)
        return cls(tuple(metric), growth, growth_radial, radial)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The metric, growth, growth_radial and radial: nine numbers."""
        return (*self.metric, self.growth, self.growth_radial, self.radial)

    def is_inside(self, hkl: np.ndarray, s2: np.ndarray) -> np.ndarray:
        """Whether points are in the region about the lattice point nearest to them.

        Args:
            hkl: Fractional Miller indices, shape (..., 3).
            s2: s² of the points, Å⁻², shape (...).
        """
        g = symmetric(self.metric)
        dh = hkl - np.rint(hkl)
        dg = dh @ g
        distance = np.sum(dg * dh, axis=-1)
        if self.radial:
            along = np.sum(dg * hkl, axis=-1)
            distance += self.radial * along**2 / (1 + self.growth_radial * s2)
        return distance < 1 + self.growth * s2

    def volume(self, cell: uctbx.unit_cell, hkl: np.ndarray) -> np.ndarray:
        """Volume about each lattice point, in reciprocal cells.

            v = 4π/3 (1 + growth s²) (1 + growth_radial s²)^{1/2} / √det g

        where the region does not grow along s as it does across (Ellipsoid of
        ``bragg.ellipsoid``, a sphere at s = 0), else (1 + growth s²)^{3/2}.

        Args:
            cell: Cell of the crystal.
            hkl: Miller indices, shape (n, 3).
        """
        b = np.array(cell.fractionalization_matrix()).reshape(3, 3)
        s2 = np.sum((hkl @ b) ** 2, axis=1)
        across = 1 + self.growth * s2
        along = 1 + self.growth_radial * s2 if self.radial else across
        determinant = np.linalg.det(symmetric(self.metric))
        return 4 / 3 * np.pi * across * np.sqrt(along) / np.sqrt(determinant)


@dataclasses.dataclass(frozen=True)
class BraggSettings:
    """The region about the Bragg positions whose pixels are left out.

    Attributes:
        exclusion: none, ellipsoid, auto (fitted to the images), shoebox (spots) or
            statistical (voxels that stand out).
        semi_axes, unit: Of the ellipsoid, in reciprocal cells or 1/Å.
        absent: Whether absent reflections are left out too.
        fraction: Of the Bragg intensity that lies inside the fitted ellipsoid.
        margin: Pixels by which shoeboxes are enlarged.
    """

    exclusion: str = "ellipsoid"
    semi_axes: tuple[float, float, float] = (0.25, 0.25, 0.25)
    unit: str = "hkl"
    absent: bool = False
    fraction: float = 0.999
    margin: int = 0

    def __post_init__(self) -> None:
        if self.exclusion != "ellipsoid":
            return
        if min(self.semi_axes) <= 0:
            raise ValueError(
                "bragg.semi_axes must be positive: use bragg.exclusion=none to keep "
                "all pixels"
            )

    @classmethod
    def from_phil(cls, params: Any) -> BraggSettings:
        """Settings of an extracted scope ``bragg``; some have fewer parameters."""
        values = {
            field.name: getattr(params, field.name)
            for field in dataclasses.fields(cls)
            if hasattr(params, field.name)
        }
        values["exclusion"] = chosen(params.exclusion)
        values["semi_axes"] = three_of("bragg.semi_axes", params.semi_axes or [0.25])
        return cls(**values)

    def metric(
        self, cell: uctbx.unit_cell, rotations: np.ndarray
    ) -> tuple[float, ...] | None:
        """Symmetric matrix g of the ellipsoid g(dh, dh) < 1 in fractional indices.

            g_ij = cos(a*_i, a*_j) / (r_i r_j)

        with the semi-axes r as fractions of the reciprocal axes, averaged over the Laue
        group, R g Rᵀ, so that equivalent pixels are treated alike. Equal lengths in 1/Å
        make a sphere in any cell.

        Args:
            cell: Cell of the crystal.
            rotations: Rotation parts of the Laue group, shape (n, 3, 3), h' = h R.

        Returns:
            g11, g22, g33, g12, g13, g23, or None where there is no such ellipsoid.
        """
        if self.exclusion != "ellipsoid":
            return None
        reciprocal = cell.reciprocal().parameters()
        r = np.array(self.semi_axes)
        if self.unit == "inverse_angstrom":
            r = r / reciprocal[:3]
        cosines = np.eye(3)
        cos_23, cos_13, cos_12 = np.cos(np.radians(reciprocal[3:]))
        cosines[[0, 0, 1], [1, 2, 2]] = cosines[[1, 2, 2], [0, 0, 1]] = (
            cos_12,
            cos_13,
            cos_23,
        )
        g = np.mean(
            rotations @ (cosines / np.outer(r, r)) @ np.swapaxes(rotations, 1, 2),
            axis=0,
        )
        return g[0, 0], g[1, 1], g[2, 2], g[0, 1], g[0, 2], g[1, 2]

    def check_coverage(self, cell: uctbx.unit_cell, rotations: np.ndarray) -> None:
        """Check that the ellipsoids leave something of each reciprocal cell.

        Raises:
            ValueError: They cover more than 95 % of it.
        """
        metric = self.metric(cell, rotations)
        if metric is None:
            return
        covered = covered_fraction(metric)
        if covered > 0.95:
            largest = min(cell.reciprocal().parameters()[:3]) / 2
            raise ValueError(
                f"The ellipsoids of bragg.semi_axes={self.semi_axes[0]:g},"
                f"{self.semi_axes[1]:g},{self.semi_axes[2]:g} with bragg.unit="
                f"{self.unit} cover {100 * covered:.0f} % of each reciprocal cell: use "
                f"less than 0.5 for unit=hkl, or less than {largest:.2g} for "
                "unit=inverse_angstrom"
            )


@dataclasses.dataclass(frozen=True)
class IndexingSettings:
    """Whether crystals are brought into one indexing setting, and what if in doubt."""

    consistent: str = "auto"
    in_doubt: str = "best"


@dataclasses.dataclass(frozen=True)
class GeometrySettings:
    """Which images are far from their models, and whether they are left out."""

    reject_images: bool = False
    tolerance: float | None = None


@dataclasses.dataclass(frozen=True)
class ExtractionSettings:
    """Everything that decides what ``extract`` makes of a set of experiments.

    Attributes:
        ndiv: Voxels per reciprocal lattice vector.
        d_min, d_max: Resolution limits in Å; None for the detector's, and for none.
        reference_cell: ``mean``, ``first`` or ``given``.
        unit_cell: The reference cell if it is given.
        block_width: Degrees of rotation that make one observation per voxel.
        phi_sampling: ``middle`` indexes all pixels of an image at the middle of its
            rotation, ``spread`` its rows at angles spread over it; ``auto`` decides.
        mask: Mask of each panel, True for good pixels, or None.
        masks: The same for each experiment, by its identifier.
        background: Path of the output of dials.diffuse_background, or None.
        ellipsoids: Fitted regions of Bragg peaks, by the identifier of the experiment.
        shoeboxes: Pixels of spots.
        gain: Detector units per photon, or None for the panels' own.
        trusted_range: Smallest and largest value to use, or None for the panels' own.
        nproc: Number of processes.
    """

    ndiv: tuple[int, int, int] = (2, 2, 2)
    d_min: float | None = None
    d_max: float | None = None
    reference_cell: str = "mean"
    unit_cell: tuple[float, ...] | None = None
    block_width: float = 1.0
    phi_sampling: str = "auto"
    bragg: BraggSettings = BraggSettings()
    corrections: CorrectionSettings = CorrectionSettings()
    indexing: IndexingSettings = IndexingSettings()
    geometry: GeometrySettings = GeometrySettings()
    mask: tuple[np.ndarray, ...] | None = None
    masks: Mapping[str, tuple[np.ndarray, ...]] | None = None
    background: str | None = None
    ellipsoids: Mapping[str, Ellipsoid] | None = None
    shoeboxes: Shoeboxes | None = None
    gain: float | None = None
    trusted_range: tuple[float, float] | None = None
    nproc: int = 1

    def __post_init__(self) -> None:
        if self.reference_cell == "given" and self.unit_cell is None:
            raise ValueError("reference_cell=given needs unit_cell=a,b,c,al,be,ga")
        if self.unit_cell is not None and self.reference_cell != "given":
            raise ValueError("unit_cell is used only with reference_cell=given")
        low, high = self.trusted_range or (0, 1)
        if not low < high:
            raise ValueError("trusted_range needs the smaller value first")

    def mask_of(self, experiment: Experiment) -> tuple[np.ndarray, ...] | None:
        """The mask of an experiment's panels, or None."""
        if self.masks is not None:
            return self.masks.get(experiment.identifier)
        return self.mask

    def region(self, experiment: Experiment, grid: Grid) -> ExclusionRegion | None:
        """The region left out about the lattice points of an experiment, or None."""
        if self.bragg.exclusion == "auto":
            if not self.ellipsoids:
                return None
            fitted = self.ellipsoids[experiment.identifier]
            radial = (fitted.growth - fitted.growth_radial) * fitted.radius**2
            return ExclusionRegion(
                fitted.metric, fitted.growth, fitted.growth_radial, radial
            )
        cell = experiment.crystal.get_unit_cell()
        metric = self.bragg.metric(cell, grid.rotations)
        return None if metric is None else ExclusionRegion(metric)

    @classmethod
    def from_phil(
        cls, params: Any, mask: tuple[np.ndarray, ...] | None = None
    ) -> ExtractionSettings:
        """Settings of the extracted PHIL parameters of ``phil/extract.phil``."""
        cell = params.grid.unit_cell
        return cls(
            ndiv=three_of("grid.ndiv", params.grid.ndiv),
            d_min=params.grid.d_min,
            d_max=params.grid.d_max,
            reference_cell=params.grid.reference_cell,
            unit_cell=cell.parameters() if cell else None,
            block_width=params.block_width,
            phi_sampling=chosen(params.phi_sampling),
            bragg=BraggSettings.from_phil(params.bragg),
            corrections=CorrectionSettings.from_phil(params.corrections),
            indexing=IndexingSettings(
                consistent=chosen(params.indexing.consistent),
                in_doubt=params.indexing.in_doubt,
            ),
            geometry=GeometrySettings(
                reject_images=params.geometry.reject_images,
                tolerance=number_or_none(params.geometry.tolerance),
            ),
            mask=mask,
            background=params.background,
            gain=params.gain,
            trusted_range=(
                tuple(params.trusted_range) if params.trusted_range else None
            ),
            nproc=processes(params.mp.nproc),
        )


def processes(nproc: Any) -> int:
    """The number of processes that ``mp.nproc`` asks for; Auto is all processors."""
    return nproc if isinstance(nproc, int) else available_cores()


def chosen(value: Any) -> str:
    """A choice. PHIL reads the words none and auto, given by the user, as something else."""
    if value is Auto:
        return "auto"
    return value or "none"


def number_or_none(value: Any) -> float | None:
    """A number, or None for Auto."""
    return float(value) if isinstance(value, (int, float)) else None


def three_of(name: str, values: list | None) -> tuple:
    """Three values of a parameter for which one may stand for all.

    Raises:
        ValueError: There are two values, or none.
    """
    if values is not None and len(values) == 1:
        return tuple(values) * 3
    if values is None or len(values) != 3:
        raise ValueError(f"{name} takes one number or three")
    return tuple(values)
