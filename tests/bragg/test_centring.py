from __future__ import annotations

import numpy as np
import pytest

from cctbx import sgtbx

from dials_diffuse.bragg.centring import (
    centring_translations,
    is_absent,
    is_centring_absent,
)

AXIS = np.arange(-4, 5)
HKL = np.stack(np.meshgrid(AXIS, AXIS, AXIS), axis=-1).reshape(-1, 3)
h, k, l = HKL.T

ALLOWED = {
    "P 2 2 2": h == h,
    "A 1 2 1": (k + l) % 2 == 0,
    "C 2 2 2": (h + k) % 2 == 0,
    "I 2 2 2": (h + k + l) % 2 == 0,
    "F 2 2 2": ((h + k) % 2 == 0) & ((k + l) % 2 == 0),
    "R 3 :H": (-h + k + l) % 3 == 0,
}


@pytest.mark.parametrize("symbol", ALLOWED)
def test_reflection_conditions_of_international_tables(symbol):
    group = sgtbx.space_group_info(symbol).group()
    absent = is_centring_absent(HKL, centring_translations(group))
    np.testing.assert_array_equal(absent, ~ALLOWED[symbol])


def test_at_most_three_translations():
    lengths = {
        symbol: len(centring_translations(sgtbx.space_group_info(symbol).group()))
        for symbol in ALLOWED
    }
    assert list(lengths.values()) == [0, 1, 1, 1, 3, 2]


def test_screw_axes_are_no_centring():
    group = sgtbx.space_group_info("P 21 21 21").group()
    assert not is_centring_absent(HKL, centring_translations(group)).any()
    expected = (np.sum(HKL != 0, axis=1) == 1) & (HKL.sum(axis=1) % 2 == 1)
    np.testing.assert_array_equal(is_absent(HKL, group), expected)


def test_absent_includes_centring():
    group = sgtbx.space_group_info("I 41").group()
    centring = is_centring_absent(HKL, centring_translations(group))
    assert np.all(is_absent(HKL, group)[centring])
