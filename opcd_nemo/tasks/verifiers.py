"""Does an answer keep to a style? Pure functions, strict where a lax rule could be gamed."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable

Verifier = Callable[[str], bool]

MAX_BREVITY_WORDS = 20
MIN_BREVITY_WORDS = 3
MIN_BULLETS = 3

ABBREVIATION = re.compile(r"\b(e\.g|i\.e|U\.S|U\.K|vs|approx|Dr|Mr|Mrs|Ms|St)\.(?=,?\s)")
_SENTENCE_BREAK = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s|[a-z][.!?][A-Z]")
_SENTENCE_END = re.compile(r"(?<!\.\.)[.!?][\"'\u201d\u2019)\]]*$")
_BULLET = re.compile(r"\s*[-*•]\s.*\w.*")
_PIRATE = re.compile(r"\b(arr+|ahoy|matey|ye|aye)\b", re.IGNORECASE)


def is_brief(text: str) -> bool:
    """True for exactly one complete sentence of 3 to 20 words.

    A text that was cut before its final stop, or that trails off in an ellipsis, is not complete.
    A stop followed by a space ends a sentence, except after a few listed abbreviations.
    """
    text = text.strip()
    num_words = sum(any(letter.isalnum() for letter in word) for word in text.split())
    return (
        MIN_BREVITY_WORDS <= num_words <= MAX_BREVITY_WORDS
        and "\n" not in text
        and _SENTENCE_END.search(text) is not None
        and _SENTENCE_BREAK.search(ABBREVIATION.sub(r"\1", text)) is None
    )


def is_bullets(text: str) -> bool:
    """True with 3 or more lines that begin with `-`, `*` or `•` and hold a word.

    Numbered lines are no bullets. Text around the list is allowed, and so is a last bullet cut
    short. What the bullets say is not judged: three equal bullets are a list too.
    """
    return sum(_BULLET.fullmatch(line) is not None for line in text.splitlines()) >= MIN_BULLETS


def is_json(text: str) -> bool:
    """True when the whole text is one JSON object whose `answer` is a string that is not blank.

    A code fence, or a word before or after the object, makes it false.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return False
    answer = parsed.get("answer") if isinstance(parsed, dict) else None
    return isinstance(answer, str) and bool(answer.strip())


def is_pirate(text: str) -> bool:
    """True when the text has the word arr (with two r or more), ahoy, matey, ye or aye."""
    return _PIRATE.search(text) is not None


def mentions(answer: str, text: str) -> bool:
    """True when `text` has `answer` as whole words; case and accents do not count."""
    return re.search(rf"(?<!\w){re.escape(_plain(answer))}(?!\w)", _plain(text)) is not None


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))


VERIFIERS: dict[str, Verifier] = {
    "brevity": is_brief,
    "bullets": is_bullets,
    "json": is_json,
    "pirate": is_pirate,
}
