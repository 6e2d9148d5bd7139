"""What several stages need and no stage owns: commands, files, versions of DIALS."""

from __future__ import annotations
