from __future__ import annotations

import numpy as np

from dials_diffuse.export.npz import write_npz


def test_arrays_return(tmp_path):
    arrays = {
        "intensity": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "space_group": np.array(" P 1"),
        "ndiv": np.array([2, 3, 1]),
    }
    arrays["intensity"][0, 0, 0] = np.nan
    path = tmp_path / "map.npz"
    write_npz(path, iter(arrays.items()))
    with np.load(path) as found:
        assert set(found) == set(arrays)
        for name, values in arrays.items():
            np.testing.assert_array_equal(found[name], values)
            assert found[name].dtype == values.dtype
