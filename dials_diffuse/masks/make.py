"""The mask of a detector: all layers, and the numbers of pixels that they take."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Mapping, Sequence

import numpy as np

from dxtbx.model import Beam, Detector

from dials.util import tabulate
from dials_diffuse.masks.bragg import BraggLayer
from dials_diffuse.masks.dynamic import (
    FLICKER,
    MIN_IMAGES_HIGH,
    MIN_IMAGES_SCATTER,
    Sensitivity,
    find_faulty,
)
from dials_diffuse.masks.rings import Rings, make_rings
from dials_diffuse.masks.series import Series, split
from dials_diffuse.masks.settings import MaskSettings
from dials_diffuse.masks.shadow import (
    MAX_FRACTION,
    GoniometerShadow,
    find_beamstop,
    goniometer_shadow,
)
from dials_diffuse.masks.static import (
    file_masks,
    never_trusted,
    shape_layers,
    untrusted_rectangles,
)
from dials_diffuse.masks.statistics import PixelModel, PixelSums, sum_images
from dials_diffuse.masks.unexposed import unexposed_areas, unexposed_hint

logger = logging.getLogger("dials.diffuse.mask")

LAYERS: dict[str, str] = {
    "untrusted": "untrusted rectangles, or above the trusted range in every image",
    "gaps": "below the trusted range in every image",
    "file": "masked by files or by the format of the images",
    "shapes": "border and untrusted shapes",
    "resolution": "beyond d_min or d_max, or in a resolution_range",
    "ice_rings": "in ice rings",
    "goniometer": "in the shadow of the goniometer in every image read, by the format",
    "beamstop": "in the shadow of the beam stop, found automatically",
    "hot": "too many photons in most images or on average",
    "dead": "no photons where the surroundings have some",
    "flickering": "too many photons now and then",
    "unstable": "too few photons, too much or too little scatter",
}


# What says nothing about the shadow of a beam stop.
NOT_SEEN = ("untrusted", "file", "gaps", "goniometer")
# Values that scatter more than photons do, as detector units with an offset in each
# panel, are no measure of darkness in fewer images.
MAX_SCATTER, MIN_IMAGES_DARK = 2.0, 10


@dataclasses.dataclass(frozen=True)
class MadeMask:
    """The mask of a detector.

    Attributes:
        detector: The detector.
        beam: The beam of the first experiment.
        identifiers: Of the experiments that share it.
        layers: For each of ``LAYERS`` an array per panel, (n_slow, n_fast), True for
            masked pixels.
        mean: Mean photons of each pixel in an image, per panel; NaN where not known.
        n_images: Number of images that were read.
        rings: Where the pixels lie.
        warnings: What the user should know.
        notes: What could not be found, and why.
        bragg: What extraction leaves out of one image besides; no part of the mask.
    """

    detector: Detector
    beam: Beam
    identifiers: Sequence[str]
    layers: dict[str, list[np.ndarray]]
    mean: list[np.ndarray]
    n_images: int
    rings: Rings
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    bragg: BraggLayer | None = None

    @property
    def good(self) -> tuple[np.ndarray, ...]:
        """The pixels of each panel that no layer masks."""
        return tuple(
            ~np.logical_or.reduce(panels) for panels in zip(*self.layers.values())
        )

    def counts(self) -> list[dict[str, Any]]:
        """Pixels that each layer masks, and those that no other layer does.

        Returns:
            For each layer its ``name``, ``n_pixels`` and ``n_only``, and ``panels``: the
            number of pixels in each panel.
        """
        masked_by = [
            sum(p.astype(np.uint8) for p in x) for x in zip(*self.layers.values())
        ]
        return [
            {
                "name": name,
                "meaning": LAYERS[name],
                "n_pixels": int(sum(map(np.count_nonzero, panels))),
                "n_only": int(
                    sum(
                        np.count_nonzero(layer & (number == 1))
                        for layer, number in zip(panels, masked_by)
                    )
                ),
                "panels": [int(np.count_nonzero(layer)) for layer in panels],
            }
            for name, panels in self.layers.items()
        ]

    def summary(self) -> dict[str, Any]:
        """The figures of the mask, for JSON."""
        good = self.good
        return {
            "identifiers": list(self.identifiers),
            "n_images": self.n_images,
            "n_pixels": sum(panel.size for panel in good),
            "n_masked": int(sum(np.count_nonzero(~panel) for panel in good)),
            "n_masked_panels": [int(np.count_nonzero(~panel)) for panel in good],
            "layers": self.counts(),
            "image_layers": [self.bragg.summary(good)] if self.bragg else [],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


def make_mask(
    series: Series, settings: MaskSettings, masks: Sequence[Sequence[np.ndarray]] = ()
) -> MadeMask:
    """The mask of the detector of a series of images.

    Args:
        series: The images.
        settings: What to look for.
        masks: Masks from files that fit the detector, True for good pixels.

    Raises:
        ValueError: An image cannot be read, or a shape does not fit.
    """
    shapes, beam = series.shapes, series.experiments[0].beam
    rings = make_rings(series.detector, beam)
    images = series.chosen(settings.max_images)
    goniometer = goniometer_shadow(images, len(rings.u))
    layers = {
        "untrusted": untrusted_rectangles(series.detector),
        "file": file_masks(series, masks),
        **shape_layers(series, settings.shapes),
        "goniometer": goniometer.always,
    }
    usable = ~(layers["untrusted"] | layers["file"])
    model = PixelModel.of_detector(series.detector, usable, rings, settings)
    sums = sum_images(images, model, settings.nproc)
    for name, found in never_trusted(sums).items():
        # the values of shadowed pixels are replaced by one below any range
        layers[name] = layers.get(name, False) | (found & ~layers["goniometer"])
    hidden = np.logical_or.reduce([layers[name] for name in NOT_SEEN])
    seen = ~hidden & (sums.n > 0)
    layers["beamstop"], warnings, notes = _beamstop(sums, seen, rings, shapes, settings)
    masked = np.logical_or.reduce(list(layers.values()))
    notes += shadow_notes(goniometer)
    if settings.find:
        faulty, sensitivity = find_faulty(sums, masked, rings, shapes)
        layers.update({k: v for k, v in faulty.items() if k in settings.find})
        warnings += too_few_images(settings, len(images))
        notes += sensitivity_notes(sensitivity, settings, len(images))
    left = ~np.logical_or.reduce(list(layers.values()))
    warnings += unexposed_hint(unexposed_areas(sums, left, model), len(left))
    for note in notes:
        logger.info("%s", note)
    for warning in warnings:
        logger.warning("Warning: %s", warning)
    return MadeMask(
        detector=series.detector,
        beam=beam,
        identifiers=[e.identifier for e in series.experiments],
        layers={k: split(layers[k], shapes) for k in LAYERS if k in layers},
        mean=split(sums.mean(), shapes),
        n_images=len(images),
        rings=rings,
        warnings=warnings,
        notes=notes,
    )


def _beamstop(
    sums: PixelSums,
    seen: np.ndarray,
    rings: Rings,
    shapes: Sequence[tuple[int, int]],
    settings: MaskSettings,
) -> tuple[np.ndarray, list[str], list[str]]:
    """The layer of the beam stop, flat; a warning if what was found is none; notes."""
    nothing = np.zeros(len(seen), dtype=bool)
    if not settings.beamstop:
        return nothing, [], []
    scatter = relative_scatter(sums, seen)
    if sums.n_images < MIN_IMAGES_DARK and scatter > MAX_SCATTER:
        note = (
            "The shadow of a beam stop is not looked for: the values scatter "
            f"{scatter:.1f} times as much as photons, and {sums.n_images} image(s) are "
            "too few to average that. Give the gain, or untrusted.polygon"
        )
        return nothing, [], [note]
    found = find_beamstop(
        np.nan_to_num(sums.mean()),
        sums.noise(),
        seen,
        rings,
        shapes,
        settings.transmission,
        settings.border,
    )
    if not found.any():
        return nothing, [], ["No shadow of a beam stop was found"]
    share = np.count_nonzero(found & seen) / max(np.count_nonzero(seen), 1)
    if share > MAX_FRACTION:
        warning = (
            f"a dark region from the beam on covers {100 * share:.0f}% of the pixels. That "
            "is no beam stop, and it is not masked: check the beam centre"
        )
        return nothing, [warning], []
    return found, [], []


def relative_scatter(sums: PixelSums, seen: np.ndarray) -> float:
    """Median over the pixels of the variance of an image over its mean; 1 for photons.

    Args:
        sums: The sums over the images.
        seen: Pixels to look at, flat.
    """
    mean = sums.mean()[seen]
    lit = mean > 0
    if not lit.any():
        return 1.0
    return float(np.median((sums.noise() * sums.n_images)[seen][lit] / mean[lit]))


def too_few_images(settings: MaskSettings, n_images: int) -> list[str]:
    """A warning if there are too few images to tell faulty pixels from Bragg peaks."""
    layers = [name for name in ("hot", "flickering") if name in settings.find]
    if n_images >= MIN_IMAGES_HIGH or not layers:
        return []
    return [
        f"{' and '.join(layers)} pixels cannot be told from Bragg peaks in fewer than "
        f"{MIN_IMAGES_HIGH} images, there are {n_images}"
    ]


def shadow_notes(goniometer: GoniometerShadow) -> list[str]:
    """What the layer of the goniometer holds, and who takes care of the rest."""
    always, sometimes = (
        int(np.count_nonzero(x)) for x in (goniometer.always, goniometer.sometimes)
    )
    if not (goniometer.known or sometimes):
        return []
    return [
        f"The format of the images knows the shadow of the goniometer: {always} pixels lie "
        f"in it in every image that was read and are in this mask; {sometimes} more lie in "
        "it in some images only and are left out of those by dials.diffuse_extract"
    ]


def sensitivity_notes(
    sensitivity: Sensitivity, settings: MaskSettings, n_images: int
) -> list[str]:
    """What could not be found in so few images or photons."""
    notes = []
    flickering = "flickering" in settings.find and n_images >= MIN_IMAGES_HIGH
    if flickering and sensitivity.chance < 0.99:
        notes.append(
            f"A pixel is called flickering if it is high in {sensitivity.min_runs} runs of "
            f"images. In {n_images} images that finds {100 * sensitivity.chance:.0f}% of "
            f"those that are high in one of {1 / FLICKER:.0f} images"
        )
    if "unstable" in settings.find and not sensitivity.scatter:
        notes.append(
            "The scatter of the pixels is not judged with fewer than "
            f"{MIN_IMAGES_SCATTER} images"
        )
    if "dead" in settings.find and sensitivity.n_without:
        notes.append(
            f"Whether {sensitivity.n_without} pixels are dead cannot be told: their "
            "surroundings have fewer than 14 photons in all the images"
        )
    return notes


def log_mask(made: MadeMask, number: int) -> None:
    """A table of the layers of a mask, and of the panels if there are several."""
    summary = made.summary()
    n_pixels = summary["n_pixels"]
    rows = [
        (x["name"], x["n_pixels"], f"{100 * x['n_pixels'] / n_pixels:.3f}", x["n_only"])
        for x in summary["layers"]
    ]
    n_masked = summary["n_masked"]
    rows.append(("all layers", n_masked, f"{100 * n_masked / n_pixels:.3f}", ""))
    logger.info(
        "\nDetector %d: %d images of %d experiments, %d pixels in %d panel(s)",
        number,
        made.n_images,
        len(made.identifiers),
        n_pixels,
        len(made.detector),
    )
    logger.info(
        tabulate(rows, headers=["Layer", "Pixels masked", "%", "By this layer only"])
    )
    for layer in summary["image_layers"]:
        log_bragg_layer(layer, n_pixels)
    if len(made.detector) > 1:
        log_panels(made, summary)


def log_bragg_layer(layer: Mapping[str, Any], n_pixels: int) -> None:
    """What the Bragg exclusion takes of one image, by itself and beside the mask.

    Args:
        layer: Its ``summary``.
        n_pixels: Of the detector.
    """
    logger.info(
        "\nBragg layer, of image %d (%s) only and not in the mask: dials.diffuse_extract "
        "leaves out of each image what lies %s, to %.2f Å:",
        layer["image"],
        layer["file"],
        layer["exclusion"],
        layer["d_min"],
    )
    names = {
        "bragg": layer["n_pixels"],
        "bragg, not masked": layer["n_only"],
        "mask and bragg": layer["n_together"],
    }
    rows = [(name, n, f"{100 * n / n_pixels:.3f}") for name, n in names.items()]
    logger.info(tabulate(rows, headers=["Layer", "Pixels left out", "%"]))


def log_panels(made: MadeMask, summary: dict[str, Any]) -> None:
    """A table of the pixels that each layer masks in each panel."""
    used = [x for x in summary["layers"] if x["n_pixels"]]
    rows = [
        (i, *(x["panels"][i] for x in used), n)
        for i, n in enumerate(summary["n_masked_panels"])
    ]
    logger.info("\nMasked pixels of each panel:")
    logger.info(
        tabulate(rows, headers=["Panel", *(x["name"] for x in used), "all layers"])
    )
