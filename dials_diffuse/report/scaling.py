"""The figures of ``dials.diffuse_scale``: how well the model describes the observations.

All figures are of the observations that were refined against. χ² is the sum of the squares
of their deviations from the intensities of their voxels over what counting explains of
them (``error_model.residuals``), so that it is 1 for Poisson counts, however few they are.
A map that was scaled to is one more observation of its voxels, with its own errors. χ² is
given for the same observations, without the outliers, in three states:

    before        with scales only from the ratio of counts, and no other term
    after         with the model
    error_model   with the model, over the variance of the error model

The χ² per degree of freedom of the refinement, as in the log, are given besides: they are
by the weights of the refinement and, at its start, of all observations.

They are added up in bins of the images, of the resolution, of the expected counts and of
the place on the detector, so the report has the same size for any number of observations.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList

from dials.util.version import dials_version
from dials_diffuse import __version__
from dials_diffuse.merging import sums
from dials_diffuse.report.extraction_record import finite
from dials_diffuse.report.image_axis import ImageAxis
from dials_diffuse.scaling.axes import DecayAxis, SmoothAxis, StepAxis
from dials_diffuse.scaling.block import RowReader, read_sorted_cells
from dials_diffuse.scaling.components import JointComponent
from dials_diffuse.scaling.coordinates import Extent
from dials_diffuse.scaling.error_model import (
    ErrorModel,
    blocks_of_rows,
    chi_square_bins,
    normal_probability,
    residuals,
)
from dials_diffuse.scaling.layout import Layout, Owner
from dials_diffuse.scaling.model import plot_component
from dials_diffuse.scaling.reference import Reference
from dials_diffuse.scaling.refinement import Refiner
from dials_diffuse.scaling.result import Scaling
from dials_diffuse.scaling.selection import Gain, agreement, gains
from dials_diffuse.scaling.start import start_scales
from dials_diffuse.scaling.terms import TERMS
from dials_diffuse.util.text import shortened

MOST_RANGES = 180  # of images of all sweeps together
LEAST_RANGES = 8  # of each sweep
N_SHELLS = 25
ROWS_PER_PLACE = 150  # observations for each cell of the map of the detector
MOST_PLACES = 48  # along its longer edge
MOST_OWNERS = 4  # sweeps or detectors whose surfaces are shown
MOST_PROFILES = 12  # offsets of stills that are shown one by one
PERCENTILES = (5, 25, 50, 75, 95)

Columns = tuple[np.ndarray, ...]


class Ranges(NamedTuple):
    """What the observations are grouped by along the images: stills, parts of sweeps.

    Args:
        layout: Gives observations their range, as a cell.
        cell: The cell of each range, in the order of the experiments.
        experiment: Number of the experiment of each.
        phi: Rotation angle of its middle, degrees; 0 for stills.
        x: Where it stands in plots.
        label: Of the axis of x.
    """

    layout: Layout
    cell: np.ndarray
    experiment: np.ndarray
    phi: np.ndarray
    x: np.ndarray
    label: str


def find_ranges(experiments: ExperimentList, extents: Sequence[Extent]) -> Ranges:
    """Each still, and parts of equal rotation of each sweep.

    Args:
        experiments: The experiments.
        extents: What they cover.
    """
    images = [_images_of(e, extent) for e, extent in zip(experiments, extents)]
    n_sweeps = sum(not extent.is_still for extent in extents)
    n_parts = max(LEAST_RANGES, MOST_RANGES // max(n_sweeps, 1))
    owners, numbers, phi, image = [], [], [], []
    for extent, (first, n_images) in zip(extents, images):
        axes: tuple[SmoothAxis, ...] = ()
        n = 1
        if not extent.is_still:
            n = min(n_parts, max(n_images, 2))  # an axis has two cells at least
            axes = (_bins("phi", *extent.phi, n),)
        owners.append(Owner(extent.number, axes))
        numbers += [extent.number] * n
        middle = (np.arange(n) + 0.5) / n
        phi += (extent.phi[0] + middle * np.ptp(extent.phi)).tolist()
        image += (first - 0.5 + middle * n_images).tolist()
    layout = Layout(owners)
    cell = np.concatenate([_cells_of(layout, i) for i in range(len(owners))])
    axis = ImageAxis(
        {
            "first_image": [first for first, _ in images],
            "n_images": [n for _, n in images],
        }
    )
    x, label = axis.place(numbers, image), axis.label
    if n_sweeps == len(extents) == 1:
        x, label = np.array(phi), "φ (°)"
    return Ranges(layout, cell, np.array(numbers), np.array(phi), x, label)


def _images_of(experiment: Any, extent: Extent) -> tuple[int, int]:
    """First image and number of images; stills have one place each."""
    if experiment.scan is None or extent.is_still:
        return 1, 1
    first, last = experiment.scan.get_image_range()
    return first, last - first + 1


def _bins(coordinate: str, low: float, high: float, n: int) -> SmoothAxis:
    """n bins of equal width: the cells of an axis with one for each interval."""
    return SmoothAxis(coordinate, low, high, (high - low) / n, cells_per_interval=1)


def _cells_of(layout: Layout, number: int) -> np.ndarray:
    """The cells of an experiment."""
    block = layout.blocks[layout.block[number]]
    first = block.first_cell + int(layout.place[number]) * block.n_cells
    return np.arange(first, first + block.n_cells)


class Places(NamedTuple):
    """What the observations are grouped by on the detector.

    Args:
        layout: Gives observations their place, as a cell: 1 + number of the place.
        x: Horizontal coordinate of the places, shape (n_x,).
        y: Vertical one, downwards, shape (n_y,).
        labels: Of both axes.
    """

    layout: Layout
    x: np.ndarray
    y: np.ndarray
    labels: tuple[str, str]


def find_places(
    experiments: ExperimentList, extents: Sequence[Extent], n_rows: int
) -> Places:
    """A grid over the detector: of its pixels if it is a single panel, else of angles.

    Args:
        experiments: The experiments.
        extents: What they cover.
        n_rows: Number of observations; the grid is as fine as they allow.
    """
    single = all(e.detector == 0 and e.n_panels == 1 for e in extents)
    if single:
        size = experiments[0].detector[0].get_image_size()
        names, low, high = ("slow", "fast"), np.zeros(2), np.ones(2)
        edges = np.array(size[::-1], dtype=float)
        labels = ("Fast axis (pixels)", "Slow axis (pixels)")
    else:
        names = ("v", "u")
        low = np.array([min(getattr(e, name)[0] for e in extents) for name in names])
        high = np.array([max(getattr(e, name)[1] for e in extents) for name in names])
        edges = high - low
        labels = ("Horizontal direction, 2 sin θ", "Vertical direction, 2 sin θ")
    n_cells = min(max(n_rows / ROWS_PER_PLACE, 36), MOST_PLACES**2)
    n = np.sqrt(n_cells * edges / edges[::-1])
    n = np.clip(np.rint(n), 2, MOST_PLACES).astype(int)
    axes = tuple(_bins(*limits) for limits in zip(names, low, high, n.tolist()))
    y, x = (axis.centres() for axis in axes)
    if single:
        x, y = x * size[0], y * size[1]
    return Places(Layout([Owner("all", axes)] * len(extents)), x, y, labels)


def read_cells(
    reader: RowReader, scaling: Scaling, layouts: Mapping[str, Layout]
) -> dict[str, np.ndarray]:
    """The cells of the observations of voxels of the refinement in further layouts.

    Raises:
        AssertionError: The reader gives other observations than those of the refinement.
    """
    refiner = scaling.refiner
    own = RowReader(
        reader.tables, reader.numbers, reader.finder, layouts, reader.excluded
    )
    single = refiner.reference is not None
    voxel, cells = read_sorted_cells(own, scaling.step, single, description="Report")
    first = len(refiner.block.voxel) - len(voxel)
    assert np.array_equal(voxel, refiner.block.voxel[first:])
    return cells


class Deviations(NamedTuple):
    """Squares of deviations and their expectations, arrays of shape (n,), float32.

    Args:
        square: Square of the deviation, in units of a positive variance.
        expected: Its expectation by an error model, in the same unit.
    """

    square: np.ndarray
    expected: np.ndarray


def find_deviations(
    columns: Columns,
    used: np.ndarray,
    models: Sequence[ErrorModel],
    reference: Reference | None = None,
) -> list[Deviations]:
    """Those of all observations that are used, of voxels with several or of the map.

    Args:
        columns: As those of ``error_model.blocks_of_rows``.
        used: Which observations are.
        models: The error models.
        reference: What a map says of each voxel, one more observation.

    Returns:
        Those by each of the models.
    """
    n = np.count_nonzero(used)
    result = [Deviations(*np.empty((2, n), np.float32)) for _ in models]
    stop = 0
    for place, rows in blocks_of_rows(*columns, reference):
        found = residuals(rows.select(used[place]))
        start, stop = stop, stop + len(found.deviation)
        for model, (square, expected) in zip(models, result):
            scale = found.scale(model)
            square[start:stop] = found.deviation**2 / scale
            expected[start:stop] = found.expectation(model) / scale
    return [Deviations(*(column[:stop] for column in found)) for found in result]


class Observations:
    """What is known of each observation of voxels that was refined against.

    Bragg peaks, if there are any, come before them in a block and are left out.

    Args:
        scaling: The result of scaling, with a refiner.

    Attributes:
        used: Whether it is no outlier.
        group: Number of its voxel.
        voxel: Packed index of each voxel.
        kept: Whether it counts for χ²: no outlier, and not the only one of its voxel if
            no map has that.
        before: Deviations with the scales from the ratio of counts, of those kept.
        after: The same with the model.
        modelled: The same in units of the errors of the error model.
        expected: Expected counts, positive, photons, of all.
        above: Whether it has more counts than expected.
        columns: As those of ``error_model.blocks_of_rows``, for the model.
        reference: What a map that was scaled to says of each voxel.
        sums: Photons and their response to the intensity, of the used rows of each voxel
            and the map.
    """

    def __init__(self, scaling: Scaling) -> None:
        refiner, model = scaling.refiner, scaling.error_model
        block = refiner.block
        first_group = int(np.searchsorted(block.voxel, 0))
        first = int(block.start[first_group])
        self.voxel = block.voxel[first_group:]
        self.group = block.group[first:] - first_group
        self.used = refiner.used[first:]
        limits = (block.start[first_group:] - first).astype(np.int64)
        response, offset = (values[first:] for values in refiner.responses())
        counts, background = block.counts[first:], block.background[first:]
        base, variance = background + offset, block.variance[first:]
        self.columns = counts, response, base, variance, limits
        scale = initial_scales(scaling)[block.experiment[first:]]
        initial = block.normalisation[first:] * scale
        before = counts, initial, background, variance, limits
        known = refiner.reference
        if known is not None:
            known = known.select(np.arange(first_group, block.n_groups))
        self.reference = known
        counting = ErrorModel()
        (self.before,) = find_deviations(before, self.used, [counting], known)
        self.after, self.modelled = find_deviations(
            self.columns, self.used, [counting, model], known
        )
        n_used = np.add.reduceat(self.used.astype(np.int64), limits[:-1])
        if known is not None:
            n_used += known.known
        self.kept = self.used & (n_used > 1)[self.group]
        weight = (self.used | (n_used == 0)[self.group]).astype(np.float64)
        photons = np.add.reduceat((counts - base) * weight, limits[:-1])
        norm = np.add.reduceat(response * weight, limits[:-1])
        if known is not None:
            photons, norm = photons + known.photons, norm + known.response
        self.above = counts - base > response * (photons / norm)[self.group]
        intensity = (np.maximum(photons, 1.0) / norm)[self.group]
        self.expected = response * intensity + np.maximum(base, 0.0)
        self.sums = photons, norm


def initial_scales(scaling: Scaling) -> np.ndarray:
    """Scale of each experiment from the ratio of counts in common voxels."""
    n = len(scaling.extents)
    if "scale" not in scaling.components:
        return np.ones(n)
    scale = start_scales(scaling.refiner, n).scale[:n]
    return np.where(scale > 0, scale, 1.0)


def tally(rows: Observations, cell: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """χ² in the three states, and outliers, of n cells.

    Args:
        rows: The observations.
        cell: The cell of each, shape (n_rows,).
        n: Number of cells.

    Returns:
        Arrays of shape (n,); χ² is NaN where there is none.
    """
    mine = cell[rows.kept]

    def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        total = np.bincount(mine, below, n)
        positive = np.where(total > 0, total, np.nan)
        return np.bincount(mine, above, n) / positive

    outlier, above = cell[~rows.used], rows.above[~rows.used]
    return {
        "n_observations": np.bincount(cell, minlength=n),
        "n_too_high": np.bincount(outlier[above], minlength=n),
        "n_too_low": np.bincount(outlier[~above], minlength=n),
        "chi_square_before": ratio(*rows.before),
        "chi_square_after": ratio(*rows.after),
        "chi_square_error_model": ratio(*rows.modelled),
    }


def scaling_record(
    experiments: ExperimentList,
    reader: RowReader,
    scaling: Scaling,
    warnings: Sequence[str] = (),
    inputs: Sequence[str] = (),
    contributions: Mapping[str, Gain] | None = None,
) -> dict[str, Any]:
    """All figures of the report, for JSON: lists, numbers and texts, None for no number.

    Args:
        experiments: The experiments.
        reader: Of their observations, as ``scale`` returned it.
        scaling: The result.
        warnings: What the user was warned of.
        inputs: Names of the files.
        contributions: What each term contributes; found here if it is not given.
    """
    record: dict[str, Any] = {
        "inputs": list(inputs),
        "versions": {"dials": dials_version(), "dials_diffuse": __version__},
        "n_experiments": len(experiments),
        "n_observations": reader.n_rows,
        "warnings": list(dict.fromkeys(warnings)),
        "dropped": dict(scaling.dropped),
        "terms": list(scaling.components),
        "stages": _stages(scaling),
        "error_model": scaling.error_model.as_dict(),
        "chi_square": {
            "before": scaling.before,
            "model": scaling.counting,
            "error_model": scaling.after,
            "other_voxels": scaling.control,
        },
        "contributions": [],
        "refined_against": None,
    }
    if scaling.refiner is not None and scaling.refiner.block.voxel[-1] >= 0:
        rows, model = Observations(scaling), scaling.error_model
        record.update(_refined_record(experiments, reader, scaling, rows))
        known = rows.reference
        points = normal_probability(*rows.columns, model, ~rows.used, reference=known)
        record["error_model"]["normal_probability"] = points._asdict()
        if contributions is None:
            contributions = gains(scaling.refiner, len(experiments))
        record["contributions"] = [
            {"without": name, "chi_square": gain.chi_square, "cc": gain.cc}
            for name, gain in contributions.items()
        ]
    return finite(record)


def _stages(scaling: Scaling) -> list[dict[str, Any]]:
    """The minimisations, with their χ² per degree of freedom."""
    return [
        {
            "terms": stage.terms,
            "chi_square_before": stage.before,
            "chi_square": stage.fit.reduced,
            "n_observations": stage.fit.n_used,
            "n_steps": stage.fit.n_steps,
            "reason": stage.fit.reason,
        }
        for stage in scaling.stages
    ]


def _refined_record(
    experiments: ExperimentList, reader: RowReader, scaling: Scaling, rows: Observations
) -> dict[str, Any]:
    """What the observations of the refinement say."""
    refiner, extents = scaling.refiner, scaling.extents
    n_rows = len(rows.used)
    ranges = find_ranges(experiments, extents)
    places = find_places(experiments, extents, n_rows)
    layouts = {"ranges": ranges.layout, "places": places.layout}
    cells = read_cells(reader, scaling, layouts)
    total = tally(rows, np.zeros(n_rows, dtype=np.int64), 1)
    images = tally(rows, cells["ranges"], ranges.layout.n_cells)
    # Bragg peaks are in no range, and so compared with nothing.
    n_peaks = refiner.block.n_rows - n_rows
    of_all = np.concatenate([np.zeros(n_peaks, np.int32), cells["ranges"]])
    images.update(_agreement(refiner, of_all, ranges.layout.n_cells))
    images = {name: values[ranges.cell] for name, values in images.items()}
    shape = (len(places.y), len(places.x))
    detector = tally(rows, cells["places"] - 1, shape[0] * shape[1])
    resolution = _resolution_record(rows, reader)
    return {
        "refined_against": {
            "n_voxels": len(rows.voxel),
            "n_bragg_peaks": n_peaks,
            "one_voxel_in": scaling.step,
            "reference": refiner.reference is not None,
            **{name: values[0] for name, values in total.items()},
        },
        "images": {
            "label": ranges.label,
            "x": ranges.x,
            "experiment": ranges.experiment,
            "phi": ranges.phi,
            **images,
            **_smooth_terms(scaling, ranges),
        },
        "experiments": {
            "scale": scaling.experiment_scales(),
            "is_still": [extent.is_still for extent in extents],
            "n_observations": scaling.n_observations,
            "scale_from": [source.value for source in scaling.source],
            **_agreement(refiner, refiner.block.experiment, len(extents)),
        },
        "resolution": resolution,
        "intensity": _intensity_record(rows, scaling.error_model),
        "detector": {
            "labels": places.labels,
            "x": places.x,
            "y": places.y,
            **{name: values.reshape(shape) for name, values in detector.items()},
        },
        "offset": _offset_record(scaling, resolution),
        "surfaces": surfaces(experiments, scaling),
    }


def _agreement(refiner: Refiner, cell: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Correlation with the rest, of any groups of observations."""
    view = copy.copy(refiner)
    view.block = dataclasses.replace(refiner.block, experiment=cell)
    found = agreement(view, n)
    return {"cc": found.cc, "delta_cc": found.delta, "n_shared_voxels": found.n_pairs}


def _smooth_terms(scaling: Scaling, ranges: Ranges) -> dict[str, np.ndarray]:
    """The scale b and the relative B, Å², of each range of images."""
    result = {}
    if "scale" in scaling.components:
        result["scale"] = np.exp(_along_phi(scaling.components["scale"], ranges))
    if "decay" in scaling.components:
        result["relative_b"] = _along_phi(scaling.components["decay"], ranges)
    return result


def _along_phi(component: JointComponent, ranges: Ranges) -> np.ndarray:
    """Parameters of a term of the rotation angle, or of nothing, in the middle of ranges."""
    result = np.full(len(ranges.experiment), np.nan)
    parameters = flumpy.to_numpy(component.parameters)
    limits = np.flatnonzero(np.diff(ranges.experiment, prepend=-1))
    for start, stop in zip(limits, [*limits[1:], len(result)]):
        place = component.layout.of_experiment(int(ranges.experiment[start]))
        if place is None:
            continue
        axes, chosen = place
        own = parameters[chosen]
        phi = [axis for axis in axes if not isinstance(axis, DecayAxis)]
        if phi:
            own = phi[0].weights(ranges.phi[start:stop]) @ own
        result[start:stop] = own
    return result


def _resolution_record(rows: Observations, reader: RowReader) -> dict[str, Any]:
    """In shells of equal width in s = 1/d, with the mean intensity."""
    s = reader.tables[0].grid.s(sums.unpack(rows.voxel))
    limits = np.linspace(s.min(), s.max(), N_SHELLS + 1)
    shell = np.clip(np.searchsorted(limits, s, "right") - 1, 0, N_SHELLS - 1)
    found = tally(rows, shell[rows.group], N_SHELLS)
    photons, norm = (np.bincount(shell, x, N_SHELLS) for x in rows.sums)
    found["intensity"] = photons / np.where(norm > 0, norm, np.nan)
    return {"s": (limits[1:] + limits[:-1]) / 2, "limits": limits, **found}


def _intensity_record(rows: Observations, model: ErrorModel) -> dict[str, Any]:
    """In bins of the expected counts, those of the error model."""
    known = rows.reference
    bins = chi_square_bins(*rows.columns, model, ~rows.used, reference=known)
    n = len(bins.n_rows)
    if n == 0:
        return {"limits": [], "expected": []}
    cell = np.searchsorted(bins.limits[1:-1], rows.expected, side="right")
    found = tally(rows, cell, n)
    return {"limits": bins.limits, "expected": bins.expected, **found}


def _offset_record(
    scaling: Scaling, resolution: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Offsets c(s) of stills: a few one by one, of many the percentiles."""
    if "offset" not in scaling.components:
        return None
    component = scaling.components["offset"]
    values = component.cell_values()
    for block in component.layout.blocks:
        if [axis.coordinate for axis in block.axes] != ["s"]:
            continue
        s = block.axes[0].centres()
        seen = (s >= resolution["limits"][0]) & (s <= resolution["limits"][-1])
        profiles = values[block.cells].reshape(block.n_owners, -1)[:, seen]
        return {
            "s": s[seen],
            "n": block.n_owners,
            "percentiles": dict(
                zip(PERCENTILES, np.percentile(profiles, PERCENTILES, axis=0))
            ),
            "profiles": profiles if block.n_owners <= MOST_PROFILES else None,
        }
    return None


def surfaces(experiments: ExperimentList, scaling: Scaling) -> list[dict[str, Any]]:
    """Plots of the terms of several dimensions, of the first owners of each.

    And of what their mean at each resolution is divided by, without which a surface alone
    would be taken for what is done to the intensities.
    """
    result = []
    for name, joint in scaling.components.items():
        layout, seen = joint.layout, {}
        for i, owner in enumerate(zip(layout.block.tolist(), layout.place.tolist())):
            if owner[0] >= 0:
                seen.setdefault(owner, []).append(i)
        for numbers in list(seen.values())[:MOST_OWNERS]:
            component = experiments[numbers[0]].scaling_model.components[name]
            is_gauge = TERMS[name].stage is None
            if not (is_gauge or _is_surface(component.axes)):
                continue
            plot = plot_component(name, component)
            if is_gauge:
                plot["layout"]["title"] = {"text": "Resolution (gauge)"}
            elif len(seen) > 1:
                text = plot["layout"]["title"]["text"]
                text += f", experiments {shortened(numbers, 3)}"
                plot["layout"]["title"] = {"text": text}
            result.append(
                {
                    "term": name,
                    "experiments": numbers,
                    "n_owners": len(seen),
                    "plot": plot,
                }
            )
    return result


def _is_surface(axes: Sequence[Any]) -> bool:
    """Whether a term has more than its course along φ or s, which other plots show."""
    long = [axis for axis in axes if axis.n_cells > 1]
    if any(isinstance(axis, DecayAxis) for axis in axes):
        return False
    return len(long) > 1 or any(isinstance(axis, StepAxis) for axis in long)
