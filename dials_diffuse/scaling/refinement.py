"""Refinement of the terms of a scaling model by DIALS' machinery, on lean blocks.

The functional is Σ w (n - m a (b I + c))² over the observations of a block, with the
photons n less background, plus the restraints of the components. I is the least-squares
intensity of each voxel for the current model; a reference map is one more observation of
its voxels (``reference``). The weights are the inverse of the variances that the *model*
expects, and stay the same during a minimisation: those from the counts themselves would
draw every mean down.

Components, restraints, parameter manager and minimiser are those of DIALS; instead of its
``IhTable`` there is a block of 20 bytes and 4 for each term a row, and a loop in C++ over
it.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from dxtbx import flumpy

from dials.algorithms.scaling.active_parameter_managers import (
    active_parameter_manager,
    multi_active_parameter_manager,
)
from dials.algorithms.scaling.scaling_refiner import scaling_refinery
from dials.algorithms.scaling.scaling_restraints import ScalingRestraintsCalculator
from dials.array_family import flex
from dials_diffuse.grid import Grid
from dials_diffuse.merging import estimate, sums
from dials_diffuse.scaling.block import ObservationBlock
from dials_diffuse.scaling.components import JointComponent
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.terms import TERMS
from dials_diffuse_ext import ScalingBlock

logger = logging.getLogger("dials.diffuse.scale")

SMALLEST_VARIANCE = 1e-6  # photons²


class Fit(NamedTuple):
    """How well a block is described.

    Args:
        chi_square: Σ w (n - expected)².
        n_used: Observations with a weight.
        n_free: Observations less intensities and parameters.
        n_steps: Steps of the minimiser.
        reason: Why it stopped.
    """

    chi_square: float
    n_used: int
    n_free: int
    n_steps: int = 0
    reason: str = ""

    @property
    def reduced(self) -> float:
        """χ² per degree of freedom."""
        return self.chi_square / max(self.n_free, 1)


def _shells(voxel: np.ndarray, grid: Grid) -> np.ndarray:
    """Number of the resolution shell of each voxel; Bragg peaks have shells of their own."""
    is_peak = voxel < 0
    s = grid.s(sums.unpack(np.where(is_peak, ~voxel, voxel)))
    shell = estimate.thin_shell(s)
    return shell + is_peak * (shell.max(initial=0) + 1)


class Refiner:
    """Terms and observations of a refinement.

    Args:
        block: The observations.
        components: The terms, by name; all of them have cells in the block.
        grid: The voxel grid.
        reference: A map to scale to.

    Attributes:
        map: All of that map.
        reference: What it says of each voxel of the block.
    """

    def __init__(
        self,
        block: ObservationBlock,
        components: Mapping[str, JointComponent],
        grid: Grid,
        reference: Reference | None = None,
    ) -> None:
        self.block, self.components = block, dict(components)
        self.map = reference
        self.reference = None if reference is None else reference.of(block.voxel)
        self.shell = _shells(block.voxel, grid)
        self.photons = block.counts - block.background
        self.weight = np.ones(block.n_rows, dtype=np.float32)
        self.reference_weight = np.zeros(block.n_groups, dtype=np.float32)
        self.used = np.ones(block.n_rows, dtype=bool)
        self._rows = ScalingBlock(
            flumpy.from_numpy(block.start),
            flumpy.from_numpy(self.photons),
            flumpy.from_numpy(block.normalisation),
        )
        for name, component in self.components.items():
            cells = flumpy.from_numpy(block.cells[name])
            self._rows.add_term(int(TERMS[name].role), cells, component.layout.n_cells)

    def cell_values(self) -> list[np.ndarray]:
        """The value of each cell of each term."""
        return [component.cell_values() for component in self.components.values()]

    def evaluate(self, curvatures: bool = True) -> float:
        """χ² for the current parameters and weights; keeps the derivatives.

        Args:
            curvatures: Whether those of second order are needed, too.
        """
        values = [flumpy.from_numpy(v) for v in self.cell_values()]
        return self._rows.evaluate(values, curvatures)

    def gradient(self, name: str) -> np.ndarray:
        """Of χ² by the parameters of a term, of the last evaluation."""
        by_cell = self._rows.gradient(list(self.components).index(name))
        return self.components[name].gradient(flumpy.to_numpy(by_cell))

    def curvature(self, name: str) -> np.ndarray:
        """Diagonal of the second derivatives, of the last evaluation."""
        by_cell = self._rows.curvature(list(self.components).index(name))
        return self.components[name].curvature(flumpy.to_numpy(by_cell))

    def intensities(self) -> np.ndarray:
        """I of each voxel, of the last evaluation."""
        return flumpy.to_numpy(self._rows.intensities())

    def responses(self) -> tuple[np.ndarray, np.ndarray]:
        """x and o of each row: x I + o photons are expected above the background."""
        values = [flumpy.from_numpy(v) for v in self.cell_values()]
        return tuple(flumpy.to_numpy(a) for a in self._rows.responses(values))

    def expected_intensities(
        self, response: np.ndarray, offset: np.ndarray
    ) -> np.ndarray:
        """I of each voxel for variances: positive, and not of a single count.

        From the sum of the photons of the voxel, and where that is small from the mean
        of its resolution shell too (``merging.estimate``).
        """
        start = self.block.start[:-1]
        used = self.used.astype(np.float64)
        photons = np.add.reduceat((self.photons - offset) * used, start)
        norm = np.add.reduceat(response * used, start)
        norm = np.where(norm > 0, norm, np.add.reduceat(response.astype(float), start))
        if self.reference is not None:
            photons, norm = (
                photons + self.reference.photons,
                norm + self.reference.response,
            )
        n = self.shell.max(initial=0) + 1
        rate = estimate.shell_rate(
            np.maximum(np.bincount(self.shell, photons, n), 0),
            np.bincount(self.shell, norm, n),
        )
        return estimate.expected_counts(photons, rate[self.shell] * norm) / norm

    def variances(self, a: float = 1.0, b: float = 0.0) -> np.ndarray:
        """The variance of each row that the model expects, photons².

        Args:
            a: Of the error model, var' = a² (var + (b x I)²).
            b: The same.
        """
        response, offset = self.responses()
        mean = self.expected_intensities(response, offset)
        signal = response * np.repeat(mean, np.diff(self.block.start))
        variance = signal + np.maximum(offset, 0) + self.block.background
        variance = np.maximum(variance, 0) + self.block.variance + (b * signal) ** 2
        return np.maximum(a**2 * variance, SMALLEST_VARIANCE)

    def update_weights(self, a: float = 1.0, b: float = 0.0) -> None:
        """Weights from the expected variances; rows that are not used get none."""
        self.weight = np.where(self.used, 1 / self.variances(a, b), 0).astype(
            np.float32
        )
        self._rows.set_weights(flumpy.from_numpy(self.weight))
        if self.reference is not None:
            known = self.reference.weights(self.expected_intensities(*self.responses()))
            self.reference_weight = known.astype(np.float32)
            self._rows.set_reference(
                flumpy.from_numpy(self.reference.intensity.astype(np.float32)),
                flumpy.from_numpy(self.reference_weight),
            )

    def fit(self, n_steps: int = 0, reason: str = "") -> Fit:
        """χ² of the current model."""
        chi_square = self.evaluate()
        n_used, n_intensities = self.count_used()
        # Of restrained parameters only what the data decide counts.
        n_params = sum(map(self.effective_parameters, self.components))
        n_free = int(round(n_used - n_intensities - n_params))
        return Fit(chi_square, n_used, n_free, n_steps, reason)

    def count_used(self) -> tuple[int, int]:
        """Number of observations that say something, and of intensities they determine."""
        used = np.add.reduceat(self.used.astype(np.int64), self.block.start[:-1])
        if self.reference is not None:
            used += self.reference.known & (used > 0)
        return int(used[used > 1].sum()), int(np.count_nonzero(used > 1))

    def effective_parameters(self, name: str) -> float:
        """Number of parameters of a term that the observations decide, not the prior."""
        if TERMS[name].stage is None:
            return 0.0
        curvature = self.curvature(name)
        restraint = self.components[name].restraint_curvature()
        return float(np.sum(curvature / (curvature + restraint)))

    def refine(self, names: Sequence[str], settings: Any) -> Fit:
        """Refine some terms, the others fixed.

        Args:
            names: The terms.
            settings: ``max_iterations`` and ``tolerance``, the relative change of χ² in
                a step at which the minimiser stops.
        """
        target = Target(self)
        manager = ParameterManager(self, target, names)
        refinery = scaling_refinery(
            "SimpleLBFGS",
            Scaler(self, settings.tolerance),
            target,
            manager,
            settings.max_iterations,
        )
        refinery.run()
        manager.set_param_vals(refinery.x)
        n_steps = refinery.history.get_nrows()
        text = str(refinery.history.reason_for_termination)
        reason = _reason(text, n_steps, settings)
        return self.fit(n_steps, reason)


def _reason(text: str, n_steps: int, settings: Any) -> str:
    """Why the minimiser stopped, in terms of χ²."""
    if text.startswith("RMSD no longer decreasing"):
        return f"the change of χ² in a step is below {settings.tolerance:g}"
    if n_steps >= settings.max_iterations:  # the minimiser does not say so itself
        return f"refinement.max_iterations={settings.max_iterations} allows no more"
    return "no step lowers χ² further"


class Target:
    """The functional, as DIALS' refinery asks for it."""

    rmsd_names = ["χ²/n"]
    rmsd_units = ["-"]

    def __init__(self, refiner: Refiner) -> None:
        self._refiner = refiner
        self._value = 0.0

    def rmsds(self, table: Any, manager: Any) -> list[float]:
        """What convergence is judged by."""
        return [self._value / max(np.count_nonzero(self._refiner.used), 1)]

    def achieved(self) -> bool:
        return False

    def compute_functional_gradients(
        self, manager: ParameterManager
    ) -> tuple[float, flex.double]:
        """χ² and its derivatives by the active parameters."""
        value = self._refiner.evaluate(curvatures=False)
        self._value = value
        parts = [self._refiner.gradient(name) for name in manager.names]
        return value, flumpy.from_numpy(np.concatenate(parts))

    @staticmethod
    def compute_restraints_functional_gradients(
        manager: ParameterManager,
    ) -> list | None:
        restraints = ScalingRestraintsCalculator.calculate_restraints(manager)
        return [flex.sum(restraints[0]), restraints[1]] if restraints else None


class Scaler:
    """What DIALS' refinery asks of a scaler."""

    def __init__(self, refiner: Refiner, tolerance: float) -> None:
        scope = SimpleNamespace(rmsd_tolerance=tolerance)
        self.params = SimpleNamespace(scaling_refinery=scope)
        self.Ih_table = SimpleNamespace(size=refiner.block.n_rows)

    def get_blocks_for_minimisation(self) -> list[None]:
        return [None]

    def update_for_minimisation(self, manager: Any, block_id: int) -> None:
        """Nothing: the values of the cells are calculated where they are needed."""


class ParameterManager(multi_active_parameter_manager):
    """Gives the minimiser parameters in units of their standard errors.

    Otherwise the functional would be a thousand times steeper along some of them than
    along others, which costs a thousand steps.
    """

    def __init__(self, refiner: Refiner, target: Target, names: Sequence[str]) -> None:
        self.names = [name for name in refiner.components if name in names]
        refiner.evaluate()
        units = [
            1 / np.sqrt(refiner.curvature(name) + own.restraint_curvature())
            for name, own in refiner.components.items()
            if name in self.names
        ]
        self.unit = flumpy.from_numpy(np.concatenate(units))
        super().__init__(
            target, [refiner.components], [self.names], active_parameter_manager
        )
        self.x = self.x / self.unit

    def set_param_vals(self, x: flex.double) -> None:
        self.x = x
        self.apm_list[0].set_param_vals(x * self.unit)

    def compute_functional_gradients(self, block: None) -> tuple[float, flex.double]:
        value, gradient = self.target.compute_functional_gradients(self)
        return value, gradient * self.unit

    def compute_restraints_functional_gradients(self, manager: Any) -> list | None:
        restraints = self.target.compute_restraints_functional_gradients(self)
        return restraints and [restraints[0], restraints[1] * self.unit]
