"""The images to leave out, in the syntax of dials.scale."""

from __future__ import annotations

import pytest

from dxtbx.model import Experiment, Goniometer, Scan

from dials_diffuse.scaling.block import ImageRange
from dials_diffuse.scaling.excluded import parse_excluded


def sweep(first: int = 1, last: int = 90) -> Experiment:
    """Of images of half a degree."""
    scan = Scan((first, last), (0.0, 0.5))
    return Experiment(scan=scan, goniometer=Goniometer())


STILL = Experiment(scan=Scan((7, 7), (0.0, 0.0)))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1", [ImageRange(1)]),
        ("1:3:7", [ImageRange(1, 2, 7)]),
        ("0:1:90", [ImageRange(0, 0, 90)]),
        ("0:5:5,1:8:9", [ImageRange(0, 4, 5), ImageRange(1, 7, 9)]),
        ("0:5:5 1", [ImageRange(0, 4, 5), ImageRange(1)]),
        ("2:7:7", [ImageRange(2, 6, 7)]),
    ],
)
def test_syntax(text, expected):
    assert parse_excluded([text], [sweep(), sweep(), STILL]) == expected


def test_a_single_experiment_needs_no_number():
    assert parse_excluded(["101:120", "150:150"], [sweep(101, 190)]) == [
        ImageRange(0, 100, 120),
        ImageRange(0, 149, 150),
    ]


@pytest.mark.parametrize(
    "text, start, stop",
    [("0:101:101", 100, 110), ("0:110:111", 100, 120), ("0:190:191", 180, 195)],
)
def test_whole_blocks(text, start, stop, caplog):
    """Of five degrees, ten images, from the first image of the scan; the last is short."""
    experiments = [sweep(101, 195), sweep()]
    assert parse_excluded([text], experiments, {0: 5.0}) == [ImageRange(0, start, stop)]


def test_what_dials_leaves_out():
    """The same images as the parser of dials.util.exclude_images."""
    from dials.array_family import flex
    from dials.util.exclude_images import _parse_exclude_images_commands

    experiments = [sweep(), sweep()]
    tables = [flex.reflection_table() for _ in range(2)]
    for i, (table, experiment) in enumerate(zip(tables, experiments)):
        table.experiment_identifiers()[i] = experiment.identifier = f"id{i}"
    text = "0:15:20,1:20:25"
    known = _parse_exclude_images_commands([[text]], experiments, tables)
    found = parse_excluded([text], experiments)
    assert found == [
        ImageRange(int(name[2:]), first - 1, last) for name, (first, last) in known
    ]


@pytest.mark.parametrize("text", ["0:1:91", "0:0:4", "0:91:99"])
def test_images_beyond_the_scan(text):
    with pytest.raises(ValueError, match=f"^exclude_images={text}: .* from 1 to 90$"):
        parse_excluded([text], [sweep(), sweep()])


def test_still_without_a_scan():
    with pytest.raises(ValueError, match="exclude_images=0 leaves it out"):
        parse_excluded(["0:1:1"], [Experiment(), sweep()])
