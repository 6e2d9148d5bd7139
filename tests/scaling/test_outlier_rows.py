"""Outliers of tables in files."""

from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse.scaling.outlier_rows import OutlierRows

SIZES = (1000, 1, 500)


@pytest.mark.parametrize("n_lots", [1, 7])
def test_flags_are_those_of_the_rows_added(tmp_path, n_lots):
    """In whatever lots and order they come, and whatever is asked for."""
    rng = np.random.default_rng(2)
    expected = [rng.random(n) < 0.2 for n in SIZES]
    table = np.repeat(np.arange(len(SIZES)), [x.sum() for x in expected])
    number = np.concatenate([np.flatnonzero(x) for x in expected])
    order = rng.permutation(len(table))
    outliers = OutlierRows(tmp_path, len(SIZES))
    for lot in np.array_split(order, n_lots):
        outliers.add(table[lot], number[lot])
    for i, flags in enumerate(expected):
        for start, stop in ((0, len(flags)), (3, 400), (999, 1000), (7, 7)):
            stop = min(stop, len(flags))
            start = min(start, stop)
            found = outliers.flags(i, start, stop)
            assert found.dtype == bool
            assert np.array_equal(found, flags[start:stop])
    assert sum(x.sum() for x in expected) > 200


def test_no_outliers(tmp_path):
    outliers = OutlierRows(tmp_path, 2)
    outliers.add(np.array([1]), np.array([5]))
    assert not outliers.flags(0, 0, 10).any()
    assert not list(tmp_path.glob("*_0"))
