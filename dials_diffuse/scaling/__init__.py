"""Putting experiments on one relative scale."""

from __future__ import annotations
