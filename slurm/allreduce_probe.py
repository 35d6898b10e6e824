"""How fast neighbouring nodes sum a tensor: one process a node, `allreduce_probe.py NODE...`.

Every node takes part in a pair with each neighbour of the ring. It prints `<node>: ok` when one of
its pairs reached OPCD_MIN_GBPS (bus bandwidth), else its best. NCCL where every rank has a GPU.
"""

from __future__ import annotations

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

REPEATS = 3


def pairs_of(nodes: list[str]) -> list[list[tuple[int, int]]]:
    """The edges of the ring in rounds without a common node: even, odd, the closing one."""
    last = len(nodes) - 1
    even, odd = ([(one, one + 1) for one in range(first, last, 2)] for first in (0, 1))
    closing = [(0, last)] if last != 1 else []
    return [even, odd, closing]


def bus_bandwidth(rank: int, world_size: int, num_mib: int, device: torch.device) -> float:
    """GB/s of the links, as nccl-tests counts it; 0 when the sum is wrong."""
    tensor = torch.ones(num_mib << 18, device=device)
    dist.all_reduce(tensor)  # sets connections up
    started = time.perf_counter()
    for _ in range(REPEATS):
        tensor.fill_(1.0)
        dist.all_reduce(tensor)
    is_right = bool((tensor == world_size).all())  # waits for the device
    seconds = (time.perf_counter() - started) / REPEATS
    moved = 2 * (world_size - 1) / world_size * tensor.nbytes
    return moved / seconds / 1e9 if is_right and world_size > 1 else float("inf") * is_right


def measure(
    local_rank: int, place: int, hosts: list[str], port: int, timeout_s: int, speeds: torch.Tensor
) -> None:
    """One rank of one pair; `hosts[place]` is this node, the first host has the store."""
    timeout = datetime.timedelta(seconds=timeout_s)
    ranks = len(speeds)
    rank, world_size = place * ranks + local_rank, len(hosts) * ranks
    use_gpu = torch.cuda.device_count() > local_rank
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        hosts[0], port, world_size, is_master=rank == 0, timeout=timeout
    )
    backend = "nccl" if use_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    speeds[local_rank] = bus_bandwidth(rank, world_size, int(os.environ["OPCD_PROBE_MIB"]), device)
    dist.destroy_process_group()


def speed_of_pair(place: int, hosts: list[str], port: int, timeout_s: int) -> float:
    """The slowest rank of this node; 0 when the partner is not there, or ends.

    The ranks are children: what a lost partner leaves in a process (a group half made, NCCL's
    watchdog that aborts it) does not reach the next pair.
    """
    speeds = torch.zeros(int(os.environ["OPCD_RANKS_PER_NODE"])).share_memory_()
    try:
        start_processes(
            measure,
            args=(place, hosts, port, timeout_s, speeds),
            nprocs=len(speeds),
            start_method="fork",
        )
    except (ProcessRaisedException, ProcessExitedException) as error:
        sys.stderr.write(f"pair {hosts}: {str(error).strip().splitlines()[-1]}\n")
        return 0.0
    return float(speeds.min())


def main() -> None:
    """Print this node's verdict."""
    nodes, minimum = sys.argv[1:], float(os.environ["OPCD_MIN_GBPS"])
    node, port = os.environ["SLURMD_NODENAME"], int(os.environ["OPCD_PROBE_PORT"])
    timeout_s, place, best = int(os.environ["OPCD_PROBE_TIMEOUT_S"]), nodes.index(node), 0.0
    for number, pairs in enumerate(pairs_of(nodes)):
        for pair in pairs:
            if place not in pair:
                continue
            members = sorted(set(pair))
            hosts = [nodes[one] for one in members]
            # the partner may have waited in vain in every round before
            patience_s = timeout_s * (number + 1)
            speed = speed_of_pair(members.index(place), hosts, port + number, patience_s)
            best = max(best, speed)
    verdict = "ok" if best >= minimum else f"all-reduce at {best:.2f} GB/s, needs {minimum}"
    print(f"{node}: {verdict}", flush=True)
    sys.stderr.write(f"{best:.2f} GB/s at {node}\n")


if __name__ == "__main__":
    main()
