from __future__ import annotations

import dataclasses
import struct
import tracemalloc

import numpy as np
import pytest
from simulate_images import (
    make_beam,
    make_crystal,
    make_detector,
    make_goniometer,
    make_scan,
)

from dxtbx import flumpy
from dxtbx.model import Experiment
from dxtbx.model.experiment_list import ExperimentList

import dials.command_line.show
from dials.array_family import flex
from dials_diffuse.bragg.sums import PeakIntensities
from dials_diffuse.io import bragg
from dials_diffuse.io.bragg import COLUMNS as WRITTEN
from dials_diffuse.io.bragg import BraggWriter, bragg_table
from dials_diffuse.util.compat import miller_index_to_numpy
from dials_diffuse.util.files import atomic_path

N = 7

COLUMNS = {
    "intensity.sum.value": "intensity",
    "intensity.sum.variance": "variance",
    "background.sum.value": "background",
    "normalisation": "weight",
    "num_pixels.foreground": "n_pixels",
    "xyzobs.px.value": "xyz",
    "partiality": "complete",
    "id": "id",
    "panel": "panel",
}


def some_experiments() -> ExperimentList:
    """A sweep and a still, in this order."""
    models = {"beam": make_beam(), "detector": make_detector(2)}
    sweep = Experiment(
        **models,
        crystal=make_crystal(),
        goniometer=make_goniometer(),
        scan=make_scan(20),
        identifier="sweep",
    )
    still = Experiment(**models, crystal=make_crystal(seed=8), identifier="still")
    result = ExperimentList()
    result.extend(ExperimentList([sweep, still]))
    return result


def some_peaks(n: int = N) -> PeakIntensities:
    rng = np.random.default_rng(7)
    id = np.sort(rng.integers(0, 2, n)).astype(np.uint32)
    return PeakIntensities(
        hkl=rng.integers(-30, 30, (n, 3)),
        id=id,
        panel=rng.integers(0, 2, n).astype(np.uint32),
        intensity=rng.normal(1e5, 1e5, n),
        variance=rng.uniform(1, 1e4, n),
        background=rng.uniform(1, 1e3, n),
        weight=rng.uniform(1e-6, 1e-4, n),
        n_pixels=rng.integers(1, 300, n),
        xyz=rng.uniform(0, 20, (n, 3)),
        complete=np.arange(n) % 2 == 0,
    )


def written(tmp_path, peaks: PeakIntensities) -> flex.reflection_table:
    path = tmp_path / "bragg.refl"
    with atomic_path(path) as temporary:
        with BraggWriter(temporary, some_experiments()) as writer:
            writer.append(peaks)
    return flex.reflection_table.from_file(str(path))


def test_dials_reads_what_was_written(tmp_path):
    peaks = some_peaks()
    assert 0 < np.count_nonzero(peaks.complete) < N
    table = written(tmp_path, peaks)
    assert len(table) == N
    np.testing.assert_array_equal(
        miller_index_to_numpy(table["miller_index"]), peaks.hkl
    )
    for column, name in COLUMNS.items():
        np.testing.assert_array_equal(
            flumpy.to_numpy(table[column]), getattr(peaks, name), err_msg=column
        )
    assert dict(table.experiment_identifiers()) == {0: "sweep", 1: "still"}
    table.assert_experiment_identifiers_are_consistent(some_experiments())
    assert table.get_flags(table.flags.integrated_sum).count(True) == N


def test_rows_follow_their_experiments(tmp_path):
    """Selecting and splitting, as programs of DIALS do, keeps rows and identifiers."""
    peaks = some_peaks()
    table = written(tmp_path, peaks)
    part = table.select_on_experiment_identifiers(["still"])
    np.testing.assert_array_equal(
        flumpy.to_numpy(part["intensity.sum.value"]), peaks.intensity[peaks.id == 1]
    )


def test_no_peaks_make_an_empty_table(tmp_path):
    nothing = {
        field.name: getattr(some_peaks(), field.name)[:0]
        for field in dataclasses.fields(PeakIntensities)
    }
    table = written(tmp_path, PeakIntensities(**nothing))
    assert len(table) == 0
    assert set(table.keys()) == set(WRITTEN)


def test_dials_show_shows_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, some_peaks())
    some_experiments().as_file(str(tmp_path / "some.expt"))
    dials.command_line.show.run(["some.expt", "bragg.refl"])
    text = capsys.readouterr().out
    assert f"Number of reflections: {N}" in text or f"contains {N} reflections" in text
    assert "intensity.sum.value" in text
    low = some_peaks().intensity.min()
    assert f"{low:.1f}" in text


def parts_of(peaks: PeakIntensities, *limits: int) -> list[PeakIntensities]:
    return [
        PeakIntensities(
            **{
                field.name: getattr(peaks, field.name)[start:stop]
                for field in dataclasses.fields(PeakIntensities)
            }
        )
        for start, stop in zip((0, *limits), (*limits, len(peaks.id)))
    ]


def test_parts_make_the_same_file_as_the_whole(tmp_path):
    peaks = some_peaks(50)
    written(tmp_path, peaks)
    with bragg_table(tmp_path / "parts.refl", some_experiments()) as append:
        for part in parts_of(peaks, 0, 13, 14, 14, 40):
            append(part)
    whole, parts = (tmp_path / name for name in ("bragg.refl", "parts.refl"))
    assert whole.read_bytes() == parts.read_bytes()
    assert sorted(tmp_path.iterdir()) == [whole, parts]  # nothing is left beside them


def test_no_table_without_peaks(tmp_path):
    with bragg_table(tmp_path / "bragg.refl", some_experiments()) as append:
        append(some_peaks(0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_interrupted_table_leaves_what_was_there(tmp_path, error):
    (tmp_path / "bragg.refl").write_text("before")
    with pytest.raises(error):
        with bragg_table(tmp_path / "bragg.refl", some_experiments()) as append:
            append(some_peaks())
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["bragg.refl"]
    assert (tmp_path / "bragg.refl").read_text() == "before"


def test_dials_writes_the_same_table(tmp_path):
    """What DIALS makes of the table that it has read is equal, column by column."""
    table = written(tmp_path, some_peaks())
    table.as_file(str(tmp_path / "again.refl"))
    again = flex.reflection_table.from_file(str(tmp_path / "again.refl"))
    assert set(again.keys()) == set(table.keys()) == set(WRITTEN)
    for name in WRITTEN:
        assert type(again[name]) is type(table[name])
        assert list(again[name]) == list(table[name])
    assert isinstance(table["panel"], flex.size_t)
    assert isinstance(table["miller_index"], flex.miller_index)


def test_only_the_part_at_hand_is_held(tmp_path):
    """Memory does not grow with the number of the parts."""
    part = some_peaks(2000)
    size = sum(
        np.asarray(column.values(part), column.dtype).nbytes
        for column in WRITTEN.values()
    )
    tracemalloc.start()
    try:
        with BraggWriter(tmp_path / "b.refl", some_experiments()) as writer:
            for _ in range(50):
                writer.append(part)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "b.refl").stat().st_size > 50 * size
    # the part, and the megabyte in which files are copied
    assert held < 5 * size + 2_000_000 < 50 * size


def test_a_table_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with BraggWriter(tmp_path / "b.refl", some_experiments()) as writer:
            writer.append(some_peaks())
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_more_peaks_than_a_table_can_hold(tmp_path, monkeypatch, caplog):
    """There is no table, also no earlier one, and what else is done goes on."""
    monkeypatch.setattr(bragg, "MAX_BYTES", 24 * 20)  # of the widest column
    path = tmp_path / "bragg.refl"
    with bragg_table(path, some_experiments()) as append:
        for part in parts_of(some_peaks(20), 7, 14):
            append(part)
    assert len(flex.reflection_table.from_file(str(path))) == 20
    assert caplog.messages == [] and not append.is_full
    with bragg_table(path, some_experiments()) as append:
        for part in parts_of(some_peaks(33), 7, 14, 20, 21):
            append(part)
            assert len(list(tmp_path.iterdir())) == 2 - append.is_full
        assert path.exists()  # until the end
    assert list(tmp_path.iterdir()) == []
    (message,) = caplog.messages
    assert message.startswith("Warning: 33 Bragg peaks are more than")
    assert f"{path} was not written" in message


def test_an_error_after_too_many_peaks_leaves_what_was_there(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(bragg, "MAX_BYTES", 24 * 5)
    (tmp_path / "bragg.refl").write_text("before")
    with pytest.raises(ZeroDivisionError):
        with bragg_table(tmp_path / "bragg.refl", some_experiments()) as append:
            append(some_peaks())
            raise ZeroDivisionError
    assert (tmp_path / "bragg.refl").read_text() == "before"
    assert caplog.messages == []


def test_largest_column_that_dials_reads():
    """The length of a column is written in 32 bits."""
    assert struct.unpack(">I", bragg._bytes_head(bragg.MAX_BYTES)[1:]) == (2**32 - 1,)
    with pytest.raises(struct.error):
        bragg._bytes_head(bragg.MAX_BYTES + 1)
