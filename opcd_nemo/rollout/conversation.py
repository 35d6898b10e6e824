"""A turn as the token ids that student and teacher read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from opcd_nemo.context.sources import ContextSource
from opcd_nemo.errors import UserError
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.tasks import Episode
from opcd_nemo.types import Turn


class TurnPrompts(NamedTuple):
    """The two prompts of a turn, and the text of its last user message without the context."""

    question: str
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Renders both sides of a turn, and refuses what does not fit the model's positions."""

    tokenizer: ChatTokenizer
    source: ContextSource
    max_positions: int

    def prompts(self, episode: Episode, step: int = 0, *, with_context: bool = True) -> TurnPrompts:
        """Render the episode's present turn, at a step of the run.

        Without context the teacher reads what the student reads.
        """
        return self._render(episode.turn(self.source.context(episode.uid, step)), with_context)

    def longest_prompts(self, episode: Episode) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Student's and teacher's ids of the longest turn that may come, over all contexts."""
        turns = [episode.longest_turn(context) for context in self.source.contexts()]
        rendered = [self._render(turn, True) for turn in turns]
        return rendered[0].student_ids, max((r.teacher_ids for r in rendered), key=len)

    def _render(self, turn: Turn, with_context: bool) -> TurnPrompts:
        student_ids = self.tokenizer.render(turn.student_messages)
        return TurnPrompts(
            question=turn.student_messages[-1]["content"],
            student_ids=student_ids,
            teacher_ids=self.tokenizer.render(turn.teacher_messages)
            if with_context
            else student_ids,
        )

    def check_fits(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a prompt that would have to be truncated.

        Raises:
            UserError: naming both lengths.
        """
        if len(prompt_ids) + max_new_tokens > self.max_positions:
            raise UserError(
                "max_new_tokens",
                max_new_tokens,
                "a shorter context or fewer new tokens (nothing is truncated)",
                problem=f"with a prompt of {len(prompt_ids)} tokens more than the model's "
                f"{self.max_positions} positions",
            )


def shared_start(prompts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The token ids that all prompts start with."""
    shared = takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return tuple(ids[0] for ids in shared)
