from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dials_diffuse.grid import Grid
from dials_diffuse.report import slices
from dials_diffuse.report.beam_view import circle_resolutions

GRID = Grid((8.1, 9.3, 11.2, 75, 100, 110), (2, 3, 1), " P 1", 2.5)
ISOTROPIC = {"s": np.array([0.005, 0.395]), "intensity": np.array([10.0, 2.0])}


def layer(normal: int) -> slices.Layer:
    shape = [n for i, n in enumerate(GRID.shape) if i != normal]
    intensity = np.arange(math.prod(shape), dtype=float).reshape(shape)
    intensity[0, 0] = np.nan
    return slices.cut_layer(GRID, normal, intensity, ISOTROPIC)


@pytest.mark.parametrize(
    "normal, name, axes",
    [
        (2, "hk0", ("a*", "b*")),
        (1, "h0l", ("a*", "c*")),
        (0, "0kl", ("b*", "c*")),
    ],
)
def test_layer_has_the_true_geometry(normal, name, axes):
    cut = layer(normal)
    assert cut.name == name
    assert cut.axis_names == axes
    # Points of the layer are as far from the origin as their voxels
    index = slices.layer_indices(GRID, normal)
    u, v = (i for i in range(3) if i != normal)
    hkl = index / GRID.ndiv
    assert np.all(hkl[:, normal] == 0)
    position = hkl[:, [u, v]] @ cut.basis.T
    np.testing.assert_allclose(
        np.linalg.norm(position, axis=1), GRID.s(index), rtol=1e-9, atol=1e-12
    )
    # The first axis runs to the right, the second upwards
    assert cut.basis[1, 0] == 0
    assert cut.basis[0, 0] > 0 and cut.basis[1, 1] > 0


def test_layer_indices_are_in_the_order_of_the_array():
    index = slices.layer_indices(GRID, 1)
    shape = (GRID.shape[0], GRID.shape[2])
    place = (1 + GRID.half_size[0], -2 + GRID.half_size[2])
    np.testing.assert_array_equal(index[np.ravel_multi_index(place, shape)], [1, 0, -2])


def test_anisotropic_part_is_the_rest():
    cut = layer(2)
    s = GRID.s(slices.layer_indices(GRID, 2)).reshape(cut.intensity.shape)
    inside = (s > 0.005) & (s < 0.395) & np.isfinite(cut.intensity)
    isotropic = 10 - 8 * (s - 0.005) / 0.39
    np.testing.assert_allclose(
        cut.anisotropic[inside], (cut.intensity - isotropic)[inside]
    )
    assert np.isnan(cut.anisotropic[0, 0])


def test_circles_are_round_numbers_and_the_limit():
    for d_min in (0.5, 1.0, 1.45, 2.5, 6.0):
        chosen = circle_resolutions(d_min)
        assert chosen[-1] == d_min
        assert 3 <= len(chosen) <= 5
        s = 1 / np.array(chosen)
        assert np.all(np.diff(s) > 0.1 / d_min)


def draw(values: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Colours of a figure of one layer hk0, and where (0, 0) Å⁻¹ and axes are on it."""
    cut = slices.cut_layer(grid, 2, values, {k: v[:0] for k, v in ISOTROPIC.items()})
    figure = slices.plot_layers([cut], grid.d_min, "photons", "test")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[::-1, :, :3], figure.axes[0].transData


def test_voxels_are_drawn_where_they_lie():
    # One bright voxel, off all axes, in a layer that was observed everywhere
    values = np.zeros(GRID.shape[:2])
    h, k = 4, -3
    values[h + GRID.half_size[0], k + GRID.half_size[1]] = 1.0
    image, to_pixels = draw(values, GRID)
    basis = slices.layer_basis(GRID, 2)

    def colour(h, k):
        position = basis @ (np.array([h, k]) / GRID.ndiv[:2])
        x, y = to_pixels.transform(position)
        return tuple(map(int, image[int(y), int(x)]))

    bright = colour(h, k)
    assert sum(bright) != sum(colour(-h, -k))
    # The four corners of the voxel belong to it, and its neighbours do not
    for du, dv in ((0.4, 0.4), (-0.4, 0.4), (0.4, -0.4), (-0.4, -0.4)):
        assert colour(h + du, k + dv) == bright
    for du, dv in ((0.7, 0), (-0.7, 0), (0, 0.7), (0, -0.7)):
        assert colour(h + du, k + dv) != bright


def test_voxels_that_were_not_observed_are_grey():
    values = np.zeros(GRID.shape[:2])
    values[: GRID.half_size[0] - 2] = np.nan
    values[-1] = 1
    image, to_pixels = draw(values, GRID)
    basis = slices.layer_basis(GRID, 2)
    x, y = to_pixels.transform(basis @ [-2.2, 0.3])
    red, green, blue = image[int(y), int(x)]
    assert red == green == blue == round(float(slices.NOT_OBSERVED) * 255)


def test_layers_without_observations_can_be_drawn():
    values = np.full(GRID.shape[:2], np.nan)
    image, _ = draw(values, GRID)
    assert image.std() > 0
