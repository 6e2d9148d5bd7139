"""Putting experiments on one relative scale."""

from __future__ import annotations

# It loads every registered scaling model, ours too, while it is itself being imported:
# that must come before any of our modules is half imported.
import dials.algorithms.scaling.model.model  # noqa: F401
