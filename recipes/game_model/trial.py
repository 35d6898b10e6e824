"""How well a model plays and writes at temperature 1, in settings that training never has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch

from opcd_nemo.context.items import as_text, parse_items
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.tasks.games.boards import Board

from .network import Weights, next_logits
from .samples import Sampler, play_at_random
from .settings import draw_setting
from .vocabulary import ASSISTANT, USER, extraction_prompt, notes_template


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """What was written; `kinds` counts the right and all items by their first word."""

    num_right: int
    num_written: int
    num_without: int
    kinds: dict[str, tuple[int, int]]


class Trial:
    """Asks a model."""

    def __init__(self, config: ModelConfig, weights: Weights, sampler: Sampler, seed: int) -> None:
        self._config, self._weights, self._sampler = config, weights, sampler
        self._generator = torch.Generator().manual_seed(seed)
        self._rng = Random(seed)

    def win_rate(
        self, boards: Sequence[Board], rounds: int, *, about: Sequence[str] | None, hidden: bool
    ) -> float:
        """Share of games won with the notes on `about`, in any order; None: all of them."""
        games = []
        for board in boards:
            setting = draw_setting(self._rng, board, rounds, unseen=True, hidden=hidden)
            facts = setting.facts()
            names = list(facts) if about is None else list(about)
            self._rng.shuffle(names)
            games.append((setting.game(board), [facts[name] for name in names]))
        while live := [game for game in games if not game[0].done]:
            questions = [_with_notes(episode.transcript(), notes) for episode, notes in live]
            for (episode, _), text in zip(live, self._answers(questions, 6), strict=True):
                episode.reply(text)
        return sum(episode.score() for episode, _ in games) / len(games)

    def items(self, boards: Sequence[Board], rounds: int, *, hidden: bool) -> Items:
        """Let the model write of games that were played at random."""
        questions, settings = [], []
        for board in boards:
            setting = draw_setting(self._rng, board, rounds, unseen=True, hidden=hidden)
            episode = setting.game(board)
            play_at_random(self._rng, episode, setting)
            trace, outcome = episode.transcript(), episode.outcome
            questions.append(extraction_prompt().format(trace=trace, outcome=outcome))
            settings.append(setting)
        kinds: dict[str, tuple[int, int]] = {}
        without = 0
        for text, setting in zip(self._answers(questions, 24), settings, strict=True):
            items = parse_items(text)
            without += not items
            for item in items:
                right, written = kinds.get(item.split()[0], (0, 0))
                is_right = item in setting.facts().values()
                kinds[item.split()[0]] = right + is_right, written + 1
        return Items(
            num_right=sum(right for right, _ in kinds.values()),
            num_written=sum(written for _, written in kinds.values()),
            num_without=without,
            kinds=kinds,
        )

    def _answers(self, questions: Sequence[str], max_new_tokens: int) -> list[str]:
        prompts = [self._sampler.encode(f"{USER}{text}{ASSISTANT}") for text in questions]
        texts: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            logits = next_logits(self._config, self._weights, [prompts[i] + texts[i] for i in live])
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=self._generator)[:, 0]
            for index, token in zip(live, drawn.tolist(), strict=True):
                texts[index].append(token)
            live = [i for i in live if texts[i][-1] not in self._config.eos_token_ids]
            if not live:
                break
        return [self._sampler.decode(text) for text in texts]


def _with_notes(transcript: str, notes: Sequence[str]) -> str:
    if not notes:
        return transcript
    opening, situation = transcript.split("\n\n", 1)
    return notes_template().format(opening=opening, experience=as_text(notes), situation=situation)
