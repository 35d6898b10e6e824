"""Runs the programs of one world size on demand: imports once, forks one process a rank.

Started by the tests as `python -m tests.distributed.worker MODELS RESULTS`; each line read is a
job (`world 2` or `moves 2`), each line written `ok` or the path of a traceback.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import traceback
from pathlib import Path


def main() -> None:
    models, results = Path(sys.argv[1]), Path(sys.argv[2])
    sys.stdout = sys.stderr
    from opcd_nemo.distributed import _megatron_cpu

    _megatron_cpu.install()  # ranks that are forked later find it installed
    import tests.distributed.programs  # noqa: F401  # imported before the fork

    gc.freeze()  # ranks do not search what was imported, nor copy its pages
    for line in sys.stdin:
        job, world = line.split()
        answer = _run_job(job, int(world), models, results)
        sys.__stdout__.write(answer + "\n")
        sys.__stdout__.flush()


def _run_job(job: str, world: int, models: Path, results: Path) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            _run_rank(job, world, models, results)
        ranks[pid] = rank
    answer = "ok"
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status and answer == "ok":
            answer = str(results / f"error-{job}-{world}-{rank}.txt")
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return answer


def _run_rank(job: str, world: int, models: Path, results: Path) -> None:
    from tests.distributed import programs

    try:
        jobs = {
            "world": programs.run_world,
            "moves": programs.run_moves,
            "teachers": programs.run_teachers,
            "doctor": programs.run_doctor,
            "plan": programs.run_plan,
        }
        jobs[job](world, models, results)
    except BaseException:  # reported by the parent
        error = results / f"error-{job}-{world}-{os.environ['RANK']}.txt"
        error.write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # gloo's own teardown can abort


if __name__ == "__main__":
    main()
