"""With Poisson noise the errors of the map are those that it states.

Few counts, so that the uneven sampling of a voxel by its pixels is small beside the noise.
"""

from __future__ import annotations

import pytest
from truth_ladder import SMALL, climb, vary

from cctbx import uctbx

L3 = vary(
    SMALL,
    crystal={"unit_cell": uctbx.unit_cell((15, 18, 21, 90, 90, 90))},
    grid={"ndiv": (4, 4, 4)},
)


@pytest.mark.parametrize(
    "flux, changes",
    [
        pytest.param(1e9, {}, id="rotation"),
        pytest.param(1e8, {}, id="a few photons in each voxel"),
        pytest.param(1e8, {"mode": "stills", "scan": {"exposure": 1.0}}, id="stills"),
        pytest.param(
            1e9,
            {"detector": {"gain": 4.0, "thickness": 0.3}, "seed": 5},
            id="gain",
        ),
    ],
)
def test_chi_squared(tmp_path, flux, changes):
    comparison = climb(vary(L3, beam={"flux": flux}, **changes), tmp_path, noise=True)
    overall = comparison.overall
    assert 0.95 < overall.chi2 < 1.05
    for shell in comparison.shells:
        assert 0.9 < shell.chi2 < 1.1
        assert shell.ratio == pytest.approx(1, abs=4 * shell.ratio_error)
    assert overall.chi2_per_decade == pytest.approx(
        0, abs=4 * overall.chi2_per_decade_error
    )
    assert overall.chi2_per_s == pytest.approx(0, abs=4 * overall.chi2_per_s_error)
    assert overall.mean_pull == pytest.approx(0, abs=4 * overall.mean_pull_error)
    assert overall.sigma_ratio == pytest.approx(1, abs=0.05)
