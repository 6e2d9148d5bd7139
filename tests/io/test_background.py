from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest

from dials_diffuse.background.model import BackgroundAxes, ImageBackground
from dials_diffuse.extraction.settings import CorrectionSettings
from dials_diffuse.io.background import BackgroundFile, BackgroundWriter
from dials_diffuse.util.files import atomic_path

CORRECTIONS = CorrectionSettings(path="helium", polarization_normal=(0.0, 1.0, 0.0))
AXES = BackgroundAxes(0.0, 0.01, 16)


def _terms(rng):
    grids = tuple(rng.normal(size=(3, n)).astype("float32") for n in (4, 5))
    return ImageBackground(
        base_index=1,
        rate_scale=0.25,
        profile=rng.normal(size=7),
        profile_variance=rng.random(7),
        grids=grids,
        grid_variances=tuple(grid**2 for grid in grids),
    )


@pytest.fixture
def written(tmp_path):
    """A background of two stills and one sweep of two images."""
    rng = np.random.default_rng(7)
    path = tmp_path / "diffuse_background.h5"
    keys = [("a", 0), ("b", 0), ("c", 4), ("c", 5)]
    images = {key: _terms(rng) for key in keys}
    bases = [tuple(rng.random((6, n)).astype("float32") for n in (8, 9)) for _ in "12"]
    with atomic_path(path) as part:
        with BackgroundWriter(
            part,
            "modal",
            CORRECTIONS,
            AXES,
            "method=modal",
            ["a.expt"],
            {"gain": 2.0, "trusted_range": (0.0, 99.0)},
        ) as writer:
            for rates in bases:
                writer.add_base(rates, tuple(2 * r for r in rates), 0.5, 3)
            for key, terms in images.items():
                writer.add_image(*key, terms)
    return path, images, bases


def test_counts_must_be_made_alike(written):
    with BackgroundFile(written[0]) as handle:
        handle.check_counting(2.0, (0.0, 99.0))
        with pytest.raises(ValueError, match="made with gain=2.0, not None"):
            handle.check_counting(None, (0.0, 99.0))
        with pytest.raises(ValueError, match="trusted_range"):
            handle.check_counting(2.0, (0.0, 98.0))


def test_what_is_written_is_read(written):
    path, images, bases = written
    with BackgroundFile(path) as handle:
        assert handle.images == list(images)
        assert handle.axes.spacing_px == 16
        assert handle.axes.s_step == pytest.approx(0.01)
        assert handle.corrections == CORRECTIONS
        for key, terms in images.items():
            found = handle.of_image(*key)
            assert found.base_index == 1
            assert found.rate_scale == 0.25
            np.testing.assert_array_equal(found.profile, terms.profile)
            np.testing.assert_array_equal(
                found.profile_variance, terms.profile_variance
            )
            for a, b in zip(found.grids, terms.grids):
                np.testing.assert_array_equal(a, b)
            for a, b in zip(found.grid_variances, terms.grid_variances):
                np.testing.assert_array_equal(a, b)
        rates, variances = handle.base(1)
        np.testing.assert_array_equal(rates[1], bases[1][1])
        np.testing.assert_array_equal(variances[0], 2 * bases[1][0])
        model = handle.read()
    assert model.of_image("c", 5).profile[0] == images["c", 5].profile[0]
    assert len(model.bases) == 2


def test_every_array_has_units_and_the_record_is_there(written):
    path, _, _ = written
    with h5py.File(path) as handle:
        process = handle["entry/dials_diffuse"]
        assert process.attrs["NX_class"] == "NXprocess"
        assert process["phil"].asstr()[()] == "method=modal"
        lacking = []

        def look(name, item):
            skipped = name.startswith("entry/dials_diffuse") or item.dtype.kind == "O"
            if not skipped and "units" not in item.attrs:
                lacking.append(name)

        handle.visititems(
            lambda name, item: look(name, item) if hasattr(item, "dtype") else None
        )
        assert not lacking


def test_image_without_terms_and_unknown_image(tmp_path):
    path = tmp_path / "none.h5"
    with BackgroundWriter(path, "none", CorrectionSettings(), AXES) as writer:
        writer.add_image("a", 0, ImageBackground())
    with BackgroundFile(path) as handle:
        assert handle.of_image("a", 0) == ImageBackground()
        with pytest.raises(ValueError, match="no image 2 of experiment a"):
            handle.of_image("a", 1)


def test_other_corrections_are_refused(written):
    path, _, _ = written
    with BackgroundFile(path) as handle:
        handle.check_corrections(CORRECTIONS)
        other = dataclasses.replace(CORRECTIONS, path="air")
        with pytest.raises(ValueError, match="corrections.path=helium, not air"):
            handle.check_corrections(other)


def test_files_of_another_kind_or_schema_are_refused(tmp_path, written):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as handle:
        handle["entry/data"] = 1
    with pytest.raises(ValueError, match="is not a background"):
        BackgroundFile(other)
    path, _, _ = written
    with h5py.File(path, "a") as handle:
        handle["entry/dials_diffuse"].attrs["schema"] = 99
    with pytest.raises(ValueError, match="schema 99"):
        BackgroundFile(path)
