"""A turn as the token ids that student and teacher read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from opcd_nemo.context.sources import ContextSource
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.tasks import Episode
from opcd_nemo.types import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Renders both sides of a turn, and refuses what does not fit the model's positions."""

    tokenizer: ChatTokenizer
    source: ContextSource
    max_positions: int

    def prompts(
        self, episode: Episode, step: int = 0, *, with_context: bool = True
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Student's and teacher's prompt ids of the episode's turn, at a step of the run.

        Without context the teacher reads what the student reads.
        """
        return self._render(episode.turn(self.source.context(episode.uid, step)), with_context)

    def longest_prompts(self, episode: Episode) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As `prompts`, of the longest turn that the episode may come to, over all contexts."""
        turns = [episode.longest_turn(context) for context in self.source.contexts()]
        sides = [self._render(turn, True) for turn in turns]
        return sides[0][0], max((teacher for _, teacher in sides), key=len)

    def _render(self, turn: Turn, with_context: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        student = self.tokenizer.render(turn.student_messages)
        return student, self.tokenizer.render(turn.teacher_messages) if with_context else student

    def check_fits(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a prompt that would have to be truncated.

        Raises:
            ValueError: naming both lengths.
        """
        if len(prompt_ids) + max_new_tokens > self.max_positions:
            raise ValueError(
                f"prompt of {len(prompt_ids)} tokens + max_new_tokens={max_new_tokens}: "
                f"longer than the model's {self.max_positions} positions; allowed: a shorter "
                "context or fewer new tokens (nothing is truncated)"
            )


def shared_start(prompts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The token ids that all prompts start with."""
    shared = takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return tuple(ids[0] for ids in shared)
