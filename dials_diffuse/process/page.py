"""The one-page summary of a run, a single HTML file that is readable offline.

The figures come from the record that is written as JSON too; pictures are embedded. More
sections can be added to a page before it is rendered (``Page.add_section``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dials_diffuse.report.embedding import draw, embed, page_environment

RESOLUTION_TICKS = 5


class Section(NamedTuple):
    """A section of the page: its title and its content in HTML."""

    title: str
    html: Markup


class Page:
    """The summary of a run as an HTML page.

    Args:
        record: The record of the run, as in diffuse.json.
        picture: PNG of the layers of the map, or None.
        mask_pictures: PNG of the mask of each detector.
    """

    def __init__(
        self,
        record: Mapping[str, Any],
        picture: Path | None = None,
        mask_pictures: Sequence[Path] = (),
    ) -> None:
        self.record = record
        self.picture = picture
        self.mask_pictures = mask_pictures
        self.sections: list[Section] = []

    def add_section(self, title: str, html: str) -> None:
        """Add a section after those of the merged map.

        Args:
            title: Its heading.
            html: Its content, an HTML fragment, which is not escaped.
        """
        self.sections.append(Section(title, Markup(html)))

    def render(self) -> str:
        """The page as HTML."""
        environment = page_environment()
        environment.filters["cell"] = format_cell
        merging = self.record.get("merging")
        return environment.get_template("process.html").render(
            **self.record,
            plot=merging and embed(plot_shells(merging["shells"]), "svg+xml"),
            picture=self.picture and embed(self.picture.read_bytes(), "png"),
            mask_pictures=[embed(p.read_bytes(), "png") for p in self.mask_pictures],
            sections=self.sections,
        )


def format_cell(
    cell: Sequence[float], deviations: Sequence[float] | None = None
) -> str:
    """Cell parameters, each with its standard deviation if that is not zero."""
    deviations = deviations or [0.0] * len(cell)
    return ", ".join(
        f"{x:.2f}" + (f" ± {sd:.2f}" if sd >= 0.005 else "")
        for x, sd in zip(cell, deviations)
    )


def plot_shells(shells: Sequence[Mapping[str, Any]]) -> bytes:
    """SVG of the mean intensity, CC1/2, completeness and multiplicity of the shells.

    The horizontal axis is linear in 1/d² and labelled with d in Å.

    Args:
        shells: The statistics of each shell, as dictionaries.
    """
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    # the middle of a shell in s, as its limits are far apart at low resolution
    s = np.array([(1 / shell["d_max"] + 1 / shell["d_min"]) / 2 for shell in shells])
    for ax, (key, label, factor) in zip(
        axes,
        (
            ("mean_intensity", "Mean intensity (photons s⁻¹ sr⁻¹)", 1),
            ("cc_half", "CC½ of the anisotropic part", 1),
            ("completeness", "Completeness (%)", 100),
            ("multiplicity", "Multiplicity", 1),
        ),
    ):
        values = [shell[key] for shell in shells]
        numbers = [np.nan if v is None else factor * v for v in values]
        ax.plot(s**2, numbers, "o-", ms=4, lw=1.2, color="#1f4e79")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        _resolution_axis(ax, s)
    axes[1].axhline(0, lw=0.8, color="0.5")
    axes[1].set_ylim(top=1.05)
    axes[2].set_ylim(0, 105)
    axes[3].set_ylim(bottom=0)
    return draw(figure, "svg")


def _resolution_axis(ax: Axes, s: np.ndarray) -> None:
    """Label an axis of 1/d² with d."""
    ticks = np.linspace(s[0] ** 2, s[-1] ** 2, RESOLUTION_TICKS)
    ax.set_xticks(ticks, [f"{1 / np.sqrt(tick):.2f}" for tick in ticks])
    ax.tick_params(labelbottom=True)
    ax.set_xlabel("d (Å)")
