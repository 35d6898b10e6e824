"""Where a reply gives its answer: the tasks' prompts ask for an answer in these forms."""

from __future__ import annotations

import re
from collections.abc import Iterator

from opcd_nemo.tasks.thinking import spoken

_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_LINE = re.compile(r"\banswer\b[*_ ]*:[ \t*_]*([^\s*_][^\n]*)", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])")
_BRACE = re.compile(rf"(?P<box>{_BOX.pattern}\s*\{{)|\\.|[{{}}]", re.DOTALL)
_FORMULA = re.compile(
    rf"(?P<box>{_BOX.pattern}[ \t]*(?![\s{{]))"
    r"|(?P<begin>\\[(\[])|(?P<end>\\[)\]]|\n)|\\.|(?P<dollar>\$\$?)"
)
_BRACES = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_TO_END = re.compile(rf"(?:{_BRACES}|\\(?!end\b)[^)\]\\\n]|[^${{}}\\\n]){{0,200}}")
_WORD = re.compile(rf"(?:{_BRACES}|\([^()$\n]*\)|\\(?:[A-Za-z]+|[^\s)\]])|[^\s${{}}\\]){{0,200}}")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}\s")


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
    r"""Return (start, content) of every box: `\boxed{2}`, `\fbox{2}`, `\boxed 2`.

    A brace that is never closed makes no box. A box without braces holds what follows up to the end
    of the formula, as MATH's authors read it; outside formulas it holds the next word.
    """
    return [*_braced(text), *_unbraced(text)]


def _braced(text: str) -> Iterator[tuple[int, str]]:
    opened: list[int | None] = []  # where a box begins; None: another brace
    for match in _BRACE.finditer(text):
        if match["box"]:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened and (begin := opened.pop()) is not None:
            yield begin, text[begin : match.start()]


def _unbraced(text: str) -> Iterator[tuple[int, str]]:
    in_formula = False
    for match in _FORMULA.finditer(text):
        if match["box"]:
            content = _TO_END.match(text, match.end())
            assert content is not None
            if not in_formula or _PROSE.search(re.sub(_BRACES, "", content[0])):
                content = _WORD.match(text, match.end())
                assert content is not None
            yield match.end(), content[0].rstrip(" .,;:!?")
        elif match["dollar"]:
            in_formula = not in_formula
        elif match["begin"] or match["end"]:
            in_formula = bool(match["begin"])


def after_hashes(text: str) -> str | None:
    """Return what follows the last `####`, or None."""
    return (text.rpartition("####")[2].strip() or None) if "####" in text else None


def last_box(text: str) -> str | None:
    """Return the content of the last box, or None."""
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
