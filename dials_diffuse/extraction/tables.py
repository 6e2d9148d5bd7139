"""Per-pixel arrays of a detector in a beam, made once and used for all its images.

Direction of every pixel in single precision (off by less than 1e-4 of a pixel) and its
normalisation as an integer weight, in units of 2^-30 of the panel's largest: sums of
integers are exact, whatever their order. Masked pixels have a weight of zero.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import math
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from dxtbx import flumpy
from dxtbx.imageset import ImageSet
from dxtbx.model import Beam, Detector, Experiment, Panel
from dxtbx.model.experiment_list import ExperimentList

import dials_diffuse_ext as ext
from dials_diffuse import corrections
from dials_diffuse.extraction.settings import CorrectionSettings, ExtractionSettings
from dials_diffuse.geometry import directions
from dials_diffuse.geometry.interpolation import PixelInterpolation, row_chunks
from dials_diffuse.grid import Grid
from dials_diffuse.util.compat import inclusive_trusted_range

# The sum of 2^23 pixels in one voxel and block is still exact in double precision.
MAX_WEIGHT = 2**30
TOLERANCE_PX = 1e-4  # about the rounding of a direction in single precision
TOLERANCE_NORMALISATION = 1e-6


@dataclasses.dataclass(frozen=True)
class TableKey:
    """What the arrays depend on: experiments of one key share them."""

    detector: str
    beam: tuple[float, ...]
    mask: str


def detector_numbers(experiments: ExperimentList) -> list[int]:
    """Number of each experiment's detector among those that experiments share."""
    numbers = [0] * len(experiments)
    for number, detector in enumerate(experiments.detectors()):
        for i in experiments.indices(detector):
            numbers[i] = number
    return numbers


def detector_digests(experiments: ExperimentList) -> list[str]:
    """A text for each of ``experiments.detectors()``, the same for equal ones."""
    return [
        hashlib.sha1(json.dumps(detector.to_dict()).encode()).hexdigest()
        for detector in experiments.detectors()
    ]


def share_equal_detectors(experiments: ExperimentList) -> None:
    """Give experiments whose detectors are equal one of them, as for one series of images.

    Stills that were processed one by one come with a detector each.
    """
    first: dict[str, Detector] = {}
    digests = detector_digests(experiments)
    for number, experiment in zip(detector_numbers(experiments), experiments):
        shared = first.setdefault(digests[number], experiment.detector)
        experiment.detector = shared


def model_keys(
    experiments: ExperimentList,
) -> list[tuple[str, tuple[float, ...]]]:
    """Digest of the detector of each experiment, and the numbers of its beam."""
    digests = detector_digests(experiments)
    return [
        (
            digests[number],
            (
                *experiment.beam.get_s0(),
                *experiment.beam.get_polarization_normal(),
                experiment.beam.get_polarization_fraction(),
            ),
        )
        for number, experiment in zip(detector_numbers(experiments), experiments)
    ]


def table_keys(
    experiments: ExperimentList,
    masks: Mapping[str, tuple[np.ndarray, ...]] | None = None,
) -> tuple[TableKey, ...]:
    """The key of each experiment's arrays.

    Args:
        experiments: The experiments.
        masks: A mask for each, by its identifier, if they have masks of their own.
    """
    own: dict[int, str] = {}  # experiments mostly share a mask: one digest for each
    keys = []
    for (detector, beam), experiment in zip(model_keys(experiments), experiments):
        given = (masks or {}).get(experiment.identifier)
        if id(given) not in own:
            own[id(given)] = mask_digest(given)
        mask = mask_digest(lookup_mask(experiment.imageset)) + own[id(given)]
        keys.append(TableKey(detector, beam, mask))
    return tuple(keys)


def mask_digest(masks: Sequence[np.ndarray] | None) -> str:
    """A text that differs for different masks; empty for none."""
    if masks is None:
        return ""
    digest = hashlib.sha1()
    for mask in masks:
        digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()


def lookup_mask(imageset: ImageSet) -> list[np.ndarray] | None:
    """The mask that comes with the images (format or ``dials.import``), by panel.

    Returns:
        Boolean arrays of shape (n_slow, n_fast), True for good pixels, or None.
    """
    mask = imageset.external_lookup.mask.data
    if mask.empty():
        return None
    return [flumpy.to_numpy(mask.tile(i).data()) for i in range(mask.n_tiles())]


def good_pixels(
    panel: Panel, number: int, imageset: ImageSet, mask: tuple[np.ndarray, ...] | None
) -> np.ndarray:
    """Pixels of a panel that no static mask leaves out, shape (n_slow, n_fast)."""
    good = flumpy.to_numpy(panel.get_untrusted_rectangle_mask()).copy()
    for masks in (lookup_mask(imageset), mask):
        if masks is not None:
            good &= masks[number]
    return good


def check_masks(detector: Detector, masks: tuple[np.ndarray, ...], name: str) -> None:
    """Check that a mask fits a detector.

    Raises:
        ValueError: It has another number of panels, or panels of another size.
    """
    shapes = [panel.get_image_size()[::-1] for panel in detector]
    found = [mask.shape for mask in masks]
    if shapes != found:
        raise ValueError(
            f"The mask {name} has {len(found)} panel(s) of {found[0]} pixels, the "
            f"detector {len(shapes)} of {shapes[0]} (slow, fast): make one for this "
            "detector with dials.generate_mask"
        )


def correction_factors(
    panel: Panel,
    beam: Beam,
    position: np.ndarray,
    e: np.ndarray,
    settings: CorrectionSettings,
) -> dict[str, np.ndarray]:
    """The factors of the normalisation of pixels; see ``dials_diffuse.corrections``.

    Args:
        panel, beam: The models.
        position: Pixel centres, mm, shape (3, n_rows, n_fast), laboratory frame.
        e: Directions with parallax, unit vectors of the same shape.
        settings: The factors to take in.

    Returns:
        P, ΔΩ (sr), ε and A_air as ``polarization``, ``solid_angle``, ``efficiency`` and
        ``path``, float64 arrays of shape (n_rows, n_fast); those that are not taken in
        are missing.
    """
    factors: dict[str, np.ndarray | float] = {}
    normal = np.array(panel.get_normal())
    if settings.polarization:
        fraction, plane_normal = polarization_of(beam, settings)
        factors["polarization"] = corrections.polarization(
            e, beam.get_s0(), plane_normal, fraction
        )
    if settings.solid_angle:
        factors["solid_angle"] = corrections.solid_angle(
            position, normal, panel.get_pixel_size()
        )
    if settings.efficiency:
        factors["efficiency"] = corrections.sensor_efficiency(
            e, normal, panel.get_mu(), panel.get_thickness()
        )
    if settings.path != "vacuum":
        mu = gas_attenuation_of(beam, settings)
        factors["path"] = corrections.gas_transmission(position, mu)
    shape = e.shape[1:]
    return {name: np.broadcast_to(value, shape) for name, value in factors.items()}


def gas_attenuation_of(beam: Beam, settings: CorrectionSettings) -> float:
    """Attenuation coefficient of the gas between sample and detector, 1/mm."""
    return corrections.gas_attenuation(
        settings.path, beam.get_wavelength(), settings.temperature, settings.pressure
    )


def normalisation(
    panel: Panel,
    beam: Beam,
    position: np.ndarray,
    e: np.ndarray,
    settings: CorrectionSettings,
) -> np.ndarray:
    """P · ΔΩ · ε · A_air of pixels: the product of their ``correction_factors``.

    Args:
        panel, beam, position, e, settings: As for ``correction_factors``.

    Returns:
        float64 array of shape (n_rows, n_fast).
    """
    factors = correction_factors(panel, beam, position, e, settings)
    return math.prod(factors.values(), start=np.ones(e.shape[1:]))


def polarization_of(
    beam: Beam, settings: CorrectionSettings
) -> tuple[float, tuple[float, ...]]:
    """Polarization fraction and plane normal: the settings', else the beam's."""
    fraction = settings.polarization_fraction
    normal = settings.polarization_normal
    return (
        beam.get_polarization_fraction() if fraction is None else fraction,
        beam.get_polarization_normal() if normal is None else normal,
    )


@dataclasses.dataclass(frozen=True)
class PanelArrays:
    """Per-pixel arrays of a panel.

    Attributes:
        e: Unit vectors from the sample to the pixels, float32, shape
            (3, n_slow, n_fast), laboratory frame.
        weight: P · ΔΩ · ε · A_air in units of ``weight_unit``, int32, shape
            (n_slow, n_fast); zero for masked pixels.
        weight_unit: Normalisation of a weight of 1, without the exposure time.
        n_outside: Good pixels beyond the resolution limits, if they were given.
    """

    e: np.ndarray
    weight: np.ndarray
    weight_unit: float
    n_outside: int = 0


def pixel_vectors(
    panel: Panel, fast: np.ndarray, slow: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where some pixels are, and in which direction they see the sample.

    Args:
        panel: The panel.
        fast, slow: Numbers of the pixels along either axis.

    Returns:
        Centres, mm, and unit vectors e with parallax, laboratory frame, each of shape
        (3, len(slow), len(fast)).
    """
    position = directions.lab_coordinates(panel, fast, slow, parallax=False)
    ray = directions.lab_coordinates(panel, fast, slow, parallax=True)
    return position, ray / corrections.length(ray)


def direction_and_normalisation(
    panel: Panel,
    beam: Beam,
    settings: CorrectionSettings,
    fast: np.ndarray,
    slow: np.ndarray,
) -> np.ndarray:
    """Exact values at some pixels: e (3 components) and P · ΔΩ · ε · A_air.

    Args:
        panel, beam: The models.
        settings: The factors of the normalisation.
        fast, slow: Numbers of the pixels along either axis.

    Returns:
        Array of shape (4, len(slow), len(fast)).
    """
    position, e = pixel_vectors(panel, fast, slow)
    weight = normalisation(panel, beam, position, e, settings)
    return np.concatenate([e, weight[None]])


def panel_interpolation(
    panel: Panel, beam: Beam, settings: CorrectionSettings
) -> PixelInterpolation:
    """Direction and normalisation of all pixels of a panel, from those of a few.

    Directions are within ``TOLERANCE_PX`` of a pixel, normalisations within
    ``TOLERANCE_NORMALISATION`` of the largest.
    """

    def function(fast: np.ndarray, slow: np.ndarray) -> np.ndarray:
        return direction_and_normalisation(panel, beam, settings, fast, slow)

    nfast, nslow = panel.get_image_size()
    corners = function(np.array([0, nfast - 1]), np.array([0, nslow - 1]))
    tolerance = np.array(
        [direction_tolerance(panel)] * 3 + [TOLERANCE_NORMALISATION * corners[3].max()]
    )
    smooth = directions.has_smooth_parallax(panel)
    return PixelInterpolation(function, (nslow, nfast), tolerance, smooth)


def direction_tolerance(panel: Panel) -> float:
    """``TOLERANCE_PX`` as a change of the unit vector to the farthest pixel."""
    nfast, nslow = panel.get_image_size()
    farthest = max(
        np.linalg.norm(panel.get_pixel_lab_coord((x, y)))
        for x in (0, nfast)
        for y in (0, nslow)
    )
    return TOLERANCE_PX * min(panel.get_pixel_size()) / farthest


class ResolutionLimits(NamedTuple):
    """Limits of the cosine of the scattering angle, c = e·e0.

        s = |e - e0| / λ,    s² = 2 (1 - c) / λ²

    of unit vectors e, with the limits of s = 1/d.

    Attributes:
        e0: Unit vector of the beam.
        low, high: Cosines at d_min and, if there is one, at d_max.
    """

    e0: np.ndarray
    low: float
    high: float

    @classmethod
    def of(cls, grid: Grid, beam: Beam) -> ResolutionLimits:
        """The limits of a grid in a beam."""
        wavelength = beam.get_wavelength()
        s = np.array([1 / grid.d_min, 1 / grid.d_max if grid.d_max else 0.0])
        low, high = 1 - (wavelength * s) ** 2 / 2
        return cls(np.array(beam.get_unit_s0()), low, high)

    def n_outside(self, cosine: np.ndarray, good: np.ndarray) -> int:
        """Number of the good pixels whose cosines are beyond the limits."""
        beyond = cosine < self.low
        if self.high < 1:
            beyond |= cosine > self.high
        return int(np.count_nonzero(beyond & good))


def n_outside(panel: Panel, beam: Beam, good: np.ndarray, grid: Grid) -> int:
    """Number of a panel's good pixels beyond the resolution limits of a grid.

    What ``panel_arrays`` counts, without the arrays.
    """
    limits = ResolutionLimits.of(grid, beam)

    def function(fast: np.ndarray, slow: np.ndarray) -> np.ndarray:
        _, e = pixel_vectors(panel, fast, slow)
        return np.tensordot(limits.e0, e, 1)[None]

    cosine = PixelInterpolation(
        function,
        good.shape,
        np.array([direction_tolerance(panel)]),
        directions.has_smooth_parallax(panel),
    )
    return sum(
        limits.n_outside(cosine.rows(rows)[0], good[rows])
        for rows in row_chunks(good.shape)
    )


def panel_arrays(
    panel: Panel,
    beam: Beam,
    good: np.ndarray,
    settings: CorrectionSettings,
    n_threads: int = 1,
    grid: Grid | None = None,
) -> PanelArrays:
    """Directions and normalisation of all pixels of a panel.

    Args:
        panel, beam: The models.
        good: Mask, True for good pixels, shape (n_slow, n_fast).
        settings: The factors of the normalisation.
        n_threads: Threads to use; numpy and scipy let them run side by side.
        grid: The voxel grid, to count the pixels beyond its resolution limits.
    """
    exact = panel_interpolation(panel, beam, settings)
    unit = float(exact.values[3].max()) / MAX_WEIGHT
    exact.set_scale(np.array([1.0, 1.0, 1.0, 1.0 / unit]))
    e = np.empty((3, *good.shape), dtype=np.float32)
    weight = np.empty(good.shape, dtype=np.int32)

    limits = None if grid is None else ResolutionLimits.of(grid, beam)

    def fill(rows: slice) -> int:
        values = exact.rows(rows)
        e[:, rows] = values[:3]
        np.rint(values[3], out=weight[rows], casting="unsafe")
        weight[rows] *= good[rows]
        if limits is None:
            return 0
        cosine = np.einsum("i,i...->...", limits.e0, values[:3])
        return limits.n_outside(cosine, good[rows])

    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        # sum() raises what a thread raised
        n_beyond = sum(pool.map(fill, row_chunks(good.shape)))
    return PanelArrays(e, weight, unit, n_beyond)


class PixelCounts(NamedTuple):
    """Pixels of an image, of them masked, and good ones beyond the resolution limits."""

    total: int
    masked: int
    outside: int


@dataclasses.dataclass(frozen=True)
class PanelTable:
    """A panel for the pixel loop, and what its values and weights stand for.

    Attributes:
        panel: The arrays in the extension.
        arrays: The same arrays, whose memory it uses.
        weight_unit: Normalisation of a weight of 1, without the exposure time.
        gain: Detector units per photon.
        pedestal: Value of a pixel without photons.
        pixels: Of the panel, if they were counted.
    """

    panel: ext.Panel
    arrays: PanelArrays
    weight_unit: float
    gain: float
    pedestal: float
    pixels: PixelCounts = PixelCounts(0, 0, 0)

    def photons(self, value: np.ndarray, n_pixels: np.ndarray) -> np.ndarray:
        """Photons in sums of raw values over some pixels each."""
        return (value - n_pixels * self.pedestal) / self.gain


def detector_tables(
    experiment: Experiment,
    settings: ExtractionSettings,
    n_threads: int = 1,
    grid: Grid | None = None,
) -> list[PanelTable]:
    """What the pixel loop needs of each panel of an experiment's detector.

    Args:
        experiment: The experiment.
        settings: The settings of extraction.
        n_threads: Threads to use.
        grid: The voxel grid, to count the pixels beyond its resolution limits.
    """
    tables = []
    for number, panel in enumerate(experiment.detector):
        good = good_pixels(
            panel, number, experiment.imageset, settings.mask_of(experiment)
        )
        arrays = panel_arrays(
            panel, experiment.beam, good, settings.corrections, n_threads, grid
        )
        n_masked = good.size - int(np.count_nonzero(good))
        nfast, nslow = panel.get_image_size()
        low, high = settings.trusted_range or inclusive_trusted_range(panel)
        # Named, so that they outlive an exception: dxtbx 3.11 aborts the process if such
        # an array is freed while one is on its way.
        e = [flumpy.from_numpy(component.ravel()) for component in arrays.e]
        weight = flumpy.from_numpy(arrays.weight.ravel())
        loop_panel = ext.Panel(
            *e,
            weight=weight,
            nfast=nfast,
            nslow=nslow,
            trusted_min=float(low),
            trusted_max=float(high),
        )
        gain = settings.gain or panel.get_gain()
        tables.append(
            PanelTable(
                loop_panel,
                arrays,
                arrays.weight_unit,
                gain,
                panel.get_pedestal(),
                PixelCounts(good.size, n_masked, arrays.n_outside),
            )
        )
    return tables
