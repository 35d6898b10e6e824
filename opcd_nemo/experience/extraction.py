"""Experience from a model's own traces: the model plays without context, then writes notes.

A chain is `num_steps` extractions whose items are appended. Chains are independent. Work is done in
waves, a step of all chains; each wave is written at once when all of its extractions are done, so
that a run that was killed repeats its last wave alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.context.items import as_text, newest_within, parse_items
from opcd_nemo.context.sources import NoContext
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import UserError
from opcd_nemo.experience.config import ExtractionConfig
from opcd_nemo.rollout.collect import collect_rollouts
from opcd_nemo.rollout.conversation import Conversation
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.storage import heartbeat
from opcd_nemo.storage.ranks import on_rank_0
from opcd_nemo.storage.records import read_lines
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.types import Message, Prompt

logger = logging.getLogger(__name__)

_RECORD = {
    "chain": int,
    "step": int,
    "uid": str,
    "score": float,
    "turns": list[str],
    "trace": str,
    "outcome": str | None,
    "answer": str,
    "items": list[str],
}
_REMEDY = "a copy of the file as it was; or no such file, and its wave is done again"
_WRITING = 500_000_000  # an extraction's index starts here: its random numbers are no player's


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A model with everything that it needs to answer; its tokenizer is the conversation's."""

    engine: RolloutEngine
    conversation: Conversation
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class _Play:
    """An episode of a chain's step, played to its end; `turns` are the texts of its prompts."""

    chain: int
    step: int
    episode: Episode
    turns: Sequence[str]


class Extraction:
    """Extracts wave by wave into a folder."""

    def __init__(
        self,
        run_folder: RunFolder,
        subfolder: str,
        settings: ExtractionConfig,
        task: Task,
        *,
        player: Sampler,
        writer: Sampler,
        parallel: Parallel,
        seed: int,
    ) -> None:
        """`player` meets the problems, `writer` writes the experience into the subfolder."""
        self._run_folder, self._subfolder = run_folder, subfolder
        self._settings, self._task = settings, task
        self._player, self._writer = player, writer
        self._parallel, self._seed = parallel, seed

    def run(self) -> list[dict[str, Any]]:
        """Do every wave that is not done; returns the records of all. Collective over the world.

        Raises:
            OSError: the disk refuses, or another attempt holds the folder.
            UserError: no extraction has written an item.
        """
        folder = self._run_folder.path / self._subfolder
        on_rank_0(self._parallel, lambda: folder.mkdir(parents=True, exist_ok=True))
        records: list[dict[str, Any]] = []
        for wave in range(self._settings.num_steps):
            found = self._written(wave)
            if found is None:
                found = self._wave(wave, records)
                text = "".join(f"{json.dumps(record)}\n" for record in found)
                self._write(wave, text)
                heartbeat.touch()
                logger.info("extraction: wave %s: %s", wave, _summary(found))
            records += found
        if not any(record["items"] for record in records):
            raise UserError(
                "experience.extraction",
                allowed="a prompt and a model that write lines with the marker - EXPERIENCE ITEM:",
                problem=f"{len(records)} extractions wrote no item",
            )
        return records

    def _write(self, wave: int, text: str) -> None:
        on_rank_0(self._parallel, lambda: self._run_folder.write(self._file(wave), text))

    def _file(self, wave: int) -> str:
        return f"{self._subfolder}/wave={wave:04d}.jsonl"

    def _written(self, wave: int) -> list[dict[str, Any]] | None:
        """The records of a wave that an earlier run has done. Collective over the world."""
        return on_rank_0(self._parallel, lambda: self._read(wave))

    def _read(self, wave: int) -> list[dict[str, Any]] | None:
        file = self._run_folder.path / self._file(wave)
        if not file.exists():
            return None
        found = read_lines(file, _RECORD, _REMEDY)
        if [record["chain"] for record in found] != list(range(self._settings.num_chains)):
            chains = f"holds {len(found)} records, not one of each chain"
            raise UserError(file, allowed=_REMEDY, problem=chains)
        if [record["uid"] for record in found] != self._uids(wave):
            other = "its problems are not those that this version draws"
            raise UserError(file, allowed="another name for the pipeline", problem=other)
        return found

    def _wave(self, wave: int, before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        share = self._parallel.share(self._settings.num_chains)
        plays = self._play(wave, share)
        prompts = [
            Prompt(token_ids=self._extraction_prompt(play, before), index=_WRITING + play.chain)
            for play in plays
        ]
        samples = self._writer.engine.generate(
            prompts, self._writer.sampling, seed=self._seed, step=wave
        )
        reply = self._writer.conversation.tokenizer.reply
        records = [
            self._record(play, reply(prompt.token_ids, sample.response_ids))
            for play, prompt, sample in zip(plays, prompts, samples, strict=True)
        ]
        return self._parallel.gather_over_dp(records)

    def _play(self, step: int, chains: range) -> list[_Play]:
        """The step's problems of these chains, which follow each other in the wave."""
        episodes = [self._problem(chain, step) for chain in chains]
        rollouts = collect_rollouts(
            self._player.engine,
            "student",
            episodes,
            self._player.conversation,
            self._player.sampling,
            seed=self._seed,
            step=step,
            first_index=chains.start,
        )
        turns: dict[int, list[str]] = {chain: [] for chain in chains}
        for rollout in rollouts:
            turns[rollout.episode_index].append(rollout.question)
        return [
            _Play(chain=chain, step=step, episode=episode, turns=turns[chain])
            for chain, episode in zip(chains, episodes, strict=True)
        ]

    def _uids(self, step: int) -> list[str]:
        count = self._settings.num_chains
        if self._settings.shared_problems:
            return [self._problem(0, step).uid] * count
        return [episode.uid for episode in self._task.episodes("train", step, count)]

    def _problem(self, chain: int, step: int) -> Episode:
        if self._settings.shared_problems:
            return self._task.episodes("train", step, 1)[0]
        return self._task.episodes("train", step, self._settings.num_chains)[chain]

    def _extraction_prompt(self, play: _Play, before: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        items: tuple[str, ...] = ()
        if self._settings.with_previous:
            of_chain = [record for record in before if record["chain"] == play.chain]
            items = self._within_cap(tuple(item for record in of_chain for item in record["items"]))
        trace = play.episode.trace()
        text = self._settings.filled(trace.text, trace.outcome, as_text(items) or "(none)")
        conversation = self._writer.conversation
        message: Message = {"role": "user", "content": text}
        ids = conversation.tokenizer.render((message,))
        conversation.check_fits(ids, self._writer.sampling.max_new_tokens)
        return ids

    def _within_cap(self, items: tuple[str, ...]) -> tuple[str, ...]:
        encode = self._writer.conversation.tokenizer.encode
        return newest_within(items, self._settings.cap_tokens, lambda text: len(encode(text)))

    def _record(self, play: _Play, answer: str) -> dict[str, Any]:
        trace, items = play.episode.trace(), parse_items(answer)
        if self._settings.keep == "trace":
            items = (f"{trace.text}\n\n{trace.outcome or ''}".strip(),)
        # candidates() refuses an item above the cap too, but only after every wave is done
        self._within_cap(items)
        return {
            "chain": play.chain,
            "step": play.step,
            "uid": play.episode.uid,
            "score": play.episode.score(),
            "turns": play.turns,
            "trace": trace.text,
            "outcome": trace.outcome,
            "answer": answer,
            "items": list(items),
        }


def check_extraction(
    settings: ExtractionConfig, task: Task, player: Conversation, writer: Conversation
) -> None:
    """Check before a model loads that the prompts can be filled and fit.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    count = 1 if settings.shared_problems else settings.num_chains
    nothing = NoContext().context("", 0)
    for episode in task.episodes("train", 0, count):
        longest = episode.longest_turn(nothing).student_messages
        num_tokens = len(player.tokenizer.render(longest)) + settings.problem_max_new_tokens
        prompt = writer.tokenizer.render(({"role": "user", "content": settings.prompt},))
        previous = settings.cap_tokens if settings.with_previous else 0
        num_all = num_tokens + len(prompt) + previous + settings.sampling.max_new_tokens
        if num_all > writer.max_positions:
            raise UserError(
                "experience.extraction.sampling.max_new_tokens",
                settings.sampling.max_new_tokens,
                f"at most the model's {writer.max_positions} in all",
                problem=f"with a trace of up to {num_tokens} tokens, the prompt's {len(prompt)} "
                f"and {previous} of earlier items {num_all} in all",
            )


def _summary(records: Sequence[dict[str, Any]]) -> str:
    items = sum(len(record["items"]) for record in records)
    silent = sum(not record["items"] for record in records)
    score = sum(record["score"] for record in records) / len(records)
    return (
        f"{len(records)} extractions, {items} items, {silent} without any; score without "
        f"experience {score:.2f}"
    )
