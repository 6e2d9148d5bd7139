"""The example of docs/scaling_terms.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from simulated_observations import (
    ROTATION,
    draw,
    observe,
    read_all,
    read_models,
    term_values,
)

from dials_diffuse.scaling import terms

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scaling_terms.md"


@pytest.fixture
def code(monkeypatch):
    """The blocks of the document; terms that they register are forgotten."""
    known = terms.TERMS.copy()
    yield re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    terms.TERMS.clear()
    terms.TERMS.update(known)


def without_gauge(values: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Less the mean of thin shells of resolution, which goes into the intensities."""
    shell = (40 * s / s.max()).astype(int)
    mean = np.bincount(shell, values) / np.maximum(np.bincount(shell), 1)
    return values - mean[shell]


@pytest.mark.slow
def test_the_example_recovers_radiation_damage(code, tmp_path, monkeypatch):
    """The rate of fading is linear in s, which no B factor describes."""
    monkeypatch.chdir(tmp_path)
    geometry = observe(ROTATION, tmp_path, ndiv=1)
    damage = -1.5 * geometry.turn * geometry.s / geometry.s.max()
    draw(geometry, tmp_path, np.exp(damage))
    names: dict = {}
    definition, use = code
    exec(definition, names)
    exec(use, names)

    rows, experiments = read_all("scaled.refl"), read_models("scaled.expt")
    assert "damage" in experiments[0].scaling_model.components
    found = np.log(
        term_values(experiments, rows, "damage")
        * term_values(experiments, rows, "scale")
    )
    truth = without_gauge(damage, geometry.s)
    deviation = without_gauge(found, geometry.s) - truth
    assert np.std(truth) > 0.15
    assert np.std(deviation) < 0.03

    # Without the term, the factors differ: there is something to find.
    names["diffuse_scale"].run(
        [
            *("extracted.expt", "extracted.refl", "output.html=None"),
            *(f"model.{name}.use=no" for name in ("damage", "decay", "absorption")),
            *("model.offset.use=no", "model.detector.use=no"),
        ],
        phil=names["load_phil"]("scale"),
    )
    rows, experiments = read_all("scaled.refl"), read_models("scaled.expt")
    assert "damage" not in experiments[0].scaling_model.components
    found = np.log(rows["inverse_scale_factor"])
    assert np.std(without_gauge(found, geometry.s) - truth) > 0.06
