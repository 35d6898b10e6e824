"""A run may be continued on another layout; `make crash-test` tries more of them."""

from __future__ import annotations

from pathlib import Path

from tests.layouts import compare


def test_a_run_continued_on_tp2_is_the_uninterrupted_one_but_for_rounding(
    tiny: Path, tmp_path: Path
) -> None:
    is_within, line = compare(tiny, tmp_path, "single", "tp2")
    assert is_within, line
