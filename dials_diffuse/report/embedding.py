"""Pictures inside HTML pages, which need no other files then."""

from __future__ import annotations

import base64
import io

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
