"""The ``dials.diffuse_*`` commands: parse, check, call one function, write."""

from __future__ import annotations
