"""Whether the observations determine a term of the scaling model.

Only differences between the observations of one voxel say anything about scales: what all
of them have in common goes into its intensity. Random parameters p, each with the variance
1, change the expected photons of row i by t_i. The part of it that I cannot take up,

    q = Σ w t²  -  Σ_voxels (Σ w x t)² / (Σ w x² + v)

with the weight v that a reference map has in the voxel, is on average the trace of the
matrix of second derivatives (Hutchinson 1990, https://doi.org/10.1080/03610919008812866),
so the n parameters that have observations have a standard error of about sqrt(n/q) each.
A sweep of 10° with few equivalents has millions of observations of voxels on neighbouring
images, and yet determines no surface: t is nearly the same for all rows of a voxel.
"""

from __future__ import annotations

import numpy as np

from dials_diffuse.scaling.refinement import Refiner
from dials_diffuse.scaling.terms import TERMS, Role

N_PROBES = 8
SEED = 20


def standard_error(refiner: Refiner, name: str) -> float:
    """Standard error that the parameters of a term would have, infinite at worst.

    The other terms are taken as known.

    Args:
        refiner: With weights, in the state before the term is refined.
        name: The term.
    """
    component = refiner.components[name]
    cells = refiner.block.cells[name]
    refiner.evaluate()
    n_seen = np.count_nonzero(refiner.curvature(name) > 0)
    if n_seen == 0:
        return np.inf
    slope = _slope(refiner, TERMS[name].role) * component.unit
    response, _ = refiner.responses()
    start = refiner.block.start[:-1]
    wx = refiner.weight * response.astype(np.float64)
    norm = np.add.reduceat(wx * response, start) + refiner.reference_weight
    rng = np.random.default_rng(SEED)
    information = []
    for _ in range(N_PROBES):
        probe = rng.standard_normal(component.n_params)
        change = slope * component.layout.values(probe)[cells]
        common = np.add.reduceat(wx * change, start)
        taken = np.divide(common**2, norm, out=np.zeros_like(norm), where=norm > 0)
        information.append(np.sum(refiner.weight * change**2) - np.sum(taken))
    mean = float(np.mean(information))
    return float(np.sqrt(n_seen / mean)) if mean > 0 else np.inf


def _slope(refiner: Refiner, role: Role) -> np.ndarray:
    """Derivative of the photons of each row by ln(factor), or by the offset."""
    response, offset = refiner.responses()
    response = response.astype(np.float64)
    intensity = np.repeat(refiner.intensities(), np.diff(refiner.block.start))
    if role is Role.INNER:
        return response * intensity
    if role is Role.OUTER:
        return response * intensity + offset
    outer = refiner.block.normalisation.astype(np.float64)
    for name, component in refiner.components.items():
        if TERMS[name].role is Role.OUTER:
            outer *= component.cell_values()[refiner.block.cells[name]]
    return outer
