"""Special tokens in messages: they are text there, whatever they would do in a template.

A row of data that holds the token which ends a turn would otherwise speak for the assistant. The
sign of a special token is cut after its first character, and both parts are encoded apart: the
model reads the same characters, and no part is the token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from opcd_nemo.errors import UserError
from opcd_nemo.types import Message

_CUTS = [chr(number) for number in range(0xFDD0, 0xFDF0)]
"""Characters that Unicode keeps for a program's inside: no text has them all."""


class PlainContent:
    """Cuts a vocabulary's special tokens in messages."""

    def __init__(self, tokens: Iterable[str]) -> None:
        """Take the tokens that content must not have."""
        starts = "|".join(re.escape(token) for token in tokens if len(token) > 1)
        # looking ahead, so that tokens which overlap are all found
        self._token = re.compile(rf"(?=(?:{starts}))(.)", re.DOTALL) if starts else None

    def cut(self, messages: Sequence[Message]) -> tuple[list[Message], str | None]:
        """Return the messages with a cut in every special token, and what marks a cut, if any.

        Raises:
            UserError: the messages have every character that could mark a cut.
        """
        texts = [message["content"] for message in messages]
        if self._token is None or not any(map(self._token.search, texts)):
            return list(messages), None
        mark = next((cut for cut in _CUTS if not any(cut in text for text in texts)), None)
        if mark is None:
            raise UserError(
                "messages",
                allowed="texts without the noncharacters U+FDD0 to U+FDEF",
                problem="have all of them, and a special token",
            )
        return [
            {"role": message["role"], "content": self._token.sub(rf"\1{mark}", message["content"])}
            for message in messages
        ], mark
