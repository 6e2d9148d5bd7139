from __future__ import annotations

import dataclasses
import logging

import matplotlib.image
import numpy as np
import pytest
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
)

from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList
from scitbx.array_family import flex

from dials_diffuse.extraction.settings import CorrectionSettings, ExtractionSettings
from dials_diffuse.extraction.tables import panel_arrays
from dials_diffuse.report import correction_pictures, corrections
from dials_diffuse.report import correction_plots as plots_module
from dials_diffuse.report.correction_pictures import (
    draw_corrections,
    plot_corrections,
)
from dials_diffuse.report.correction_plots import correction_plots
from dials_diffuse.report.correction_view import pixel_values, view_corrections
from dials_diffuse.report.corrections import (
    log_corrections,
    sample_pixels,
    summarise_corrections,
)

SETTINGS = ExtractionSettings()
FACTORS_ONLY = dataclasses.replace(
    SETTINGS, corrections=CorrectionSettings(exposure=False)
)
TIMES = (0.1, 0.1, 0.4, 0.2)


def sweep(detector=None, beam=None, times=TIMES, identifier="sweep") -> Experiment:
    scan = make_scan(len(times))
    scan.set_exposure_times(flex.double(times))
    return Experiment(
        beam=beam or make_beam(),
        detector=detector or make_detector(2, (70, 60), 20.0, 8.0, parallax=True),
        goniometer=make_goniometer(),
        scan=scan,
        crystal=make_crystal(),
        identifier=identifier,
    )


def still(detector, beam, identifier="still") -> Experiment:
    return Experiment(
        beam=beam, detector=detector, crystal=make_crystal(), identifier=identifier
    )


def experiment_list(*experiments: Experiment) -> ExperimentList:
    result = ExperimentList()
    for experiment in experiments:
        result.append(experiment)
    return result


@pytest.mark.parametrize("n, n_samples", [(1, 4), (5, 100), (100, 5), (487, 32)])
def test_sampled_pixels_stand_for_all(n, n_samples):
    pixels, weights = sample_pixels(n, n_samples)
    assert pixels[0] == 0 and pixels[-1] == n - 1
    assert len(pixels) <= max(2, n_samples)
    assert weights.sum() == pytest.approx(n)
    # the mean of a straight line is exact
    line = 3.0 + 0.1 * np.arange(n)
    assert np.average(line[pixels], weights=weights) == pytest.approx(
        line.mean(), rel=0.02
    )


def test_ranges_are_those_of_all_pixels():
    experiment = sweep()
    (summary,) = summarise_corrections(experiment_list(experiment), FACTORS_ONLY)
    values = [
        a.weight * a.weight_unit
        for a in (
            panel_arrays(
                panel,
                experiment.beam,
                np.ones((60, 70), dtype=bool),
                FACTORS_ONLY.corrections,
            )
            for panel in experiment.detector
        )
    ]
    product = summary.factors[-1]
    assert product.label == "product P·ΔΩ·ε·A (µsr)"
    all_values = 1e6 * np.array(values)
    assert product.minimum == pytest.approx(all_values.min(), rel=1e-6)
    assert product.maximum == pytest.approx(all_values.max(), rel=1e-3)
    assert product.mean == pytest.approx(all_values.mean(), rel=1e-3)


def test_exposure_is_a_factor_of_the_product():
    experiments = experiment_list(sweep())
    (summary,) = summarise_corrections(experiments, SETTINGS)
    (without,) = summarise_corrections(experiments, FACTORS_ONLY)
    exposure, product = summary.factors[-2:]
    assert exposure.label == "exposure t (s)"
    assert exposure[1:] == pytest.approx((0.1, 0.2, 0.4))
    assert product.label == "product P·ΔΩ·ε·A·t (µsr s)"
    assert product[1:] == pytest.approx(
        np.array(without.factors[-1][1:]) * (0.1, 0.2, 0.4)
    )
    assert summary.n_images == 4
    assert summary.n_without_exposure == 0


def test_one_summary_for_each_detector_and_beam():
    detectors = [make_detector(), make_detector(distance=40.0)]
    beams = [make_beam(), make_beam(1.3)]
    pairs = [(0, 0), (0, 1), (1, 0), (0, 0)]
    experiments = experiment_list(
        *(still(detectors[d], beams[b], str(i)) for i, (d, b) in enumerate(pairs))
    )
    summaries = summarise_corrections(experiments, SETTINGS)
    assert [s.experiments for s in summaries] == [(0, 3), (1,), (2,)]
    assert [s.n_images for s in summaries] == [2, 1, 1]
    assert [s.n_without_exposure for s in summaries] == [2, 1, 1]
    solid = [s.factors[1].maximum for s in summaries]
    assert solid[0] == solid[1]
    assert solid[2] < 0.3 * solid[0]


def test_of_many_pairs_some_are_summarised(monkeypatch, caplog):
    monkeypatch.setattr(corrections, "MOST_PAIRS", 5)
    detector = make_detector()
    experiments = experiment_list(
        *(still(detector, make_beam(1 + 0.01 * i), str(i)) for i in range(12))
    )
    summaries = summarise_corrections(experiments, SETTINGS)
    assert len(summaries) == 5
    assert summaries[0].experiments == (0,) and summaries[-1].experiments == (11,)
    with caplog.at_level(logging.INFO, "dials.diffuse.extract"):
        log_corrections(experiments, SETTINGS)
    assert "Corrections of 5 of 12 pairs of detector and beam together" in caplog.text
    assert caplog.text.count("solid angle ΔΩ (µsr)") == 1


def logged(caplog, experiments, settings) -> str:
    with caplog.at_level(logging.INFO, "dials.diffuse.extract"):
        log_corrections(experiments, settings)
    return caplog.text


def test_log_says_what_was_used(caplog):
    experiment = sweep()
    for panel, gain in zip(experiment.detector, (1.5, 2.0)):
        panel.set_gain(gain)
        panel.set_pedestal(10.0)
    text = logged(caplog, experiment_list(experiment), SETTINGS)
    assert "Polarization: fraction 0.95 (model), normal of the plane 0, 1, 0" in text
    assert "Sensor: Si, 0.45 mm, attenuation 3.92 /mm" in text
    assert "air at 293.15 K and 101325 Pa" in text
    assert "Gain 1.5 to 2 detector units per photon (model), pedestal 10" in text
    assert "do not say theirs" not in text
    assert "switched off" not in text


def test_log_says_what_was_given_and_left_out(caplog):
    settings = dataclasses.replace(
        SETTINGS,
        gain=3.0,
        corrections=CorrectionSettings(
            path="vacuum", efficiency=False, polarization_fraction=0.5
        ),
    )
    experiment = still(make_detector(), make_beam())
    text = logged(caplog, experiment_list(experiment), settings)
    assert "Polarization: fraction 0.5 (given)" in text
    assert "Gain 3 detector units per photon (given)" in text
    assert "1 of 1 images do not say theirs, it is taken as 1 s" in text
    assert "switched off: sensor efficiency, transmission of the gas" in text
    assert "product P·ΔΩ·t (µsr s)" in text


def test_sensor_without_material_is_named(caplog):
    detector = make_detector()
    detector[0].set_thickness(0.0)
    text = logged(caplog, experiment_list(still(detector, make_beam())), SETTINGS)
    assert "no material or thickness, the efficiency is taken as 1" in text


def test_pictures_show_the_factors_of_every_pixel():
    experiment = sweep()
    values = pixel_values(experiment.detector, experiment.beam, CorrectionSettings())
    assert list(values) == [
        "polarization",
        "solid_angle",
        "efficiency",
        "path",
        "product",
    ]
    exact = np.concatenate(
        [
            (a.weight * a.weight_unit).ravel()
            for a in (
                panel_arrays(
                    panel,
                    experiment.beam,
                    np.ones((60, 70), dtype=bool),
                    CorrectionSettings(),
                )
                for panel in experiment.detector
            )
        ]
    )
    np.testing.assert_allclose(values["product"], exact, rtol=1e-3)
    product = np.prod([v for k, v in values.items() if k != "product"], axis=0)
    np.testing.assert_allclose(values["product"], product, rtol=1e-3)


def test_figure_has_a_part_for_each_factor():
    figure = plot_corrections([sweep()], SETTINGS)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == [
        "polarization",
        "solid angle",
        "sensor efficiency",
        "transmission of the gas",
        "product",
        "exposure",
    ]
    bars = [bar for ax in figure.axes for bar in ax.child_axes]
    labels = {ax.get_ylabel() for ax in (*figure.axes, *bars)}
    assert {"P", "ΔΩ (µsr)", "ε", "A", "P·ΔΩ·ε·A (µsr)", "t (s)"} <= labels
    # unpolarized light is weaker to all sides; here only along the plane, +x and -x
    picture = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    middle = picture[picture.shape[0] // 2]
    seen = middle[np.isfinite(middle)]
    assert seen.max() > 1.2 * max(seen[0], seen[-1])


def test_everything_off_leaves_one_picture():
    off = CorrectionSettings(
        polarization=False,
        solid_angle=False,
        efficiency=False,
        path="vacuum",
        exposure=False,
    )
    settings = dataclasses.replace(SETTINGS, corrections=off)
    figure = plot_corrections([sweep()], settings)
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["product"]


@pytest.mark.slow
def test_a_file_for_each_detector(tmp_path, monkeypatch, caplog):
    beam = make_beam()
    experiments = experiment_list(
        sweep(make_detector(), beam, identifier="a"),
        sweep(make_detector(distance=40.0), beam, identifier="b"),
        sweep(make_detector(), beam, identifier="c"),  # the first one again
    )
    paths = draw_corrections(tmp_path / "c.png", experiments, SETTINGS)
    assert [path.name for path in paths] == ["c.png", "c_2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "c_2.png"]
    for path in paths:
        assert matplotlib.image.imread(path).std() > 0.05
    monkeypatch.setattr(correction_pictures, "MOST_PICTURES", 1)
    with caplog.at_level(logging.INFO, "dials.diffuse.extract"):
        assert len(draw_corrections(tmp_path / "d.png", experiments, SETTINGS)) == 1
    assert "first 1 of 2 detectors only" in caplog.text


def test_plots_of_the_page_have_the_factors():
    """Each number in its place, to the fourth digit of the range of the factor."""
    experiment = sweep()
    plots, (shown,), n_detectors = correction_plots(
        experiment_list(experiment), SETTINGS
    )
    assert n_detectors == 1 and shown.names == list(plots) and shown.n_images == 4
    assert shown.title == "detector of 2 panels, 1.0000 Å"
    view = view_corrections([experiment], SETTINGS, plots_module.PIXELS)
    *pictures, exposure = plots.values()
    titles = [plot["layout"]["title"]["text"].lower() for plot in pictures]
    assert titles == [factor.name for factor in view.factors]
    for plot, factor, picture in zip(pictures, view.factors, view.pictures):
        heatmap, beam = plot["data"]
        z = np.array(heatmap["z"], dtype=float)[::-1]
        width = np.nanmax(picture) - np.nanmin(picture)
        np.testing.assert_allclose(z, picture, atol=1e-3 * width)
        assert np.isnan(z).any()  # between the panels
        assert heatmap["colorbar"]["title"]["text"] == factor.symbol_and_unit
        assert (beam["x"], beam["y"]) == ([0], [0])
        left, right, bottom, top = view.extent
        n_rows, n_columns = picture.shape
        assert heatmap["x0"] - heatmap["dx"] / 2 == pytest.approx(left, abs=0.01)
        assert left + n_columns * heatmap["dx"] == pytest.approx(right)
        assert bottom + n_rows * heatmap["dy"] == pytest.approx(top)
        assert plot["layout"]["yaxis"]["scaleanchor"] == "x"
    (trace,) = exposure["data"]
    assert (trace["x"], trace["y"]) == ([1, 2, 3, 4], list(TIMES))


def test_equal_exposures_are_a_line_between_two_points():
    times = (0.1,) * 50 + (0.2,) * 50
    plots, _, _ = correction_plots(experiment_list(sweep(times=times)), SETTINGS)
    (trace,) = plots["correction_0_exposure"]["data"]
    assert (trace["x"], trace["y"]) == ([1, 50, 51, 100], [0.1, 0.1, 0.2, 0.2])
    assert trace["line"]["shape"] == "hvh"


def test_page_shows_each_detector(monkeypatch):
    """Four at the most; the more there are, the coarser they are shown."""
    experiments = experiment_list(
        *(
            still(make_detector(distance=20.0 + i), make_beam(), str(i))
            for i in range(5)
        )
    )
    plots, shown, n_detectors = correction_plots(experiments, FACTORS_ONLY)
    assert (len(shown), n_detectors, len(plots)) == (4, 5, 4 * 5)
    monkeypatch.setattr(plots_module, "PIXELS", 2000)
    coarse, _, _ = correction_plots(experiments, FACTORS_ONLY)
    sizes = [p["correction_0_1"]["data"][0]["dx"] for p in (plots, coarse)]
    assert sizes[1] >= 2 * sizes[0]


def test_detector_behind_the_sample_has_no_pictures():
    detector = make_detector()
    panel = detector[0]
    x, y, z = panel.get_origin()
    panel.set_frame(panel.get_fast_axis(), panel.get_slow_axis(), (x, y, -z))
    experiments = experiment_list(still(detector, make_beam()))
    plots, (shown,), _ = correction_plots(experiments, SETTINGS)
    assert list(plots) == shown.names == ["correction_0_exposure"]
    with pytest.raises(ValueError, match="nothing to draw of a detector at scatt"):
        plot_corrections(list(experiments), SETTINGS)


def test_picture_in_a_folder_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        draw_corrections(tmp_path / "no" / "c.png", experiment_list(sweep()), SETTINGS)
