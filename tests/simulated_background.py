"""Simulated images with a background that is known."""

from __future__ import annotations

import dataclasses
from typing import Any, Sequence

import numpy as np
from truth_ladder import SMALL, ImageMaker, simulated_experiments, vary

from dxtbx.model.experiment_list import ExperimentList

from dials_diffuse.background.make import background_axes, make_background
from dials_diffuse.background.model import BackgroundModel
from dials_diffuse.background.pixels import Pixels, make_pixels
from dials_diffuse.background.settings import BackgroundSettings
from dials_diffuse.extraction.settings import BraggSettings, CorrectionSettings
from dials_diffuse.simulation.settings import SimulationSettings
from dials_diffuse.simulation.simulate import Simulation

# Stills with spots 11 pixels apart, weak structured diffuse scattering, solvent, Compton
# scattering, and air that is twice the crystal's.
STILLS = vary(
    SMALL,
    mode="stills",
    n_images=4,
    crystal={"unit_cell": None},
    bragg={"on": True},
    diffuse={"contrast": 0.2, "halo_displacement": 0.25},
    background={"solvent": 0.3, "compton": True, "air": 10.0},
    beam={"flux": 1e9},
    detector={
        "size": (360, 360),
        "pixel": 0.172,
        "distance": 80.0,
        "beamstop": 3.0,
        "beamstop_arm": 1.0,
    },
    scan={"orientations": "random"},
    grid={"d_min": None},
)


def brighter(settings: SimulationSettings, factor: float) -> SimulationSettings:
    """The same with more photons."""
    return vary(
        settings,
        beam={"flux": factor * settings.beam.flux},
        background={"air": factor * settings.background.air},
    )


def background_settings(simulation: Simulation, **changes: Any) -> BackgroundSettings:
    """Settings that fit a simulation."""
    air = simulation.settings.air
    return dataclasses.replace(
        BackgroundSettings(
            bragg=BraggSettings(semi_axes=(0.3, 0.3, 0.3)),
            corrections=CorrectionSettings(
                path=air.path, temperature=air.temperature, pressure=air.pressure
            ),
            mask=tuple(simulation.good_pixels()),
        ),
        **changes,
    )


class Collector:
    """Keeps what is made in memory."""

    def __init__(self) -> None:
        self.images, self.bases, self.variances, self.phi = {}, [], [], []

    def add_base(self, rates, variances, phi, n_images) -> None:
        self.bases.append(rates)
        self.variances.append(variances)
        self.phi.append((phi, n_images))

    def add_image(self, identifier, array_index, terms) -> None:
        self.images[identifier, array_index] = terms


def make_model(
    experiments: ExperimentList,
    settings: BackgroundSettings,
    blanks: ExperimentList | None = None,
) -> BackgroundModel:
    collector = Collector()
    make_background(experiments, settings, collector, blanks)
    axes, _ = background_axes(experiments, settings)
    return BackgroundModel(
        settings.method,
        settings.corrections,
        axes,
        collector.images,
        collector.bases,
        collector.variances,
    )


def crystals_and_blanks(
    simulation: Simulation, image: ImageMaker | None = None
) -> tuple[ExperimentList, ExperimentList]:
    """Experiments with counts in memory: with the crystal, and without."""
    every = simulated_experiments(simulation, noise=True, image=image)
    return (
        ExperimentList([e for e in every if e.crystal is not None]),
        ExperimentList([e for e in every if e.crystal is None]),
    )


def pixel_values(
    model: BackgroundModel,
    key: tuple[str, int],
    pixels: Pixels,
    exposure: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Background and variance of one-panel images at ``pixels``."""
    shape = pixels.shapes[0]
    s, m = np.zeros(shape[0] * shape[1]), np.zeros(shape[0] * shape[1])
    s[pixels.flat], m[pixels.flat] = pixels.s, pixels.normalisation * exposure
    value, variance = model.evaluate(
        model.of_image(*key), 0, s.reshape(shape), m.reshape(shape)
    )
    return value.ravel()[pixels.flat], variance.ravel()[pixels.flat]


def flat(panels: Sequence[np.ndarray], pixels: Pixels) -> np.ndarray:
    return np.concatenate([panel.ravel() for panel in panels])[pixels.flat]


def first_pixels(experiments: ExperimentList, settings: BackgroundSettings) -> Pixels:
    return make_pixels(experiments[0], settings)
