"""Would the ranks wait for each other for ever? Their collectives, compared in order.

The n-th collective of a group must be the same on all of its ranks, and ranks that share several
groups must come to them in one order. Sends and receives of two ranks must meet without a buffer:
NCCL runs what two ranks exchange in a group in one order, and promises no buffer. Each pair of
ranks is compared by itself: that three wait in a circle is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, zip_longest
from typing import Any

from opcd_nemo.rehearsal.names import BEGIN, END

_PAIRED = ("send", "recv_")
Event = dict[str, Any]


def mismatches(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each group and each pair of ranks that would wait for ever.

    And for each line of code that lets a collective go on and never waits for it: what it writes
    may not be there yet when it is read, and what it reads may be overwritten.

    Args:
        results: of ranks of the same world, as `rank.py` writes them.
    """
    found = list(_forgotten(results))
    for one, other in combinations(sorted(results, key=lambda result: result["rank"]), 2):
        lines = [*_of_groups(one, other), *_of_pair(one, other)]
        found += lines or list(_of_order(one, other))
    return found


def _forgotten(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        for name, count in result["never_waited_for"].items():
            yield f"rank {result['rank']} never waits for {count} x {name}"


def _of_groups(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    ours, theirs = _by_group(one, other["rank"]), _by_group(other, one["rank"])
    for group in sorted(ours.keys() | theirs.keys()):
        pairs = zip_longest(ours.get(group, []), theirs.get(group, []))
        for number, (mine, its) in enumerate(pairs):
            if mine is None or its is None or _what(mine) != _what(its):
                yield (
                    f"ranks {one['rank']} and {other['rank']} differ at collective {number} of "
                    f"their group {group}: {_shown(mine)} against {_shown(its)}"
                )
                break


def _of_order(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """The first position at which two ranks, alike in every group, are in different groups."""
    for mine, its in zip(_shared(one, other["rank"]), _shared(other, one["rank"]), strict=True):
        if mine["group"] != its["group"]:
            yield (
                f"ranks {one['rank']} and {other['rank']} come to their groups in another order: "
                f"{_shown(mine)} of group {mine['group']} against {_shown(its)} of group "
                f"{its['group']}"
            )
            return


def _by_group(result: dict[str, Any], peer: int) -> dict[str, list[Event]]:
    found: dict[str, list[Event]] = {}
    for event in _shared(result, peer):
        found.setdefault(event["group"], []).append(event)
    return found


def _shared(result: dict[str, Any], peer: int) -> list[Event]:
    """The collectives of the groups that the other rank is in, too."""
    return [
        event
        for event in result["collectives"]
        if event["peer"] is None and peer in event["ranks"] and event["name"] not in (BEGIN, END)
    ]


def _what(event: Event) -> tuple[str, str]:
    return event["name"], event["tensors"]


def _shown(event: Event | None) -> str:
    if event is None:
        return "nothing"
    return (
        f"{event['name']} of {event['tensors'] or 'objects'} in {event['phase']}, {event['site']}"
    )


def _of_pair(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    ours, theirs = _exchanges(one, other["rank"]), _exchanges(other, one["rank"])
    for group in sorted(ours.keys() | theirs.keys()):
        stuck = _first_stuck(ours.get(group, []), theirs.get(group, []))
        if stuck is not None:
            mine, its = stuck
            yield (
                f"ranks {one['rank']} and {other['rank']} would both wait in group {group}: "
                f"{_shown(mine)} against {_shown(its)}"
            )


def _exchanges(result: dict[str, Any], peer: int) -> dict[str, list[list[Event]]]:
    """What goes to and comes from the other rank, by group; what is coalesced goes together."""
    found: dict[str, list[list[Event]]] = {}
    together: list[Event] | None = None
    for event in result["collectives"]:
        if event["name"] == BEGIN:
            together = []
        elif event["name"] == END:
            if together:
                found.setdefault(together[0]["group"], []).append(together)
            together = None
        elif event["name"] in _PAIRED and event["peer"] == peer:
            if together is None:
                found.setdefault(event["group"], []).append([event])
            else:
                together.append(event)
    return found


def _first_stuck(
    ours: list[list[Event]], theirs: list[list[Event]]
) -> tuple[Event | None, Event | None] | None:
    """The two events at the heads of the ranks' queues that never meet; None: all meet."""
    mine, its = [list(part) for part in ours], [list(part) for part in theirs]
    while mine and its:
        met = next(
            ((a, b) for a in mine[0] for b in its[0] if _meet(a, b)),
            None,
        )
        if met is None:
            return mine[0][0], its[0][0]
        mine[0].remove(met[0])
        its[0].remove(met[1])
        mine, its = mine[not mine[0] :], its[not its[0] :]
    if mine or its:
        return (mine[0][0] if mine else None), (its[0][0] if its else None)
    return None


def _meet(one: Event, other: Event) -> bool:
    return {one["name"], other["name"]} == {*_PAIRED} and one["tensors"] == other["tensors"]
