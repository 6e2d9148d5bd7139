"""The images to leave out, in the syntax of dials.scale."""

from __future__ import annotations

import numpy as np
import pytest

from dxtbx.model import Experiment, Goniometer, Scan

from dials_diffuse.grid import Grid
from dials_diffuse.io.observations import ObservationFile, ObservationWriter
from dials_diffuse.scaling.block import ImageRange
from dials_diffuse.scaling.excluded import parse_excluded, read_blocks


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


# Of experiment 0: image 104 is not used, and the exposure changes after image 127.
BLOCKS = np.array(
    [
        (0, 100, 103),
        (0, 104, 114),
        (0, 114, 124),
        (0, 124, 127),
        (0, 127, 137),
        (0, 137, 145),
        (2, 0, 30),
    ]
)


@pytest.mark.parametrize(
    "text, start, stop, n",
    [
        ("0:101:101", 100, 103, 1),
        ("0:103:105", 100, 114, 2),
        ("0:116:116", 114, 124, 1),
        ("0:124:125", 114, 127, 2),
        ("0:145:145", 137, 145, 1),
    ],
)
def test_whole_blocks(text, start, stop, n, caplog):
    caplog.set_level("INFO", "dials.diffuse.scale")
    found = parse_excluded([text], [sweep(101, 145), sweep(), sweep()], BLOCKS)
    assert found == [ImageRange(0, start, stop)]
    images = f"Images {start + 1} to {stop} of experiment 0"
    assert caplog.messages == [f"{images} are left out, {n} of 6 blocks"]


def test_images_that_extraction_has_left_out(caplog):
    caplog.set_level("INFO", "dials.diffuse.scale")
    assert parse_excluded(["104:104"], [sweep(101, 145)], BLOCKS) == []
    assert caplog.messages == [
        "Images 104 to 104 of experiment 0 are in no observation: extraction has left "
        "them out"
    ]


def test_unknown_blocks(caplog):
    """One warning; none of stills, or of experiments that are left out as a whole."""
    experiments = [sweep(101, 145), sweep(), sweep(), sweep(), STILL]
    texts = ["2:5:5", "1", "4:7:7"]
    assert parse_excluded(texts, experiments, BLOCKS)[0] == ImageRange(2, 0, 30)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    found = parse_excluded(["3:5:6,1:7:8", "0:116:116", "1:9:9"], experiments, BLOCKS)
    assert found == [
        ImageRange(3, 4, 6),
        ImageRange(1, 6, 8),
        ImageRange(0, 114, 124),
        ImageRange(1, 8, 9),
    ]
    (message,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "not known which images make up an observation" in message
    assert message.endswith("concerns the experiments 1, 3")


def write_blocks(path, identifiers, limits) -> ObservationFile:
    grid = Grid((9.1, 10.3, 12.2, 75, 100, 110), (2, 3, 1), " P 2y", 2.0, 9.0)
    with ObservationWriter(path, grid, identifiers) as writer:
        if limits is not None:
            writer.write_blocks(np.array(limits))
    return ObservationFile(path)


def test_blocks_of_several_tables(tmp_path):
    """They get the numbers of the experiments; tables that do not say are left out."""
    first = write_blocks(tmp_path / "1.refl", {0: "a", 5: "b"}, [(5, 0, 3), (0, 3, 7)])
    old = write_blocks(tmp_path / "2.refl", {0: "c"}, None)
    last = write_blocks(tmp_path / "3.refl", {0: "d"}, [(0, 8, 9)])
    numbers = [{0: 3, 5: 2}, {0: 1}, {0: 0}]
    found = read_blocks([first, old, last], numbers)
    np.testing.assert_array_equal(found, [(2, 0, 3), (3, 3, 7), (0, 8, 9)])
    np.testing.assert_array_equal(first.blocks, [(5, 0, 3), (0, 3, 7)])  # as it was
    assert read_blocks([old], [{0: 0}]) is None
    for table in (first, old, last):
        table.close()


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
