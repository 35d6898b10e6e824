"""What a cluster's script tells a run by environment: which attempt this is, and which nodes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from opcd_nemo.errors import UserError

ATTEMPT_ENV = "OPCD_ATTEMPT"  # <job>.<how often it was restarted>
RENDEZVOUS_ENV = "OPCD_RENDEZVOUS"  # <host of the first node>:<port>
NUM_NODES_ENV = "OPCD_NUM_NODES"
NODE_RANK_ENV = "OPCD_NODE_RANK"
_LAST_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a job; a later one of the same job takes over its folder."""

    job: str
    number: int

    def __str__(self) -> str:
        """As in the environment, and in the names of unpublished files."""
        return f"{self.job}.{self.number}"

    def follows(self, other: Attempt | None) -> bool:
        """Whether this is a later start of the same job."""
        return other is not None and other.job == self.job and other.number < self.number


def this_attempt() -> Attempt | None:
    """The attempt that the environment names; None outside a cluster's script.

    Raises:
        UserError: it is not `<job>.<number>`.
    """
    text = os.environ.get(ATTEMPT_ENV)
    if text is None:
        return None
    found = re.fullmatch(r"(\w+)\.(\d+)", text)
    if found is None:
        raise UserError(ATTEMPT_ENV, text, "<job>.<number of restarts>, as 12.0")
    return Attempt(job=found[1], number=int(found[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes of a run, and the number of this node."""

    count: int
    rank: int
    rendezvous: str

    def ranks_per_node(self, num_ranks: int) -> int:
        """How many ranks each node has.

        Raises:
            UserError: the nodes cannot have equally many.
        """
        if num_ranks % self.count:
            raise UserError(
                "parallel.num_ranks", num_ranks, f"a multiple of the {self.count} nodes"
            )
        return num_ranks // self.count


def this_node() -> Nodes | None:
    """The nodes that the environment names; None when the run is on this machine alone.

    Raises:
        UserError: a variable is missing or wrong.
    """
    rendezvous = os.environ.get(RENDEZVOUS_ENV)
    if rendezvous is None:
        return None
    place = re.fullmatch(r"[^:\s]+:([0-9]{1,5})", rendezvous)
    if place is None or not 0 < int(place[1]) < _LAST_PORT:  # launches alternate with the next port
        allowed = f"<host>:<port>, a port of 1 to {_LAST_PORT - 1}"
        raise UserError(RENDEZVOUS_ENV, rendezvous, allowed)
    count, rank = _number(NUM_NODES_ENV), _number(NODE_RANK_ENV)
    if not 0 <= rank < count:
        raise UserError(NODE_RANK_ENV, rank, f"below {NUM_NODES_ENV}={count}")
    return Nodes(count=count, rank=rank, rendezvous=rendezvous)


def is_first_node() -> bool:
    """Whether this node writes what is not written by ranks."""
    node = this_node()
    return node is None or node.rank == 0


def ranks_here(num_ranks: int) -> int:
    """How many of a run's ranks this node has.

    Raises:
        UserError: the nodes cannot have equally many.
    """
    node = this_node()
    return num_ranks if node is None else node.ranks_per_node(num_ranks)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise UserError(name, text, f"a whole number, with {RENDEZVOUS_ENV}")
    return int(text)
