from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from dials_diffuse.process.page import Page, format_cell, plot_shells
from dials_diffuse.report.embedding import format_figure

PNG = b"\x89PNG not really"


def shell(d_max, d_min, cc_half=0.5, completeness=0.875, intensity=1234.5):
    return {
        "d_max": d_max,
        "d_min": d_min,
        "n_obs": 777,
        "n_voxels": 333,
        "n_possible": 400,
        "mean_intensity": intensity,
        "mean_i_over_sigma": 4.5,
        "n_pairs": 200,
        "cc_half": cc_half,
        "completeness": completeness,
        "multiplicity": 2.25,
    }


@pytest.fixture
def record():
    return {
        "versions": {"dials": "DIALS 3.99", "dials_diffuse": "9.8.7"},
        "started": "2020-01-01 12:00:00",
        "data": "/data/a<b_0001.cbf",
        "json": "diffuse.json",
        "error": None,
        "warnings": ["the cells differ"],
        "stages": [
            {
                "name": "dials.import",
                "command": "dials.import '/data/a b.cbf'",
                "seconds": 1.25,
                "state": "done",
                "log": "dials.import.log",
            }
        ],
        "mode": "rotation",
        "reason": "60 images of 0.5 degrees in 1 sweep",
        "n_images": 60,
        "spots": {
            "n_images": 60,
            "n_found": 1000,
            "n_indexed": 900,
            "fraction_indexed": 0.9,
        },
        "refinement": {
            "n_reflections": 876,
            "rmsd_x_px": 0.12,
            "rmsd_y_px": 0.34,
            "rmsd_angle_deg": 0.056,
            "experiments": [],
        },
        "crystal": {
            "n_crystals": 1,
            "n_experiments": 1,
            "unit_cell": [10.0, 20.0, 30.0, 90.0, 95.5, 90.0],
            "unit_cell_sd": [0.0] * 6,
            "space_group": "P 1 21 1",
        },
        "mask": [
            {
                "mask": "diffuse.mask",
                "n_images": 60,
                "n_pixels": 2000,
                "n_masked": 50,
                "layers": [
                    {"name": n, "meaning": m, "n_pixels": i, "n_only": j}
                    for n, m, i, j in (
                        ("gaps", "below", 40, 39),
                        ("hot", "too many", 11, 10),
                        ("dead", "no photons", 0, 0),
                    )
                ],
            }
        ],
        "background": None,
        "indexing": {"n_experiments": 6, "n_reindexed": 2, "n_left_out": 1},
        "geometry": {
            "n_images": 60,
            "n_spots": 900,
            "mean_distance": 0.00123,
            "largest_mean_distance": 0.004,
            "rms_delta_hkl": 0.045,
            "tolerance": 0.003,
            "n_images_beyond": 4,
            "rejected": True,
        },
        "extraction": {
            "n_experiments": 1,
            "n_observations": 4321,
            "n_pixels": 1000000,
            "photons": 5e5,
            "photons_per_pixel": 0.5,
            "ndiv": [2, 3, 4],
            "shape": [11, 21, 31],
            "unit_cell": [10.0, 20.0, 30.0, 90.0, 95.5, 90.0],
            "laue_group": "P 1 2/m 1",
            "d_min": 1.6,
            "d_max": None,
        },
        "scaling": {
            "terms": ["scale", "detector"],
            "dropped": {"offset": "the observations do not need it"},
            "chi_square_before": 3.21,
            "chi_square": 1.32,
            "chi_square_error_model": 1.02,
            "error_model": [1.01, 0.0123],
            "n_experiments": 2,
            "scale_min": 0.9,
            "scale_max": 1.1,
        },
        "merging": {
            "overall": shell(20.0, 1.6),
            "shells": [shell(20.0, 3.0), shell(3.0, 2.0, None, 0.0, None)],
            "scales": {},
        },
    }


class TextOf(HTMLParser):
    """The text of a page without its style; checks that elements are closed."""

    VOID = ("meta", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def test_all_is_on_the_page(record, tmp_path):
    picture, mask = tmp_path / "merged.png", tmp_path / "mask.png"
    picture.write_bytes(PNG)
    mask.write_bytes(b"\x89PNG of a mask")
    html = Page(record, picture, [mask]).render()
    text = TextOf(html).text
    for expected in (
        "Diffuse scattering: a<b_0001.cbf",
        "/data/a<b_0001.cbf and 59 more images",
        "rotation (60 images of 0.5 degrees in 1 sweep)",
        "DIALS 3.99, dials_diffuse 9.8.7",
        "the cells differ",
        "dials.import done 1.2 dials.import.log",
        "1000 found, 900 indexed (90.0 %)",
        "P 1 21 1",
        "10.00, 20.00, 30.00, 90.00, 95.50, 90.00",
        "0.12 px (x), 0.34 px (y), 0.056° (rotation), 876 reflections",
        "2 × 3 × 4 voxels per reciprocal cell, Laue group P 1 2/m 1, to 1.60 Å",
        "50 of 2000 pixels masked (2.5 %), by the models and 60 images; red in the",
        "gaps 40 39 below hot 11 10 too many",
        "2 of 6 experiments reindexed to that of the others, 1 left out",
        "0.00123 Å⁻¹ on average of 900 spots, rms |Δhkl| 0.045; 4 of 60 images beyond "
        "0.00300 Å⁻¹, left out",
        "4321 of voxels, by 1 sweep",
        "20.00 3.00 777 333 87.5 2.25 1.234e+03 4.50 0.500",
        "3.00 2.00 777 333 0.0 2.25 – 4.50 –",
    ):
        assert expected in text
    assert 'href="dials.import.log"' in html
    assert "no photons" not in text  # layers that mask nothing are left out
    for content in (PNG, b"\x89PNG of a mask"):
        assert base64.b64encode(content).decode() in html


def test_the_page_needs_no_network(record):
    html = Page(record).render()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) > 1
    for source in sources:
        assert source.startswith("data:image/") or source.endswith(".log")


def test_background(record):
    shell = {"s": 0.25, "measured": 12.5, "background": 10.25, "residual": 2.25}
    record["background"] = {
        "method": "radial",
        "removes": "all of <it>",
        "sample": {"name": "Image 3 of experiment 1", "shells": [shell]},
    }
    text = TextOf(Page(record).render()).text
    assert "method=radial takes off all of <it>: image 3 of experiment 1" in text
    assert "4.00 12.5 10.25 2.25" in text


def test_stills(record):
    record["mode"] = "stills"
    record["spots"]["n_images_indexed"] = 58
    record["crystal"].update(n_crystals=58, unit_cell_sd=[0.1, 0, 0.02, 0, 0, 0])
    text = TextOf(Page(record).render()).text
    assert "Stills indexed 58 of 60" in text
    assert "10.00 ± 0.10, 20.00, 30.00 ± 0.02, 90.00" in text
    assert "of 58 crystal models" in text
    assert "0.056° (angle to the Ewald sphere)" in text


def test_a_run_that_failed(record):
    for key in ("spots", "refinement", "crystal", "mask", "indexing", "geometry"):
        record[key] = None
    record["extraction"] = record["scaling"] = record["merging"] = None
    record["stages"][0]["state"] = "failed"
    record["error"] = "dials.import failed (exit status 1): no <images>"
    html = Page(record).render()
    text = TextOf(html).text
    assert "dials.import failed (exit status 1): no <images>" in text
    assert "Merged map" not in text
    assert "<img" not in html


def test_sections_can_be_added(record):
    page = Page(record)
    page.add_section("Comparison & more", "<p>CC <b>0.99</b></p>")
    html = page.render()
    assert "<h2>Comparison &amp; more</h2>\n<p>CC <b>0.99</b></p>" in html
    assert html.index("Comparison") > html.index("Merged map")


def test_plot_has_a_point_for_each_shell_that_is_known():
    edges = [20, 4, 3, 2.5, 2]
    shells = [shell(*pair) for pair in zip(edges, edges[1:])]
    shells[2]["cc_half"] = None
    svg = plot_shells(shells).decode()
    assert svg.count("<use ") >= 15
    full = [shell(*pair) for pair in zip(edges, edges[1:])]
    assert svg.count("<use ") == plot_shells(full).decode().count("<use ") - 1


def test_format():
    assert format_figure(None) == "–"
    assert format_figure(0.123, ".1f", 100) == "12.3"
    assert format_cell([1, 2], [0.004, 0.3]) == "1.00, 2.00 ± 0.30"
