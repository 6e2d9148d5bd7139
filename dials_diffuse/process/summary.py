"""The figures of a run, read from the files that its stages have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.geometry.validation import ImageResiduals, images_to_reject
from dials_diffuse.io.observations import ObservationFile
from dials_diffuse.process.stages import STILLS_FOLDER
from dials_diffuse.util.compat import oscillation_width


def spots_summary(mode: str, folder: Path, n_images: int) -> dict[str, Any] | None:
    """Numbers of spots found and indexed; of images indexed too, for stills.

    Args:
        mode: stills or rotation.
        folder: The output folder.
        n_images: Number of images that were processed.

    Returns:
        None if spot finding has not come to an end.
    """
    if mode == "stills":
        found = sorted(folder.glob(f"{STILLS_FOLDER}/idx-*_strong.refl"))
        indexed = sorted(folder.glob(f"{STILLS_FOLDER}/idx-*_indexed.refl"))
    else:
        found = list(folder.glob("strong.refl"))
        indexed = list(folder.glob("indexed.refl"))
    if not found:
        return None
    n_found = sum(len(read_table(path)) for path in found)
    n_indexed = sum(_count_flag(read_table(path), "indexed") for path in indexed)
    result = {
        "n_images": n_images,
        "n_found": n_found,
        "n_indexed": n_indexed,
        "fraction_indexed": n_indexed / n_found if n_found else 0.0,
    }
    if mode == "stills":
        lists = sorted(folder.glob(f"{STILLS_FOLDER}/idx-*_refined.expt"))
        result["n_images_indexed"] = _count_images(lists)
    return result


def read_table(path: Path) -> flex.reflection_table:
    """What a program of DIALS wrote.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return flex.reflection_table.from_file(str(path))
    except Exception as e:  # whatever a damaged file brings about
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(
            f"Cannot read {path} ({reason}): perhaps the disk is full"
        ) from None


def _count_flag(table: flex.reflection_table, flag: str) -> int:
    return table.get_flags(getattr(table.flags, flag), all=False).count(True)


def _count_images(lists: Sequence[Path]) -> int:
    """Number of different images in some lists: a still may show several crystals."""
    images = set()
    for path in lists:
        for experiment in ExperimentList.from_file(str(path), check_format=False):
            imageset = experiment.imageset
            images.add((imageset.get_path(0), imageset.indices()[0]))
    return len(images)


def refinement_summary(
    experiments: ExperimentList, reflections: flex.reflection_table
) -> dict[str, Any]:
    """Root-mean-square differences between observed and predicted positions.

    RMSD = sqrt(mean((cal - obs)²)) over the reflections used in refinement, in x and y
    (px) and, for rotation data, in the rotation angle (degrees); for stills in the angle
    by which a reciprocal lattice point misses the Ewald sphere.

    Args:
        experiments: The refined models.
        reflections: The reflections with predictions that dials.refine has written.
    """
    used = reflections.select(
        reflections.get_flags(reflections.flags.used_in_refinement)
    )
    ids = flumpy.to_numpy(used["id"])
    observed = flumpy.to_numpy(used["xyzobs.px.value"])
    residual = flumpy.to_numpy(used["xyzcal.px"]) - observed
    widths = np.array([oscillation_width(e.scan) or 0.0 for e in experiments])
    angle = residual[:, 2] * widths[ids]
    if "delpsical.rad" in used and all(e.is_still() for e in experiments):
        angle = np.degrees(flumpy.to_numpy(used["delpsical.rad"]))
    values = np.column_stack([residual[:, :2], angle])
    return {
        **_rmsd(values),
        "experiments": [
            {"id": i, **_rmsd(values[ids == i])} for i in range(len(experiments))
        ],
    }


def _rmsd(values: np.ndarray) -> dict[str, Any]:
    names = ("rmsd_x_px", "rmsd_y_px", "rmsd_angle_deg")
    if len(values) == 0:
        return {"n_reflections": 0, **dict.fromkeys(names)}
    rmsd = np.sqrt(np.mean(values**2, axis=0))
    return {"n_reflections": len(values), **dict(zip(names, map(float, rmsd)))}


def crystal_summary(experiments: ExperimentList) -> dict[str, Any]:
    """Mean unit cell (Å, degrees), its standard deviation over crystals, space group."""
    crystals = experiments.crystals()
    cells = np.array([crystal.get_unit_cell().parameters() for crystal in crystals])
    groups = {str(crystal.get_space_group().info()) for crystal in crystals}
    return {
        "n_crystals": len(crystals),
        "n_experiments": len(experiments),
        "unit_cell": cells.mean(axis=0).tolist(),
        "unit_cell_sd": cells.std(axis=0).tolist(),
        "space_group": ", ".join(sorted(groups)),
    }


def mask_summary(detectors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The numbers of masked pixels of each detector, in all and by layer.

    Args:
        detectors: The figures of ``dials.diffuse_mask``, which has those of each panel.
    """
    keys = ("mask", "n_images", "n_pixels", "n_masked")
    layer_keys = ("name", "meaning", "n_pixels", "n_only")
    return [
        {
            **{key: detector[key] for key in keys},
            "layers": [{k: x[k] for k in layer_keys} for x in detector["layers"]],
        }
        for detector in detectors
    ]


def indexing_summary(
    before: ExperimentList, after: ExperimentList
) -> dict[str, Any] | None:
    """How many experiments extraction has reindexed or left out.

    With a* b* c* before and after in the columns of A and A', A' = A M, the operator
    M is the identity where nothing was changed.

    Args:
        before: The refined experiments.
        after: The extracted ones, with the same identifiers.

    Returns:
        None if there is one crystal only.
    """
    if len(before.crystals()) < 2:
        return None
    setting = {e.identifier: _setting(e) for e in before if e.crystal is not None}
    changes = [np.linalg.solve(setting[e.identifier], _setting(e)) for e in after]
    n_reindexed = sum(np.abs(m - np.eye(3)).max() > 0.5 for m in changes)
    return {
        "n_experiments": len(setting),
        "n_reindexed": int(n_reindexed),
        "n_left_out": len(setting) - len(after),
    }


def _setting(experiment: Experiment) -> np.ndarray:
    return np.array(experiment.crystal.get_A()).reshape(3, 3)


def geometry_summary(
    images: ImageResiduals, tolerance: float, reject: bool
) -> dict[str, Any] | None:
    """How far the indexed spots are from their Bragg positions, in 1/Å.

    Args:
        images: The distances, by image.
        tolerance: Largest mean distance of an image in order, Å⁻¹.
        reject: Whether the others are left out.

    Returns:
        None if there are no spots.
    """
    if len(images) == 0:
        return None
    n = images.n_spots
    return {
        "n_images": len(images),
        "n_spots": int(n.sum()),
        "mean_distance": float(np.average(images.mean, weights=n)),
        "largest_mean_distance": float(images.mean.max()),
        "rms_delta_hkl": float(np.sqrt(np.average(images.rms_hkl**2, weights=n))),
        "tolerance": float(tolerance),
        "n_images_beyond": len(images_to_reject(images, tolerance)),
        "rejected": reject,
    }


def extraction_summary(path: str) -> dict[str, Any]:
    """Grid, numbers of observations, pixels and photons of an observation file."""
    n_pixels, counts = 0, 0.0
    with ObservationFile(path) as table:
        for start, stop in table.slabs():
            rows = table.read(start, stop, ["num_pixels.valid", "counts"])
            n_pixels += int(rows["num_pixels.valid"].sum())
            counts += float(rows["counts"].sum())
        grid = table.grid
        return {
            "n_experiments": len(table.identifiers),
            "n_observations": table.n_rows,
            "n_pixels": n_pixels,
            "photons": counts,
            "photons_per_pixel": counts / max(n_pixels, 1),
            "ndiv": list(grid.ndiv),
            "shape": list(grid.shape),
            "unit_cell": list(grid.unit_cell),
            "laue_group": str(grid.laue_group.info()),
            "d_min": grid.d_min,
            "d_max": grid.d_max,
        }
