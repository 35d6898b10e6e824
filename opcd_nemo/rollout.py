"""Rollouts: how tokens are sampled, what an engine must do, and one batch of episodes played.

Shape letters: `R` rows (sequences), `V` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, Protocol

import torch

from opcd_nemo.context import ContextSource
from opcd_nemo.tasks import Episode
from opcd_nemo.tokenizer import ChatTokenizer
from opcd_nemo.types import Prompt, Rollout, Sample, Turn

SamplerName = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int


class RolloutEngine(Protocol):
    """Continues prompts with the weights it last loaded."""

    @property
    def weights_version(self) -> int:
        """The version of the weights that are held."""

    def load_weights(self, version: int) -> None:
        """Take the model's present weights, under this version number."""

    def release_weights(self) -> None:
        """Give back what `load_weights` holds, until it is called again."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        step: int,
        prefix_ids: Sequence[int] = (),
    ) -> list[Sample]:
        """One continuation a prompt, in order; prompts may share `prefix_ids` at their start."""


def row_uniforms(seed: int, step: int, index: int, count: int) -> torch.Tensor:
    """The `count` uniform numbers of one sequence: a pure function of (seed, step, index)."""
    digest = hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample_tokens(
    logits_RV: torch.Tensor, uniform_R: torch.Tensor, sampling: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their log-probabilities (nats, before top-k and top-p) by inverse CDF.

    The log-probability is that of the tempered distribution; greedy reports temperature 1.
    """
    logits_RV = logits_RV.float()
    if sampling.temperature == 0:
        token_R = logits_RV.argmax(-1)
    else:
        logits_RV = logits_RV / sampling.temperature
        kept_RV = _nucleus(_top_k(logits_RV, sampling.top_k), sampling.top_p)
        cdf_RV = kept_RV.softmax(-1).double().cumsum(-1)
        threshold_R1 = uniform_R.to(cdf_RV)[:, None] * cdf_RV[:, -1:]
        token_R = torch.searchsorted(cdf_RV, threshold_R1, right=True)[:, 0]
        token_R = token_R.clamp(max=logits_RV.shape[-1] - 1)
    chosen_R = logits_RV.gather(-1, token_R[:, None])[:, 0]
    return token_R, chosen_R - logits_RV.logsumexp(-1)


def _top_k(logits_RV: torch.Tensor, top_k: int) -> torch.Tensor:
    if top_k == 0 or top_k >= logits_RV.shape[-1]:
        return logits_RV
    kept = logits_RV.topk(top_k, dim=-1)
    return torch.full_like(logits_RV, -torch.inf).scatter(-1, kept.indices, kept.values)


def _nucleus(logits_RV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches `top_p`."""
    if top_p >= 1:
        return logits_RV
    ordered = logits_RV.sort(dim=-1, descending=True)
    mass_RV = ordered.values.softmax(-1).double().cumsum(-1)
    before_RV = mass_RV - ordered.values.softmax(-1)
    values = ordered.values.masked_fill(before_RV >= top_p, -torch.inf)
    return torch.empty_like(logits_RV).scatter(-1, ordered.indices, values)


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


def collect_rollouts(
    engine: RolloutEngine,
    sampler: SamplerName,
    episodes: Sequence[Episode],
    conversation: Conversation,
    sampling: SamplingParams,
    *,
    seed: int,
    step: int,
    first_index: int,
    num_anchors: int = 0,
    prefix_ids: Sequence[int] = (),
) -> list[Rollout]:
    """Play this rank's episodes to their end and return every turn as a rollout.

    Args:
        engine: holds the weights of the sampler.
        sampler: `student` reads no context, `teacher` reads it.
        episodes: this rank's share of the global batch.
        conversation: renders the turns.
        sampling: how tokens are drawn.
        seed: of the run.
        step: of the run; with `seed` and the index it fixes every sample.
        first_index: the first episode's index in the global batch.
        num_anchors: the last episodes that keep old behaviour: their teacher reads no context.
        prefix_ids: start of the teacher's prompts whose keys and values the engine may hold.

    Raises:
        ValueError: a prompt does not fit the model's positions.
    """
    rollouts: list[Rollout] = []
    anchored = len(episodes) - num_anchors
    live = list(enumerate(episodes))
    turn = 0
    while live:
        sides = [conversation.prompts(e, step, with_context=place < anchored) for place, e in live]
        asked = [student if sampler == "student" else teacher for student, teacher in sides]
        for _, teacher in sides:
            conversation.check_fits(teacher, sampling.max_new_tokens)
        prompts = [
            Prompt(token_ids=ids, index=first_index + place + turn * 1_000_000)
            for ids, (place, _) in zip(asked, live, strict=True)
        ]
        samples = engine.generate(prompts, sampling, seed=seed, step=step, prefix_ids=prefix_ids)
        for (_, episode), (student, teacher), sample in zip(live, sides, samples, strict=True):
            episode.reply(conversation.tokenizer.decode(sample.response_ids))
            rollouts.append(
                Rollout(
                    uid=episode.uid,
                    turn_index=turn,
                    prompt_ids=student,
                    teacher_prompt_ids=teacher,
                    response_ids=sample.response_ids,
                    sampled_logprobs=sample.logprobs,
                    weights_version=engine.weights_version,
                    finish_reason=sample.finish_reason,
                )
            )
        live = [(place, episode) for place, episode in live if not episode.done]
        turn += 1
    return rollouts


def shared_start(prompts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The token ids that all prompts start with."""
    shared = takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
    return tuple(ids[0] for ids in shared)
