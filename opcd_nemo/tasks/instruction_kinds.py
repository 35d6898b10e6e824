"""Instructions that a program can check: how each is worded, varied and verified, strictly.

A check takes the answer without blanks around it, and never gets an empty answer. What a wording
leaves open is read the strict way where a lax reading could be met by accident.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opcd_nemo.tasks.verifiers import ABBREVIATION

_SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]*]*(?=\s|$)|\n")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_TITLE = re.compile(r"<<[^<>\n]*\w[^<>\n]*>>")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\w[^\[\]\n]*\](?!\()")  # no link of Markdown
_HIGHLIGHT = re.compile(r"(?<![*\w])\*(?![\s*])[^*\n]*\w[^*\n]*(?<!\s)\*(?![*\w])")
_SEPARATOR = re.compile(r"^[^\S\n]*\*{6}[^\S\n]*$", re.MULTILINE)
_BULLET = re.compile(r"^[^\S\n]*- .*\w", re.MULTILINE)
_NUMBERED = re.compile(r"^[^\S\n]*(\d+)\. .*\w", re.MULTILINE)
_POSTSCRIPT = re.compile(r"P\.S\. .*\w")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of instruction; `choices` has the values of every slot of `wording`.

    `check` takes the answer and the chosen values. The slot `question` is filled by the prompt.
    """

    wording: str
    check: Callable[..., bool]
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def words(text: str) -> int:
    """Count the words, which are separated by blanks and have a letter or a digit."""
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


def sentences(text: str) -> list[str]:
    """Split at stops that a blank follows, but for a few abbreviations, and at ends of lines."""
    parts = _SENTENCE_END.split(ABBREVIATION.sub(r"\1", text))
    return [part.strip() for part in parts if words(part)]


def paragraphs(text: str) -> list[str]:
    """Split at blank lines."""
    return _BLANK_LINES.split(text)


def occurrences(word: str, text: str) -> int:
    """Count a word as a whole word, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def is_json_object(text: str, first: str, second: str) -> bool:
    """True for one object with exactly these keys, whose values are texts that are not blank."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(parsed, dict)
        and parsed.keys() == {first, second}
        and all(isinstance(value, str) and value.strip() for value in parsed.values())
    )


def is_lower(text: str) -> bool:
    """True for letters, none of them a capital."""
    return text != text.upper() and text == text.lower()


def is_upper(text: str) -> bool:
    """True for letters, all of them capitals."""
    return text != text.lower() and text == text.upper()


def is_quoted(text: str) -> bool:
    """True between two double quotation marks, the only ones: `"a" or "b"` is not quoted."""
    return text[0] == text[-1] == '"' and text.count('"') == 2 and words(text) > 0


def has_sections(text: str, marker: str, n: int) -> bool:
    """True with lines that begin `MARKER 1` to `MARKER n` in this order, each before some text."""
    _, *parts = re.split(rf"^{marker} (\d+)(?!\w)", text, flags=re.MULTILINE)
    numbers, bodies = parts[::2], parts[1::2]
    return numbers == [str(i + 1) for i in range(n)] and all(map(words, bodies))


def has_numbered_items(text: str, n: int) -> bool:
    """True when the lines that begin with a number and a stop are `1.` to `n.`, in this order."""
    return _NUMBERED.findall(text) == [str(i + 1) for i in range(n)]


def has_two_answers(text: str) -> bool:
    """True for two different texts around one line of six asterisks."""
    parts = [part.strip() for part in _SEPARATOR.split(text)]
    return len(parts) == 2 and all(map(words, parts)) and parts[0] != parts[1]


def has_postscript(text: str) -> bool:
    """True when the last line is a postscript, and not the only line."""
    before, _, last = text.rpartition("\n")
    return words(before) > 0 and _POSTSCRIPT.match(last) is not None


KINDS: dict[str, Kind] = {
    "min_words": Kind(
        wording="Use at least {n} words.",
        check=lambda text, n: words(text) >= n,
        choices={"n": (40, 60, 80)},
    ),
    "max_words": Kind(
        wording="Use at most {n} words.",
        check=lambda text, n: words(text) <= n,
        choices={"n": (40, 50, 60)},
    ),
    "min_sentences": Kind(
        wording="Write at least {n} sentences.",
        check=lambda text, n: len(sentences(text)) >= n,
        choices={"n": (3, 4, 5)},
    ),
    "max_sentences": Kind(
        wording="Write at most {n} sentences.",
        check=lambda text, n: len(sentences(text)) <= n,
        choices={"n": (2, 3, 4)},
    ),
    "short_sentences": Kind(
        wording="No sentence may have more than {n} words.",
        check=lambda text, n: all(words(sentence) <= n for sentence in sentences(text)),
        choices={"n": (12, 15)},
    ),
    "paragraphs": Kind(
        wording="Write exactly {n} paragraphs with a blank line between them.",
        check=lambda text, n: len(paragraphs(text)) == n,
        choices={"n": (2, 3, 4)},
    ),
    "lower_case": Kind(wording="Write everything in lower case.", check=is_lower),
    "upper_case": Kind(wording="Write everything in capital letters.", check=is_upper),
    "capital_words": Kind(
        wording="Write at least {n} words in capital letters.",
        check=lambda text, n: len(re.findall(r"\b[A-Z]{2,}\b", text)) >= n,
        choices={"n": (2, 3)},
    ),
    "no_comma": Kind(
        wording="Do not use any comma.", check=lambda text: not set(text) & set(",\uff0c\u3001")
    ),
    "keyword": Kind(
        wording='Use the word "{word}" at least {n} times.',
        check=lambda text, word, n: occurrences(word, text) >= n,
        choices={"word": ("morning", "simple", "people", "slowly", "green"), "n": (2, 3)},
    ),
    "forbidden_word": Kind(
        wording='Do not use the word "{word}".',
        check=lambda text, word: occurrences(word, text) == 0,
        choices={"word": ("really", "very", "also", "because", "many")},
    ),
    "start": Kind(
        wording='Begin your answer with exactly these words: "{phrase}"',
        check=lambda text, phrase: text.startswith(phrase) and words(text[len(phrase) :]) > 0,
        choices={"phrase": ("Let me think.", "Here we go:", "In short:", "A good question!")},
    ),
    "end": Kind(
        wording='End your answer with exactly these words: "{phrase}"',
        check=lambda text, phrase: text.endswith(phrase) and words(text[: -len(phrase)]) > 0,
        choices={"phrase": ("That was all.", "Now you know.", "Do you agree?", "The end.")},
    ),
    "question_end": Kind(
        wording="The last character of your answer must be a question mark.",
        check=lambda text: text.endswith("?") and words(text) > 0,
    ),
    "repeat": Kind(
        wording='First repeat "{question}" word for word, then answer.',
        check=lambda text, question: text.startswith(question) and words(text[len(question) :]) > 0,
    ),
    "quoted": Kind(
        wording="Put the whole answer between double quotation marks, and use no others.",
        check=is_quoted,
    ),
    "json": Kind(
        wording='Answer with one JSON object, without anything around it, whose keys are "{first}" '
        'and "{second}" and whose values are texts.',
        check=is_json_object,
        choices={"first": ("title", "topic"), "second": ("answer", "text")},
    ),
    "bullets": Kind(
        wording='Write exactly {n} bullet points, each on a line of its own that begins with "- ".',
        check=lambda text, n: len(_BULLET.findall(text)) == n,
        choices={"n": (2, 3, 4)},
    ),
    "numbered": Kind(
        wording='Write exactly {n} numbered points, on lines that begin with "1. ", "2. " and so '
        "on.",
        check=has_numbered_items,
        choices={"n": (2, 3, 4)},
    ),
    "sections": Kind(
        wording='Write {n} sections; begin each with a line such as "{marker} 1".',
        check=has_sections,
        choices={"n": (2, 3), "marker": ("SECTION", "PART", "CHAPTER")},
    ),
    "two_answers": Kind(
        wording="Give two different answers, separated by a line of six asterisks: ******",
        check=has_two_answers,
    ),
    "title": Kind(
        wording="Add a title in double angle brackets, such as <<my title>>.",
        check=lambda text: _TITLE.search(text) is not None,
    ),
    "postscript": Kind(
        wording='Let the last line of your answer be a postscript that begins with "P.S. ".',
        check=has_postscript,
    ),
    "letter": Kind(
        wording='Use the letter "{letter}" at least {n} times.',
        check=lambda text, letter, n: text.casefold().count(letter) >= n,
        choices={"letter": ("b", "k", "v", "w"), "n": (4, 6)},
    ),
    "placeholders": Kind(
        wording="Use at least {n} placeholders in square brackets, such as [name].",
        check=lambda text, n: len(_PLACEHOLDER.findall(text)) >= n,
        choices={"n": (1, 2, 3)},
    ),
    "highlights": Kind(
        wording="Highlight at least {n} parts with single asterisks, such as *this part*.",
        check=lambda text, n: len(_HIGHLIGHT.findall(text)) >= n,
        choices={"n": (1, 2)},
    ),
    "numbers": Kind(
        wording="Use at least {n} numbers, written in digits.",
        check=lambda text, n: len(_NUMBER.findall(text)) >= n,
        choices={"n": (2, 3)},
    ),
    "no_digits": Kind(
        wording="Do not use any digit.",
        check=lambda text: not any(letter.isdigit() for letter in text),
    ),
    "number_only": Kind(
        wording="Do not answer in words: write only how much you know about it, as one whole "
        "number from 0 to 100.",
        check=lambda text: re.fullmatch(r"0|[1-9][0-9]?|100", text) is not None,
    ),
}

ALONE = frozenset({"json", "number_only"})  # they say all about the form of an answer

_CLASHES = [
    (frozenset(left.split()), frozenset(right.split()))
    for left, right in (
        ("min_words", "max_words max_sentences"),
        ("max_words", "min_sentences max_sentences sections"),
        ("min_sentences", "max_sentences"),
        ("min_sentences max_sentences", "numbered bullets sections postscript title two_answers"),
        ("max_sentences", "paragraphs keyword"),
        ("paragraphs", "bullets numbered sections two_answers postscript"),
        ("bullets", "numbered sections two_answers"),
        ("numbered", "sections two_answers no_digits numbers"),
        ("sections", "two_answers no_digits numbers"),
        ("numbers", "no_digits"),
        ("lower_case", "upper_case"),
        ("lower_case upper_case", "capital_words start end repeat postscript sections"),
        ("start", "repeat quoted"),
        ("repeat", "quoted"),
        ("end", "question_end postscript quoted"),
        ("question_end", "postscript quoted"),
    )
]


def compatible(first: str, second: str) -> bool:
    """True when an answer can follow an instruction of each kind without contortions."""
    if first == second or ALONE.intersection((first, second)):
        return False
    return not any(
        (first in left and second in right) or (second in left and first in right)
        for left, right in _CLASHES
    )
