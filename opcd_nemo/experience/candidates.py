"""Candidates: what a chain of extractions has written up to a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opcd_nemo.context.items import as_text, content_hash, newest_within

CANDIDATE = {
    "chain": int,
    "step": int,
    "items": list[str],
    "num_tokens": int,
    "problems": list[str],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The items of a chain up to a step."""

    chain: int
    step: int
    items: tuple[str, ...]
    num_tokens: int
    problems: tuple[str, ...]

    @property
    def hash(self) -> str:
        """Of the items alone: candidates with the same items are scored once."""
        return content_hash(self.items)

    def record(self) -> dict[str, Any]:
        """The candidate as JSON has it."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Candidate:
        """The candidate of a record with `CANDIDATE`'s fields, which may say more of it."""
        return cls(
            chain=record["chain"],
            step=record["step"],
            items=tuple(record["items"]),
            num_tokens=record["num_tokens"],
            problems=tuple(record["problems"]),
        )


def candidates(
    records: Sequence[Mapping[str, Any]], cap_tokens: int, count: Callable[[str], int]
) -> list[Candidate]:
    """Every prefix of every chain, if it differs from the prefix before; the newest items stay."""
    found: list[Candidate] = []
    for chain in sorted({record["chain"] for record in records}):
        items: tuple[str, ...] = ()
        problems: list[str] = []
        of_chain = [record for record in records if record["chain"] == chain]
        for record in sorted(of_chain, key=lambda record: record["step"]):
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
