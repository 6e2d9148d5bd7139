"""PHIL definitions of the stages, and presets."""

from __future__ import annotations
