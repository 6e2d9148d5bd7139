"""Bragg intensities on the scale of the diffuse map, as a DIALS reflection table."""

from __future__ import annotations

import os

import numpy as np

from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.bragg.sums import PeakIntensities
from dials_diffuse.util.compat import miller_index_from_numpy


def reflection_table(
    peaks: PeakIntensities, experiments: ExperimentList
) -> flex.reflection_table:
    """The table of some Bragg intensities.

    ``intensity.sum.value`` is |F|² in the unit of the map; it needs no Lorentz or
    polarization correction. ``partiality`` is 1 where the peak is complete, else 0, and
    ``normalisation`` the weight of means over stills.
    """
    table = flex.reflection_table()
    table["miller_index"] = miller_index_from_numpy(peaks.hkl)
    table["id"] = flumpy.from_numpy(peaks.id.astype(np.int32))
    table["panel"] = flex.size_t(map(int, peaks.panel))
    for name, column in (
        ("intensity.sum.value", peaks.intensity),
        ("intensity.sum.variance", peaks.variance),
        ("background.sum.value", peaks.background),
        ("normalisation", peaks.weight),
        ("partiality", peaks.complete.astype(float)),
    ):
        table[name] = flumpy.from_numpy(np.ascontiguousarray(column, dtype=float))
    table["num_pixels.foreground"] = flumpy.from_numpy(peaks.n_pixels.astype(np.int32))
    xyz = np.ascontiguousarray(peaks.xyz, dtype=float)
    table["xyzobs.px.value"] = flumpy.vec_from_numpy(xyz)
    table["flags"] = flex.size_t(len(peaks.id), 0)
    table.set_flags(flex.bool(len(peaks.id), True), table.flags.integrated_sum)
    for number, experiment in enumerate(experiments):
        table.experiment_identifiers()[number] = experiment.identifier
    return table


def write_bragg(
    path: str | os.PathLike, peaks: PeakIntensities, experiments: ExperimentList
) -> None:
    """Write Bragg intensities; pass the path of ``atomic_path``."""
    reflection_table(peaks, experiments).as_file(os.fspath(path))
