from __future__ import annotations

import math
import os

import numpy as np
import pytest

from cctbx.array_family import flex
from dxtbx.model import Panel

from dials_diffuse.util import compat


@pytest.mark.parametrize("n", [0, 1, 7, 8, 23])
def test_miller_indices_there_and_back(monkeypatch, n):
    monkeypatch.setattr(compat, "CONVERSION_BLOCK", 8)
    index = np.random.default_rng(n).integers(-(2**31), 2**31, (n, 3))
    indices = compat.miller_index_from_numpy(index)
    assert isinstance(indices, flex.miller_index)
    assert list(indices) == [tuple(map(int, row)) for row in index]
    back = compat.miller_index_to_numpy(indices)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, index)


def test_miller_indices_of_an_array_in_another_order():
    index = np.asfortranarray([[1, -2, 3], [4, 5, -6]])[::-1]
    assert list(compat.miller_index_from_numpy(index)) == [(4, 5, -6), (1, -2, 3)]


@pytest.mark.parametrize("limits", [(-1, 10), (0, 10), (2, 10), (-3, 7)])
@pytest.mark.parametrize("flex_type", [flex.int, flex.double])
def test_trusted_range_is_that_of_dxtbx(limits, flex_type):
    """For all values that a photon counter can have."""
    values = list(range(12))
    panel = Panel()
    panel.set_image_size((len(values), 1))
    panel.set_trusted_range(limits)
    data = flex_type(values)
    data.reshape(flex.grid(1, len(values)))
    trusted = panel.get_trusted_range_mask(data)
    low, high = compat.inclusive_trusted_range(panel)
    assert [low <= v <= high for v in values] == list(trusted)


def test_gaps_between_modules_are_never_trusted():
    """Gaps hold -1, whichever dxtbx wrote the limits of a photon counter."""
    panel = Panel()
    for low in (-1, 0) if compat.trusted_range_is_inclusive() else (-1,):
        panel.set_trusted_range((low, 1000))
        limits = compat.inclusive_trusted_range(panel)
        assert limits[0] > -1
        assert math.ceil(limits[0]) == 0


def test_a_photon_counter_trusts_zero_but_no_gap():
    panel = Panel()
    panel.set_image_size((4, 1))
    panel.set_trusted_range(compat.photon_counter_trusted_range(10))
    data = flex.int([-1, 0, 9, 11])
    data.reshape(flex.grid(1, 4))
    assert list(panel.get_trusted_range_mask(data)) == [False, True, True, False]
    assert -1 < compat.inclusive_trusted_range(panel)[0] <= 0


def test_available_cores():
    n = compat.available_cores()
    assert isinstance(n, int)
    assert 1 <= n <= os.cpu_count()
