"""The launchers' store is on the address that was given, and takes nothing for Python objects."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

from opcd_nemo.errors import UserError
from opcd_nemo.launch.meeting import BACKEND, listen, offer_meeting


def listening() -> set[tuple[str, int]]:
    """Addresses on which this process listens."""
    found = psutil.Process().net_connections("inet")
    return {tuple(one.laddr) for one in found if one.status == psutil.CONN_LISTEN}


class Payload:
    """What unpickling this does."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.victim,)


def test_the_store_of_one_machine_is_not_seen_by_others(tmp_path: Path) -> None:
    before = listening()
    offer_meeting()
    parameters = RendezvousParameters(BACKEND, "127.0.0.1:0", "a-run", 1, 1, rank=0, timeout=30)
    meeting = rendezvous_handler_registry.create_handler(parameters)
    assert meeting.use_agent_store, "a rank would open a store of its own"
    found = meeting.next_rendezvous()
    ((host, port),) = listening() - before
    assert host == "127.0.0.1"
    assert found.bootstrap_store_info.master_addr == "127.0.0.1"
    assert found.bootstrap_store_info.master_port == port
    assert (found.rank, found.world_size) == (0, 1)
    found.store.set("key", pickle.dumps(Payload(tmp_path / "ran")))
    assert isinstance(found.store.get("key"), bytes)
    assert not (tmp_path / "ran").exists()
    with socket.create_connection((host, port)) as stranger:
        stranger.sendall(os.urandom(512))
    found.store.set("key", b"goes on")
    assert found.store.get("key") == b"goes on"


@pytest.mark.parametrize(
    ("host", "count", "key"),
    [("127.0.0.1", 1, "parallel.port"), ("127.0.0.1", 2, "OPCD_RENDEZVOUS")],
)
def test_a_port_that_is_taken_is_the_users_to_change(host: str, count: int, key: str) -> None:
    offer_meeting()
    with listen(host, 0, alone=True) as taken:
        port = taken.getsockname()[1]
        parameters = RendezvousParameters(
            BACKEND, f"{host}:{port}", "a-run", count, count, rank=0, timeout=30
        )
        with pytest.raises(UserError, match="in use") as caught:
            rendezvous_handler_registry.create_handler(parameters).next_rendezvous()
    assert caught.value.key == key


ELSEWHERE = "192.0.2.1"  # for documentation: no machine's


@pytest.mark.parametrize(
    ("host", "resolved", "alone", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"], True, "127.0.0.1"),
        ("127.0.0.3", ["127.0.0.3"], False, "127.0.0.3"),
        ("localhost", ["127.0.0.1"], False, "127.0.0.1"),
        ("node1", ["127.0.0.7"], False, "0.0.0.0"),
        ("node1", ["127.0.0.7"], True, "127.0.0.7"),
        ("node1", [ELSEWHERE, "0.0.0.0"], False, "0.0.0.0"),  # the second is this machine's
    ],
)
def test_nodes_meet_on_the_address_of_the_first(
    host: str, resolved: list[str], alone: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in resolved]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: infos)
    with listen(host, 0, alone=alone) as opened:
        assert opened.getsockname()[0] == expected


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (f"{ELSEWHERE}:29500", "this machine has no such address"),
        ("0.0.0.0:29500", "no address that the other nodes reach"),
        ("no.such.host.invalid:29500", ""),
        ("a..b:29500", ""),
    ],
)
def test_a_first_node_that_is_another_machine_is_refused(place: str, problem: str) -> None:
    offer_meeting()
    parameters = RendezvousParameters(BACKEND, place, "a-run", 2, 2, rank=0, timeout=30)
    with pytest.raises(UserError) as caught:
        rendezvous_handler_registry.create_handler(parameters).next_rendezvous()
    assert (caught.value.key, caught.value.value) == ("OPCD_RENDEZVOUS", place)
    assert caught.value.allowed.startswith("an address of the first node, which is this machine")
    assert problem in str(caught.value.problem)
