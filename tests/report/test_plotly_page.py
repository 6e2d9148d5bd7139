from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest

from dials_diffuse.report import plotly_page
from dials_diffuse.report.plotly_page import (
    PLOTLY_URL,
    log_axis,
    packed_plotly,
    plotly_file,
    render_plots,
    resolution_axis,
    resolved,
    significant,
    trace_of,
    whole_numbers,
    with_steps,
)

FACTS = {
    "inputs": ["a.expt"],
    "n_experiments": 1,
    "n_observations": 5,
    "refined_against": None,
    "terms": [],
    "versions": {"dials": "DIALS", "dials_diffuse": "0"},
    "warnings": [],
    "dropped": {},
    "stages": [],
    "contributions": [],
}
TRACE = trace_of([1, 2], [0.5, None], "</script><b>", "#000", "lines")
PLOTS = {"scale": {"data": [TRACE], "layout": {}}}


def page(plots=PLOTS) -> str:
    return render_plots(
        "scaling.html", plots, **FACTS, sections=[("Scales", list(plots))], worst=[]
    )


def data_of(html: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="plot-data">(.*)</', html)
    return json.loads(text)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Where a script of plotly is, which is not the real one."""
    script = tmp_path / "plotly.js"
    script.write_text("window.Plotly = 'χ²';", encoding="utf-8")
    monkeypatch.setattr(plotly_page, "IN_PACKAGE", "missing.js")
    monkeypatch.setattr(plotly_page, "OF_DEBIAN", str(script))
    return script


def test_page_has_its_data_and_the_script(installed):
    html = page()
    assert data_of(html) == PLOTS
    (packed,) = re.findall(r'<script type="text/plain" id="plotly">(.*)</script>', html)
    assert zlib.decompress(base64.b64decode(packed)) == installed.read_bytes()
    assert '<div class="plot" id="scale"></div>' in html


def test_without_plotly_the_page_names_its_address(installed):
    installed.unlink()
    assert plotly_file() is None and packed_plotly() is None
    html = page()
    assert data_of(html) == PLOTS
    assert 'id="plotly"' not in html
    assert f'const plotlyUrl = "{PLOTLY_URL}"' in html


def test_page_without_plots_has_no_script(installed):
    assert "<script" not in page({})


def test_names_cannot_end_the_data(installed):
    """Names of files may hold anything; the only ends of scripts are our own."""
    html = page()
    assert html.count("<script") == html.count("</script>") == 3
    assert "<b>" not in html


def test_numbers_that_are_not_finite_are_refused(installed):
    plots = {"scale": {"data": [{"y": [float("nan")]}], "layout": {}}}
    with pytest.raises(ValueError, match="JSON compliant"):
        page(plots)


def test_script_in_the_package_comes_first(installed, tmp_path, monkeypatch):
    package = tmp_path / "site" / "plotly"
    (package / "package_data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('was imported')")
    small = package / "package_data" / "plotly.min.js"
    monkeypatch.setattr(plotly_page, "IN_PACKAGE", "package_data/plotly.min.js")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "plotly", raising=False)
    assert plotly_file() == installed
    small.write_text("1")
    assert plotly_file() == small


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 7e8])
def test_rounded_numbers_are_near_and_short(scale):
    values = scale * np.random.default_rng(7).normal(size=500)
    found = significant(values)
    np.testing.assert_allclose(found, values, rtol=5.001e-4)
    for value in found:
        digits = re.sub(r"e.*|[-.]", "", repr(value)).strip("0")
        assert len(digits) <= 4
    width = np.ptp(values)
    np.testing.assert_allclose(resolved(values), values, atol=5.001e-4 * width)


def test_rounding_keeps_what_is_not_a_number():
    values = [[np.nan, 0.0], [np.inf, 123456.0]]
    assert significant(values) == [[None, 0.0], [None, 123500.0]]
    assert resolved([np.nan, np.nan]) == [None, None]


def test_small_differences_of_large_numbers_are_kept_but_no_noise():
    assert resolved([0.99991234, 0.99993234]) == [0.99991234, 0.99993234]
    assert len(set(resolved(1 + 1e-15 * np.arange(100)))) == 1


@pytest.mark.parametrize("x", [[5, 6, 7], [0.5, 3.0, 5.5], [4, 2, 0]])
def test_equal_steps_are_not_written_out(x):
    trace = with_steps(trace_of(x, [0] * 3, "", "", "lines"))
    assert "x" not in trace
    assert [trace["x0"] + i * trace["dx"] for i in range(3)] == x


@pytest.mark.parametrize("x", [[1], [1, 2, 4], []])
def test_other_steps_are(x):
    assert with_steps(trace_of(x, x, "", "", "lines"))["x"] == x


def test_ticks_of_axes():
    assert whole_numbers([5, 9]) == {"dtick": 1}
    assert whole_numbers([5.5, 95.5]) == whole_numbers([]) == {}
    axis = log_axis("", [0.003, None, 0.05])
    assert axis["ticktext"][:4] == ["0.001", "0.002", "0.005", "0.01"]
    axis = resolution_axis(0.0, 0.5)
    assert axis["ticktext"] == [f"{1 / s:g}" for s in axis["tickvals"]]
    assert axis["ticktext"][-1] == "2" and np.diff(axis["tickvals"]).min() > 0.035


def test_neither_the_command_nor_its_page_imports_matplotlib():
    """Nor the package plotly: each of them takes longer than a page."""
    code = (
        "import sys\n"
        "import dials_diffuse.command_line.diffuse_extract\n"
        "import dials_diffuse.report.extraction as page\n"
        "page.render_plots('plots.html', {'a': {'data': [], 'layout': {}}})\n"
        "print([x for x in ('matplotlib', 'plotly') if x in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
