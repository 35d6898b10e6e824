"""Experience from a model's own traces: it plays without context, then writes what it learnt.

A chain is `num_steps` extractions whose items are appended. Chains are independent. Work is done in
waves, a step of all chains, each written at once when it is whole: a run that was killed repeats
its last wave alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from opcd_nemo.storage.durable import write_whole
from opcd_nemo.tasks import Context, Episode, Task, Trace
from opcd_nemo.types import Message, Prompt, Turn

Say = Callable[[str], None]
Place = tuple[int, int]
"""Chain and step."""
_WRITING = 500_000_000  # the index of an extraction's prompt starts here: its own randomness


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A model with what it needs to answer; its tokenizer is the conversation's."""

    engine: RolloutEngine
    conversation: Conversation
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The items of a chain up to a step."""

    chain: int
    step: int
    items: tuple[str, ...]
    num_tokens: int
    problems: tuple[str, ...]


class _Logged:
    """An episode that remembers what the student was asked."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode
        self.uid = episode.uid
        self.asked: list[str] = []

    @property
    def done(self) -> bool:
        return self._episode.done

    def turn(self, context: Context) -> Turn:
        turn = self._episode.turn(context)
        self.asked.append(turn.student_messages[-1]["content"])
        return turn

    def longest_turn(self, context: Context) -> Turn:
        return self._episode.longest_turn(context)

    def reply(self, text: str) -> None:
        self._episode.reply(text)

    def score(self) -> float:
        return self._episode.score()

    @property
    def answered(self) -> bool:
        return self._episode.answered

    def trace(self) -> Trace:
        return self._episode.trace()


class Extraction:
    """Extracts chain by chain into a folder."""

    def __init__(
        self,
        folder: Path,
        settings: ExtractionConfig,
        task: Task,
        *,
        player: Speaker,
        writer: Speaker,
        parallel: Parallel,
        seed: int,
        fence: Callable[[], None],
    ) -> None:
        """Take the models: `player` meets the problems, `writer` writes the experience.

        `fence` raises when the folder is no longer this run's.
        """
        self._folder, self._settings, self._task = folder, settings, task
        self._player, self._writer = player, writer
        self._parallel, self._seed, self._fence = parallel, seed, fence

    def run(self, say: Say) -> list[dict[str, Any]]:
        """Do every wave that is not done; returns the records of all. Collective over the world.

        Raises:
            OSError: the disk refuses, or the fence does.
            UserError: no extraction has written an item.
        """
        if self._parallel.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        records: list[dict[str, Any]] = []
        for wave, places in enumerate(waves(self._settings)):
            file = self._folder / f"wave={wave:04d}.jsonl"
            done = _read(file) if self._parallel.rank == 0 and file.exists() else None
            found: list[dict[str, Any]] | None = self._parallel.gather_objects(done)[0]
            if found is None:
                found = self._wave(wave, places, records)
                if self._parallel.rank == 0:
                    self._fence()
                    write_whole(file, "".join(f"{json.dumps(one)}\n" for one in found))
                heartbeat.touch()
                say(f"extraction: wave {wave}: {_summary(found)}")
            records += found
        if not any(record["items"] for record in records):
            raise UserError(
                "experience.extraction",
                allowed="a prompt and a model that write lines with the marker - EXPERIENCE ITEM:",
                problem=f"{len(records)} extractions wrote no item",
            )
        return records

    def _wave(
        self, wave: int, places: Sequence[Place], before: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        share = self._parallel.share(len(places))
        mine = [places[index] for index in share]
        episodes = [_Logged(self._problem(place)) for place in mine]
        collect_rollouts(
            self._player.engine,
            "student",
            episodes,
            self._player.conversation,
            self._player.sampling,
            seed=self._seed,
            step=wave,
            first_index=share.start,
        )
        prompts = [
            Prompt(token_ids=self._asked(place, episode, before), index=_WRITING + index)
            for index, place, episode in zip(share, mine, episodes, strict=True)
        ]
        samples = self._writer.engine.generate(
            prompts, self._writer.sampling, seed=self._seed, step=wave
        )
        decode = self._writer.conversation.tokenizer.decode
        records = [
            self._record(place, episode, decode(sample.response_ids))
            for place, episode, sample in zip(mine, episodes, samples, strict=True)
        ]
        return self._parallel.gather_over_dp(records)

    def _problem(self, place: Place) -> Episode:
        chain, step = place
        if self._settings.shared_problems:
            return self._task.episodes("train", step, 1)[0]
        return self._task.episodes("train", step, self._settings.num_chains)[chain]

    def _asked(
        self, place: Place, episode: _Logged, before: Sequence[dict[str, Any]]
    ) -> tuple[int, ...]:
        items: tuple[str, ...] = ()
        if self._settings.with_previous:
            items = tuple(i for one in before if one["chain"] == place[0] for i in one["items"])
            items = self._within_cap(items)
        trace = episode.trace()
        text = self._settings.filled(trace.text, trace.outcome, as_text(items) or "(none)")
        conversation = self._writer.conversation
        message: Message = {"role": "user", "content": text}
        ids = conversation.tokenizer.render((message,))
        conversation.check_fits(ids, self._writer.sampling.max_new_tokens)
        return ids

    def _within_cap(self, items: tuple[str, ...]) -> tuple[str, ...]:
        encode = self._writer.conversation.tokenizer.encode
        return newest_within(items, self._settings.cap_tokens, lambda text: len(encode(text)))

    def _record(self, place: Place, episode: _Logged, answer: str) -> dict[str, Any]:
        trace, items = episode.trace(), parse_items(answer).items
        if self._settings.keep == "trace":
            items = (f"{trace.text}\n\n{trace.outcome or ''}".strip(),)
        self._within_cap(items)  # or they are refused now, not after every wave
        return {
            "chain": place[0],
            "step": place[1],
            "uid": episode.uid,
            "score": episode.score(),
            "turns": episode.asked,
            "trace": trace.text,
            "outcome": trace.outcome,
            "answer": answer,
            "items": list(items),
        }


def waves(settings: ExtractionConfig) -> list[list[Place]]:
    """What is extracted together: a step of all chains."""
    return [
        [(chain, step) for chain in range(settings.num_chains)]
        for step in range(settings.num_steps)
    ]


def candidates(
    records: Sequence[dict[str, Any]], cap_tokens: int, count: Callable[[str], int]
) -> list[Candidate]:
    """Every prefix of every chain that differs from the one before; the newest items are kept."""
    found: list[Candidate] = []
    for chain in sorted({record["chain"] for record in records}):
        items: tuple[str, ...] = ()
        problems: list[str] = []
        for record in sorted(
            (one for one in records if one["chain"] == chain), key=lambda one: one["step"]
        ):
            problems.append(record["uid"])
            if not record["items"]:
                continue
            items = newest_within((*items, *record["items"]), cap_tokens, count)
            found.append(
                Candidate(
                    chain=chain,
                    step=record["step"],
                    items=items,
                    num_tokens=count(as_text(items)),
                    problems=tuple(problems),
                )
            )
    return found


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
        asked = episode.longest_turn(nothing).student_messages
        num_tokens = len(player.tokenizer.render(asked)) + settings.problem_max_new_tokens
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


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _summary(records: Sequence[dict[str, Any]]) -> str:
    items = sum(len(record["items"]) for record in records)
    silent = sum(not record["items"] for record in records)
    score = sum(record["score"] for record in records) / len(records)
    return (
        f"{len(records)} extractions, {items} items, {silent} without any; score without "
        f"experience {score:.2f}"
    )
