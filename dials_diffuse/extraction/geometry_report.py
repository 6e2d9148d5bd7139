"""The log of where indexed spots fall, image by image."""

from __future__ import annotations

import logging

import numpy as np

from dials.util import tabulate
from dials_diffuse.geometry.validation import ImageResiduals

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
    rows = [
        (
            int(images.experiment[i]),
            int(images.array_index[i]) + 1,
            int(n[i]),
            images.mean[i],
            images.largest[i],
            images.shift[i],
        )
        for i in order
    ]
    header = ("experiment", "image", "spots", "mean 1/Å", "largest", "shift")
    bad = [row for row in rows if row[3] > tolerance]
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
