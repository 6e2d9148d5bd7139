"""HTML pages with their pictures inside, which need no other files then."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def embed(content: bytes, kind: str) -> str:
    """A picture as the data URI of an img element.

    Args:
        content: The file of the picture.
        kind: Its MIME type, without ``image/``.
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def draw(figure: Figure, form: str, dpi: float | str = "figure") -> bytes:
    """A figure as a file, png or svg."""
    picture = io.BytesIO()
    figure.savefig(picture, format=form, dpi=dpi)
    return picture.getvalue()


def page_environment() -> jinja2.Environment:
    """The templates of pages, which extend ``base.html``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dials_diffuse.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["figure"] = format_figure
    environment.policies["json.dumps_kwargs"] = {
        "allow_nan": False,  # browsers refuse it
        "separators": (",", ":"),
    }
    return environment


def format_figure(value: float | None, form: str = ".2f", factor: float = 1) -> str:
    """A number, or a dash for one that is not defined."""
    return "–" if value is None else format(value * factor, form)
