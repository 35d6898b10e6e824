"""What an engine has computed of a game's turns, for the next turn, whose prompt repeats them."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opcd_nemo.model.packing import common_start
from opcd_nemo.model.varlen import KeyValue


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldTurn:
    """A prompt with its answer, but for the last token: keys and values [G, tokens, D], by layer.

    Shape letters: `G` key-value groups of this rank, `D` head size.
    """

    token_ids: tuple[int, ...]
    layers: dict[int, KeyValue]


class HeldTurns:
    """Turns to be found again by the tokens that a prompt starts with."""

    def __init__(self, turns: Iterable[HeldTurn]) -> None:
        self._turns = sorted(turns, key=lambda turn: turn.token_ids)

    def before(
        self, prompts: Sequence[tuple[int, ...]]
    ) -> list[tuple[dict[int, KeyValue], int]] | None:
        """For each prompt the held turn that has most of its start, and how many tokens of it.

        At least a token of a prompt is left to compute. None where nothing is held.
        """
        return [self._nearest(prompt) for prompt in prompts] if self._turns else None

    def _nearest(self, prompt: tuple[int, ...]) -> tuple[dict[int, KeyValue], int]:
        # sorted as words in a dictionary, the longest common start is a neighbour's
        place = bisect(self._turns, prompt, key=lambda turn: turn.token_ids)
        found = [
            (min(common_start(turn.token_ids, prompt), len(prompt) - 1), turn.layers)
            for turn in self._turns[max(0, place - 1) : place + 1]
        ]
        count, layers = max(found, key=lambda pair: pair[0])
        return layers, count
