"""Experience items: what a model wrote down of its own games and answers. Nothing here needs torch.

Source: On-Policy Context Distillation (arXiv 2602.12275), section on experiential knowledge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from random import Random

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.thinking import spoken

ITEM_MARKER = "- EXPERIENCE ITEM:"


def parse_items(answer: str) -> tuple[str, ...]:
    """Return the items of an answer; its thinking and every line without the marker are dropped.

    Several items may stand in one line. White space around an item is cut, inside it is kept.
    """
    parts = [p for line in spoken(answer).splitlines() for p in line.split(ITEM_MARKER)[1:]]
    return tuple(part.strip() for part in parts if part.strip())


def content_hash(items: Sequence[str]) -> str:
    """SHA-256, in hex, of the items in their order."""
    canonical = json.dumps(list(items), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def as_text(items: Sequence[str]) -> str:
    """One item a line, as the model reads them."""
    return "\n".join(f"- {item}" for item in items)


def newest_within(
    items: Sequence[str], cap_tokens: int, count: Callable[[str], int]
) -> tuple[str, ...]:
    """Return the newest whole items whose text has at most `cap_tokens` tokens.

    Args:
        items: oldest first.
        cap_tokens: most tokens of `as_text`.
        count: the tokens of a text.

    Raises:
        UserError: not even the newest item fits.
    """
    if not items:
        return ()
    first = next((i for i in range(len(items)) if count(as_text(items[i:])) <= cap_tokens), None)
    if first is None:
        raise UserError(
            "experience.extraction.cap_tokens",
            cap_tokens,
            "a cap that holds one item",
            problem=f"the newest item has {count(as_text(items[-1:]))} tokens",
        )
    return tuple(items[first:])


def shuffled_words(items: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return a control: the same words in random places, as many in each item as before."""
    words = [word for item in items for word in item.split()]
    Random(seed).shuffle(words)
    shuffled, start = [], 0
    for item in items:
        end = start + len(item.split())
        shuffled.append(" ".join(words[start:end]))
        start = end
    return tuple(shuffled)
