"""What the corrections are: their ranges, for the log and for the report.

Each factor of the normalisation of a pixel (polarization, solid angle, efficiency of the
sensor, transmission of the gas on the way, exposure) is summarised for each detector in
each beam, from some thousand pixels that stand for their neighbours. ``correction_view``
has them as pictures.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, NamedTuple, Sequence

import numpy as np

from dxtbx.model import Beam, Detector, Experiment, Panel
from dxtbx.model.experiment_list import ExperimentList

from dials.util import tabulate
from dials_diffuse.extraction.blocks import exposure_times
from dials_diffuse.extraction.settings import CorrectionSettings, ExtractionSettings
from dials_diffuse.extraction.tables import (
    correction_factors,
    gas_attenuation_of,
    model_keys,
    pixel_vectors,
    polarization_of,
)

logger = logging.getLogger("dials.diffuse.extract")

SAMPLE = 10_000  # pixels of a detector, at least 4 x 4 of each panel
MOST_PAIRS = 20  # of detector and beam that are summarised
MOST_TABLES = 2  # in the log; more go into one


class Factor(NamedTuple):
    """How a factor is called, and in what it is given."""

    name: str
    symbol: str
    unit: str = ""
    scale: float = 1.0

    @property
    def symbol_and_unit(self) -> str:
        return f"{self.symbol} ({self.unit})" if self.unit else self.symbol

    @property
    def label(self) -> str:
        return f"{self.name} {self.symbol_and_unit}"


FACTORS = {
    "polarization": Factor("polarization", "P"),
    "solid_angle": Factor("solid angle", "ΔΩ", "µsr", 1e6),
    "efficiency": Factor("sensor efficiency", "ε"),
    "path": Factor("transmission of the gas", "A"),
    "exposure": Factor("exposure", "t", "s"),
}


def product_of(names: Sequence[str]) -> Factor:
    """The product of some factors, as a factor itself."""
    used = [FACTORS[name] for name in names]
    units = " ".join(factor.unit for factor in used if factor.unit)
    scale = math.prod(factor.scale for factor in used)
    return Factor(
        "product", "·".join(factor.symbol for factor in used) or "1", units, scale
    )


class FactorRange(NamedTuple):
    """Smallest, mean and largest value of a factor, in the unit of its label."""

    label: str
    minimum: float
    mean: float
    maximum: float


@dataclasses.dataclass(frozen=True)
class CorrectionSummary:
    """The factors of one detector in one beam.

    Attributes:
        experiments: Numbers of the experiments that share them.
        factors: Those that are taken in, and their product last.
        n_images: Number of images.
        n_without_exposure: Images whose exposure time is not known, and taken as 1 s.
    """

    experiments: tuple[int, ...]
    factors: tuple[FactorRange, ...]
    n_images: int
    n_without_exposure: int


def sample_pixels(n: int, n_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Some pixels along an edge, both ends among them, and what each stands for.

    Args:
        n: Number of pixels.
        n_samples: How many of them to take, if there are as many.

    Returns:
        Numbers of the pixels, and how many are nearest to each: they add up to n.
    """
    pixels = np.unique(np.rint(np.linspace(0, n - 1, max(2, n_samples))).astype(int))
    edges = np.concatenate([[-0.5], (pixels[1:] + pixels[:-1]) / 2, [n - 0.5]])
    return pixels, np.diff(edges)


def panel_factors(
    panel: Panel,
    beam: Beam,
    settings: CorrectionSettings,
    fast: np.ndarray,
    slow: np.ndarray,
) -> dict[str, np.ndarray]:
    """The factors of some pixels of a panel, and their ``product``.

    Args:
        panel, beam: The models.
        settings: The factors to take in.
        fast, slow: Numbers of the pixels along either axis.

    Returns:
        Arrays of shape (len(slow), len(fast)); solid angles in sr.
    """
    position, e = pixel_vectors(panel, fast, slow)
    factors = correction_factors(panel, beam, position, e, settings)
    product = math.prod(factors.values(), start=np.ones(e.shape[1:]))
    return {**factors, "product": product}


def sampled_factors(
    detector: Detector, beam: Beam, settings: CorrectionSettings
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The factors of a detector at a coarse grid of its pixels.

    Returns:
        Flat arrays over all panels, ``product`` last, and how many pixels each stands
        for.
    """
    per_edge = max(4, round(math.sqrt(SAMPLE / len(detector))))
    weights, parts = [], []
    for panel in detector:
        (fast, by_fast), (slow, by_slow) = (
            sample_pixels(n, per_edge) for n in panel.get_image_size()
        )
        weights.append(np.outer(by_slow, by_fast).ravel())
        parts.append(panel_factors(panel, beam, settings, fast, slow))
    factors = {
        name: np.concatenate([p[name].ravel() for p in parts]) for name in parts[0]
    }
    return factors, np.concatenate(weights)


def _groups(experiments: ExperimentList, by_beam: bool = True) -> list[list[int]]:
    """Numbers of the experiments that have the detector, and the beam, in common."""
    groups: dict[tuple, list[int]] = {}
    for i, (detector, beam) in enumerate(model_keys(experiments)):
        groups.setdefault((detector, beam if by_beam else ()), []).append(i)
    return list(groups.values())


def _range(factor: Factor, values: np.ndarray, weights: np.ndarray) -> FactorRange:
    mean = np.average(values, weights=weights)
    return FactorRange(
        factor.label,
        *(factor.scale * float(x) for x in (values.min(), mean, values.max())),
    )


def _summary(
    experiments: ExperimentList, numbers: Sequence[int], settings: CorrectionSettings
) -> CorrectionSummary:
    first = experiments[numbers[0]]
    factors, weights = sampled_factors(first.detector, first.beam, settings)
    product = factors.pop("product")
    names = list(factors)
    rows = [_range(FACTORS[name], factors[name], weights) for name in names]
    times = [np.array(exposure_times(experiments[i])) for i in numbers]
    all_times = np.concatenate(times)
    overall = _range(product_of(names), product, weights)
    if settings.exposure:
        exposure = _range(FACTORS["exposure"], all_times, np.ones(len(all_times)))
        rows.append(exposure)
        # pixels and images are independent: ranges and means multiply
        label = product_of([*names, "exposure"]).label
        products = (a * b for a, b in zip(overall[1:], exposure[1:]))
        overall = FactorRange(label, *products)
    return CorrectionSummary(
        experiments=tuple(numbers),
        factors=(*rows, overall),
        n_images=len(all_times),
        n_without_exposure=sum(_n_unknown(experiments[i]) for i in numbers),
    )


def _n_unknown(experiment: Experiment) -> int:
    """Images that do not say their exposure time."""
    if experiment.scan is None:
        return 1
    known = sum(time > 0 for time in experiment.scan.get_exposure_times())
    return experiment.scan.get_num_images() - known


def summarise_corrections(
    experiments: ExperimentList, settings: ExtractionSettings
) -> list[CorrectionSummary]:
    """Ranges of the factors, for each detector in each beam.

    Of many pairs of detector and beam, as stills with models of their own have, some
    are taken, evenly spread over the list.
    """
    groups = _groups(experiments)
    chosen = np.unique(np.rint(np.linspace(0, len(groups) - 1, MOST_PAIRS)).astype(int))
    return [_summary(experiments, groups[i], settings.corrections) for i in chosen]


def in_few_tables(
    summaries: Sequence[CorrectionSummary],
) -> list[CorrectionSummary]:
    """The summaries, or those of many pairs in one: for the reader."""
    if len(summaries) > MOST_TABLES:
        return [_joined(summaries)]
    return list(summaries)


def _joined(summaries: Sequence[CorrectionSummary]) -> CorrectionSummary:
    """Ranges over several detectors and beams, each counted by its images."""
    n_images = [summary.n_images for summary in summaries]
    rows = [
        FactorRange(
            of_all[0].label,
            min(row.minimum for row in of_all),
            float(np.average([row.mean for row in of_all], weights=n_images)),
            max(row.maximum for row in of_all),
        )
        for of_all in zip(*(summary.factors for summary in summaries))
    ]
    return CorrectionSummary(
        experiments=tuple(i for summary in summaries for i in summary.experiments),
        factors=tuple(rows),
        n_images=sum(n_images),
        n_without_exposure=sum(summary.n_without_exposure for summary in summaries),
    )


def _among(values: Sequence[float]) -> str:
    """A number, or the range of several."""
    low, high = min(values), max(values)
    return f"{low:.5g}" if low == high else f"{low:.5g} to {high:.5g}"


def describe_models(experiment: Experiment, settings: ExtractionSettings) -> list[str]:
    """What the factors of an experiment were computed from, line by line."""
    beam, panels = experiment.beam, list(experiment.detector)
    c = settings.corrections
    lines = [f"Wavelength {beam.get_wavelength():.5f} Å"]
    if c.polarization:
        fraction, normal = polarization_of(beam, c)
        lines.append(
            f"Polarization: fraction {fraction:g} ({_origin(c.polarization_fraction)}), "
            f"normal of the plane {', '.join(f'{x:.4g}' for x in normal)} "
            f"({_origin(c.polarization_normal)})"
        )
    if c.efficiency:
        thickness = [panel.get_thickness() for panel in panels]
        mu = [panel.get_mu() for panel in panels]
        if min(thickness) * min(mu) > 0:
            material = ", ".join(sorted({panel.get_material() for panel in panels}))
            lines.append(
                f"Sensor: {material or 'material not named'}, {_among(thickness)} mm, "
                f"attenuation {_among(mu)} /mm"
            )
        else:
            lines.append(
                "Sensor: the detector model has no material or thickness, the efficiency "
                "is taken as 1"
            )
    if c.path != "vacuum":
        lines.append(
            f"Gas: {c.path} at {c.temperature:g} K and {c.pressure:g} Pa, attenuation "
            f"{gas_attenuation_of(beam, c):.4g} /mm"
        )
    gain = [settings.gain] if settings.gain else [panel.get_gain() for panel in panels]
    pedestal = [panel.get_pedestal() for panel in panels]
    lines.append(
        f"Gain {_among(gain)} detector units per photon ({_origin(settings.gain)}), "
        f"pedestal {_among(pedestal)} (model)"
    )
    return lines


def _origin(given: object) -> str:
    return "model" if given is None else "given"


def log_corrections(
    experiments: ExperimentList, settings: ExtractionSettings
) -> list[CorrectionSummary]:
    """Log the ranges of the factors, and what they were computed from.

    Returns:
        The ranges, of ``summarise_corrections``.
    """
    summaries = summarise_corrections(experiments, settings)
    shown = in_few_tables(summaries)
    if len(shown) < len(summaries):
        logger.info(
            "Corrections of %d of %d pairs of detector and beam together, models of the "
            "first:",
            len(summaries),
            len(_groups(experiments)),
        )
    for summary in shown:
        first = summary.experiments[0]
        header = ("Factor", "Min", "Mean", "Max")
        rows = [(row[0], *(f"{x:.5g}" for x in row[1:])) for row in summary.factors]
        logger.info(
            "Corrections of the pixels, %d images from experiment %d on:\n%s",
            summary.n_images,
            first,
            tabulate(rows, header, disable_numparse=True),
        )
        for line in describe_models(experiments[first], settings):
            logger.info("%s", line)
        if settings.corrections.exposure and summary.n_without_exposure:
            logger.info("%s", _exposure_line(summary))
    off = switched_off(settings)
    if off:
        logger.info("Corrections that are switched off: %s", ", ".join(off))
    return summaries


def _exposure_line(summary: CorrectionSummary) -> str:
    return (
        f"Exposure: {summary.n_without_exposure} of {summary.n_images} images do not say "
        "theirs, it is taken as 1 s"
    )


def switched_off(settings: ExtractionSettings) -> list[str]:
    """Names of the factors that are not taken in."""
    return [FACTORS[name].name for name in FACTORS if not _is_on(name, settings)]


def corrections_record(
    summaries: Sequence[CorrectionSummary],
    experiments: ExperimentList,
    settings: ExtractionSettings,
) -> dict[str, Any]:
    """The ranges of the factors and what they were computed from, for a JSON file.

    Args:
        summaries: Of ``summarise_corrections``.
        experiments: The experiments.
        settings: The settings of extraction.
    """

    def record(summary: CorrectionSummary) -> dict[str, Any]:
        models = describe_models(experiments[summary.experiments[0]], settings)
        if settings.corrections.exposure and summary.n_without_exposure:
            models.append(_exposure_line(summary))
        return {
            "experiments": list(summary.experiments),
            "n_images": summary.n_images,
            "models": models,
            "factors": [factor._asdict() for factor in summary.factors],
        }

    together = in_few_tables(summaries)
    return {
        "n_pairs": len(_groups(experiments)),
        "pairs": [record(summary) for summary in summaries],
        "together": record(together[0]) if len(together) < len(summaries) else None,
        "switched_off": switched_off(settings),
    }


def _is_on(name: str, settings: ExtractionSettings) -> bool:
    if name == "path":
        return settings.corrections.path != "vacuum"
    return getattr(settings.corrections, name)


def detector_groups(experiments: ExperimentList) -> list[list[int]]:
    """Numbers of the experiments that share a detector."""
    return _groups(experiments, by_beam=False)
