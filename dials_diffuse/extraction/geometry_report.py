"""Where indexed spots fall, image by image: for the log and for the report."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from dials.util import tabulate
from dials_diffuse.geometry.validation import SIGNIFICANT, ImageResiduals

logger = logging.getLogger("dials.diffuse.extract")

MAX_ROWS = 20


def log_images(images: ImageResiduals, tolerance: float, reject: bool) -> None:
    """Log the distances of spots from their Bragg positions; name the images far off.

    Args:
        images: The distances.
        tolerance: Largest mean distance of an image in order, Å⁻¹.
        reject: Whether the others are left out.
    """
    if len(images) == 0:
        logger.warning("Warning: no indexed reflection belongs to the experiments")
        return
    n = images.n_spots
    logger.info(
        "Indexed spots against their Bragg positions: %d spots of %d images, mean "
        "distance %.5f 1/Å, largest %.5f 1/Å, rms |delta hkl| %.3f; mean shift of an "
        "image %.5f 1/Å",
        n.sum(),
        len(images),
        np.average(images.mean, weights=n),
        images.largest.max(),
        np.sqrt(np.average(images.rms_hkl**2, weights=n)),
        images.shift.mean(),
    )
    # the worst images first
    order = np.argsort(-images.mean, kind="stable")
    rows = [_table_row(images, i) for i in order]
    header = ("experiment", "image", "spots", "mean 1/Å", "error", "largest", "shift")
    is_beyond = images.is_beyond(tolerance)[order]
    bad = [row for row, beyond in zip(rows, is_beyond) if beyond]
    logger.debug(tabulate(rows, header, floatfmt=".5f"))
    if bad:
        logger.warning(
            "Warning: the spots of %d of %d images are on average farther than %.5f 1/Å "
            "from their Bragg positions: the models do not describe these images. They "
            "are %s\n%s%s",
            len(bad),
            len(rows),
            tolerance,
            "left out"
            if reject
            else "used; geometry.reject_images=True leaves them out",
            tabulate(bad[:MAX_ROWS], header, floatfmt=".5f"),
            f"\n({len(bad) - MAX_ROWS} more)" if len(bad) > MAX_ROWS else "",
        )
    unsure = int(np.count_nonzero(images.mean > tolerance)) - len(bad)
    if unsure:
        logger.info(
            "%d more images are beyond it, but by less than %g standard errors above the "
            "median: their spots are too few to tell",
            unsure,
            SIGNIFICANT,
        )


def _table_row(images: ImageResiduals, i: int) -> tuple[float, ...]:
    return (
        int(images.experiment[i]),
        int(images.array_index[i]) + 1,
        int(images.n_spots[i]),
        images.mean[i],
        images.mean_error[i],
        images.largest[i],
        images.shift[i],
    )


def geometry_record(
    images: ImageResiduals, tolerance: float, given: bool, reject: bool
) -> dict[str, Any] | None:
    """The distances of spots from their Bragg positions, for a JSON file.

    Args:
        images: The distances.
        tolerance: Largest mean distance of an image in order, Å⁻¹.
        given: Whether the user gave it.
        reject: Whether the other images are left out.

    Returns:
        None if there are no spots.
    """
    if len(images) == 0:
        return None
    n = images.n_spots
    is_beyond = images.is_beyond(tolerance)
    return {
        "n_images": len(images),
        "n_spots": int(n.sum()),
        "mean_distance": float(np.average(images.mean, weights=n)),
        "largest_distance": float(images.largest.max()),
        "mean_shift": float(images.shift.mean()),
        "rms_delta_hkl": float(np.sqrt(np.average(images.rms_hkl**2, weights=n))),
        "tolerance": float(tolerance),
        "tolerance_is_given": given,
        "standard_errors": SIGNIFICANT,
        "n_beyond": int(is_beyond.sum()),
        "n_unsure": int(np.sum((images.mean > tolerance) & ~is_beyond)),
        "rejected": reject,
        "images": {**images.as_dict(), "is_beyond": is_beyond.tolist()},
    }


def worst_images(record: dict[str, Any], n: int = MAX_ROWS) -> list[dict[str, Any]]:
    """Rows of the images of a ``geometry_record``: those beyond the tolerance come first.

    Args:
        record: The record.
        n: The most rows.
    """
    columns = record["images"]
    order = np.lexsort((-np.array(columns["mean"]), ~np.array(columns["is_beyond"])))
    return [
        {name: column[i] for name, column in columns.items()}
        for i in order[:n].tolist()
    ]
