from __future__ import annotations

import os
import signal

import pytest
import tqdm

from dials_diffuse.util.signals import DeferredSignals, enter_whole, progress_bar


def test_deferred_signals_take_effect_late():
    with pytest.raises(KeyboardInterrupt):
        with DeferredSignals():
            os.kill(os.getpid(), signal.SIGINT)
            reached = True
    assert reached
    with DeferredSignals() as signals:
        signals.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signals.check()


def test_an_error_is_not_hidden_by_a_signal():
    with pytest.raises(ValueError, match="first"), DeferredSignals():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("first")


class Watched:
    """A context that is interrupted while it is made and entered."""

    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        self.steps = ["made"]

    def __enter__(self) -> list[str]:
        os.kill(os.getpid(), signal.SIGINT)
        self.steps.append("entered")
        return self.steps

    def __exit__(self, *_: object) -> None:
        self.steps.append("left")


def test_a_context_is_entered_as_a_whole():
    made = []

    def make() -> Watched:
        made.append(Watched())
        return made[0]

    with pytest.raises(KeyboardInterrupt):
        with enter_whole(make):
            made.append("the block")
    (watched,) = made
    assert watched.steps == ["made", "entered", "left"]


def test_a_progress_bar_is_made_as_a_whole(monkeypatch, capfd):
    """One without its attributes complains when it goes."""
    new = tqdm.tqdm.__new__

    def interrupted(cls, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return new(cls, *args, **kwargs)

    monkeypatch.setattr(tqdm.tqdm, "__new__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        progress_bar(range(3), desc="Watched")
    assert "Exception" not in capfd.readouterr().err


def test_progress_bar_goes_through_its_items():
    assert list(progress_bar([3, 1, 2], desc="Numbers")) == [3, 1, 2]
    with progress_bar(total=2) as bar:
        bar.update(2)
