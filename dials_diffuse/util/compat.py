"""Differences between the supported versions of DIALS (3.12 to 3.30), in one place."""

from __future__ import annotations

import math

import numpy as np

from cctbx.array_family import flex
from dxtbx import flumpy
from dxtbx.model import Panel, Scan

CONVERSION_BLOCK = 1 << 20  # Miller indices


def miller_index_from_numpy(index: np.ndarray) -> flex.miller_index:
    """flex.miller_index of an integer array of shape (n, 3).

    flumpy of dxtbx 3.11 has no conversion of Miller indices.
    """
    columns = np.ascontiguousarray(np.asarray(index, dtype=np.int32).T)
    return flex.miller_index(*(flumpy.from_numpy(column) for column in columns))


def miller_index_to_numpy(indices: flex.miller_index) -> np.ndarray:
    """Integer array of shape (n, 3) of a flex.miller_index."""
    result = np.empty((len(indices), 3), dtype=np.int32)
    # In blocks: as_vec3_double takes twice the memory of the indices themselves.
    for start in range(0, len(indices), CONVERSION_BLOCK):
        stop = min(start + CONVERSION_BLOCK, len(indices))
        block = indices[start:stop].as_vec3_double()
        result[start:stop] = np.rint(flumpy.to_numpy(block))
    return result


def trusted_range_is_inclusive() -> bool:
    """Whether dxtbx trusts the two limits of a panel's trusted range themselves.

    dxtbx 3.11 takes min < value < max (with min = -1 for photon counters), later
    versions min <= value <= max (with min = 0).
    """
    panel = Panel()
    panel.set_image_size((1, 1))
    panel.set_trusted_range((1.0, 3.0))
    data = flex.int(flex.grid(1, 1), 1)
    return bool(panel.get_trusted_range_mask(data)[0])


def inclusive_trusted_range(panel: Panel) -> tuple[float, float]:
    """Smallest and largest value of a panel that dxtbx trusts, both inclusive.

    Experiment lists written by dxtbx 3.11 hold the exclusive limits: min = -1 for photon
    counters, which mark the gaps between modules with -1. Later versions read that
    number as an inclusive limit and would trust the gaps.
    """
    low, high = panel.get_trusted_range()
    if trusted_range_is_inclusive():
        return (0.0 if low == -1.0 else low), high
    return math.nextafter(low, math.inf), math.nextafter(high, -math.inf)


def photon_counter_trusted_range(count_cutoff: int) -> tuple[float, float]:
    """The trusted range that the formats of this dxtbx give a photon counter.

    0 is trusted and -1, the value of gaps between modules, is not.
    """
    return (0.0 if trusted_range_is_inclusive() else -1.0), float(count_cutoff)


def oscillation_width(scan: Scan | None) -> float | None:
    """Rotation during each image in degrees, None if there is no scan of angles.

    Scans of dxtbx 3.20 and later may be of something else than angles.
    """
    if scan is None:
        return None
    if hasattr(scan, "has_property") and not scan.has_property("oscillation"):
        return None
    return scan.get_oscillation()[1]


def available_cores() -> int:
    """Number of processors that this process may use.

    ``dials.util.mp.available_cores`` of DIALS 3.12 became
    ``dials.util.system.CPU_COUNT``.
    """
    try:
        from dials.util.system import CPU_COUNT
    except ImportError:
        from dials.util.mp import available_cores as dials_available_cores

        return dials_available_cores()
    return CPU_COUNT
