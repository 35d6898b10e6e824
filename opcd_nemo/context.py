"""What the teacher sees and the student does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from opcd_nemo.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A system message, then question and answer pairs, all put before the question.

    Nothing here is ever cut: a context that does not fit the model is an error of its user.
    """

    system: str | None
    demonstrations: tuple[tuple[str, str], ...]

    def messages(self, question: str) -> tuple[Message, ...]:
        """Return the chat that ends with `question`."""
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for asked, answered in self.demonstrations:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        messages.append({"role": "user", "content": question})
        return tuple(messages)

    @property
    def content_hash(self) -> str:
        """SHA-256, in hex, of the context's canonical JSON text."""
        canonical = json.dumps(
            {"demonstrations": self.demonstrations, "system": self.system},
            ensure_ascii=True,
            separators=(",", ":"),
            sort_keys=True,
        )
        return hashlib.sha256(canonical.encode()).hexdigest()


class ContextSource(Protocol):
    """Chooses the context of an episode."""

    def context(self, uid: str, step: int) -> Context:
        """Return the context of episode `uid` at `step`; pure in both."""
        ...


class FixedContext:
    """The same system prompt for every episode."""

    def __init__(self, *, system: str) -> None:
        """Raises: ValueError when `system` is blank."""
        _require_text("context.system", system)
        self._context = Context(system=system, demonstrations=())

    def context(self, uid: str, step: int) -> Context:
        """Return the one context."""
        return self._context


class FewShotContext:
    """The same demonstrations, and perhaps a system prompt, for every episode."""

    def __init__(self, *, system: str | None, demonstrations: Sequence[Mapping[str, str]]) -> None:
        """Take demonstrations as mappings with the keys `question` and `answer`.

        Raises:
            ValueError: no demonstration, other keys, or a blank text.
        """
        if system is not None:
            _require_text("context.system", system)
        if not demonstrations:
            raise ValueError("context.demonstrations=[]; allowed: one demonstration or more")
        pairs = tuple(_pair(index, one) for index, one in enumerate(demonstrations))
        self._context = Context(system=system, demonstrations=pairs)

    def context(self, uid: str, step: int) -> Context:
        """Return the one context."""
        return self._context


def _pair(index: int, demonstration: Mapping[str, str]) -> tuple[str, str]:
    key = f"context.demonstrations[{index}]"
    if set(demonstration) != {"question", "answer"}:
        raise ValueError(
            f"{key} has the keys {sorted(demonstration)}; allowed: question and answer"
        )
    _require_text(f"{key}.question", demonstration["question"])
    _require_text(f"{key}.answer", demonstration["answer"])
    return demonstration["question"], demonstration["answer"]


def _require_text(key: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}={value!r}; allowed: a text that is not blank")
