"""Conversion of our files to those of other programs."""

from __future__ import annotations
