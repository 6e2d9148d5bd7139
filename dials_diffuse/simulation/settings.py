"""The settings of a simulation, checked once, built from the PHIL parameters.

One frozen class for each PHIL scope, with the same names and units as in
``phil/simulate.phil``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from cctbx import sgtbx, uctbx

from dials_diffuse.extraction.settings import processes, three_of

Vector = tuple[float, float, float]

DEFAULT_SPACE_GROUP = "P 21 21 21"
DEFAULT_CELL = (36.0, 40.0, 44.0, 90.0, 90.0, 90.0)


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


def _space_group(symbol: str | None) -> sgtbx.space_group | None:
    if symbol is None:
        return None
    try:
        return sgtbx.space_group_info(symbol).group()
    except RuntimeError:
        raise ValueError(
            f"crystal.space_group={symbol} is not the symbol of a space group"
        ) from None


def _text(values: Any) -> str:
    return ", ".join(f"{x:g}" for x in values)


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
        group = _space_group(self.space_group)
        if (
            self.unit_cell
            and group
            and not group.is_compatible_unit_cell(self.unit_cell, 0.01, 0.1)
        ):
            raise ValueError(
                f"the cell {_text(self.unit_cell.parameters())} does not have the "
                f"symmetry of the space group {self.space_group}: change "
                "crystal.unit_cell or crystal.space_group"
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
    polarization_fraction: float = 0.98
    polarization_normal: Vector = (0.0, 1.0, 0.0)

    def __post_init__(self) -> None:
        if not self.flux > 0:
            raise ValueError(f"beam.flux={self.flux:g} must be positive")
        normal = np.array(self.polarization_normal)
        if abs(normal[2]) > 1e-6 or not np.linalg.norm(normal) > 0:
            raise ValueError(
                f"beam.polarization_normal={_text(normal)} must be perpendicular to the "
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
        if not self.distance > 0:
            raise ValueError(
                f"detector.distance={self.distance:g} puts the detector behind the "
                "source: it must be positive"
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
        if not np.linalg.norm(self.axis) > 0:
            raise ValueError("goniometer.axis must not have zero length")


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
            field.name: _from_scope(type(field.default), getattr(params, field.name))
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


def _from_scope(cls: type, scope: Any) -> Any:
    """The settings class of a scope: fields have the names of the parameters."""
    values = {}
    for field in dataclasses.fields(cls):
        value = getattr(scope, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    if "ndiv" in values:
        values["ndiv"] = three_of("grid.ndiv", values["ndiv"])
    return cls(**values)
