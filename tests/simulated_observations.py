"""Observation tables of known truth, without images.

The geometry is real: a dry run of the extraction on blank images tells which voxels are
seen on which image, where, and with which normalisation. Then the counts are drawn from
the model of scaling,

    N ~ Poisson(M a (b I + c) + B)

with intensities I that are independent from voxel to voxel, so that nothing but symmetry
tells them, and with factors and offset that a test gives for each row.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Sequence

import numpy as np
from simulate_images import with_images

from cctbx import sgtbx, uctbx
from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentList, ExperimentListFactory

from dials.array_family import flex
from dials_diffuse import symmetry
from dials_diffuse.extraction.extract import extract
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import BraggSettings, ExtractionSettings
from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ObservationFile, ObservationWriter
from dials_diffuse.merging.sums import pack
from dials_diffuse.simulation.models import make_series
from dials_diffuse.simulation.settings import (
    CrystalSettings,
    DetectorSettings,
    ScanSettings,
    SimulationSettings,
)

CELLS = {
    "P 1": (15.0, 18.0, 21.0, 82.0, 97.0, 104.0),
    "P 21 21 21": (15.0, 18.0, 21.0, 90.0, 90.0, 90.0),
}
D_MIN = 1.9

# A row stays on one image and, with few voxels, on one place of the detector.
ROTATION = SimulationSettings(
    n_images=90,
    crystal=CrystalSettings(space_group="P 21 21 21"),
    detector=DetectorSettings(
        preset="given", size=(400, 400), pixel=0.225, distance=60
    ),
    scan=ScanSettings(width=2.0, exposure=1.0),
)
STILLS = dataclasses.replace(
    ROTATION,
    mode="stills",
    n_images=100,
    detector=DetectorSettings(preset="given", size=(450, 450), pixel=0.2, distance=60),
    scan=ScanSettings(exposure=1.0, orientations="random"),
)


@dataclasses.dataclass
class Geometry:
    """Rows of observations, and where they come from.

    Args:
        experiments: The models; no images.
        grid: The voxel grid.
        columns: Of the rows, as in an observation file.
        voxel: Number of the symmetry-unique voxel of each row.
    """

    experiments: ExperimentList
    grid: Grid
    columns: dict[str, np.ndarray]
    voxel: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.voxel)

    @property
    def experiment(self) -> np.ndarray:
        """Number of the experiment of each row."""
        return self.columns["id"]

    @property
    def frame(self) -> np.ndarray:
        """Mean frame of each row, from 0."""
        return self.columns["xyzobs.px.value"][:, 2]

    @property
    def turn(self) -> np.ndarray:
        """Place of each row in its sweep, 0 to 1."""
        return self.frame / self.experiments[0].scan.get_num_images()

    @property
    def s(self) -> np.ndarray:
        """1/d of each row, Å⁻¹."""
        return self.grid.s(self.columns["miller_index"])

    @property
    def place(self) -> np.ndarray:
        """Place on the panel in units of its sides, from -1/2 to 1/2."""
        size = self.experiments[0].detector[0].get_image_size()
        return self.columns["xyzobs.px.value"][:, :2] / size - 0.5

    def intensities(self, seed: int = 5, contrast: float = 0.4) -> np.ndarray:
        """I of each row: falls with s, and differs from voxel to voxel."""
        rng = np.random.default_rng(seed)
        of_voxel = np.exp(contrast * rng.standard_normal(self.voxel.max() + 1))
        return of_voxel[self.voxel] * np.exp(-4 * self.s**2)


def observe(settings: SimulationSettings, folder: Path, ndiv: int = 2) -> Geometry:
    """The rows that extraction finds on the images of a simulation.

    Args:
        settings: The simulation; its crystal has a cell of ``CELLS``.
        folder: For temporary files.
        ndiv: Voxels of the grid along each edge of the reciprocal cell.
    """
    name = settings.crystal.space_group
    group = sgtbx.space_group_info(name).group()
    cell = settings.crystal.unit_cell or uctbx.unit_cell(CELLS[name])
    models, blank = ExperimentList(), ExperimentList()
    image = [np.zeros(settings.detector.size[::-1], dtype=np.int32)]
    for series in make_series(settings, cell, group):
        n = 1 if series.is_stills else series.n_images
        models.extend(series.experiments)
        blank.extend(
            ExperimentList([with_images(e, [image] * n) for e in series.experiments])
        )
    own = ExtractionSettings(
        ndiv=(ndiv, ndiv, ndiv), d_min=D_MIN, bragg=BraggSettings(exclusion="none")
    )
    grid = make_grid(blank, own)
    path = folder / "blank.refl"
    extract(blank, grid, own, path)
    with ObservationFile(path) as table:
        columns = table.read(0, table.n_rows, list(table.columns))
        known = {name: i for i, name in enumerate(models.identifiers())}
        number = np.array([known[table.identifiers[i]] for i in range(len(known))])
    columns["id"] = number[columns["id"]].astype(np.int32)
    order = np.lexsort((columns["id"], grid.key(columns["miller_index"])))
    columns = {name: values[order] for name, values in columns.items()}
    unique = pack(symmetry.map_to_asu(columns["miller_index"], grid.laue_group))
    return Geometry(models, grid, columns, np.unique(unique, return_inverse=True)[1])


@dataclasses.dataclass
class Observed:
    """Counts of known truth.

    Args:
        geometry: Of the rows.
        intensity: I of each row.
        factor: a b of each row.
        offset: a c of each row, photons s⁻¹ sr⁻¹.
        background: Photons of the background that is known.
        counts: What was counted.
        files: Paths of the .expt and the .refl file.
    """

    geometry: Geometry
    intensity: np.ndarray
    factor: np.ndarray
    offset: np.ndarray
    background: np.ndarray
    counts: np.ndarray
    files: tuple[str, str]


def draw(
    geometry: Geometry,
    folder: Path,
    factor: np.ndarray | float = 1.0,
    offset: np.ndarray | float = 0.0,
    background: float = 0.0,
    counts_per_pixel: float = 2.5,
    seed: int = 7,
    name: str = "extracted",
    use: np.ndarray | None = None,
    outlier: np.ndarray | None = None,
    outlier_size: float = 0.0,
) -> Observed:
    """Draw counts, and write them with the experiments.

    Args:
        geometry: Of the rows.
        folder: For the files.
        factor: a b of each row.
        offset: a c of each row, in units of the mean I.
        background: Known background, in units of the mean I.
        counts_per_pixel: Mean number of photons of the signal in a pixel.
        seed: Of the counts.
        name: Of the files.
        use: Rows to keep.
        outlier: Rows whose expectation is changed, by their sign up or down.
        outlier_size: By how many standard deviations.
    """
    rng = np.random.default_rng(seed)
    n = geometry.n_rows
    m = geometry.columns["normalisation"]
    factor = np.broadcast_to(np.asarray(factor, dtype=float), n)
    intensity = geometry.intensities()
    n_pixels = geometry.columns["num_pixels.valid"].sum()
    intensity *= counts_per_pixel * n_pixels / np.sum(m * intensity * factor)
    unit = np.sum(m * intensity * factor) / np.sum(m)
    offset = np.broadcast_to(np.asarray(offset, dtype=float) * unit, n)
    base = background * unit * m
    expected = m * (factor * intensity + offset) + base
    if outlier is not None:
        expected = expected + outlier * outlier_size * np.sqrt(expected)
    counts = rng.poisson(expected).astype(float)
    columns = {**geometry.columns, "counts": counts, "background.sum.value": base}
    use = np.ones(n, dtype=bool) if use is None else use
    files = write(geometry, {k: v[use] for k, v in columns.items()}, folder, name)
    return Observed(geometry, intensity, factor, offset, base, counts, files)


def write(
    geometry: Geometry, columns: dict[str, np.ndarray], folder: Path, name: str
) -> tuple[str, str]:
    """Write rows and experiments; returns the paths."""
    expt, refl = folder / f"{name}.expt", folder / f"{name}.refl"
    geometry.experiments.as_file(str(expt))
    identifiers = dict(enumerate(geometry.experiments.identifiers()))
    with ObservationWriter(refl, geometry.grid, identifiers) as writer:
        writer.append(columns)
    return str(expt), str(refl)


def read_all(path: str | Path) -> dict[str, np.ndarray]:
    """All columns of an observation file."""
    with ObservationFile(path) as table:
        return table.read(0, table.n_rows, list(table.columns))


def read_models(path: str | Path) -> ExperimentList:
    """Experiments with their scaling models, as any program of DIALS reads them."""
    return ExperimentListFactory.from_json_file(str(path), check_format=False)


def term_values(
    experiments: ExperimentList, rows: dict[str, np.ndarray], name: str
) -> np.ndarray:
    """What the scaling models say about a term for each row; 1 (offset: 0) without it."""
    result = np.full(len(rows["id"]), 0.0 if name == "offset" else 1.0)
    for number, experiment in enumerate(experiments):
        model = experiment.scaling_model
        mine = np.flatnonzero(rows["id"] == number)
        if model is None or name not in model.components or len(mine) == 0:
            continue
        table = flex.reflection_table()
        table["panel"] = flumpy.from_numpy(rows["panel"][mine].astype(np.uint64))
        table["xyzobs.px.value"] = flumpy.vec_from_numpy(rows["xyzobs.px.value"][mine])
        table["d"] = flumpy.from_numpy(rows["d"][mine])
        points = model.coordinates(table, experiment)[name]
        values = model.components[name].values(
            {key: flumpy.to_numpy(x) for key, x in points.items()}, len(mine)
        )
        result[mine] = values
    return result


def without_means(
    values: np.ndarray,
    weight: np.ndarray,
    groups: Sequence[np.ndarray],
    rounds: int = 5,
) -> np.ndarray:
    """Values less their weighted means in the classes of one or more groupings.

    Args:
        values: Shape (n,).
        weight: Shape (n,).
        groups: For each grouping the number of the class of each value.
        rounds: Of subtraction, as the groupings are not independent.
    """
    values = values.copy()
    for _ in range(rounds):
        for group in groups:
            total = np.maximum(np.bincount(group, weight), 1e-30)
            values -= (np.bincount(group, weight * values) / total)[group]
    return values


def rms(values: np.ndarray, weight: np.ndarray) -> float:
    """Weighted root mean square."""
    return float(np.sqrt(np.average(values**2, weights=weight)))
