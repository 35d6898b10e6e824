"""One batch of episodes played to their end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.rollout.conversation import Conversation
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.tasks import Episode, has_many_turns
from opcd_nemo.types import Prompt, Rollout

SamplerName = Literal["student", "teacher"]
_MOST_EPISODES = 1_000_000  # of a global batch: later turns draw from indices beyond this number


def collect_rollouts(
    engine: RolloutEngine,
    sampler: SamplerName,
    episodes: Sequence[Episode],
    conversation: Conversation,
    sampling: Sampling,
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
        sampler: `student` reads no context, `teacher` reads the context.
        episodes: this rank's share of the global batch.
        conversation: renders the turns.
        sampling: how tokens are drawn.
        seed: of the run.
        step: of the run; `seed`, `step` and the index fix every sample.
        first_index: the first episode's index in the global batch.
        num_anchors: the last episodes that keep old behaviour: their teacher reads no context.
        prefix_ids: start of the teacher's prompts whose keys and values the engine may hold.

    Raises:
        UserError: a prompt does not fit the model's positions.
    """
    rollouts: list[Rollout] = []
    first_anchor = first_index + len(episodes) - num_anchors
    live = list(enumerate(episodes, start=first_index))
    turn = 0
    while live:
        rendered = [
            conversation.prompts(episode, step, with_context=index < first_anchor)
            for index, episode in live
        ]
        for of_turn in rendered:
            conversation.check_fits(of_turn.teacher_ids, sampling.max_new_tokens)
        prompts = [
            Prompt(
                token_ids=of_turn.student_ids if sampler == "student" else of_turn.teacher_ids,
                index=index + turn * _MOST_EPISODES,
                goes_on=has_many_turns(episode),
            )
            for of_turn, (index, episode) in zip(rendered, live, strict=True)
        ]
        samples = engine.generate(prompts, sampling, seed=seed, step=step, prefix_ids=prefix_ids)
        turns = zip(live, rendered, prompts, samples, strict=True)
        for (index, episode), of_turn, prompt, sample in turns:
            episode.reply(conversation.tokenizer.reply(prompt.token_ids, sample.response_ids))
            rollouts.append(
                Rollout(
                    uid=episode.uid,
                    episode_index=index,
                    turn_index=turn,
                    question=of_turn.question,
                    prompt_ids=of_turn.student_ids,
                    teacher_prompt_ids=of_turn.teacher_ids,
                    response_ids=sample.response_ids,
                    sampled_logprobs=sample.logprobs,
                    weights_version=engine.weights_version,
                    finish_reason=sample.finish_reason,
                )
            )
        live = [(index, episode) for index, episode in live if not episode.done]
        turn += 1
    return rollouts
