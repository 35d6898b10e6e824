"""Ranks that would wait for each other for ever are named with the lines that wait."""

from __future__ import annotations

from typing import Any

import pytest

from opcd_nemo.rehearsal.command import corners
from opcd_nemo.rehearsal.compare import mismatches
from opcd_nemo.rehearsal.names import BEGIN, END


def event(name: str, tensors: str = "(4,) float32", **changes: Any) -> dict[str, Any]:
    told = {"phase": "student", "ranks": [0, 1], "group": "3", "peer": None, "site": f"{name}.py:7"}
    return {**told, "name": name, "tensors": tensors, **changes}


def ranks(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    both = {"never_waited_for": {}}
    return [{"rank": 0, "collectives": first, **both}, {"rank": 1, "collectives": second, **both}]


def send(peer: int, group: str = "3") -> dict[str, Any]:
    return event("send", peer=peer, group=group)


def receive(peer: int, group: str = "3") -> dict[str, Any]:
    return event("recv_", peer=peer, group=group)


def test_the_same_collectives_in_the_same_order_meet() -> None:
    events = [event("allreduce_"), event("broadcast_")]
    alone = event("allgather_", ranks=[0, 2], group="4")
    assert mismatches(ranks([*events, alone], events)) == []


def test_what_goes_on_and_is_never_waited_for_is_named() -> None:
    results = ranks([], [])
    results[1]["never_waited_for"] = {"isend groups.py:7": 2}
    assert mismatches(results) == ["rank 1 never waits for 2 x isend groups.py:7"]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ([event("broadcast_"), event("allreduce_")], "collective 0 of their group 3"),
        ([event("allreduce_")], "against nothing"),
        ([event("allreduce_"), event("broadcast_", "(5,) float32")], "(5,) float32"),
        ([event("allreduce_"), event("broadcast_", "(4,) bfloat16")], "collective 1"),
    ],
)
def test_collectives_swapped_left_out_or_of_another_shape(
    second: list[dict[str, Any]], words: str
) -> None:
    (line,) = mismatches(ranks([event("allreduce_"), event("broadcast_")], second))
    assert words in line
    assert ".py:7" in line


def test_ranks_that_come_to_two_groups_in_another_order() -> None:
    events = [event("allreduce_"), event("broadcast_", group="4")]
    assert mismatches(ranks(events, events)) == []
    (line,) = mismatches(ranks(events, events[::-1]))
    assert "allreduce_" in line
    assert "of group 3 against broadcast_" in line


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        ([send(1), receive(1)], [receive(0), send(0)], True),
        ([send(1), receive(1)], [send(0), receive(0)], False),  # both wait for a receive
        ([send(1, "3"), receive(1, "4")], [send(0, "4"), receive(0, "3")], True),
        (
            [event(BEGIN), send(1), receive(1), event(END)],
            [event(BEGIN), send(0), receive(0), event(END)],
            True,
        ),
        ([send(1)], [], False),  # nobody receives
        ([event("send", "(8,) float32", peer=1)], [receive(0)], False),
    ],
)
def test_sends_and_receives_meet_without_a_buffer(
    first: list[dict[str, Any]], second: list[dict[str, Any]], meet: bool
) -> None:
    assert (mismatches(ranks(first, second)) == []) == meet


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((16, 4, 1, 1), [0, 3, 12, 15]),  # tp 4, dp 4
        ((16, 2, 2, 1), [0, 1, 6, 7, 8, 9, 14, 15]),  # tp 2, pp 2, dp 4
        ((8, 2, 1, 2), [0, 1, 2, 3, 4, 5, 6, 7]),  # tp 2, cp 2, two groups of them
        ((1, 1, 1, 1), [0]),
    ],
)
def test_corners_are_the_ends_of_every_axis(
    sizes: tuple[int, int, int, int], expected: list[int]
) -> None:
    from types import SimpleNamespace

    world, tp, pp, cp = sizes
    parallel: Any = SimpleNamespace(
        num_ranks=world,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
    )
    assert corners(parallel) == expected
