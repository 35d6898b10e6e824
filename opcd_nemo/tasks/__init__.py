"""Tasks: their prompts, and how answers are scored. This package needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from opcd_nemo.types import Message, Split, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What an episode that is done shows to somebody who learns from it.

    `outcome` is the environment's word on it; None where nobody but the label knows.
    """

    text: str
    outcome: str | None


class Context(Protocol):
    """What an episode needs of a context."""

    def messages(self, question: str) -> tuple[Message, ...]:
        """Return the chat that ends with `question`."""
        ...


class Episode(Protocol):
    """One play, used once: ask for a turn, reply, until it is done; then score."""

    @property
    def uid(self) -> str:
        """The prompt's name, the same in every epoch."""
        ...

    @property
    def done(self) -> bool:
        """True when no further reply is taken."""
        ...

    def turn(self, context: Context) -> Turn:
        """Return the chats that student and teacher continue now."""
        ...

    def longest_turn(self, context: Context) -> Turn:
        """Return a turn as long as any that this episode may come to ask."""
        ...

    def reply(self, text: str) -> None:
        """Take the answer to the current turn."""
        ...

    def score(self) -> float:
        """Return the result in [0, 1] of an episode that is done."""
        ...

    def trace(self) -> Trace:
        """Return all that happened in an episode that is done; no label, no score."""
        ...

    @property
    def answered(self) -> bool:
        """False after a reply without an answer to judge: a failure of format, not of knowledge."""
        ...


def has_many_turns(episode: Episode) -> bool:
    """Whether a later turn's prompt may repeat this turn: the episode's class has `many_turns`.

    Engines keep what they have computed of such a turn. A class without `many_turns` has one turn.
    """
    return bool(getattr(episode, "many_turns", False))


class Task(Protocol):
    """A source of episodes; every method is pure in its arguments and the task's seed."""

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        """Return `n` new episodes of different prompts; their uids differ.

        Training prompts follow an order shuffled anew each epoch, and no prompt comes twice in an
        epoch. The other splits ignore `step` and give their first `n`, always in the same order.

        Raises:
            UserError: `n` is below 1 or above the number of prompts.
        """
        ...

    def anchors(self, step: int, n: int) -> list[Episode]:
        """Return `n` episodes whose teacher sees no context, against forgetting; never scored.

        Drawn like training prompts.

        Raises:
            UserError: as in `episodes`.
        """
        ...

    def unit_of(self, uid: str) -> str:
        """Return what an episode is a repetition of; most episodes repeat nothing but themselves.

        Episodes with the same unit (games on the same map) are no independent observations:
        intervals average over them first.
        """
        ...

    def report(self) -> dict[str, Any]:
        """Return what is known of the units (how many, how many in two splits); may be empty."""
        ...
