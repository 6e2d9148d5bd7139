from __future__ import annotations

import numpy as np

from dials_diffuse.report.beam_view import to_picture
from dials_diffuse.report.masks import PALE, masked_colours


def test_thin_lines_are_seen_in_reduced_pictures():
    """A line of one pixel in cells of 4 x 4: its cells are red, the others clear."""
    masked = np.zeros((40, 40))
    masked[:, 17] = 1
    row, column = (x.ravel() // 4 for x in np.indices(masked.shape))
    share = to_picture(masked.ravel(), row, column, (10, 10))
    opacity = masked_colours(share)[..., 3]
    np.testing.assert_allclose(opacity[:, 4], PALE + (1 - PALE) / 4)
    assert not np.delete(opacity, 4, axis=1).any()


def test_cells_are_paler_for_fewer_pixels_and_clear_without():
    share = np.array([[np.nan, 0, 0.01, 0.5, 1]])
    (opacity,) = masked_colours(share)[..., 3]
    assert opacity[0] == opacity[1] == 0
    assert PALE < opacity[2] < opacity[3] < opacity[4] == 1
