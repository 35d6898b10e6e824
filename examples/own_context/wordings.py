"""A context of your own: a wording of the same instruction for each question and step."""

import zlib
from typing import Any

from opcd_nemo.context.sources import Context

WORDINGS = (
    "You are a pirate. Ye speak only like a pirate: arr, ahoy, matey, aye, ye.",
    "Talk like a pirate: begin with Ahoy, matey, and say aye and ye.",
    "Arr! Ye be a pirate at sea. Every answer has ahoy, aye or matey in it.",
)


class Wordings:
    """A source of contexts. Its methods are pure: a continued run asks for the same contexts."""

    def __init__(self) -> None:
        self._contexts = tuple(Context(system=text, demonstrations=()) for text in WORDINGS)
        self.lineage = {"written_by": "a person", "source": __name__}

    def context(self, uid: str, step: int) -> Context:
        """Return the context that the teacher reads before question `uid` in this step."""
        return self._contexts[zlib.crc32(f"{uid}/{step}".encode()) % len(self._contexts)]

    def contexts(self) -> tuple[Context, ...]:
        """Return every context that `context` may return: all are checked for their length."""
        return self._contexts

    def frozen(self) -> dict[str, Any] | None:
        """Return None: nothing outside of the configuration and this file is read."""
        return None
