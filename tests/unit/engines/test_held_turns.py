"""A prompt finds the held turn that begins as it does, and leaves a token to compute."""

from __future__ import annotations

import random

import pytest

from opcd_nemo.engines.held_turns import HeldTurn, HeldTurns
from opcd_nemo.model.packing import common_start


def held(*turns: tuple[int, ...]) -> HeldTurns:
    return HeldTurns(HeldTurn(token_ids=turn, layers={}) for turn in turns)


def test_nothing_is_found_where_nothing_is_held() -> None:
    assert held().before([(1, 2)]) is None


def test_the_last_token_of_a_prompt_is_computed() -> None:
    (found,) = held((1, 2, 3)).before([(1, 2, 3)]) or []
    assert found[1] == 2


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_common_start_is_found(seed: int) -> None:
    draw = random.Random(seed)
    turns = [tuple(draw.choices((0, 1), k=draw.randint(1, 6))) for _ in range(draw.randint(1, 9))]
    prompts = [tuple(draw.choices((0, 1), k=draw.randint(1, 8))) for _ in range(9)]
    found = held(*turns).before(prompts)
    assert found is not None
    for prompt, (_, count) in zip(prompts, found, strict=True):
        longest = max(common_start(prompt, turn) for turn in turns)
        assert count == min(longest, len(prompt) - 1)
