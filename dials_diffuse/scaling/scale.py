"""Scaling of observations: which terms, on which observations, in which order.

1. The observations of a choice of voxels are read (``block``).
2. Scales start from the ratio of counts in common voxels (``initial``).
3. The terms are refined in stages, the offset last; each is first asked whether the
   observations determine it (``determination``), then whether they need it: χ² must fall.
4. All terms are refined together, with new weights, outliers and error model each time.
5. Terms whose effect hardly shows in equivalent observations are given up (``visibility``).
6. Another choice of voxels tells whether the first was large enough.

What the observations leave open is settled by the gauge: the mean scale of the rows that
are refined against is 1, the mean of the logarithm of any other factor 0, the offset as
small as it can be. A reference map settles all of this instead, as its own scale is 1.
Scales of experiments with too few of these rows are set afterwards (``remaining``) and do
not move the others: then the mean over all experiments is not 1.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import lsqr

from dxtbx import flumpy
from dxtbx.model import Experiment

from dials_diffuse.grid import Grid
from dials_diffuse.merging.observations import ObservationTable
from dials_diffuse.scaling.block import (
    ImageRange,
    NoObservations,
    ObservationBlock,
    RowReader,
    read_block,
)
from dials_diffuse.scaling.bragg_reference import bragg_rows
from dials_diffuse.scaling.components import JointComponent, Prior
from dials_diffuse.scaling.coordinates import CoordinateFinder, Extent, find_extents
from dials_diffuse.scaling.determination import standard_error
from dials_diffuse.scaling.error_model import refine_error_model
from dials_diffuse.scaling.initial import warn_of_groups
from dials_diffuse.scaling.layout import Layout
from dials_diffuse.scaling.outliers import find_outliers
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.refinement import Refiner
from dials_diffuse.scaling.remaining import scale_remaining
from dials_diffuse.scaling.result import Scaling, Stage
from dials_diffuse.scaling.start import start_scales
from dials_diffuse.scaling.terms import TERMS, Role
from dials_diffuse.scaling.visibility import Visibility, visibility

logger = logging.getLogger("dials.diffuse.scale")

# A factor that differs more from 1 is no correction but a sign of a failed refinement.
LARGEST_FACTOR = 20.0

# χ² of observations that were not refined against may be that much larger.
ENOUGH = 1.05

# χ² must fall by so much for each parameter of a term; noise makes it fall by 1.
NEEDED_GAIN = 5.0

# χ² per degree of freedom, by counting errors, from which on the model does not describe the
# observations, whatever an error model makes of it.
UNFIT = 10.0

# Part of the photons above the background that an offset may take without a warning.
LARGEST_OFFSET = 0.5

# Part of the variance of a factor that must show in differences between equivalents: of
# true corrections more does, of surfaces that describe other errors of a short sweep less.
VISIBLE = 0.4

# Spread of ln(factor) that does no harm.
HARMLESS = 1e-3

# Standard error of a term that the user asks for, over the expected size of parameters.
WEAK = 0.5

# Least expected size of parameters.
SMALLEST_PRIOR = 1e-3

# Observations a parameter must have on average.
ROWS_PER_PARAMETER = 3


def scale(
    experiments: Sequence[Experiment],
    tables: Sequence[ObservationTable],
    numbers: Sequence[Mapping[int, int]],
    params: Any,
    excluded: Sequence[ImageRange] = (),
    reference: Reference | None = None,
) -> tuple[Scaling, RowReader]:
    """Refine a scaling model.

    Args:
        experiments: The experiments.
        tables: Their observations, on one grid.
        numbers: For each table the number of each experiment by its ``id``.
        params: PHIL parameters of ``dials.diffuse_scale``.
        excluded: Images to leave out.
        reference: A map to scale to.

    Returns:
        The model, and what reads the observations with the cells of its terms.

    Raises:
        ValueError: There are no usable observations.
    """
    grid = tables[0].grid
    extents = find_extents(experiments, _range_of_s(grid))
    components, dropped = make_terms(params.model, extents, grid)
    layouts = {name: component.layout for name, component in components.items()}
    finder = CoordinateFinder(experiments, extents)
    reader = RowReader(tables, numbers, finder, layouts, excluded)
    step = choice(reader, params.refinement.max_rows)
    peaks = bragg_rows(
        [path for path in params.bragg_reference if path], experiments, reader, grid
    )
    block = read_block(reader, step, single=reference is not None, further=peaks)
    result = Scaling(components, extents, None, dropped=dropped, step=step)
    if block.n_rows == 0:
        logger.warning(
            "Warning: no voxel was observed more than once, so that nothing tells how "
            "experiments are to be scaled: all scales stay 1"
        )
        _drop_all(result, reader, "no voxel was observed more than once")
        return result, reader
    Session(result, reader, block, grid, params, reference).run()
    outliers = params.outliers
    scale_remaining(
        result,
        reader,
        reference,
        Path(params.output.reflections),
        outliers.threshold if outliers.reject else None,
    )
    if step > 1:
        _check_choice(result, reader, step, grid, params, reference)
    return result, reader


def _range_of_s(grid: Grid) -> tuple[float, float]:
    low = 0.0 if grid.d_max is None else 1 / grid.d_max
    return max(0.0, low - grid.half_diagonal), 1 / grid.d_min + grid.half_diagonal


def _drop_all(result: Scaling, reader: RowReader, why: str) -> None:
    for name in list(result.components):
        result.dropped[name] = why
        del result.components[name], reader.layouts[name]


def make_terms(
    params: Any, extents: Sequence[Extent], grid: Grid
) -> tuple[dict[str, JointComponent], dict[str, str]]:
    """The terms that are asked for and make sense, without effect yet.

    Returns:
        The components, and why others were left out.
    """
    components, dropped = {}, {}
    for name, term in TERMS.items():
        own = getattr(params, name)
        if own.use == "no":
            continue
        layout = Layout([term.owner_for(own, extent) for extent in extents])
        if layout.n_params == 0:
            kind = "stills" if all(e.is_still for e in extents) else "these experiments"
            dropped[name] = f"it makes no sense for {kind}"
            continue
        unit = 1.0 if term.role is Role.ADDITIVE else None
        components[name] = JointComponent(layout, term.prior(own), unit)
    return components, dropped


def choice(reader: RowReader, max_rows: int | None) -> int:
    """One in how many voxels is refined against."""
    if max_rows is None:
        return 1
    step = -(-reader.n_rows // max_rows)
    if step > 1:
        logger.info(
            "Refining against about %d of %d observations: all those of one in %d voxels",
            reader.n_rows // step,
            reader.n_rows,
            step,
        )
    return step


class Session:
    """The refinement of one choice of observations.

    Args:
        result: Gets the results.
        reader: Of the observations; loses the terms that are dropped.
        block: The observations.
        grid: The voxel grid.
        params: PHIL parameters of ``dials.diffuse_scale``.
        reference: As that of ``scale``.

    Raises:
        ValueError: The map has no voxel of the block.
    """

    def __init__(
        self,
        result: Scaling,
        reader: RowReader,
        block: ObservationBlock,
        grid: Grid,
        params: Any,
        reference: Reference | None,
    ) -> None:
        self.result, self.reader, self.block = result, reader, block
        self.grid, self.params = grid, params
        self.reference = reference
        self.refiner = self._new_refiner()
        if reference is not None and not self.refiner.reference.known.any():
            raise ValueError(
                "the reference map has no voxel in common with the observations: check "
                "that both have the same crystal and resolution"
            )

    def _new_refiner(self) -> Refiner:
        self.result.refiner = Refiner(
            self.block, self.result.components, self.grid, self.reference
        )
        return self.result.refiner

    def run(self) -> None:
        """All stages."""
        logger.info(
            "%d observations of %d voxels; the χ² of each refinement is by its own "
            "weights and without its own outliers",
            self.block.n_rows,
            self.block.n_groups,
        )
        self._start()
        refined: list[str] = []
        for name in sorted(self._refined(), key=lambda name: TERMS[name].stage):
            refined = [n for n in refined if n in self.result.components]
            if self._is_determined(name) and self._is_needed(name, refined):
                refined.append(name)
                self._update_errors()
        n_cycles = self.params.refinement.cycles
        for cycle in range(1, n_cycles + 1):
            if self._refined():
                self._tighten_priors()
                self._refine(self._refined())
            self._update_errors(warn=cycle == n_cycles)
        self._give_up_hidden()
        if self.reference is None:
            self._settle_resolution()
        self.refiner.update_weights()
        self.result.counting = self.refiner.fit().reduced
        model = self.result.error_model
        self.refiner.update_weights(model.a, model.b)
        self.result.after = self.refiner.fit().reduced
        logger.info(
            "χ² per degree of freedom: %.4f with scales from the ratio of counts, %.4f with "
            "the model and without outliers, %.4f with its error model",
            self.result.before,
            self.result.counting,
            self.result.after,
        )
        if self.result.counting > UNFIT:
            logger.warning(
                "Warning: equivalent observations disagree by much more than the errors of "
                "counting (χ² %.1f with the model): check the space group, the indexing, "
                "the gain and the masks, whether terms have been switched off that are "
                "needed, and whether the scale varies faster than the knots of the model "
                "(model.scale.interval)",
                self.result.counting,
            )

        self._warn_of_offset()

    def _warn_of_offset(self) -> None:
        """Warn if most of the photons are taken for background."""
        _, offset = self.refiner.responses()
        rows = self.refiner.used & self.block.is_diffuse
        photons = self.refiner.photons[rows].sum(dtype=float)
        share = float(offset[rows].sum(dtype=float)) / max(float(photons), 1.0)
        if share > LARGEST_OFFSET:
            logger.warning(
                "Warning: the offset takes %.0f%% of the photons above the background, so "
                "that intensities are small differences and may be negative: check it on "
                "the page and, if there is less background, use model.offset.use=no",
                100 * share,
            )

    def _refined(self) -> list[str]:
        """The terms that are refined."""
        return [n for n in self.result.components if TERMS[n].stage is not None]

    def _is_needed(self, name: str, refined: Sequence[str]) -> bool:
        """Refine a term with those before it; give it up if it describes noise.

        Parameters that fit noise lower χ² by 1 each, and their errors go into the map.
        Terms that the user asks for are kept.
        """
        saved = {n: c.parameters.deep_copy() for n, c in self.result.components.items()}
        model = self.result.error_model
        self.refiner.update_weights(model.a, model.b)
        before = self.refiner.evaluate()
        self._refine([*refined, name])
        if name not in self.result.components:
            return False
        if TERMS[name].error_limit is None:
            return True
        gain = before - self.refiner.evaluate()
        n = max(self.refiner.effective_parameters(name), 1)
        if gain >= NEEDED_GAIN * n or getattr(self.params.model, name).use == "yes":
            return True
        for other, values in saved.items():
            if other in self.result.components:
                self.result.components[other].parameters = values
        why = (
            f"the observations do not need it (χ² falls by {gain:.0f} with {n:.0f} "
            f"parameters, less than {NEEDED_GAIN:g} for each)"
        )
        self._drop(name, why, warn=False)
        return False

    def _give_up_hidden(self) -> None:
        """Switch terms off whose effect hardly shows, the worst first."""
        while True:
            found = {
                name: self._visibility(name)
                for name in self._refined()
                if TERMS[name].error_limit is not None
                and getattr(self.params.model, name).use != "yes"
            }
            hidden = {
                name: v
                for name, v in found.items()
                if v.size > HARMLESS and v.share < VISIBLE
            }
            if not hidden:
                return
            name = min(hidden, key=lambda name: hidden[name].share)
            self._drop(
                name,
                f"it would change intensities by {hidden[name].size:.1%}, and only "
                f"{hidden[name].seen:.1%} shows in differences between equivalent "
                "observations: more rotation or crystals would determine it",
            )
            if self._refined():
                self._refine(self._refined())
            self._update_errors()

    def _visibility(self, name: str) -> Visibility:
        """Of a factor, or of an offset relative to the mean intensity of its shell."""
        cells, weight = self.block.cells, self._weights_of_means()
        one = np.zeros(self.block.n_rows, dtype=np.int32)
        shell = cells.get("resolution", one)
        known = self.refiner.reference
        photons = None if known is None else np.maximum(known.photons, 0)
        if not self.result.components[name].additive:
            factor = self.result.components[name].cell_values()[cells[name]]
            common = [cells.get("scale", one), shell]
            return visibility(np.log(factor), weight, self.block.group, common, photons)
        response, offset = (x.astype(np.float64) for x in self.refiner.responses())
        rows = weight > 0
        norm = np.bincount(shell, response * rows)
        mean = np.bincount(shell, (self.refiner.photons - offset) * rows)
        mean = np.divide(mean, norm, out=np.zeros_like(mean), where=norm > 0)[shell]
        signal = np.maximum(response * mean, 0)
        values = np.divide(offset, signal, out=np.zeros_like(offset), where=signal > 0)
        return visibility(values, signal * rows, self.block.group, [shell], photons)

    def _tighten_priors(self) -> None:
        """Expect of factors no more than has been found.

        The observations determine some combinations of parameters well and others, of
        which I can take up nearly all, hardly: these would be as large as the prior lets
        them be. The variance is Σ p² over the number of parameters that the observations
        determine (MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.415).
        """
        self.refiner.evaluate()
        for name, component in self.result.components.items():
            if TERMS[name].error_limit is None or component.additive:
                continue
            values = flumpy.to_numpy(component.parameters)
            # What the prior has shrunk must not shrink the prior.
            share = max(self.refiner.effective_parameters(name), 1) / len(values)
            size = float(np.sqrt(np.mean(values**2) / share))
            rough = component.difference_matrix() @ values
            smoothness = (
                float(np.sqrt(np.mean(rough**2) / share)) if len(rough) else 0.0
            )
            given = TERMS[name].prior(getattr(self.params.model, name))
            component.prior = Prior(
                min(max(smoothness, SMALLEST_PRIOR), given.smoothness),
                min(max(size, SMALLEST_PRIOR), given.size),
            )

    def _settle_resolution(self) -> None:
        """Make the mean logarithm of the factors, scales apart, zero at each s."""
        gauge = self.result.components.get("resolution")
        if gauge is None:
            return
        total = np.zeros(self.block.n_rows)
        for name, component in self.result.components.items():
            if not component.additive and name not in ("scale", "resolution"):
                total += np.log(component.cell_values())[self.block.cells[name]]
        cells, n = self.block.cells["resolution"], gauge.layout.n_cells
        photons = self._weights_of_means()
        weight = np.bincount(cells, photons, n)
        mean = np.bincount(cells, photons * total, n) / np.maximum(weight, 1)
        (block,) = gauge.layout.blocks
        root = np.sqrt(weight[block.cells])
        design = sparse.diags(root) @ block.weights[0]
        # A little smoothness where no observation is.
        rough = 1e-3 * root.max() * gauge.difference_matrix()
        matrix = sparse.vstack([design, rough]).tocsr()
        right = np.concatenate([-root * mean[block.cells], np.zeros(rough.shape[0])])
        gauge.parameters = flumpy.from_numpy(lsqr(matrix, right)[0])

    def _start(self) -> None:
        """Scales from the ratio of counts; units of the offset from the mean."""
        block, refiner = self.block, self.refiner
        rows = block.is_diffuse
        rate = refiner.photons[rows].sum(dtype=float)
        rate /= max(block.normalisation[rows].sum(dtype=float), 1e-30)
        for component in self.result.components.values():
            if component.additive:
                component.unit = float(rate) if rate > 0 else 1.0
        if "scale" in self.result.components:
            self._start_scales()
        refiner.update_weights()
        self.result.before = self.refiner.fit().reduced

    def _start_scales(self) -> None:
        n = len(self.result.extents)
        scales, group = start_scales(self.refiner, n)
        seen = np.flatnonzero(np.bincount(self.block.experiment, minlength=n))
        names = self._identifiers()
        if self.reference is not None:
            seen, names = np.append(seen, n), [*names, "the reference map"]
        warn_of_groups([names[i] for i in seen], group[seen], "have no known scale")
        component = self.result.components["scale"]
        values = flumpy.to_numpy(component.parameters).copy()
        for number in range(n):
            place = component.layout.of_experiment(number)
            if place is not None and scales[number] > 0:
                values[place[1]] = np.log(scales[number])
        component.parameters = flumpy.from_numpy(values)

    def _identifiers(self) -> list[str]:
        names = [str(extent.number) for extent in self.result.extents]
        for table, numbers in zip(self.reader.tables, self.reader.numbers):
            for i, name in table.identifiers.items():
                names[numbers[i]] = name
        return names

    def _is_determined(self, name: str) -> bool:
        limit = TERMS[name].error_limit
        if limit is None:
            return True
        own = getattr(self.params.model, name)
        if own.use == "yes":
            # The wish counts as long as the observations say more than what is
            # expected of the parameters anyway.
            limit = max(limit, WEAK * TERMS[name].prior(own).size)
        model = self.result.error_model
        self.refiner.update_weights(model.a, model.b)
        error = standard_error(self.refiner, name)
        logger.info("%s: standard error of its parameters about %.3g", name, error)
        n_params, n_rows = self.result.components[name].n_params, self._n_informative()
        if n_rows <= ROWS_PER_PARAMETER * n_params:
            self._drop(
                name,
                f"it has {n_params} parameters, and there are only {n_rows} observations "
                "more than voxels",
            )
            return False
        if error <= limit:
            return True
        self._drop(
            name,
            f"the observations do not determine it (standard error about {error:.2g}, "
            f"limit {limit:g}): too few of the same voxel differ in what it depends on",
        )
        return False

    def _n_informative(self) -> int:
        """Number of observations less the intensities that they must determine."""
        n_used, n_intensities = self.refiner.count_used()
        return n_used - n_intensities

    def _drop(self, name: str, why: str, warn: bool = True) -> None:
        if warn:
            logger.warning("Warning: the term %s is switched off: %s", name, why)
        else:
            logger.info("The term %s is switched off: %s", name, why)
        self.result.dropped[name] = why
        del self.result.components[name]
        self.reader.layouts.pop(name)
        self.block.cells.pop(name)
        used = self.refiner.used
        self.refiner = self._new_refiner()
        self.refiner.used = used
        model = self.result.error_model
        self.refiner.update_weights(model.a, model.b)

    def _update_errors(self, warn: bool = False) -> None:
        """Outliers and error model for the current model.

        Args:
            warn: Whether to warn of what is strange about the error model.
        """
        columns = _columns(self.refiner)
        known = self.refiner.reference
        reject = self.params.outliers.reject
        if self.params.error_model.refine:
            # It does without outliers by itself, as far as is needed to find them.
            warn_now = warn and not reject
            model = refine_error_model(*columns, warn=warn_now, reference=known)
            self.result.error_model = model
        model = self.result.error_model
        if reject:
            threshold = self.params.outliers.threshold
            outlier = find_outliers(
                *columns, threshold=threshold, error_model=model, reference=known
            )
            self.refiner.used = ~outlier
            if self.params.error_model.refine:
                model = refine_error_model(*columns, outlier, warn, known)
                self.result.error_model = model
        self.refiner.update_weights(model.a, model.b)
        logger.info(
            "Outliers: %d of %d; error model: a = %.3f, b = %.4f",
            np.count_nonzero(~self.refiner.used),
            self.block.n_rows,
            model.a,
            model.b,
        )

    def _refine(self, names: list[str]) -> None:
        """Refine, unless it leads astray: then the term in question is given up."""
        saved = {n: c.parameters.deep_copy() for n, c in self.result.components.items()}
        model = self.result.error_model
        self.refiner.update_weights(model.a, model.b)
        before = self.refiner.fit().reduced
        fit = self.refiner.refine(names, self.params.refinement)
        logger.info(
            "%s: χ² per degree of freedom %.4f after %d steps, as %s",
            ", ".join(names),
            fit.reduced,
            fit.n_steps,
            fit.reason,
        )
        self.result.stages.append(Stage(list(names), fit, before))
        bad = self._worst_term()
        if bad is not None:
            for name, values in saved.items():
                self.result.components[name].parameters = values
            self._drop(bad, "its values ran away")
            rest = [name for name in names if name != bad]
            if rest:
                self._refine(rest)
            return
        self._fix_gauge()

    def _worst_term(self) -> str | None:
        """A term with values that no correction has."""
        worst, size = None, np.log(LARGEST_FACTOR)
        for name, component in self.result.components.items():
            values = component.cell_values()
            if not np.isfinite(values).all():
                return name
            if TERMS[name].error_limit is None:
                continue
            spread = (
                np.log(LARGEST_FACTOR) * np.abs(values).max() / (5 * component.unit)
                if component.additive
                else np.abs(np.log(values)).max()
            )
            if spread > size:
                worst, size = name, spread
        return worst

    def _weights_of_means(self) -> np.ndarray:
        """Photons of each row that is used, none for Bragg peaks."""
        used = self.refiner.used & self.block.is_diffuse
        return np.maximum(self.refiner.photons, 0) * used

    def _fix_gauge(self) -> None:
        """Move what the observations leave open to where it belongs."""
        if self.reference is not None:
            return  # the reference settles it
        photons = self._weights_of_means()
        for name, component in self.result.components.items():
            axes = (axis for b in component.layout.blocks for axis in b.axes)
            if TERMS[name].stage is None or component.additive:
                continue
            if (component.layout.block < 0).any():
                continue  # experiments without the term cannot be shifted along
            if not all(axis.is_partition for axis in axes):
                continue
            values = component.cell_values()[self.block.cells[name]]
            if name == "scale":
                shift = np.log(values.mean())
            elif photons.any():
                shift = np.average(np.log(values), weights=photons)
            else:
                continue
            component.parameters = component.parameters - float(shift)
            if TERMS[name].role is Role.OUTER:  # a (b I + c): what a loses, c gains
                for other in self.result.components.values():
                    if other.additive:
                        other.parameters = other.parameters * float(np.exp(shift))


def _columns(refiner: Refiner) -> tuple[np.ndarray, ...]:
    """What outliers and errors are judged by, as ``error_model.blocks_of_rows`` asks."""
    response, offset = refiner.responses()
    block = refiner.block
    base = block.background + offset
    return block.counts, response, base, block.variance, block.start


def _check_choice(
    result: Scaling,
    reader: RowReader,
    step: int,
    grid: Grid,
    params: Any,
    reference: Reference | None,
) -> None:
    """Compare χ² with that of voxels that were not refined against."""
    try:
        block = read_block(reader, step, phase=1, single=reference is not None)
    except NoObservations:
        return
    if block.n_rows == 0:
        return
    refiner = Refiner(block, result.components, grid, reference)
    model = result.error_model
    if params.outliers.reject:
        refiner.used = ~find_outliers(
            *_columns(refiner),
            threshold=params.outliers.threshold,
            error_model=model,
            reference=refiner.reference,
        )
    refiner.update_weights(model.a, model.b)
    n_used, n_intensities = refiner.count_used()
    result.control = refiner.evaluate(curvatures=False) / max(n_used - n_intensities, 1)
    logger.info("χ² of as many other voxels: %.4f", result.control)
    if result.control > ENOUGH * result.after:
        logger.warning(
            "Warning: the model describes other voxels worse than those it was refined "
            "against (χ² %.3f and %.3f): use a larger refinement.max_rows",
            result.control,
            result.after,
        )
