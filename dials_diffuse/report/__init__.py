"""Pictures of the results for the user."""

from __future__ import annotations
