"""README.md as its tests see it: blocks of code and tables, each with the comment before it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.tree import ROOT

MOST_WORDS = 700
_COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code or a table; `mark` is the comment before it."""

    text: str
    mark: str | None

    @property
    def runners(self) -> list[str]:
        """What runs the block's commands: `make target`, or a file of tests."""
        return self.mark.removeprefix("run by: ").split(", ") if self._is("run by: ") else []

    @property
    def log(self) -> str | None:
        """The heading of the log entry that has the block's numbers."""
        return self.mark.removeprefix("log: ") if self._is("log: ") else None

    def _is(self, kind: str) -> bool:
        return self.mark is not None and self.mark.startswith(kind)


def visible_words(text: str) -> list[str]:
    """The words that a reader sees; a table's bars and rules are none."""
    words = _COMMENT.sub("", text).split()
    return [word for word in words if re.search(r"\w", word)]


def blocks(text: str) -> Iterator[Block]:
    """The blocks of code, and the tables, in order."""
    mark: str | None = None
    for part in _parts(text):
        part = part.rstrip("\n")
        comment = _COMMENT.fullmatch(part)
        is_code = part.startswith("```") or all(
            line.startswith("    ") for line in part.split("\n")
        )
        if comment is None and (is_code or part.startswith("|")):
            yield Block(part, mark)
        mark = None if comment is None else comment[1]


def _parts(text: str) -> list[str]:
    """Paragraphs; a fenced block is a single one."""
    return re.findall(r"^```[^`]*^```$|(?:^(?!```)[^\n]+\n?)+", text, re.MULTILINE)


def entry(heading: str) -> str:
    """The log entry under a heading, with the parts below it."""
    log = (ROOT / "docs/log.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", log, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def is_quoted(number: str, text: str) -> bool:
    """Whether a text has the number, perhaps with more digits."""
    digits = len(number.partition(".")[2])
    return any(f"{float(each):.{digits}f}" == number for each in re.findall(r"\d+\.\d+", text)
               if len(each.partition(".")[2]) >= digits)  # fmt: skip
