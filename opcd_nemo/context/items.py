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

    A line may hold several items. White space around an item is cut; inside an item it is kept.
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

    Twice as many items as are returned are looked at, and no more: the cost grows with the cap.

    Args:
        items: oldest first.
        cap_tokens: most tokens of `as_text`.
        count: the tokens of a text; more items never have fewer.

    Raises:
        UserError: not even the newest item fits.
    """
    if not items:
        return ()

    def fits(number: int) -> bool:
        return count(as_text(items[-number:])) <= cap_tokens

    if not fits(1):
        raise UserError(
            "experience.extraction.cap_tokens",
            cap_tokens,
            "a cap that holds one item",
            problem=f"the newest item has {count(as_text(items[-1:]))} tokens",
        )
    fitting, most = 1, len(items)
    while fitting < most and fits(number := min(2 * fitting, most)):
        fitting = number
    most = min(2 * fitting - 1, most)  # as many as that may fit
    while fitting < most:
        number = (fitting + most + 1) // 2
        fitting, most = (number, most) if fits(number) else (fitting, number - 1)
    return tuple(items[-fitting:])


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
