"""Where a reply gives its answer: the rules are those of the prompts that ask for it."""

from __future__ import annotations

import re

from opcd_nemo.tasks.thinking import spoken

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_LINE = re.compile(r"\banswer\b[*_ ]*:[ \t*_]*([^\s*_][^\n]*)", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def tagged(reply: str) -> str | None:
    """Return what the last `<answer>...</answer>` after the thinking holds, or None."""
    spans = _TAG.findall(spoken(reply))
    return spans[-1].strip() or None if spans else None


def marked(reply: str) -> str | None:
    r"""Return the last marked answer after the thinking as it is written, or None.

    Marks are `\boxed{...}`, `#### ...`, `Answer: ...` and `<answer>...</answer>`; a mark that is
    cut short, or holds nothing, does not count. A box inside another mark is the answer.
    """
    text = spoken(reply)
    found = [
        (match.start(1), match[1])
        for mark in (_TAG, _HASHES, _LINE)
        for match in mark.finditer(text)
        if _BOX.search(match[1]) is None  # a box is found by itself, or it is cut short
    ]
    found += boxes(text)
    filled = [(start, answer.strip()) for start, answer in found if plain(answer)]
    return max(filled)[1] if filled else None


def boxes(text: str) -> list[tuple[int, str]]:
    r"""Return (start, content) of every `\boxed{...}` that is closed, in one pass."""
    found = []
    opened: list[int | None] = []  # where a box begins; None: another brace
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(None)
        elif match[0].endswith("{") and match[0].startswith("\\boxed"):
            opened.append(match.end())
        elif match[0] == "}" and opened and (begin := opened.pop()) is not None:
            found.append((begin, text[begin : match.start()]))
    return found


def after_hashes(text: str) -> str | None:
    """Return what follows the last `####`, or None."""
    return (text.rpartition("####")[2].strip() or None) if "####" in text else None


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` that is closed, or None."""
    found = boxes(text)
    return (max(found)[1].strip() or None) if found else None


def plain(answer: str) -> str:
    """Return an answer without marks of emphasis or mathematics around it, and no final stop."""
    text = answer.strip().strip("*_ ").removesuffix(".").strip("*_ ")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) * 2 - 1:
            text = text.removeprefix(opening).removesuffix(closing).strip()
            break
    return text
