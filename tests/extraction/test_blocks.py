from __future__ import annotations

import pytest
from simulate_images import (
    count_images,
    import_images,
    make_crystal,
    make_detector,
    make_scan,
    memory_experiment,
    random_images,
    write_images,
)

from dxtbx.model.experiment_list import ExperimentList
from scitbx.array_family import flex

from dials_diffuse.extraction.blocks import (
    experiment_blocks,
    image_number,
    make_blocks,
    missing_images,
)
from dials_diffuse.extraction.extract import cut_into_tasks


def sweep(n_images=7, width=0.5, first=1, identifier="0"):
    detector = make_detector(1, (4, 3))
    return memory_experiment(
        random_images(n_images, detector),
        detector,
        make_crystal(),
        scan=make_scan(n_images, width, first),
        identifier=identifier,
    )


@pytest.mark.parametrize(
    "width, block_width, sizes",
    [
        (0.5, 1.0, [2, 2, 2, 1]),
        (0.5, 0.0, [1] * 7),
        (0.5, 0.1, [1] * 7),
        (0.5, 1.4, [3, 3, 1]),
        (0.5, 1e9, [7]),
        (0.0, 1.0, [1] * 7),  # stills in a sequence
    ],
)
def test_blocks_of_a_scan(width, block_width, sizes):
    blocks = list(experiment_blocks(3, sweep(width=width, first=11), block_width))
    assert [len(block) for block in blocks] == sizes
    assert [i for block in blocks for i in block.array_indices] == list(range(10, 17))
    assert {block.experiment for block in blocks} == {3}
    assert {block.exposure for block in blocks} == {1.0}


def test_block_ends_where_the_exposure_changes():
    e = sweep()
    e.scan.set_exposure_times(flex.double([0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2]))
    blocks = list(experiment_blocks(0, e, 1.0))
    assert [len(block) for block in blocks] == [2, 2, 1, 2]
    assert [block.exposure for block in blocks] == [0.1, 0.1, 0.1, 0.2]


def test_still_without_scan():
    detector = make_detector(1, (4, 3))
    e = memory_experiment(random_images(1, detector), detector, make_crystal())
    (block,) = experiment_blocks(0, e, 1.0)
    assert list(block.array_indices) == [0]
    assert image_number(e, 0) == 0


def test_scan_that_is_a_part_of_its_image_set():
    e = sweep(first=11)
    e.scan = e.scan[2:5]
    (block,) = experiment_blocks(0, e, 100.0)
    assert list(block.array_indices) == [12, 13, 14]
    assert [image_number(e, i) for i in block.array_indices] == [2, 3, 4]
    with pytest.raises(ValueError, match="includes image 18, which its image set"):
        image_number(e, 17)


def test_still_that_shares_an_image_set_needs_a_scan():
    detector = make_detector(1, (4, 3))
    e = memory_experiment(random_images(2, detector), detector, make_crystal())
    with pytest.raises(ValueError, match="shares an image set of 2 images"):
        image_number(e, 0)


@pytest.mark.parametrize("nproc", [1, 2, 5])
@pytest.mark.parametrize("n_sweeps", [1, 3])
def test_tasks_are_all_blocks_once(nproc, n_sweeps):
    experiments = ExperimentList(
        [sweep(5 + 30 * i, identifier=str(i)) for i in range(n_sweeps)]
    )
    for block_width in (0.5, 2.0, 100.0):
        blocks = make_blocks(experiments, block_width)
        tasks = cut_into_tasks(blocks, nproc)
        covered = [i for first, last in tasks for i in range(first, last)]
        assert covered == list(range(len(blocks)))


def test_missing_images_are_named(tmp_path):
    paths = write_images(tmp_path, count_images(3))
    experiments = import_images(paths)
    assert missing_images(experiments) == []
    paths[1].unlink()
    assert missing_images(experiments) == [str(paths[1])]
    assert missing_images(experiments[2:]) == []
