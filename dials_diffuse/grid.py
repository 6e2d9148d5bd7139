"""The voxel grid: reference cell, subdivision, Laue group and resolution limits.

Reciprocal space is cut into ndiv voxels along each reciprocal axis. Voxel n (three
integers) is centred at the fractional Miller index n/ndiv, so every Bragg position is
the centre of a voxel for even and odd ndiv alike, and the point h belongs to voxel
floor(h·ndiv + 1/2). Lengths (1/d, Å⁻¹) are those of the reference cell.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from cctbx import miller, sgtbx, uctbx

from dials_diffuse import symmetry
from dials_diffuse.util.compat import miller_index_to_numpy

# Voxels of the bounding box, padded to multiples of four on each axis, are numbered with
# 32-bit integers in the pixel loop.
MAX_VOXELS = 2**31 - 1

# Relative error up to which a voxel centre counts as on a resolution limit.
ROUNDING = 1e-9

# Half voxel diagonals by which voxels of grids that are taken for one may differ in s.
SAME_PLACE = 0.005

# Voxels whose s is computed at once, which bounds the memory.
S_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid of voxels in reciprocal space.

    Args:
        unit_cell: Reference cell parameters a, b, c (Å), alpha, beta, gamma (degrees).
        ndiv: Voxels per reciprocal lattice vector along a*, b*, c*.
        space_group: Hall symbol of the crystals' space group.
        d_min: Smallest d-spacing, Å.
        d_max: Largest d-spacing, Å, or None for no limit.

    Raises:
        ValueError: The subdivision breaks the symmetry, the limits are in the wrong
            order, or the grid has more than 2^31 - 1 voxels.
    """

    unit_cell: tuple[float, ...]
    ndiv: tuple[int, int, int]
    space_group: str
    d_min: float
    d_max: float | None = None

    def __post_init__(self) -> None:
        if min(self.ndiv) < 1:
            raise ValueError(f"ndiv must be positive, not {self.ndiv}")
        if self.d_max is not None and self.d_max <= self.d_min:
            raise ValueError(
                f"d_max={self.d_max:g} must be greater than d_min={self.d_min:g}"
            )
        symmetry.check_subdivision(self.laue_group, self.ndiv)
        if math.prod((n + 3) // 4 * 4 for n in self.shape) > MAX_VOXELS:
            raise ValueError(
                f"a grid of {' x '.join(map(str, self.shape))} voxels is too large "
                f"(more than {MAX_VOXELS}): use a smaller ndiv or a larger d_min"
            )

    @property
    def cell(self) -> uctbx.unit_cell:
        """The reference cell."""
        return uctbx.unit_cell(self.unit_cell)

    @property
    def laue_group(self) -> sgtbx.space_group:
        """Primitive Laue group, in the setting of the space group."""
        return symmetry.laue_group(sgtbx.space_group(self.space_group))

    @functools.cached_property
    def rotations(self) -> np.ndarray:
        """Rotation parts of the Laue group, shape (n_ops, 3, 3), h' = h R."""
        return symmetry.rotation_matrices(self.laue_group)

    @property
    def half_size(self) -> tuple[int, int, int]:
        """Largest voxel index along each axis that the sphere of radius 1/d_min meets.

        h = a·s, so |h| <= a/d_min with the length a of the *direct* axis.
        """
        return tuple(
            int(math.floor(n * a / self.d_min + 0.5))
            for n, a in zip(self.ndiv, self.unit_cell[:3])
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels of the bounding box along h, k and l."""
        return tuple(2 * n + 1 for n in self.half_size)

    @property
    def half_diagonal(self) -> float:
        """Half the longest diagonal of a voxel, Å⁻¹: a pixel is no farther from the centre.

        The voxel is the parallelepiped with the edges a*/ndiv, b*/ndiv, c*/ndiv.
        """
        edges = np.array(self.cell.reciprocal().orthogonalization_matrix())
        edges = edges.reshape(3, 3) / self.ndiv
        signs = np.array([[1, 1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]])
        return float(np.linalg.norm(signs @ edges.T, axis=1).max() / 2)

    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fractional Miller indices of the voxel centres along h, k and l."""
        return tuple(
            np.arange(-n, n + 1) / div for n, div in zip(self.half_size, self.ndiv)
        )

    def has_cell_of(self, other: Grid) -> bool:
        """Whether both cells put all voxels at the same s, to less than ``SAME_PLACE``.

        Cells that were refined or typed apart differ in their last digits.
        """
        steps = [h for h in itertools.product((-1, 0, 1), repeat=3) if any(h)]
        d = np.array([[cell.d(h) for h in steps] for cell in (self.cell, other.cell)])
        change = np.max(np.abs(d[0] / d[1] - 1)) / self.d_min
        return bool(change <= SAME_PLACE * self.half_diagonal)

    def voxel_index(self, hkl: np.ndarray) -> np.ndarray:
        """The voxel that holds each fractional Miller index, floor(h·ndiv + 1/2)."""
        return np.floor(np.asarray(hkl) * self.ndiv + 0.5).astype(np.int32)

    def key(self, index: np.ndarray) -> np.ndarray:
        """Place of each voxel in the C-ordered bounding box (h slowest, l fastest).

        Args:
            index: Voxel indices, shape (n, 3), inside the bounding box.

        Returns:
            int64 array of shape (n,).
        """
        nh, nk, nl = self.half_size
        _, size_k, size_l = self.shape
        h, k, l = np.asarray(index, dtype=np.int64).T
        return ((h + nh) * size_k + (k + nk)) * size_l + (l + nl)

    def index(self, key: np.ndarray) -> np.ndarray:
        """The voxel index of each place in the bounding box: inverse of ``key``."""
        place = np.stack(np.unravel_index(np.asarray(key), self.shape), axis=-1)
        return (place - np.array(self.half_size)).astype(np.int32)

    def s(self, index: np.ndarray) -> np.ndarray:
        """s = 1/d of each voxel centre, Å⁻¹.

        Args:
            index: Voxel indices, shape (n, 3).
        """
        aa, bb, cc, ab, ac, bc = self.cell.reciprocal().metrical_matrix()
        metric = np.array([[aa, ab, ac], [ab, bb, bc], [ac, bc, cc]])
        metric /= np.outer(self.ndiv, self.ndiv)
        index = np.asarray(index)
        s = np.empty(len(index))
        for start in range(0, len(index), S_BLOCK):
            hkl = index[start : start + S_BLOCK].astype(float)
            s2 = np.einsum("ij,ij->i", hkl @ metric, hkl)
            s[start : start + S_BLOCK] = np.sqrt(np.maximum(s2, 0.0))
        return s

    def in_resolution_range(self, s: np.ndarray) -> np.ndarray:
        """Whether voxel centres lie within d_min and d_max, limits included.

        Args:
            s: 1/d of the voxel centres, Å⁻¹. The origin, s = 0, never does.
        """
        # Voxels on the limit itself must not fall to either side by rounding.
        inside = (s > 0) & (s * self.d_min <= 1 + ROUNDING)
        if self.d_max is not None:
            inside &= s * self.d_max >= 1 - ROUNDING
        return inside

    def asu_indices(self, margin: float | None = None) -> np.ndarray:
        """Symmetry-unique voxels whose centres lie within d_min and d_max.

        They are the Miller indices of a crystal with the cell edges multiplied by ndiv;
        the origin is left out.

        Args:
            margin: If given, all voxels to this distance (Å⁻¹) beyond d_min, whatever
                d_max is and whether or not they lie in the bounding box.

        Returns:
            int32 array of shape (n, 3), in the asymmetric unit of ``map_to_asu``.
        """
        s_max = 1.0 / self.d_min + (margin or 0.0)
        lengths = [n * a for n, a in zip(self.ndiv, self.unit_cell[:3])]
        unique = miller.index_generator(
            uctbx.unit_cell((*lengths, *self.unit_cell[3:])),
            self.laue_group.type(),
            False,
            1.0 / (s_max * (1 + ROUNDING)),
        )
        index = miller_index_to_numpy(unique.to_array())
        if margin is not None:
            return index
        return index[self.in_resolution_range(self.s(index))]
