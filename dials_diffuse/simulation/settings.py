"""The settings of a simulation, checked once, built from the PHIL parameters.

One frozen class for each PHIL scope, with the same names and units as in
``phil/simulate.phil``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Iterable, NamedTuple

import numpy as np

from cctbx import uctbx

from dials_diffuse.extraction.settings import processes, three_of

Vector = tuple[float, float, float]

DEFAULT_SPACE_GROUP = "P 21 21 21"
DEFAULT_CELL = (36.0, 40.0, 44.0, 90.0, 90.0, 90.0)

SHORTEST_EDGE = 2.0  # Å; edges that are not given are 1 Å to cctbx
MOST_PIXELS = 100_000_000
# A saturated pixel holds one more, in 32 bits.
LARGEST_COUNT = int(np.iinfo(np.int32).max) - 1


class DetectorPreset(NamedTuple):
    """Size in pixels, pixel in mm, modules and gaps of a known detector."""

    size: tuple[int, int]
    pixel: float
    modules: tuple[int, int]
    gap: tuple[int, int]


PRESETS = {
    "pilatus300k": DetectorPreset((487, 619), 0.172, (1, 3), (0, 17)),
    "pilatus1m": DetectorPreset((981, 1043), 0.172, (2, 5), (7, 17)),
    "pilatus6m": DetectorPreset((2463, 2527), 0.172, (5, 12), (7, 17)),
    "eiger4m": DetectorPreset((2070, 2167), 0.075, (2, 4), (10, 37)),
    "eiger16m": DetectorPreset((4150, 4371), 0.075, (4, 8), (10, 37)),
}


def comma_separated(values: Iterable[float]) -> str:
    return ", ".join(f"{x:g}" for x in values)


def _length(name: str, vector: Vector) -> float:
    """Length of a vector that gives a direction.

    Raises:
        ValueError: It gives none.
    """
    with np.errstate(over="ignore"):  # the square of a finite number may be infinite
        length = float(np.linalg.norm(vector))
    if not 0 < length < np.inf:
        raise ValueError(
            f"{name}={comma_separated(vector)} has no direction: its length must be "
            "positive and finite"
        )
    return length


def _check_finite(name: str, value: Any) -> None:
    """Refuse nan, which the limits of PHIL let through, and inf.

    Args:
        name: Of the parameter.
        value: Of any PHIL type.

    Raises:
        ValueError: It is, or has among its numbers, one that is not finite.
    """
    if isinstance(value, uctbx.ext.unit_cell):
        value = value.parameters()
    numbers = np.atleast_1d(value)
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise ValueError(f"{name}={comma_separated(numbers)} must be finite")


@dataclasses.dataclass(frozen=True)
class CrystalSettings:
    structure: str | None = None
    space_group: str | None = None
    unit_cell: uctbx.unit_cell | None = None
    solvent_fraction: float = 0.45
    b_iso: float = 20.0
    orientation: Vector | None = None
    size: float = 0.1
    cell_spread: float = 0.0

    def __post_init__(self) -> None:
        if self.unit_cell and min(self.unit_cell.parameters()[:3]) < SHORTEST_EDGE:
            cell = comma_separated(self.unit_cell.parameters())
            raise ValueError(
                f"crystal.unit_cell={cell} has an edge below {SHORTEST_EDGE:g} Å: give a, "
                "b, c, alpha, beta and gamma"
            )


@dataclasses.dataclass(frozen=True)
class BraggPeakSettings:
    on: bool = True
    mosaicity: float = 0.05
    sigma: float | None = None

    def __post_init__(self) -> None:
        if self.on and self.sigma is not None and self.sigma <= 0:
            raise ValueError(
                f"bragg.sigma={self.sigma:g} must be positive: use bragg.on=False for "
                "no peaks"
            )


@dataclasses.dataclass(frozen=True)
class DiffuseSettings:
    contrast: float = 0.6
    length: float = 8.0
    n_terms: int = 5
    halo_displacement: float = 0.25
    halo_length: float = 40.0


@dataclasses.dataclass(frozen=True)
class BackgroundSettings:
    solvent: float = 0.3
    compton: bool = True
    air: float = 0.0
    n_images: int = 0


@dataclasses.dataclass(frozen=True)
class BeamSettings:
    wavelength: float = 0.9795
    flux: float = 1e11
    size: float = 0.1
    polarization_fraction: float = 0.999
    polarization_normal: Vector = (0.0, 1.0, 0.0)

    def __post_init__(self) -> None:
        if not self.flux > 0:
            raise ValueError(f"beam.flux={self.flux:g} must be positive")
        normal = self.polarization_normal
        if abs(normal[2]) > 1e-6 * _length("beam.polarization_normal", normal):
            raise ValueError(
                f"beam.polarization_normal={comma_separated(normal)} must be perpendicular to the "
                "beam, which goes along z"
            )


@dataclasses.dataclass(frozen=True)
class DetectorSettings:
    """``size``, ``pixel``, ``modules`` and ``gap`` override those of the preset."""

    preset: str = "pilatus300k"
    size: tuple[int, int] | None = None
    pixel: float | None = None
    modules: tuple[int, int] | None = None
    gap: tuple[int, int] | None = None
    panels: tuple[int, int] = (1, 1)
    panel_tilt: float = 0.0
    distance: float = 120.0
    two_theta: float = 0.0
    beam_centre: tuple[float, float] | None = None
    thickness: float = 0.45
    gain: float = 1.0
    count_cutoff: int = 1_000_000
    hot_fraction: float = 0.0
    dead_fraction: float = 0.0
    beamstop: float = 1.5
    beamstop_arm: float = 1.0

    def __post_init__(self) -> None:
        if self.preset == "given" and (self.size is None or self.pixel is None):
            raise ValueError(
                "detector.preset=given needs detector.size and detector.pixel"
            )
        if self.preset == "given":
            preset = DetectorPreset(self.size, self.pixel, (1, 1), (0, 0))
        else:
            preset = PRESETS[self.preset]
        for name in DetectorPreset._fields:
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(preset, name))
        if self.distance == 0:
            raise ValueError(
                "detector.distance=0 puts the detector into the sample: it must be positive"
            )
        if not self.distance > 0:
            raise ValueError(
                f"detector.distance={self.distance:g} puts the detector behind the "
                "source: it must be positive"
            )
        if self.count_cutoff > LARGEST_COUNT:
            raise ValueError(
                f"detector.count_cutoff={self.count_cutoff} is too large for images of "
                f"32 bits: it must be {LARGEST_COUNT} at most"
            )
        n_pixels = math.prod(self.size) * math.prod(self.panels)
        if n_pixels > MOST_PIXELS:
            raise ValueError(
                f"detector.size={comma_separated(self.size)} and detector.panels="
                f"{comma_separated(self.panels)} make {n_pixels} pixels: at most "
                f"{MOST_PIXELS} are possible"
            )
        for n, modules, gap in zip(self.size, self.modules, self.gap):
            if (modules - 1) * gap + modules > n:
                raise ValueError(
                    f"{modules} modules and gaps of {gap} pixels do not fit into {n} "
                    "pixels: change detector.modules or detector.gap"
                )


@dataclasses.dataclass(frozen=True)
class AirSettings:
    path: str = "air"
    temperature: float = 293.15
    pressure: float = 101325.0


@dataclasses.dataclass(frozen=True)
class GoniometerSettings:
    axis: Vector = (1.0, 0.0, 0.0)
    fixed_rotation: Vector | None = None
    setting_rotation: Vector | None = None

    def __post_init__(self) -> None:
        _length("goniometer.axis", self.axis)


@dataclasses.dataclass(frozen=True)
class ScanSettings:
    start: float = 0.0
    width: float = 0.5
    exposure: float = 0.1
    orientations: str = "stepped"


@dataclasses.dataclass(frozen=True)
class ScaleSettings:
    variation: float = 0.0
    absorption: float = 0.0


@dataclasses.dataclass(frozen=True)
class TruthGridSettings:
    ndiv: tuple[int, int, int] = (2, 2, 2)
    d_min: float | None = None


@dataclasses.dataclass(frozen=True)
class SimulationSettings:
    """All settings of a simulation."""

    mode: str = "rotation"
    n_images: int = 100
    n_crystals: int = 1
    crystal: CrystalSettings = CrystalSettings()
    bragg: BraggPeakSettings = BraggPeakSettings()
    diffuse: DiffuseSettings = DiffuseSettings()
    background: BackgroundSettings = BackgroundSettings()
    beam: BeamSettings = BeamSettings()
    detector: DetectorSettings = DetectorSettings()
    air: AirSettings = AirSettings()
    goniometer: GoniometerSettings = GoniometerSettings()
    scan: ScanSettings = ScanSettings()
    scale: ScaleSettings = ScaleSettings()
    grid: TruthGridSettings = TruthGridSettings()
    noise: str = "poisson"
    seed: int = 42
    nproc: int = 1

    def __post_init__(self) -> None:
        if self.mode == "rotation" and not self.scan.width > 0:
            raise ValueError(
                f"scan.width={self.scan.width:g} must be positive for rotation data: "
                "use mode=stills for images without rotation"
            )

    @property
    def is_stills(self) -> bool:
        return self.mode == "stills"

    @classmethod
    def from_phil(cls, params: Any) -> SimulationSettings:
        """Settings from the parameters of ``phil/simulate.phil``.

        Raises:
            ValueError: A value is impossible, or values do not fit together.
        """
        scopes = {
            field.name: _from_scope(
                type(field.default), field.name, getattr(params, field.name)
            )
            for field in dataclasses.fields(cls)
            if dataclasses.is_dataclass(field.default)
        }
        return cls(
            mode=params.mode,
            n_images=params.n_images,
            n_crystals=params.n_crystals,
            noise=params.noise or "none",
            seed=params.seed,
            nproc=processes(params.mp.nproc),
            **scopes,
        )


def _from_scope(cls: type, name: str, scope: Any) -> Any:
    """The settings class of a scope: fields have the names of the parameters."""
    values = {}
    for field in dataclasses.fields(cls):
        value = getattr(scope, field.name)
        if value is None and field.default is not None:
            raise ValueError(f"{name}.{field.name}=None: a value must be given")
        _check_finite(f"{name}.{field.name}", value)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    if "ndiv" in values:
        values["ndiv"] = three_of("grid.ndiv", values["ndiv"])
    return cls(**values)
