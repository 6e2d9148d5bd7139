"""Texts of logs and messages."""

from __future__ import annotations

from typing import Any, Sequence


def shortened(items: Sequence[Any], n: int = 10) -> str:
    """Numbers or names joined by commas, the first few only if there are many."""
    text = ", ".join(map(str, items[:n]))
    return text + (", ..." if len(items) > n else "")
