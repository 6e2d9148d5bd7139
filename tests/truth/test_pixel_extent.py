"""Images averaged over the pixels, taken by extraction at the centres of the pixels.

All other rungs simulate pixels at their centres, so that their extent cancels. Here each
is the sum of 3 x 3 parts. The voxels move by 0.18 % rms, 0.33 % in the innermost shell and
0.06 % in the outermost: less than what sampling does to them. The sums of the shells move
by less than 5e-5. This is for pixels half as wide as the voxels, 0.0085 and 0.0167 1/Å,
and displacements correlated over 4 and 8 Å; the effect goes with the square of the width
of the pixels.
"""

from __future__ import annotations

import numpy as np
import pytest
from truth_ladder import (
    QUARTERS,
    Agreement,
    assert_is_truth,
    climb,
    report,
    report_agreement,
    vary,
)

FEW = vary(QUARTERS, n_images=60)
FOUND = Agreement((1.30, 0.54, 0.43, 0.33, 0.30, 0.32), 0.112)


@pytest.mark.slow
def test_extent_of_pixels_matters_little(tmp_path):
    comparisons = []
    for parts in (1, 3):
        (tmp_path / str(parts)).mkdir()
        comparison = climb(FEW, tmp_path / str(parts), n_shells=6, parts_of_pixel=parts)
        report_agreement(f"extent, {parts} x {parts} parts of a pixel", comparison)
        comparisons.append(comparison)
    centres, averages = comparisons
    assert_is_truth(averages, FOUND)
    np.testing.assert_array_equal(averages.voxels.index, centres.voxels.index)
    shift = averages.voxels.intensity / centres.voxels.intensity - 1
    bias = [a.ratio / c.ratio - 1 for a, c in zip(averages.shells, centres.shells)]
    rms = np.sqrt(np.mean(shift**2))
    report("extent, means - centres", bias=np.abs(bias).max(), rms=f"{rms:.3%}")
    assert np.abs(bias).max() < 6e-5
    assert 0.0014 < rms < 0.0023  # more than nothing
