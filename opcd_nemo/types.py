"""The values that flow through a distillation step.

Shape letters: `T` tokens of a packed micro-batch, `R` its sequences, `N` response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

Split = Literal["train", "validation", "test"]
FinishReason = Literal["eos", "length"]
LayerSpec = Literal["local", "te"]
Fp8Format = Literal["hybrid", "e4m3"]


class Message(TypedDict):
    """One chat message, as chat templates expect it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The chats that student and teacher continue; they differ only by the context."""

    student_messages: tuple[Message, ...]
    teacher_messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids to be continued, and the key of their randomness.

    `index` counts the prompts of a step over all ranks: a sample is a pure function of
    (seed, step, index), whatever the batch or the data-parallel size. `goes_on`: a later
    prompt may start with this prompt and its answer.
    """

    token_ids: tuple[int, ...]
    index: int
    goes_on: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One continuation of a `Prompt`; log-probabilities in nats, under the sampling temperature."""

    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A response with both prompts it is scored under.

    Student sequence = `prompt_ids + response_ids`; teacher sequence =
    `teacher_prompt_ids + response_ids`. Ids are concatenated, never re-tokenised.

    Attributes:
        uid: of the episode; a wave of experience may play the same episode several times.
        episode_index: of the episode in the global batch of its step.
        turn_index: of the turn in its episode.
        question: the text of the turn's last user message, as the student reads it.
        prompt_ids: the student's prompt.
        teacher_prompt_ids: the teacher's prompt.
        response_ids: what was sampled.
        sampled_logprobs: of the response, in nats, under the sampling temperature.
        weights_version: of the model that sampled.
        finish_reason: why the response ends.
    """

    uid: str
    episode_index: int
    turn_index: int
    question: str
    prompt_ids: tuple[int, ...]
    teacher_prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampled_logprobs: tuple[float, ...]
    weights_version: int
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        """Check that every response token has its log-probability."""
        assert len(self.sampled_logprobs) == len(self.response_ids) >= 1, self.uid
        assert self.prompt_ids, self.uid
        assert self.teacher_prompt_ids, self.uid


class CheckFailed(RuntimeError):
    """The doctor found what would go wrong in a run, and has said what mends it."""
