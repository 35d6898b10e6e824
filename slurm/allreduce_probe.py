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
import torch.multiprocessing as mp

PAIR_TIMEOUT = datetime.timedelta(seconds=60)
REPEATS = 3


def pairs_of(nodes: list[str]) -> list[tuple[int, int]]:
    """The edges of the ring, those without a common node first (even, odd, the closing one)."""
    last = len(nodes) - 1
    edges = [(one, one + 1) for one in range(0, last, 2)]
    edges += [(one, one + 1) for one in range(1, last, 2)]
    return [*edges, (0, last)] if last > 1 else edges or [(0, 0)]


def bus_bandwidth(store: dist.Store, rank: int, world_size: int, num_mib: int) -> float:
    """GB/s of the links, as nccl-tests counts it; 0 when the sum is wrong."""
    local_rank = int(os.environ["LOCAL_RANK"])
    use_gpu = torch.cuda.device_count() > local_rank
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    backend = "nccl" if use_gpu else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=PAIR_TIMEOUT
    )
    tensor = torch.ones(num_mib << 18, device=device)
    dist.all_reduce(tensor)  # sets connections up
    started = time.perf_counter()
    for _ in range(REPEATS):
        tensor.fill_(1.0)
        dist.all_reduce(tensor)
    is_right = bool((tensor == world_size).all())  # waits for the device
    seconds = (time.perf_counter() - started) / REPEATS
    dist.destroy_process_group()
    moved = 2 * (world_size - 1) / world_size * tensor.nbytes
    return moved / seconds / 1e9 if is_right and world_size > 1 else float("inf") * is_right


def probe(local_rank: int, nodes: list[str], place: int, best: torch.Tensor) -> None:
    """Measure this rank's pairs; `best` keeps the fastest."""
    os.environ["LOCAL_RANK"] = str(local_rank)
    host, port = os.environ["OPCD_PROBE"].split(":")
    ranks = int(os.environ["OPCD_RANKS_PER_NODE"])
    is_server = place == 0 and local_rank == 0
    store = dist.TCPStore(
        host, int(port), is_master=is_server, timeout=PAIR_TIMEOUT, wait_for_workers=False
    )
    for number, pair in enumerate(pairs_of(nodes)):
        if place not in pair:
            continue
        members = sorted(set(pair))
        rank = members.index(place) * ranks + local_rank
        named = dist.PrefixStore(f"pair{number}", store)
        try:
            speed = bus_bandwidth(
                named, rank, len(members) * ranks, int(os.environ["OPCD_PROBE_MIB"])
            )
        except RuntimeError as error:  # of torch.distributed: the partner is not there, or slow
            sys.stderr.write(f"pair {[nodes[one] for one in members]}: {error}\n")
            continue
        best[local_rank] = max(best[local_rank].item(), speed)
    store.set(f"finished/{place}/{local_rank}", "")
    if is_server:  # the store ends with this process
        for one in range(len(nodes) * ranks):
            key = f"finished/{one // ranks}/{one % ranks}"
            try:
                store.wait([key], PAIR_TIMEOUT * 2)
            except RuntimeError:
                sys.stderr.write(f"{nodes[one // ranks]}: did not finish\n")


def main() -> None:
    """Print this node's verdict."""
    nodes, minimum = sys.argv[1:], float(os.environ["OPCD_MIN_GBPS"])
    node = os.environ["SLURMD_NODENAME"]
    ranks = int(os.environ["OPCD_RANKS_PER_NODE"])
    best = torch.zeros(ranks).share_memory_()
    mp.start_processes(
        probe, args=(nodes, nodes.index(node), best), nprocs=ranks, start_method="fork"
    )
    slowest = best.min().item()
    verdict = "ok" if slowest >= minimum else f"all-reduce at {slowest:.2f} GB/s, needs {minimum}"
    print(f"{node}: {verdict}", flush=True)
    sys.stderr.write(f"{slowest:.2f} GB/s at {node}\n")


if __name__ == "__main__":
    main()
