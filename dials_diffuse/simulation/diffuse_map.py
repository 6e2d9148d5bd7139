"""A diffuse map known at every point of reciprocal space and in the mean of every voxel.

Two parts, both with the Laue symmetry of the crystal and never negative, in electrons²
per unit cell:

* the cloud: what atoms that move independently lose of their Bragg intensity,
  modulated by a trigonometric polynomial whose frequencies are a few interatomic
  vectors;
* the halo: liquid-like motions of the lattice, sharp around each reciprocal lattice
  point and zero long before the next.

Points are fractional Miller indices. The map is a function of these alone: lengths in
reciprocal space are those of the cell of the contents, even if a crystal of the series
has a slightly different cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from scipy.interpolate import CubicSpline

from dials_diffuse import symmetry
from dials_diffuse.grid import Grid
from dials_diffuse.simulation.quadrature import chunks, gauss_legendre
from dials_diffuse.simulation.settings import DiffuseSettings
from dials_diffuse.simulation.structure import (
    BraggIntensities,
    CellContents,
    form_factor,
)

# Points evaluated at once: the intermediate arrays stay in the cache.
CHUNK = 2048
VOXEL_CHUNK = 1 << 18  # quadrature points of voxels

# Largest component of the integer vectors that give the frequencies of the cloud.
LARGEST_FREQUENCY = 2

# The isotropic part is tabulated in s². Between the nodes of the coarse table, a cubic
# spline is right to 1e-7 for B to 300 Å²; between those of the fine one, a straight line.
COARSE_STEP = 5e-4  # Å⁻²
REFINEMENT = 32

# Relative accuracy of the mean over a voxel, and how fast the isotropic part can change:
# d(ln I)/ds in Å, from the widest Gaussian of a form factor at the s where it matters.
QUADRATURE_TOLERANCE = 1e-7
ISOTROPIC_SLOPE = 20.0

FACE_NODES = 24  # of Gauss-Legendre on each edge of the face of a voxel, for the halo
RADIAL_NODES = 48


class IsotropicIntensity:
    """The diffuse intensity of atoms that move independently of each other.

        I_iso(s) = Σ_j n_j f_j(s)² [1 - exp(-B_j s²/2)]

    since displacements weaken amplitudes by exp(-B s²/4), s = 1/d = 2 sin θ/λ.
    James (1948) The Optical Principles of the Diffraction of X-rays, ch. V.

    Calculated on a table in s², which grows to the largest s that is asked for.
    """

    def __init__(self, contents: CellContents) -> None:
        element, number, b_iso = contents.atoms
        self._groups = []
        for symbol in np.unique(element).tolist():
            selected = element == symbol
            b, place = np.unique(b_iso[selected], return_inverse=True)
            self._groups.append((symbol, b, np.bincount(place, number[selected])))
        self._step = COARSE_STEP / REFINEMENT
        self._table = np.zeros(2)

    def calculate(self, s_squared: np.ndarray) -> np.ndarray:
        """I_iso, without the table, at s² of shape (n,) in Å⁻²."""
        total = np.zeros(len(s_squared))
        for symbol, b_iso, number in self._groups:
            lost = np.zeros(len(s_squared))
            for b, n in zip(b_iso, number):
                lost -= n * np.expm1(-b / 2 * s_squared)
            total += lost * form_factor(symbol, np.sqrt(s_squared)) ** 2
        return total

    def at_s_squared(self, s_squared: np.ndarray) -> np.ndarray:
        """I_iso in electrons², from the table.

        Args:
            s_squared: Å⁻², any shape.
        """
        place = s_squared / self._step
        if place.size and place.max() >= len(self._table) - 1:
            self._extend(float(np.max(s_squared)))
        node = place.astype(np.int32)
        place -= node
        low = self._table[node]
        node += 1
        return low + place * (self._table[node] - low)

    def _extend(self, s_squared: float) -> None:
        # Nodes are the same for all ranges. The spline's end is kept away from the part
        # that is used, so that the table hardly depends on the range.
        n_coarse = 2 * int(s_squared / COARSE_STEP) + 64
        coarse = np.arange(n_coarse + 1) * COARSE_STEP
        fine = np.arange(n_coarse * REFINEMENT + 1) * self._step
        table = CubicSpline(coarse, self.calculate(coarse))(fine)
        self._table = np.maximum(table, 0.0)


class Modulation:
    """A symmetric trigonometric polynomial with |P| <= 1 = P(0).

        P(h) = Σ_k w_k <cos(2π h·R u_k)>_R,    Σ w_k = 1,    w_k > 0

    R runs through the rotations of the Laue group, h' = h R. The vectors are
    u_k = D n_k with integers n_k up to ±2 and a diagonal matrix D. Axes that symmetry
    mixes have the same element, so D commutes with every R and all frequencies R u_k are
    integers times D; otherwise the elements go as 1/a, 1/b, 1/c, which makes features
    equally wide in all directions whatever the cell.

    Args:
        contents: The unit cell.
        length: Mean length of the vectors u_k, Å.
        n_terms: Number of vectors, none equivalent to another.
        seed: The same number gives the same polynomial.

    Raises:
        ValueError: There are not so many vectors.
    """

    def __init__(
        self, contents: CellContents, length: float, n_terms: int, seed: int
    ) -> None:
        laue = symmetry.laue_group(contents.space_group)
        rotations = symmetry.rotation_matrices(laue)
        rng = np.random.default_rng([seed, 1])
        vectors = _unique_vectors(rotations, n_terms, rng)
        weights = rng.uniform(0.5, 1.0, n_terms)
        weights /= weights.sum()
        steps = _frequency_steps(contents, rotations)
        to_cartesian = np.array(contents.unit_cell.orthogonalization_matrix())
        u = (vectors * steps) @ to_cartesian.reshape(3, 3).T
        steps *= length / np.linalg.norm(u, axis=1).mean()
        self.steps = steps  # diagonal of D: fractions of the cell edges
        # All frequencies and their weights, shapes (n, 3) and (n,)
        self.frequencies = np.einsum("rij,kj->kri", rotations, vectors).reshape(-1, 3)
        self.weights = np.repeat(weights / len(rotations), len(rotations))
        self._terms, self._coefficients = _real_basis(self.frequencies, self.weights)

    def at(self, hkl: np.ndarray) -> np.ndarray:
        """P at fractional Miller indices, shape (3, n).

        Each cosine of a sum is one of sums of products of cosines and sines along the
        axes: the sum over all frequencies is a small dense matrix product.
        """
        x, y, z = (
            _basis_functions(2 * np.pi * step * h, terms)
            for step, h, terms in zip(self.steps, hkl, self._terms)
        )
        along_z = (self._coefficients.reshape(-1, len(z)) @ z).reshape(
            len(x), len(y), -1
        )
        return np.einsum("in,in->n", x, np.einsum("ijn,jn->in", along_z, y))


def _unique_vectors(
    rotations: np.ndarray, n_vectors: int, rng: np.random.Generator
) -> np.ndarray:
    """Random integer vectors, none equivalent to another, shape (n_vectors, 3)."""
    size = range(-LARGEST_FREQUENCY, LARGEST_FREQUENCY + 1)
    candidates = np.array([n for n in itertools.product(size, repeat=3) if any(n)])
    found: list[np.ndarray] = []
    seen: set[tuple[int, ...]] = set()
    for n in candidates[rng.permutation(len(candidates))]:
        if tuple(n.tolist()) not in seen:
            found.append(n)
            seen.update(map(tuple, (rotations @ n).tolist()))
    if n_vectors > len(found):
        raise ValueError(
            f"diffuse.n_terms={n_vectors} is too large: this Laue group has only "
            f"{len(found)} unique vectors"
        )
    return np.array(found[:n_vectors])


def _frequency_steps(contents: CellContents, rotations: np.ndarray) -> np.ndarray:
    """1/length of each axis, with the same mean length for axes that symmetry mixes."""
    mixed = np.any(rotations != 0, axis=0)
    # Two more steps of reachability are enough for three axes.
    mixed = np.linalg.matrix_power((mixed | mixed.T).astype(int), 3) > 0
    lengths = np.array(contents.unit_cell.parameters()[:3])
    return 1 / np.exp(mixed @ np.log(lengths) / mixed.sum(axis=1))


def _basis_functions(angle: np.ndarray, terms: list[int]) -> np.ndarray:
    """cos(jx) for j >= 0 and sin(|j|x) for j < 0, shape (len(terms), n)."""
    largest = max(map(abs, terms))
    cosine, sine = np.cos(angle), np.sin(angle) if min(terms) < 0 else None
    rows = {0: 1.0, 1: cosine, -1: sine}
    for j in range(2, largest + 1):
        rows[j] = 2 * cosine * rows[j - 1] - rows[j - 2]
        if sine is not None:
            rows[-j] = 2 * cosine * rows[1 - j] - (rows[2 - j] if j > 2 else 0.0)
    result = np.empty((len(terms), len(angle)))
    for row, j in zip(result, terms):
        row[:] = rows[j]
    return result


def _real_basis(
    frequencies: np.ndarray, weights: np.ndarray
) -> tuple[list[list[int]], np.ndarray]:
    """The polynomial in products of cosines and sines along the three axes.

        cos(x + y + z) = cx cy cz - cx sy sz - sx cy sz - sx sy cz

    Returns:
        The functions along each axis as in ``_basis_functions``, and their coefficients,
        shape (n_x, n_y, n_z); symmetry makes many zero, whose functions are left out.
    """
    n = np.abs(frequencies).max(axis=0) if len(frequencies) else np.zeros(3, int)
    full = np.zeros(2 * n + 1)
    for m, weight in zip(frequencies, weights):
        for kinds in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
            sines = np.array(kinds)
            # sin(-jx) = -sin(jx)
            sign = np.prod(np.where(sines, np.sign(m), 1)) * (-1 if any(kinds) else 1)
            full[tuple(n + np.where(sines, -np.abs(m), np.abs(m)))] += weight * sign
    used = [
        np.any(np.abs(full) > 1e-14, axis=other) for other in ((1, 2), (0, 2), (0, 1))
    ]
    terms = [(np.flatnonzero(u) - size).tolist() or [0] for u, size in zip(used, n)]
    places = [np.array(t) + size for t, size in zip(terms, n)]
    return terms, np.ascontiguousarray(full[np.ix_(*places)])


def _rotations_to_other_shapes(rotations: np.ndarray) -> list[np.ndarray]:
    """One rotation for each shape that a voxel, turned back, can have.

    A box turned by M has the rows of M as edges, in any order and with any sign. Each
    shape is met by equally many rotations.
    """
    shapes = {}
    for rotation in rotations:
        edges = np.rint(np.linalg.inv(rotation)).astype(int).tolist()
        shapes[frozenset(max(tuple(e), tuple(-x for x in e)) for e in edges)] = rotation
    return list(shapes.values())


class HaloKernel:
    """The halo of one reciprocal lattice point of unit |F|².

        K(q) = 4π²σ²/V_c · Γ(q) · (1 - (q/q_c)²)²  for q < q_c, else 0
        Γ(q) = 8πγ³/(1 + 4π²γ²q²)²,    I_halo = s² |F|² K(q)

    Liquid-like motions, Caspar, Clarage, Salunke & Clarage (1988) Nature 332, 659,
    doi:10.1038/332659a0; Clarage, Clarage, Phillips, Sweet & Caspar (1992) Proteins 12,
    145, doi:10.1002/prot.340120208. The last factor ends the halo smoothly at
    q_c = 1/(2 max(a, b, c)). At q < q_c the offset in Miller indices is
    |δ_i| = |a_i·q| <= a_i q < 1/2: no two lattice points share a halo.

    Args:
        contents: The unit cell.
        displacement: σ, Å.
        length: Correlation length γ, Å.
    """

    def __init__(
        self, contents: CellContents, displacement: float, length: float
    ) -> None:
        self.cutoff = 0.5 / max(contents.unit_cell.parameters()[:3])  # q_c, Å⁻¹
        self._kappa = 2 * np.pi * length  # Å
        sigma_squared = (2 * np.pi * displacement) ** 2
        self._height = sigma_squared / contents.volume * 8 * np.pi * length**3
        # Columns a*, b*, c*, Cartesian, Å⁻¹
        self.b = np.array(contents.unit_cell.fractionalization_matrix()).reshape(3, 3).T

    def at(self, q_squared: np.ndarray) -> np.ndarray:
        """K at q < q_c, electrons² per electrons² and Å⁻²."""
        edge = 1 - q_squared / self.cutoff**2
        return self._height * (edge / (1 + self._kappa**2 * q_squared)) ** 2

    def radial_moments(self, q: np.ndarray) -> np.ndarray:
        """∫_0^q r^(2+p) K(r) dr for p = 0, 1, 2, shape (3, *q.shape).

        With r = sinh(t)/κ the integrand is smooth however sharp the halo is.
        """
        nodes, weights = gauss_legendre(RADIAL_NODES)
        end = np.arcsinh(self._kappa * np.minimum(q, self.cutoff))
        result = np.zeros((3, *q.shape))
        for node, weight in zip(nodes + 0.5, weights):
            t = end * node
            r = np.sinh(t) / self._kappa
            value = weight * end * np.cosh(t) / self._kappa * self.at(r * r) * r * r
            for p in range(3):
                result[p] += value
                value = value * r
        return result

    def box_moments(self, ndiv: np.ndarray, face_nodes: int = FACE_NODES) -> np.ndarray:
        """Means of K, q K and q² K over the voxels around a lattice point.

        A function q̂_i^m r^p K(r) is the divergence of q̂ q̂_i^m F(q)/q² with
        F = ∫ r^(2+p) K dr, so its integral over a voxel is a sum over the six faces. The
        faces lie at half-integers n/ndiv and never touch the lattice point, where the
        halo is sharp: few nodes are enough.

        Args:
            ndiv: Voxels per reciprocal lattice vector, shape (3,).
            face_nodes: Nodes along each edge of a face.

        Returns:
            Shape (n_h, n_k, n_l, 5): <K>, <q_x K>, <q_y K>, <q_z K>, <q² K> of the voxels
            -ndiv//2 ... ndiv//2 along each axis.
        """
        half = np.asarray(ndiv) // 2
        means = np.zeros((*(2 * half + 1), 5))
        for axis in range(3):
            others = [i for i in range(3) if i != axis]
            flux = np.stack(
                [
                    self._face_flux(axis, plane / ndiv[axis], ndiv, half, face_nodes)
                    for plane in np.arange(-half[axis], half[axis] + 2) - 0.5
                ]
            )
            net = np.diff(flux, axis=0)
            means += np.moveaxis(net, [0, 1, 2], [axis, *others]) * ndiv[axis]
        return means

    def _face_flux(
        self, axis: int, height: float, ndiv: np.ndarray, half: np.ndarray, n: int
    ) -> np.ndarray:
        """Mean flux through each face in the plane h_axis = height.

        For fractional coordinates h the component of the field q f along axis i is
        h_i f: the volume of the cell cancels.

        Returns:
            Shape (n_1, n_2, 5), the faces along the two other axes.
        """
        nodes, weights = gauss_legendre(n)
        others = [i for i in range(3) if i != axis]
        points = [
            ((np.arange(-half[i], half[i] + 1)[:, None] + nodes) / ndiv[i]).ravel()
            for i in others
        ]
        h = np.empty((3, len(points[0]), len(points[1])))
        h[axis] = height
        h[others[0]], h[others[1]] = points[0][:, None], points[1]
        q = np.einsum("ij,jmn->imn", self.b, h)
        length = np.sqrt(np.einsum("imn,imn->mn", q, q))
        zeroth, first, second = self.radial_moments(length) / length**3
        field = height * np.stack([zeroth, *(first * q / length), second], axis=-1)
        field = field.reshape(len(points[0]) // n, n, len(points[1]) // n, n, 5)
        return np.einsum("anbmp,n,m->abp", field, weights, weights)


class DiffuseMap:
    """The diffuse map of a crystal.

        I = I_iso(s) [1 + contrast · P(h)] + s² |F_H|² K(q)

    Args:
        contents: The unit cell.
        bragg: |F|² at least to the resolution where the map is wanted, plus half a
            reciprocal cell; there is no halo beyond.
        settings: Contrast, lengths and number of terms. No contrast, length or terms
            leaves the isotropic part of the cloud.
        seed: The same number gives the same map.
    """

    def __init__(
        self,
        contents: CellContents,
        bragg: BraggIntensities,
        settings: DiffuseSettings,
        seed: int,
    ) -> None:
        aa, bb, cc, ab, ac, bc = contents.unit_cell.reciprocal().metrical_matrix()
        self._metric = (aa, bb, cc, 2 * ab, 2 * ac, 2 * bc)
        self._bragg = bragg
        self._isotropic = IsotropicIntensity(contents)
        self.contrast = settings.contrast if settings.length > 0 else 0.0
        self.modulation: Modulation | None = None
        if self.contrast and settings.n_terms:
            self.modulation = Modulation(
                contents, settings.length, settings.n_terms, seed
            )
        self.halo_kernel: HaloKernel | None = None
        if settings.halo_displacement > 0:
            self.halo_kernel = HaloKernel(
                contents, settings.halo_displacement, settings.halo_length
            )
        # Moments of the halo in the voxels around a lattice point, for each ndiv
        self._moments: dict[tuple[int, ...], np.ndarray] = {}
        self._reciprocal = contents.unit_cell.reciprocal().parameters()[:3]

    def isotropic(self, s: np.ndarray) -> np.ndarray:
        """I_iso at s = 1/d (Å⁻¹, any shape), electrons² per unit cell."""
        return self._isotropic.at_s_squared(np.asarray(s, dtype=float) ** 2)

    def cloud(self, hkl: np.ndarray) -> np.ndarray:
        """The cloudy part at fractional Miller indices, shape (3, ...) -> (...)."""
        return self._evaluate(hkl, True, False)

    def halo(self, hkl: np.ndarray) -> np.ndarray:
        """The halo at fractional Miller indices, shape (3, ...) -> (...)."""
        return self._evaluate(hkl, False, True)

    def intensity(self, hkl: np.ndarray) -> np.ndarray:
        """Cloud and halo at fractional Miller indices, shape (3, ...) -> (...)."""
        return self._evaluate(hkl, True, True)

    def _evaluate(self, hkl: np.ndarray, cloud: bool, halo: bool) -> np.ndarray:
        hkl = np.asarray(hkl, dtype=float)
        points = hkl.reshape(3, -1)
        result = np.zeros(points.shape[1])
        for chunk in chunks(len(result), CHUNK):
            h = np.ascontiguousarray(points[:, chunk])
            s_squared = self._length_squared(h)
            if cloud:
                result[chunk] = self._isotropic.at_s_squared(s_squared)
                if self.modulation:
                    result[chunk] *= 1 + self.contrast * self.modulation.at(h)
            if halo and self.halo_kernel:
                self._add_halo(result[chunk], h, s_squared)
        return result.reshape(hkl.shape[1:])

    def _length_squared(self, h: np.ndarray) -> np.ndarray:
        """|B h|², shape (3, n) -> (n,), Å⁻²."""
        aa, bb, cc, ab, ac, bc = self._metric
        x, y, z = h
        return np.maximum(
            x * (aa * x + ab * y + ac * z) + y * (bb * y + bc * z) + cc * z * z, 0.0
        )

    def _add_halo(
        self, result: np.ndarray, h: np.ndarray, s_squared: np.ndarray
    ) -> None:
        nearest = np.floor(h + 0.5)
        q_squared = self._length_squared(h - nearest)
        near = np.flatnonzero(q_squared < self.halo_kernel.cutoff**2)
        intensity = self._bragg.at(*nearest[:, near].astype(np.int32))
        result[near] += (
            s_squared[near] * intensity * self.halo_kernel.at(q_squared[near])
        )

    def voxel_means(
        self, grid: Grid, index: np.ndarray, nodes: int | None = None
    ) -> dict[str, np.ndarray]:
        """Means of the two parts over voxels.

        The voxel n is the box of width 1/ndiv about n/ndiv. Only ``ndiv`` is taken from
        the grid.

        Args:
            grid: The grid.
            index: Voxel indices, shape (n, 3).
            nodes: Quadrature nodes per axis for the cloud; None takes as many as a
                relative accuracy of 1e-6 needs.

        Returns:
            "cloud" and "halo", electrons² per unit cell, shape (n,) each.
        """
        index = np.asarray(index).reshape(-1, 3)
        ndiv = np.array(grid.ndiv)
        return {
            "cloud": self._quadrature(self.cloud, index, ndiv, nodes),
            "halo": self._halo_means(index, ndiv),
        }

    def merged_voxel_means(
        self, grid: Grid, index: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Means over voxels and their symmetry equivalents alike, as merging takes them.

        Rotations of trigonal, hexagonal and some non-standard groups do not turn a box in
        Miller indices into a box, so the means of equivalent voxels differ a little.

        Args:
            grid: The grid.
            index: Voxel indices, shape (n, 3).

        Returns:
            As ``voxel_means``, the same for equivalent voxels.
        """
        rotations = _rotations_to_other_shapes(grid.rotations)
        total: dict[str, np.ndarray] = {}
        for rotation in rotations:
            for name, means in self.voxel_means(grid, index @ rotation).items():
                total[name] = total.get(name, 0.0) + means / len(rotations)
        return total

    def merged_isotropic_means(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        grid: Grid,
        index: np.ndarray,
    ) -> np.ndarray:
        """Means of a function of s = 1/d, as ``merged_voxel_means``.

        Args:
            function: From s (Å⁻¹, any shape) to values; as smooth as the cloud.
            grid: The grid.
            index: Voxel indices, shape (n, 3).

        Returns:
            Shape (n,).
        """
        ndiv = np.array(grid.ndiv)
        rotations = _rotations_to_other_shapes(grid.rotations)

        def at(hkl: np.ndarray) -> np.ndarray:
            return function(np.sqrt(np.maximum(self._length_squared(hkl), 0.0)))

        means = [
            self._quadrature(at, np.asarray(index) @ rotation, ndiv, None)
            for rotation in rotations
        ]
        return np.mean(means, axis=0)

    def _quadrature(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        index: np.ndarray,
        ndiv: np.ndarray,
        nodes: int | None,
    ) -> np.ndarray:
        """Means over voxels of a function of fractional Miller indices, shape (3, ...)."""
        rules = [gauss_legendre(nodes or n) for n in self._quadrature_nodes(ndiv)]
        offsets = np.stack(np.meshgrid(*[x for x, _ in rules], indexing="ij"))
        offsets = offsets.reshape(3, 1, -1) / ndiv[:, None, None]
        weights = np.einsum("i,j,k->ijk", *[w for _, w in rules]).ravel()
        means = np.empty(len(index))
        for chunk in chunks(len(index), max(1, VOXEL_CHUNK // len(weights))):
            centres = (index[chunk] / ndiv).T
            means[chunk] = function(centres[:, :, None] + offsets) @ weights
        return means

    def _quadrature_nodes(self, ndiv: np.ndarray) -> list[int]:
        """Gauss-Legendre nodes that integrate the cloud over a voxel, per axis.

        The error of n nodes for cos(φx) on [-1, 1] relative to the length of the range is
        φ^(2n) 4^n (n!)^4 / ((2n + 1) (2n)!³).
        """
        phase = ISOTROPIC_SLOPE * np.array(self._reciprocal)
        if self.modulation:
            largest = np.abs(self.modulation.frequencies).max(axis=0)
            phase = phase + 2 * np.pi * largest * self.modulation.steps
        result = []
        for phi in phase / (2 * ndiv):
            n, error = 1, phi**2 / 6
            while n < 2 or error > QUADRATURE_TOLERANCE:
                n += 1
                # Ratio of the errors of n and n - 1 nodes
                ratio = (2 * n - 1) / (2 * n + 1) * 4 * n**4
                error *= phi**2 * ratio / (2 * n * (2 * n - 1)) ** 3
            result.append(n)
        return result

    def _halo_means(self, index: np.ndarray, ndiv: np.ndarray) -> np.ndarray:
        """Means of the halo: with s = s_H + q, s² = s_H² + 2 s_H·q + q².

        They follow from the moments of K over the voxels around one lattice point. A voxel
        half-way between lattice points has the halos of both sides.
        """
        means = np.zeros(len(index))
        if not self.halo_kernel:
            return means
        key = tuple(ndiv.tolist())
        if key not in self._moments:
            self._moments[key] = self.halo_kernel.box_moments(ndiv)
        moments = self._moments[key]
        half = ndiv // 2
        nearest = np.floor(index / ndiv + 0.5).astype(np.int64)
        for shift in itertools.product((0, 1), repeat=3):
            point = nearest - shift
            offset = index - point * ndiv
            near = np.flatnonzero(np.all(np.abs(offset) <= half, axis=1))
            for chunk in chunks(len(near), VOXEL_CHUNK):
                voxel = near[chunk]
                h = point[voxel]
                zeroth, x, y, z, second = moments[tuple((offset[voxel] + half).T)].T
                s_x, s_y, s_z = self.halo_kernel.b @ h.T
                s_squared = s_x * s_x + s_y * s_y + s_z * s_z
                first = s_x * x + s_y * y + s_z * z
                intensity = self._bragg.at(*h.T)
                means[voxel] += intensity * (s_squared * zeroth + 2 * first + second)
        return means
