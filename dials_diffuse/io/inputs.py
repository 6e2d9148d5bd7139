"""Reading what extraction starts from: experiments, images, reflections, masks."""

from __future__ import annotations

import logging
import os
import pickle
from typing import Sequence

import numpy as np

import dxtbx
from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory
from dxtbx.util import ersatz_uuid4

from dials.array_family import flex
from dials.util.options import flatten_experiments, flatten_reflections
from dials.util.phil import FilenameDataWrapper
from dials_diffuse.extraction.blocks import missing_images
from dials_diffuse.extraction.tables import share_equal_detectors

logger = logging.getLogger("dials.diffuse.extract")

REFLECTION_COLUMNS = ("miller_index", "panel", "xyzobs.px.value")
SPOT_COLUMNS = ("bbox", "delpsical.rad")  # what tells the size of spots


def read_mask(path: str) -> tuple[np.ndarray, ...]:
    """The mask of each panel in a file of dials.generate_mask.

    Raises:
        ValueError: The file cannot be read as a mask.
    """
    try:
        with open(path, "rb") as handle:
            masks = pickle.load(handle)
        masks = masks if isinstance(masks, (tuple, list)) else (masks,)
        if not masks or not all(isinstance(mask, flex.bool) for mask in masks):
            raise ValueError("it holds something else")
        return tuple(flumpy.to_numpy(mask) for mask in masks)
    except OSError as e:
        reason = e.strerror
    except Exception as e:  # unpickling a file of another kind raises anything
        reason = " ".join(str(e).split()) or type(e).__name__
    raise ValueError(
        f"Cannot read the mask {path} ({reason}): give a file of dials.generate_mask"
    )


def write_mask(path: str | os.PathLike, masks: Sequence[np.ndarray]) -> None:
    """Write a mask as dials.generate_mask does.

    Args:
        path: File to make; pass the path of ``atomic_path``.
        masks: True for good pixels, (n_slow, n_fast) for each panel.
    """
    # copies: arrays that share numpy's memory do not pickle
    flex_masks = tuple(
        flumpy.from_numpy(np.ascontiguousarray(mask)).deep_copy() for mask in masks
    )
    with open(path, "wb") as handle:
        pickle.dump(flex_masks, handle, pickle.HIGHEST_PROTOCOL)


def check_identifiers(inputs: Sequence[FilenameDataWrapper]) -> None:
    """Check that no experiment is given twice.

    Raises:
        ValueError: Two experiments have the same identifier.
    """
    seen = {}
    for item in inputs:
        for identifier in filter(None, item.data.identifiers()):
            if identifier in seen:
                raise ValueError(
                    f"{seen[identifier]} and {item.filename} hold the same experiment "
                    f"(identifier {identifier}): give each only once"
                )
            seen[identifier] = item.filename


def open_images(name: str) -> ExperimentList:
    """The experiments of a file with their images opened.

    Raises:
        ValueError: The first image of an image set cannot be opened.
    """
    try:
        return ExperimentListFactory.from_json_file(name)
    except Exception as e:  # formats raise whatever their file reader raises
        reason = " ".join(str(e).split()) or type(e).__name__
        models = ExperimentListFactory.from_json_file(name, check_format=False)
        firsts = {imageset.get_path(0) for imageset in models.imagesets()}
        damaged = ", ".join(sorted(filter(is_damaged, firsts))) or "no image by itself"
        raise ValueError(
            f"Cannot open the images of {name} ({reason}; damaged: {damaged}): restore "
            "them or leave them out"
        ) from e


def is_damaged(path: str) -> bool:
    """Whether dxtbx cannot make out the detector of an image."""
    try:
        dxtbx.load(path).get_detector()
    except Exception:  # as above
        return True
    return False


def load_experiments(inputs: Sequence[FilenameDataWrapper]) -> ExperimentList:
    """The experiments of some files with their images opened, all with identifiers.

    Those with equal detectors share one.

    Args:
        inputs: Experiment lists as DIALS' parser reads them, without the images.

    Raises:
        ValueError: No experiments, one twice, or images that are missing or damaged.
    """
    if not inputs:
        raise ValueError("Please give an experiment list (.expt) with refined models")
    names = [item.filename for item in inputs]
    check_identifiers(inputs)
    models = flatten_experiments(inputs)
    if any(experiment.imageset is None for experiment in models):
        raise ValueError(f"{', '.join(names)}: experiments without images")
    missing = missing_images(models)
    if missing:
        raise ValueError(
            f"{len(missing)} image(s) of {', '.join(names)} are missing, the first is "
            f"{missing[0]}: restore them, or import them again at their new place"
        )
    experiments = ExperimentList()
    for name in names:
        experiments.extend(open_images(name))
    for imageset in experiments.imagesets():
        lookup = imageset.external_lookup
        if not (lookup.gain.data.empty() and lookup.pedestal.data.empty()):
            raise ValueError(
                f"{', '.join(names)}: the images have a gain or pedestal for each pixel "
                "(lookup), which is not applied here: import them without"
            )
    for experiment in experiments:
        if not experiment.identifier:
            experiment.identifier = ersatz_uuid4()
    share_equal_detectors(experiments)
    return experiments


def with_crystals(experiments: ExperimentList, names: Sequence[str]) -> ExperimentList:
    """The experiments that have a crystal.

    Args:
        experiments: All experiments.
        names: The files that they come from.

    Raises:
        ValueError: None has.
    """
    found = ExperimentList([e for e in experiments if e.crystal is not None])
    if not found:
        raise ValueError(
            f"{', '.join(names)}: no experiment has a crystal. Index the images first "
            "(dials.index or dials.stills_process)"
        )
    if len(found) < len(experiments):
        logger.info(
            "%d of %d experiments have no crystal and are left out",
            len(experiments) - len(found),
            len(experiments),
        )
    return found


def load_reflections(
    inputs: Sequence[FilenameDataWrapper], experiments: ExperimentList
) -> flex.reflection_table | None:
    """The indexed reflections of experiments, with their number in the list as ``id``.

    Args:
        inputs: Reflection tables as DIALS' parser reads them.
        experiments: All experiments, those without a crystal too.

    Returns:
        A table with ``id``, ``miller_index``, ``panel`` and ``xyzobs.px.value``, and those
        of ``SPOT_COLUMNS`` that all inputs have, or None if there are no inputs.

    Raises:
        ValueError: A table is empty, not indexed, or belongs to other experiments.
    """
    if not inputs:
        return None
    tables = [
        (item.filename, table)
        for item in inputs
        for table in flatten_reflections([item])
    ]
    columns = list(REFLECTION_COLUMNS)
    columns += [c for c in SPOT_COLUMNS if all(c in table for _, table in tables)]
    result = flex.reflection_table()
    for name, table in tables:
        result.extend(_indexed_reflections(name, table, experiments, columns))
    return result


def _indexed_reflections(
    name: str,
    table: flex.reflection_table,
    experiments: ExperimentList,
    columns: Sequence[str],
) -> flex.reflection_table:
    if len(table) == 0:
        raise ValueError(f"{name} has no reflections: leave it out or give another")
    missing = [column for column in REFLECTION_COLUMNS if column not in table]
    if missing:
        raise ValueError(f"{name} has no column {missing[0]}: index first")
    indexed = table.select(
        table.get_flags(table.flags.indexed, all=False) & (table["id"] >= 0)
    )
    number = experiment_numbers(name, table, experiments)
    ids = np.array(
        [number.get(i, -1) for i in flumpy.to_numpy(indexed["id"])], dtype=np.int32
    )
    known = flumpy.from_numpy(ids >= 0)
    result = flex.reflection_table()
    for column in columns:
        result[column] = indexed[column].select(known)
    result["id"] = flumpy.from_numpy(ids[ids >= 0])
    return result


def experiment_numbers(
    name: str, table: flex.reflection_table, experiments: ExperimentList
) -> dict[int, int]:
    """Number in the list of the experiment that each ``id`` of a table stands for.

    By identifier where the table has them, else the ``id`` is the number.

    Raises:
        ValueError: The table belongs to other experiments.
    """
    identifiers = dict(table.experiment_identifiers())
    if not identifiers:
        n_experiments = max(table["id"]) + 1
        if n_experiments > len(experiments):
            raise ValueError(
                f"{name} refers to {n_experiments} experiments, the list has "
                f"{len(experiments)}: give the pair of one program run"
            )
        return {i: i for i in range(len(experiments))}
    number = {e.identifier: i for i, e in enumerate(experiments)}
    if not set(identifiers.values()) & set(number):
        raise ValueError(
            f"{name} belongs to other experiments than the experiment list (no "
            "identifier in common): give the pair of one program run"
        )
    return {i: number[x] for i, x in identifiers.items() if x in number}
