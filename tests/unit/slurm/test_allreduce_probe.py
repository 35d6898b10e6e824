"""What a sick node does to the all-reduce probe of its neighbours: nothing."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.fork_server import choose_python

PROBE = Path(__file__).parents[3] / "slurm/allreduce_probe.py"
pytestmark = pytest.mark.usefixtures("fork_server")
NODES = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]


def free_port() -> int:
    """The first of as many as there are rounds, most likely."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def verdicts(num_mib: list[str]) -> list[str]:
    """What each node says; a size that is no number ends its ranks in the middle of a pair."""
    port = str(free_port())
    processes = []
    for node, size in zip(NODES, num_mib, strict=True):
        settings = {
            "SLURMD_NODENAME": node,
            "OPCD_PROBE_PORT": port,
            "OPCD_PROBE_TIMEOUT_S": "30",
            "OPCD_PROBE_MIB": size,
            "OPCD_RANKS_PER_NODE": "1",
            "OPCD_MIN_GBPS": "0.0001",
            "OMP_NUM_THREADS": "1",
        }
        command = [choose_python(), str(PROBE), *NODES]
        processes.append(
            subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
        )
    return [process.communicate(timeout=120)[0].strip() for process in processes]


def test_a_node_whose_ranks_end_does_not_make_its_neighbours_sick() -> None:
    sick, *healthy = verdicts(["none", "1", "1"])
    assert sick == "127.0.0.1: all-reduce at 0.00 GB/s, needs 0.0001"
    assert healthy == ["127.0.0.2: ok", "127.0.0.3: ok"]


def test_three_healthy_nodes_are_fit() -> None:
    assert verdicts(["1", "1", "1"]) == [f"{node}: ok" for node in NODES]
