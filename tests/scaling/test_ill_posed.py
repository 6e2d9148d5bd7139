"""Observations that determine little or nothing end in a sane model, or in one line."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from simulated_observations import ROTATION, STILLS, draw, observe, read_all
from truth_ladder import vary

from libtbx.utils import Sorry

from dials_diffuse.command_line import diffuse_scale

QUIET = ["output.html=None", "output.json=None"]
TERMS = ("scale", "decay", "absorption", "detector", "offset")
SMALL = {"detector": {"size": (60, 60), "pixel": 1.5}}


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    settings = vary(STILLS, n_images=6, **SMALL)
    return observe(settings, tmp_path_factory.mktemp("stills"))


@pytest.fixture(scope="module")
def narrow_sweep(tmp_path_factory):
    """10° in P 1: hardly a voxel is seen in two places."""
    settings = vary(
        ROTATION,
        n_images=10,
        crystal={"space_group": "P 1"},
        scan={"width": 1.0},
        **SMALL,
    )
    return observe(settings, tmp_path_factory.mktemp("sweep"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scaled(observed, *options: str) -> dict[str, np.ndarray]:
    """What the command writes, after looking whether it is sane."""
    diffuse_scale.run([*observed.files, *QUIET, *options])
    rows = read_all("scaled.refl")
    factor, offset = rows["inverse_scale_factor"], rows["additive_offset"]
    np.testing.assert_array_equal(rows["id"], read_all(observed.files[1])["id"])
    assert np.isfinite(factor).all() and np.isfinite(offset).all()
    assert factor.min() > 0.1 and factor.max() < 10
    signal = observed.counts - observed.background
    rate = signal.sum() / observed.geometry.columns["normalisation"].sum()
    assert np.abs(offset).max() <= 2 * rate
    assert os.path.exists("scaled.expt")
    return rows


@pytest.mark.parametrize("use", ["yes", "auto"])
def test_narrow_sweep_in_p1(narrow_sweep, tmp_path, use, caplog):
    observed = draw(narrow_sweep, tmp_path)
    rows = scaled(observed, *(f"model.{name}.use={use}" for name in TERMS))
    assert "Warning: the term absorption is switched off" in caplog.text
    # Nothing was injected: whatever is found is noise.
    change = np.log(rows["inverse_scale_factor"])
    assert np.std(change) < 0.1


def test_three_stills(stills, tmp_path, caplog):
    use = stills.experiment < 3
    geometry = dataclasses.replace(
        stills,
        experiments=stills.experiments[:3],
        columns={name: values[use] for name, values in stills.columns.items()},
        voxel=stills.voxel[use],
    )
    scales = np.array([0.5, 1.0, 1.5])
    observed = draw(geometry, tmp_path, scales[geometry.experiment])
    rows = scaled(observed)
    found = [np.median(rows["inverse_scale_factor"][rows["id"] == i]) for i in range(3)]
    # Few voxels are common to two stills of random orientation.
    assert found / np.mean(found) == pytest.approx(scales, rel=0.15)


def test_no_voxel_seen_twice(stills, tmp_path, caplog):
    _, first = np.unique(stills.voxel, return_index=True)
    observed = draw(stills, tmp_path, use=np.isin(np.arange(stills.n_rows), first))
    rows = scaled(observed)
    assert "no voxel was observed more than once" in caplog.text
    assert set(rows["inverse_scale_factor"]) == {1.0}
    assert set(rows["additive_offset"]) == {0.0}


def test_blank_experiment(stills, tmp_path, caplog):
    """It gets a low scale or none, and does not disturb the others."""
    factor = np.where(stills.experiment == 2, 0.0, 1.0)
    observed = draw(stills, tmp_path, factor)
    diffuse_scale.run([*observed.files, *QUIET])
    rows = read_all("scaled.refl")
    blank = rows["id"] == 2
    others = rows["inverse_scale_factor"][~blank]
    assert np.all(rows["inverse_scale_factor"] > 0)
    assert others.max() / others.min() < 1.5
    name = stills.experiments[2].identifier
    assert "1 of 6 experiments have no known scale, as they have no photons in" in (
        caplog.text
    )
    assert f"some: {name}\n" in caplog.text


def test_no_photons_at_all(stills, tmp_path, caplog):
    observed = draw(stills, tmp_path, 1.0, counts_per_pixel=1e-12)
    assert not observed.counts.any()
    try:
        diffuse_scale.run([*observed.files, *QUIET])
    except Sorry as error:
        assert len(str(error).splitlines()) == 1
    else:
        rows = read_all("scaled.refl")
        assert np.all(np.isfinite(rows["inverse_scale_factor"]))
        assert set(np.round(rows["inverse_scale_factor"], 6)) == {1.0}
        assert set(np.round(rows["additive_offset"], 6)) == {0.0}
        assert "Warning" in caplog.text


def test_experiment_without_overlap(stills, tmp_path, caplog):
    """Half of the voxels belong to experiment 2 alone: its scale is unknown."""
    alone = stills.voxel % 2 == 0
    use = (stills.experiment == 2) == alone
    observed = draw(stills, tmp_path, use=use, counts_per_pixel=10)
    diffuse_scale.run([*observed.files, *QUIET])
    rows = read_all("scaled.refl")
    factor = rows["inverse_scale_factor"]
    assert factor.min() > 0.3 and factor.max() < 3
    assert "Warning: no voxel with photons links the experiments of 2 groups" in (
        caplog.text
    )
    assert "Experiments in each: 5, 1" in caplog.text
