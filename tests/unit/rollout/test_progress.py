"""The bar of an evaluation counts the answers that an engine says have ended."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest

from opcd_nemo.rollout.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Engine:
    def __init__(self) -> None:
        self.on_finished: Callable[[int], None] | None = None


def test_the_bar_counts_what_the_engine_tells_and_lets_go_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, screen = Engine(), Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(engine, "the base model", 5):
        assert engine.on_finished is not None
        engine.on_finished(3)
    assert engine.on_finished is None
    last = screen.getvalue().rpartition("\r")[2]
    assert "the base model: 100%" in last
    assert "5/5" in last


def test_an_engine_that_tells_nothing_is_done_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(object(), "x", 2):
        pass
    assert "2/2" in screen.getvalue()


def test_where_nobody_watches_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(Engine(), "x", 2):
        pass
    assert screen.getvalue() == ""
