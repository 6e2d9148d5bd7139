"""Each correction by itself brings the truth back, and its absence shows.

The images are those of a simulation in which one effect alone is strong: polarization at
wide angles, a thin sensor that is tilted or a thick one with parallax, air or helium over
300 mm at 2 Å, a detector with gain and pedestal, or unequal exposure times. The simulation
takes none of its factors from ``dials_diffuse.corrections``. In every shell the mean of the
map is that of the truth within 0.1 %, and the correlation of the anisotropic parts is
better than 0.999.

Each negative control is the same map with that correction switched off. What is stated is
how far the worst shell is from the truth, how far the shells are from each other (largest
over smallest ratio, less one), and the rms deviation of the voxels.

The part inside of 8 Å is behind a beam stop: few pixels meet the voxels about 000, and not
evenly, which has nothing to do with corrections.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest
from truth_ladder import QUARTERS, climb, report, vary

from scitbx.array_family import flex

from dials_diffuse.simulation.comparison import Comparison
from dials_diffuse.simulation.simulate import Simulation

N = 120  # pixels along an edge, and images
PLAIN = vary(
    QUARTERS,
    n_images=N,
    diffuse={"halo_displacement": 0.15, "contrast": 0.3},
    beam={"wavelength": 2.0, "polarization_fraction": 0.5},
    detector={
        "size": (N, N),
        "pixel": 90 / N,
        "distance": 40.0,
        "beamstop": 10.0,
        "thickness": 0.0,
        "count_cutoff": 2_000_000_000,
    },
    air={"path": "vacuum"},
    scan={"width": 180 / N, "exposure": 1.0},
    grid={"d_min": 2.4},
)
# the same directions from seven and a half times as far
FAR = {"distance": 300.0, "pixel": 675 / N, "beamstop": 75.0}
TILTED = {"thickness": 0.02, "two_theta": 20.0}  # 45 % of the photons and more

NOT_UNPOLARIZED = {"polarization_fraction": 0.999}
OFF = {
    "polarization": False,
    "efficiency": False,
    "path": "vacuum",
    "exposure": False,
}

Prepare = Callable[[Simulation], None]


def nothing(_) -> None:
    pass


class Wrong(NamedTuple):
    """How wrong a map is: see ``figures``."""

    worst: float
    spread: float
    rms: float


class Rung(NamedTuple):
    """A simulation, the correction that it needs, and what its absence does."""

    changes: dict[str, dict[str, Any]]
    off: dict[str, Any]
    wrong: Wrong
    prepare: Prepare = nothing
    spoil: Callable = nothing


def amplify(simulation: Simulation) -> None:
    """A detector that stores 2.5 units per photon, and a pedestal of some photons."""
    series = simulation.series[0]
    photons = simulation.photons
    mean = np.mean(photons(series, 0)[0])
    gain, pedestal = 2.5, round(float(mean))
    for panel in series.experiments[0].detector:
        panel.set_gain(gain)
        panel.set_pedestal(pedestal)
    simulation.photons = lambda series, i: [
        gain * panel + pedestal for panel in photons(series, i)
    ]


def vary_exposure(simulation: Simulation) -> None:
    """Exposure times between 0.2 and 1.8 s."""
    times = np.random.default_rng(7).uniform(0.2, 1.8, N)
    simulation.series[0].experiments[0].scan.set_exposure_times(flex.double(times))
    exposure = simulation.exposure
    simulation.exposure = lambda series, i: dataclasses.replace(
        exposure(series, i), time=times[i]
    )


def forget_gain(experiments) -> None:
    for panel in experiments[0].detector:
        panel.set_gain(1.0)


def forget_pedestal(experiments) -> None:
    for panel in experiments[0].detector:
        panel.set_pedestal(0.0)


RUNGS = {
    "polarization": Rung(
        {"beam": NOT_UNPOLARIZED}, {"polarization": False}, Wrong(0.261, 0.259, 0.178)
    ),
    "solid angle": Rung({}, {"solid_angle": False}, Wrong(1.0, 1.411, 1.0)),
    "thin sensor": Rung(
        {"detector": TILTED}, {"efficiency": False}, Wrong(0.486, 0.0867, 0.468)
    ),
    "thick sensor": Rung(
        {"beam": {"wavelength": 0.9}, "detector": {"thickness": 0.6, "distance": 90.0}},
        {"efficiency": False},
        Wrong(0.152, 0.0165, 0.145),
    ),
    "air": Rung(
        {"detector": FAR, "air": {"path": "air"}},
        {"path": "vacuum"},
        Wrong(0.670, 0.326, 0.619),
    ),
    "helium": Rung(
        {"detector": FAR, "air": {"path": "helium"}},
        {"path": "vacuum"},
        Wrong(0.00277, 0.00059, 0.00742),
    ),
    "helium for air": Rung(
        {"detector": FAR, "air": {"path": "helium"}},
        {"path": "air"},
        Wrong(2.024, 0.326, 1.658),
    ),
    "gain": Rung({}, {}, Wrong(1.5, 0.0003, 1.501), amplify, forget_gain),
    "pedestal": Rung({}, {}, Wrong(0.532, 0.240, 0.365), amplify, forget_pedestal),
    "exposure": Rung(
        {}, {"exposure": False}, Wrong(0.00148, 0.00184, 0.102), vary_exposure
    ),
    "all": Rung(
        {
            "beam": NOT_UNPOLARIZED,
            "detector": {**FAR, **TILTED},
            "air": {"path": "air"},
        },
        OFF,
        Wrong(0.854, 0.341, 0.828),
        lambda simulation: (vary_exposure(simulation), amplify(simulation)),
    ),
}


def figures(comparison: Comparison) -> Wrong:
    ratio = np.array([shell.ratio for shell in comparison.shells])
    return Wrong(
        worst=float(np.abs(ratio - 1).max()),
        spread=float(ratio.max() / ratio.min() - 1),
        rms=comparison.overall.rms_deviation,
    )


def keep_images(prepare: Prepare) -> Prepare:
    """Prepare simulations that make their images once for all of them."""
    images: dict[tuple[int, int], list[np.ndarray]] = {}

    def prepare_and_keep(simulation: Simulation) -> None:
        prepare(simulation)
        photons = simulation.photons

        def kept(series, i: int) -> list[np.ndarray]:
            key = (series.number, i)
            if key not in images:
                images[key] = photons(series, i)
            return images[key]

        simulation.photons = kept

    return prepare_and_keep


FAST = ("polarization",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in RUNGS],
)
def test_correction_alone(tmp_path, name):
    rung = RUNGS[name]
    settings = vary(PLAIN, **rung.changes)
    prepare = keep_images(rung.prepare)
    right = climb(settings, tmp_path, prepare=prepare, n_shells=6)
    found = figures(right)
    report(f"correction, {name}", **found._asdict())
    assert all(shell.n_voxels > 20 for shell in right.shells)
    assert found.worst < 1e-3
    assert right.overall.cc_anisotropic > 0.999

    control = climb(
        settings,
        tmp_path,
        prepare=prepare,
        spoil=rung.spoil,
        corrections=rung.off,
        n_shells=6,
    )
    wrong = figures(control)
    report(f"control, without {name}", **wrong._asdict())
    assert wrong.worst > 1e-3
    np.testing.assert_allclose(wrong, rung.wrong, rtol=0.05, atol=2e-4)
