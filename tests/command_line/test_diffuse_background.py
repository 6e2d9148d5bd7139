from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from simulate_images import count_images, import_images, write_images

from dxtbx.model.experiment_list import ExperimentList
from libtbx.utils import Sorry

from dials_diffuse.command_line import diffuse_background
from dials_diffuse.io.background import BackgroundFile
from dials_diffuse.io.inputs import write_mask
from dials_diffuse.io.masks import DetectorMask, write_masks


def _write(folder: Path, name: str, n_images: int, crystal=True, **options) -> Path:
    """An experiment list with CBF images of Poisson counts."""
    subfolder = folder / name
    subfolder.mkdir()
    size = options.pop("size", (60, 50))
    paths = write_images(subfolder, count_images(n_images, size), **options)
    experiments = (
        import_images(paths) if crystal else import_images(paths, lambda i: None)
    )
    expt = subfolder / f"{name}.expt"
    experiments.as_file(str(expt))
    return expt


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return _write(tmp_path, "data", 3, width=0.5)


COARSE = ["radial.step=0.05", "bragg.exclusion=none", "mp.nproc=1"]


def test_radial_writes_model_page_and_numbers(sweep):
    diffuse_background.run([str(sweep), *COARSE])
    identifier = ExperimentList.from_file(sweep, check_format=False)[0].identifier
    with BackgroundFile("diffuse_background.h5") as handle:
        assert handle.method == "radial"
        assert handle.images == [(identifier, i) for i in range(3)]
        # images of 2, 3 and 4 counts per pixel
        levels = [handle.of_image(*key).profile[6] for key in handle.images]
        np.testing.assert_allclose(np.array(levels[1:]) / levels[0], [1.5, 2], rtol=0.1)
    record = json.loads(Path("dials.diffuse_background.json").read_text())
    assert record["n_images"] == 3
    assert "isotropic part" in record["removes"]
    for shell in record["sample"]["shells"]:
        tolerance = 5 * shell["sigma"]
        assert shell["measured"] == pytest.approx(3, abs=tolerance)
        assert abs(shell["residual"]) < tolerance
    page = Path("dials.diffuse_background.html").read_text()
    assert page.count('<img src="data:image/png') == 3
    log = Path("dials.diffuse_background.log").read_text()
    assert "Background written to diffuse_background.h5" in log


def test_images_are_scaled_by_the_exposure_times(sweep, tmp_path):
    blank = _write(tmp_path, "blank", 2, crystal=False, exposure=4.0)
    diffuse_background.run(
        [
            str(sweep),
            "method=images",
            f"images.experiments={blank}",
            "images.scale=0.5",
            "images.smoothing=1",
            "mp.nproc=1",
        ]
    )
    counts = sum(count_images(2))
    with BackgroundFile("diffuse_background.h5") as handle:
        terms = handle.of_image(*handle.images[2])
        assert terms.rate_scale == pytest.approx(0.5)
        assert terms.profile is None
        rates, variances = handle.base(terms.base_index)
        np.testing.assert_allclose(rates[0], counts / 8, rtol=1e-6)
        np.testing.assert_allclose(variances[0], counts / 64, rtol=1e-6)


def test_modal_and_none(sweep):
    diffuse_background.run(
        [str(sweep), *COARSE, "method=modal", "modal.spacing=20", "output.html=None"]
    )
    with BackgroundFile("diffuse_background.h5") as handle:
        terms = handle.of_image(*handle.images[0])
        assert handle.axes.spacing_px == 20
        assert terms.grids[0].shape == (4, 4)
    assert not Path("dials.diffuse_background.html").exists()
    diffuse_background.run([str(sweep), "method=none", "output.background=none.h5"])
    with BackgroundFile("none.h5") as handle:
        assert handle.of_image(*handle.images[2]).profile is None


def _two_detectors(tmp_path) -> ExperimentList:
    """Two stills of different detectors, as two.expt."""
    both = ExperimentList()
    for name, size in (("small", (60, 50)), ("large", (70, 50))):
        experiments = ExperimentList.from_file(_write(tmp_path, name, 1, size=size))
        both.extend(experiments)
    both.as_file("two.expt")
    return both


def test_detectors_have_masks_of_their_own(tmp_path, monkeypatch):
    """A mask that leaves one side of each of two detectors."""
    monkeypatch.chdir(tmp_path)
    both = _two_detectors(tmp_path)
    masks = []
    for experiment, n_masked in zip(both, (20, 40)):
        layer = np.zeros(experiment.detector[0].get_image_size()[::-1], dtype=bool)
        layer[:, :n_masked] = True
        masks.append(DetectorMask([experiment.identifier], {"side": [layer]}))
    write_masks("two.h5", masks)
    diffuse_background.run(["two.expt", "mask=two.h5", *COARSE])
    record = json.loads(Path("dials.diffuse_background.json").read_text())
    n_pixels = sum(shell["n_pixels"] for shell in record["sample"]["shells"])
    assert both[1].identifier in record["sample"]["name"]
    assert n_pixels == 30 * 50
    Path("diffuse_background.h5").unlink()
    write_masks("one.h5", masks[:1])
    _refused(["two.expt", "mask=one.h5"], "no mask for 1 of 2 experiments")
    swapped = [
        DetectorMask(mask.identifiers, other.layers)
        for mask, other in zip(masks, masks[::-1])
    ]
    write_masks("swapped.h5", swapped)
    _refused(["two.expt", "mask=swapped.h5"], "The mask swapped.h5 has")


def test_inputs_are_not_overwritten(sweep, tmp_path):
    """Nor by the log, which is begun before anything else is written."""
    write_mask("good.mask", [np.ones((50, 60), dtype=bool)])
    blank = _write(tmp_path, "blank", 1, crystal=False)
    arguments = [sweep, "method=images", f"images.experiments={blank}"]
    arguments.append("mask=good.mask")
    for name in (sweep, blank, tmp_path / "good.mask"):
        before = name.read_bytes()
        for option in ("background", "html", "json", "log"):
            output = f"output.{option}={name}"
            _refused([*arguments, output], f"output.{option}=.* is in use")
            assert name.read_bytes() == before
    _refused([sweep, "output.log=x", "output.json=x"], "output.log=x is in use")


def test_all_pixels_near_bragg_positions(sweep):
    """There is a background, and nothing to show of it."""
    options = ["bragg.semi_axes=2", "bragg.unit=hkl", "mp.nproc=1"]
    diffuse_background.run([str(sweep), "method=none", *options])
    assert Path("diffuse_background.h5").exists()
    record = json.loads(Path("dials.diffuse_background.json").read_text())
    assert record["sample"]["shells"] == []
    page = Path("dials.diffuse_background.html").read_text()
    assert "<img" not in page
    log = Path("dials.diffuse_background.log").read_text()
    assert "no pixel away from Bragg positions" in log
    Path("diffuse_background.h5").unlink()
    _refused([sweep, *options], "No pixel of image 1")


def _refused(arguments, match):
    with pytest.raises(Sorry, match=match):
        diffuse_background.run(list(map(str, arguments)))
    assert not Path("diffuse_background.h5").exists()


def test_bad_input_is_refused_in_one_line(sweep, tmp_path):
    images = [sweep, "method=images"]
    _refused(images, "needs images without the crystal")
    _refused([*images, "images.experiments=no.expt"], "no.expt does not exist")
    _refused([*images, f"images.experiments={sweep}"], "experiments have a crystal")
    (tmp_path / "text.expt").write_text("no list")
    _refused([*images, "images.experiments=text.expt"], "is not an experiment list")
    large = _write(tmp_path, "large", 1, crystal=False, size=(70, 50))
    _refused([*images, f"images.experiments={large}"], "another detector")
    _refused([sweep, f"images.experiments={large}"], "only with method=images")
    _refused([*images, "images.smoothing=4"], "must be odd")
    _refused([sweep, "output.background=None"], "output.background")
    _refused([sweep, "trusted_range=5,2"], "smaller value first")
    _refused([], "give an experiment list")


def test_background_scan_elsewhere_is_refused(sweep, tmp_path):
    blank = _write(tmp_path, "blank", 2, crystal=False, width=0.5)
    experiments = ExperimentList.from_file(blank)
    experiments[0].scan.set_oscillation((100.0, 0.5))
    experiments.as_file(str(blank))
    _refused([sweep, "method=images", f"images.experiments={blank}"], "does not reach")
