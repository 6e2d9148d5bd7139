"""What the integrals of a simulation share: nodes, weights, and parts of long arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def gauss_legendre(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes on [-1/2, 1/2] and weights that add up to 1, for means over an interval."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return nodes / 2, weights / 2


def chunks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` elements that cover n."""
    return (slice(start, start + size) for start in range(0, n, size))
