"""The figures of ``dials.diffuse_extract``: what its JSON file has, and its page shows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping, Sequence

import numpy as np

from dxtbx.model.experiment_list import ExperimentList

import dials_diffuse
from dials.util.version import dials_version
from dials_diffuse.bragg.lattices import shared_images
from dials_diffuse.extraction.blocks import images_of
from dials_diffuse.extraction.extract import Extracted
from dials_diffuse.extraction.geometry_report import geometry_record
from dials_diffuse.extraction.indexing_report import indexing_record
from dials_diffuse.extraction.prepare import Prepared
from dials_diffuse.extraction.report import (
    blocks_record,
    bragg_record,
    count_static_pixels,
    pixels_record,
    shells_record,
)
from dials_diffuse.report.corrections import CorrectionSummary, corrections_record

DROPPED = {
    "none": "value not trusted, or in the moving shadow of the goniometer",
    "ellipsoid": "value not trusted, or near Bragg positions without a sum",
    "auto": "value not trusted, or near Bragg positions without a sum",
    "shoebox": "in boxes of predicted spots, or value not trusted",
    "statistical": "in voxels that stand out, or value not trusted",
}


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become None, arrays lists."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        return finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def extraction_record(
    given: ExperimentList,
    prepared: Prepared,
    found: Extracted,
    summaries: Sequence[CorrectionSummary],
) -> dict[str, Any]:
    """The figures of an extraction, for a JSON file.

    Args:
        given: The experiments with crystals, as they were given.
        prepared: The experiments that were extracted.
        found: What was extracted.
        summaries: The ranges of the corrections.
    """
    experiments, settings = prepared.experiments, prepared.settings
    indexing = prepared.indexing
    record = {
        "versions": {
            "dials": dials_version(),
            "dials_diffuse": dials_diffuse.__version__,
        },
        "background": settings.background,
        "has_reflections": prepared.reflections is not None,
        "geometry": _geometry(prepared),
        "indexing": indexing and indexing_record(indexing, list(given.identifiers())),
        "indexing_note": _indexing_note(prepared, len(given.crystals())),
        "corrections": corrections_record(summaries, experiments, settings),
        **_models(prepared, found),
        **_observations(prepared, found),
        "bragg": bragg_record(found.peaks, experiments, settings),
    }
    return finite(record)


def _geometry(prepared: Prepared) -> dict[str, Any] | None:
    """The figures of spots against their Bragg positions, if there are any."""
    if prepared.images is None:
        return None
    settings = prepared.settings.geometry
    return geometry_record(
        prepared.images,
        prepared.tolerance,
        settings.tolerance is not None,
        settings.reject_images,
    )


def _indexing_note(prepared: Prepared, n_crystals: int) -> str:
    """Why there are no figures of the indexing settings."""
    if prepared.settings.indexing.consistent == "none":
        return "Crystals were left in the setting they had (indexing.consistent=none)"
    if n_crystals < 2:
        return "One crystal model: there is nothing to agree with"
    return "No choice: the lattice has no more symmetry than the Laue group"


def _models(prepared: Prepared, found: Extracted) -> dict[str, Any]:
    """The grid, the images and the experiments."""
    experiments, grid = prepared.experiments, prepared.grid
    n_images = [len(images_of(experiment)) for experiment in experiments]
    group = experiments[0].crystal.get_space_group()
    return {
        "grid": {
            **dataclasses.asdict(grid),
            "space_group": str(group.info()),
            "laue_group": str(grid.laue_group.info()),
            "shape": grid.shape,
        },
        "images": {
            "n_experiments": len(experiments),
            "n_crystals": len(experiments.crystals()),
            "n_images": sum(n_images),
            "n_used": sum(map(len, found.blocks)),
            "n_blocks": len(found.blocks),
            "lattices_share_images": any(shared_images(experiments)),
        },
        "experiments": {
            "identifier": list(experiments.identifiers()),
            "first_image": [images_of(e).start + 1 for e in experiments],
            "n_images": n_images,
        },
    }


def _observations(prepared: Prepared, found: Extracted) -> dict[str, Any]:
    """The pixels by what became of them, and sums over the observations."""
    experiments, grid = prepared.experiments, prepared.grid
    settings, blocks, totals = prepared.settings, found.blocks, found.totals
    sums = {name: float(values.sum()) for name, values in totals.blocks.items()}
    n_pixels = int(sums["n_pixels"])
    static = count_static_pixels(experiments, blocks, grid, settings, found.pixels)
    return {
        "pixels": {
            **pixels_record(static, found.peaks.n_pixels, n_pixels),
            "dropped_are": DROPPED[settings.bragg.exclusion],
        },
        "observations": {
            "n": found.n_rows,
            "photons": sums["photons"],
            "pixels_each": n_pixels / found.n_rows,
            "photons_per_pixel": sums["photons"] / n_pixels,
            "background_per_pixel": sums["background"] / n_pixels,
        },
        "blocks": blocks_record(totals, blocks),
        "shells": shells_record(totals, found.peaks),
    }
