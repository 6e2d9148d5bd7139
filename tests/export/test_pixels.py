from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
    memory_experiment,
    random_images,
)

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

from dials.array_family import flex
from dials_diffuse.export.pixels import (
    CSV_NAMES,
    PIXELS,
    expected_counts,
    image_pixels,
    write_csv,
)
from dials_diffuse.extraction.blocks import Block
from dials_diffuse.extraction.loop import accumulate_block
from dials_diffuse.extraction.reference import make_grid
from dials_diffuse.extraction.settings import (
    BraggSettings,
    CorrectionSettings,
    ExtractionSettings,
)
from dials_diffuse.extraction.tables import detector_tables

SETTINGS = ExtractionSettings(
    ndiv=(3, 2, 4), bragg=BraggSettings(exclusion="none"), trusted_range=(0, 6)
)


def rotation(n_images: int = 3) -> Experiment:
    """Several tilted panels with parallax, all rotations of the goniometer."""
    detector = make_detector(3, tilt=6.0, parallax=True)
    return memory_experiment(
        random_images(n_images, detector),
        detector,
        make_crystal("P 21 21 21"),
        make_beam(),
        make_scan(n_images, width=0.5, first=5, exposure=0.2),
        make_goniometer("general"),
    )


def still() -> Experiment:
    detector = make_detector(2, tilt=6.0)
    return memory_experiment(
        random_images(1, detector, mean=0.5), detector, make_crystal("P 21 21 21")
    )


def masked(experiment: Experiment, settings: ExtractionSettings) -> ExtractionSettings:
    rng = np.random.default_rng(3)
    shapes = [panel.get_image_size()[::-1] for panel in experiment.detector]
    return dataclasses.replace(
        settings, mask=tuple(rng.random(shape) > 0.1 for shape in shapes), gain=1.5
    )


@pytest.mark.parametrize("make, array_index", [(rotation, 5), (still, 0)])
def test_pixels_sum_to_the_voxels_of_extraction(make, array_index):
    experiment = make()
    settings = masked(experiment, SETTINGS)
    grid = make_grid(ExperimentList([experiment]), settings)
    pixels = image_pixels(experiment, array_index, grid, settings)
    block = Block(0, range(array_index, array_index + 1), 0.2 if array_index else 1.0)
    tables = detector_tables(experiment, settings)
    rows = accumulate_block(block, experiment, tables, [], grid, settings)
    rows = rows[rows["key"] < np.prod(grid.shape)]
    key = np.stack([pixels["panel"], grid.key(pixels["voxel"])], axis=-1)
    unique, inverse, n = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    order = np.lexsort((rows["key"], rows["panel"]))
    np.testing.assert_array_equal(unique[:, 1], rows["key"][order])
    np.testing.assert_array_equal(unique[:, 0], rows["panel"][order])
    np.testing.assert_array_equal(n, rows["n_pixels"][order])
    for name in ("counts", "normalisation"):
        sums = np.bincount(inverse.ravel(), pixels[name])
        np.testing.assert_allclose(sums, rows[name][order], rtol=1e-13)
    for name, axis in (("x", "x"), ("y", "y")):
        sums = np.bincount(inverse.ravel(), pixels[name] + 0.5)
        np.testing.assert_array_equal(sums, rows[axis][order])


def test_mask_of_the_experiment_alone():
    """Masks by identifier leave out what one mask for all would."""
    experiment = still()
    settings = masked(experiment, SETTINGS)
    grid = make_grid(ExperimentList([experiment]), settings)
    expected = image_pixels(experiment, 0, grid, settings)
    own = dataclasses.replace(
        settings, mask=None, masks={experiment.identifier: settings.mask}
    )
    np.testing.assert_array_equal(image_pixels(experiment, 0, grid, own), expected)
    everything = image_pixels(
        experiment, 0, grid, dataclasses.replace(settings, mask=None)
    )
    assert len(everything) > len(expected)


def test_voxels_are_those_of_the_indices():
    experiment = rotation()
    grid = make_grid(ExperimentList([experiment]), SETTINGS)
    pixels = image_pixels(experiment, 5, grid, SETTINGS)
    differ = np.any(grid.voxel_index(pixels["hkl"]) != pixels["voxel"], axis=1)
    # in the loop single precision decides on the borders
    assert np.mean(differ) < 1e-3


def test_vectors_are_those_of_dials():
    """rlp = A h with the scattering vector turned back by the goniometer, as in DIALS."""
    experiment = rotation()
    grid = make_grid(ExperimentList([experiment]), SETTINGS)
    pixels = image_pixels(experiment, 5, grid, SETTINGS)[::50]
    table = flex.reflection_table()
    table["id"] = flex.int(len(pixels), 0)
    table["imageset_id"] = flex.int(len(pixels), 0)
    table["panel"] = flex.size_t(pixels["panel"].tolist())
    table["xyzobs.px.value"] = flex.vec3_double(
        [(x + 0.5, y + 0.5, 5.5) for x, y in zip(pixels["x"], pixels["y"])]
    )
    table["xyzobs.px.variance"] = flex.vec3_double(len(pixels), (1, 1, 1))
    table.centroid_px_to_mm(ExperimentList([experiment]))
    table.map_centroids_to_reciprocal_space(ExperimentList([experiment]))
    np.testing.assert_allclose(pixels["rlp"], np.array(table["rlp"]), atol=2e-6)
    a = np.array(experiment.crystal.get_A()).reshape(3, 3)
    np.testing.assert_allclose(pixels["hkl"] @ a.T, pixels["rlp"], atol=1e-12)


def test_intensity_and_sigma():
    experiment = still()
    settings = dataclasses.replace(
        SETTINGS, corrections=CorrectionSettings(polarization=False)
    )
    grid = make_grid(ExperimentList([experiment]), settings)
    pixels = image_pixels(experiment, 0, grid, settings)
    counts, m = pixels["counts"], pixels["normalisation"]
    np.testing.assert_allclose(pixels["intensity"], counts / m)
    seen = counts > 0
    assert 0.3 < np.mean(seen) < 0.5
    np.testing.assert_allclose(pixels["sigma"][seen] * m[seen], np.sqrt(counts[seen]))
    # the images have 0.5 photons per pixel everywhere
    variance = (pixels["sigma"] * m)[~seen] ** 2
    assert np.mean(variance) == pytest.approx(0.5, abs=0.03)
    assert expected_counts(pixels).sum() == pytest.approx(counts.sum())


def test_no_photons_at_all_have_a_sigma():
    pixels = np.zeros(4, dtype=PIXELS)
    pixels["normalisation"] = 2.0
    assert expected_counts(pixels) == pytest.approx([0.125] * 4)


def test_csv(tmp_path):
    experiment = still()
    grid = make_grid(ExperimentList([experiment]), SETTINGS)
    pixels = image_pixels(experiment, 0, grid, SETTINGS)[:20]
    write_csv(tmp_path / "pixels.csv", pixels)
    found = np.genfromtxt(tmp_path / "pixels.csv", delimiter=",", names=True)
    assert found.dtype.names == CSV_NAMES
    for i, name in enumerate("hkl"):
        np.testing.assert_allclose(found[name], pixels["hkl"][:, i], rtol=1e-6)
        np.testing.assert_array_equal(found[f"voxel_{name}"], pixels["voxel"][:, i])
    for i, name in enumerate("xyz"):
        np.testing.assert_allclose(found[f"rlp_{name}"], pixels["rlp"][:, i], rtol=1e-6)
    np.testing.assert_allclose(found["sigma"], pixels["sigma"], rtol=1e-6)


def test_no_pixel_is_left():
    experiment = still()
    grid = make_grid(ExperimentList([experiment]), SETTINGS)
    settings = dataclasses.replace(SETTINGS, trusted_range=(1e5, 1e6))
    with pytest.raises(ValueError, match="No pixel is left"):
        image_pixels(experiment, 0, grid, settings)
