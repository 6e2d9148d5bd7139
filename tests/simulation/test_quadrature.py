from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse.simulation.quadrature import chunks, gauss_legendre


def test_nodes_are_exact_for_polynomials():
    x, w = gauss_legendre(5)
    for power in range(10):
        over_0_to_1 = np.sum(w * (x + 0.5) ** power)
        assert over_0_to_1 == pytest.approx(1 / (power + 1), rel=1e-12)


@pytest.mark.parametrize("n", [0, 1, 6, 7])
def test_chunks_cover_each_element_once(n):
    parts = [np.arange(n)[part] for part in chunks(n, 3)]
    assert all(1 <= len(part) <= 3 for part in parts)
    np.testing.assert_array_equal(np.concatenate([[], *parts]), np.arange(n))
