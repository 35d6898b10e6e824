"""README.md: short, its commands are run by something, its numbers are in the log."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.readme import MOST_WORDS, blocks, entry, is_quoted, visible_words
from tests.tree import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_it_is_read_in_three_minutes() -> None:
    assert len(visible_words(README)) <= MOST_WORDS


def test_every_block_says_what_runs_it_or_where_its_numbers_are_from() -> None:
    unmarked = [block.text for block in blocks(README) if block.mark is None]
    assert not unmarked


def test_what_runs_a_command_is_there() -> None:
    runners = [runner for block in blocks(README) for runner in block.runners]
    assert runners
    for runner in runners:
        kind, _, name = runner.rpartition(" ")
        assert name in TARGETS if kind == "make" else (ROOT / runner).is_file(), runner


def test_every_make_command_is_a_target() -> None:
    assert set(re.findall(r"make ([a-z-]+)", README)) <= TARGETS


@pytest.mark.parametrize(
    "block", [each for each in blocks(README) if each.log], ids=lambda b: b.log
)
def test_every_number_is_in_the_entry_that_is_named(block) -> None:
    text = entry(block.log)
    numbers = re.findall(r"\d+\.\d+", block.text)
    assert numbers
    assert not [number for number in numbers if not is_quoted(number, text)]


def test_a_table_of_numbers_names_its_entry() -> None:
    for block in blocks(README):
        if block.text.startswith("|") and re.search(r"\d\.\d", block.text):
            assert block.log, block.text


def test_the_picture_is_what_its_program_draws(tmp_path: Path) -> None:
    program = tmp_path / "method_picture.py"
    program.write_text((ROOT / "docs/method_picture.py").read_text(encoding="utf-8"))
    runpy.run_path(str(program), run_name="__main__")
    drawn = (tmp_path / "method.svg").read_text(encoding="utf-8")
    assert drawn == (ROOT / "docs/method.svg").read_text(encoding="utf-8")


def test_a_number_is_quoted_as_it_rounds() -> None:
    assert is_quoted("0.82", "OPCD 0.821 (by seed")
    assert is_quoted("1.00", "0.00 / 1.00 / 1.00")
    assert not is_quoted("0.83", "OPCD 0.821")
    assert not is_quoted("0.8213", "OPCD 0.821")
