"""Merging of voxel observations by Laue symmetry, with half-maps and statistics.

The observations of symmetry-equivalent voxels are added up as sums (``sums``), split in
two halves by a seeded random choice. Intensities and their errors are formed only from
the final sums (``estimate``), compared between the halves (``statistics``) and spread
over the whole sphere (``expansion``). ``merge`` puts these steps together.
"""

from __future__ import annotations
