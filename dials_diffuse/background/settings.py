"""The settings of the background, checked once, built from the PHIL parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import numpy as np

from dxtbx.model import Experiment

from dials_diffuse.extraction.settings import (
    BraggSettings,
    CorrectionSettings,
    processes,
)


@dataclasses.dataclass(frozen=True)
class ImagesSettings:
    """How images without the crystal make a background; see ``phil/background.phil``."""

    phi_width: float = 1.0
    smoothing: int = 5
    scale: float = 1.0
    exposure_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.smoothing % 2 == 0:
            raise ValueError(
                f"images.smoothing={self.smoothing} must be odd, so that a pixel is in "
                "the middle of its square"
            )


@dataclasses.dataclass(frozen=True)
class ProfileSettings:
    """How profiles and grids are made.

    Attributes:
        step: Spacing of the profile, 1/Å.
        quantile: Fraction of the pixels below it.
        spot_margin: Pixels about a bright one that are left out; -1 leaves out none.
        group: Images that share the shape of a profile.
        spacing: Distance of the nodes of the grids in pixels; None makes no grids.
    """

    step: float = 0.005
    quantile: float = 0.5
    spot_margin: int = 2
    group: int = 1
    spacing: int | None = None


@dataclasses.dataclass(frozen=True)
class BackgroundSettings:
    """Everything that decides what is made of a set of experiments.

    Attributes:
        method: ``images``, ``radial``, ``modal`` or ``none``.
        mask: Mask of each panel, True for good pixels, or None.
        masks: The same for each experiment, by its identifier.
        gain: Detector units per photon, or None for the panels' own.
        trusted_range: Smallest and largest value to use, or None for the panels' own.
        nproc: Number of processes.
    """

    method: str = "radial"
    images: ImagesSettings = ImagesSettings()
    profile: ProfileSettings = ProfileSettings()
    bragg: BraggSettings = BraggSettings()
    corrections: CorrectionSettings = CorrectionSettings()
    mask: tuple[np.ndarray, ...] | None = None
    masks: Mapping[str, tuple[np.ndarray, ...]] | None = None
    gain: float | None = None
    trusted_range: tuple[float, float] | None = None
    nproc: int = 1

    def __post_init__(self) -> None:
        low, high = self.trusted_range or (0, 1)
        if not low < high:
            raise ValueError("trusted_range needs the smaller value first")

    def mask_of(self, experiment: Experiment) -> tuple[np.ndarray, ...] | None:
        """The mask of an experiment's panels, or None."""
        if self.masks is not None:
            return self.masks.get(experiment.identifier)
        return self.mask

    @classmethod
    def from_phil(
        cls, params: Any, mask: tuple[np.ndarray, ...] | None = None
    ) -> BackgroundSettings:
        """Settings of the extracted PHIL parameters of ``phil/background.phil``."""
        # PHIL reads the word none, in any case, as no choice at all
        method = params.method or "none"
        images = params.images
        return cls(
            method=method,
            images=ImagesSettings(
                phi_width=images.phi_width,
                smoothing=images.smoothing,
                scale=images.scale,
                exposure_ratio=images.exposure_ratio,
            ),
            profile=ProfileSettings(
                step=params.radial.step,
                quantile=params.radial.quantile,
                spot_margin=params.radial.spot_margin,
                group=params.radial.group,
                spacing=params.modal.spacing if method == "modal" else None,
            ),
            bragg=BraggSettings.from_phil(params.bragg),
            corrections=CorrectionSettings.from_phil(params.corrections),
            mask=mask,
            gain=params.gain,
            trusted_range=(
                tuple(params.trusted_range) if params.trusted_range else None
            ),
            nproc=processes(params.mp.nproc),
        )
