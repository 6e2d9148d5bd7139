"""Cores and halos of spots that are made of both, or of halos alone."""

from __future__ import annotations

import numpy as np
import pytest

from dials_diffuse.bragg import ellipsoid
from dials_diffuse.bragg.halos import photon_variance, split, without_halos
from dials_diffuse.bragg.spots import Spots
from dials_diffuse.bragg.widths import fit_widths, spot_moments

SIGMA, WIDTH, PIXEL, HALF = 0.0015, 0.006, 0.001, 9


def some_spots(
    n: int, height: float, halo: float, seed: int = 7, noise: bool = True
) -> Spots:
    """Spots with a core of a height and a halo of another, photons per pixel."""
    rng = np.random.default_rng(seed)
    axis = np.arange(-HALF, HALF + 1) * PIXEL
    grid = np.stack(np.meshgrid(axis, axis), axis=0).reshape(2, -1)
    x = grid + rng.uniform(-0.5, 0.5, (n, 2, 1)) * PIXEL
    r2 = np.sum(x**2, axis=1)
    factor = rng.uniform(0.5, 2, (n, 1))
    core = height * factor * np.exp(-0.5 * r2 / SIGMA**2)
    photons = core + halo * factor * (1 + r2 / WIDTH**2) ** -1.5
    counts = (rng.poisson(photons + 20) if noise else photons + 20) - 20.0
    directions = np.linalg.qr(rng.normal(size=(n, 3, 3)))[0]
    zero = np.zeros(n)
    return Spots(
        hkl=rng.integers(-9, 9, (n, 3)),
        s=rng.uniform(0.1, 0.5, n),
        net=counts.sum(axis=1),
        offset=zero,
        sweep=zero,
        axes=directions[:, :2],
        x=x.astype(np.float32),
        counts=counts.astype(np.float32),
        strong=np.full(n, 9),
    )


def joined(*parts: Spots) -> Spots:
    names = Spots.__dataclass_fields__
    return Spots(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def test_a_sum_of_both_is_taken_apart():
    """Without noise, and with the right widths, exactly."""
    spots = some_spots(20, 300.0, 100.0, noise=False)
    found = split(spots, np.zeros((20, 2)), photon_variance(spots), SIGMA**2, WIDTH)
    r2 = np.sum(spots.x.astype(float) ** 2, axis=1)
    shape = np.exp(-0.5 * r2 / SIGMA**2)
    scale = found.core.sum(axis=1) / shape.sum(axis=1)
    np.testing.assert_allclose(found.core, scale[:, None] * shape, atol=0.01 * 300)
    assert np.all(found.misfit < 1e-3)
    assert np.all((found.share > 0.55) & (found.share < 0.65))


@pytest.mark.parametrize("halo", [0.0, 30.0, 120.0])
def test_width_of_the_core_does_not_know_the_halo(halo):
    spots = some_spots(300, 300.0, halo)
    cores = without_halos(spots)
    assert len(cores) > 0.95 * len(spots)
    after = fit_widths(spot_moments(cores))
    before = fit_widths(spot_moments(spots))
    assert np.sqrt(after.across[0]) == pytest.approx(SIGMA, rel=0.05)
    if halo > 100:
        assert np.sqrt(before.across[0] + before.across[1] * 0.1) > 1.1 * SIGMA
    total = 300 * 2 * np.pi * (SIGMA / PIXEL) ** 2 * 1.25  # mean of the factors
    assert cores.counts.sum(axis=1).mean() == pytest.approx(total, rel=0.07)


def test_spots_that_are_mostly_halo_are_left_out():
    spots = joined(some_spots(200, 300.0, 60.0), some_spots(200, 0.0, 200.0, seed=8))
    cores = without_halos(spots)
    assert 190 <= len(cores) <= 210
    assert np.sqrt(fit_widths(spot_moments(cores)).across[0]) == pytest.approx(
        SIGMA, rel=0.1
    )


def test_too_few_cores_are_told(monkeypatch):
    """What ``fit_data_sets`` answers with the default ellipsoid."""
    spots = joined(some_spots(20, 300.0, 60.0), some_spots(200, 0.0, 200.0, seed=8))
    monkeypatch.setattr(ellipsoid, "find_spots", lambda *_: (spots, len(spots), 5))
    with pytest.raises(ValueError, match="of 220 spots stand out of the halos"):
        ellipsoid.fit_ellipsoid([], [], np.eye(3)[None])
