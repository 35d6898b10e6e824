"""Training jobs that lose nodes, are preempted, run out of time or hang end with the same weights.

Two scenarios run at a time; the tests wait for them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.cluster.jobs import PATIENCE_S, STEPS, Job, Scenario, Site, started
from tests.cluster.slow_task import HANG_ENV, PAUSE_ENV


def plain(site: Site) -> Job:
    job = site.submit("plain")
    job.wait_for_end()
    (site.output / "plain.seconds").write_text(str(job.run_time_s()))
    return job


def power_cut(site: Site) -> Job:
    """The second node loses power in the middle of a step."""
    job = site.submit("power_cut", environment={PAUSE_ENV: "0.2"})
    job.wait_for_step(15)
    victim = job.nodes[1]
    site.cluster.power_off(victim)
    job.wait_for_end()
    assert victim not in job.nodes
    site.cluster.power_on(victim)
    return job


def preemption(site: Site) -> Job:
    """A job of a higher partition takes both nodes."""
    job = site.submit("preemption", environment={PAUSE_ENV: "0.2"})
    job.wait_for_step(15)
    nodes = ",".join(job.nodes)
    site.cluster.run(
        ["sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "-w", nodes, "--wrap", "sleep 1"]
    )
    job.wait_for_end()
    return job


def time_limit(site: Site) -> Job:
    """The time limit comes near: SIGUSR1, 180 seconds before, as the script asks."""
    job = site.submit("time_limit", environment={PAUSE_ENV: "4"})  # for the 60 + 30 s that may pass
    job.wait_for_step(2)
    minutes = int(job.run_time_s() / 60) + 4  # so that the signal is due in less than a minute
    site.cluster.run(["scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}"])
    site.cluster.wait_for(lambda: job.restarts == 1, PATIENCE_S, f"requeue\n{job.log}")
    site.cluster.run(["scontrol", "update", f"JobId={job.id}", "TimeLimit=60"])
    job.wait_for_end()
    return job


def partition(site: Site) -> Job:
    """The first node, with rank 0 and the script, loses the network; its processes go on."""
    patience = "parallel.timeout_s=3600"  # they must still be there when the next attempt starts
    job = site.submit("partition", patience, environment={PAUSE_ENV: "0.2"})
    job.wait_for_step(15)
    victim = job.nodes[0]
    site.cluster.unplug(victim)
    zombies = Writers(site, victim, job.run)
    assert zombies.pids, job.story()
    takeover = f"attempt {job.id}.1"
    site.cluster.wait_for(lambda: takeover in job.lock, PATIENCE_S, f"takeover\n{job.log}")
    assert zombies.alive(), "the test is worth nothing when nobody is left to write"
    before = zombies.positions()
    assert before, "rank 0 has its metrics open"
    while job.state in ("RUNNING", "COMPLETING"):
        now = zombies.positions()
        written = {file: place for file, place in now.items() if place != before.get(file)}
        assert not written, f"the first attempt still writes: {written}"
        time.sleep(0.2)
    site.cluster.plug_in(victim)
    job.wait_for_end()
    return job


class Writers:
    """The processes of a job on a node, and how far they are in files of a folder."""

    def __init__(self, site: Site, node: str, folder: Path) -> None:
        self.pids = site.cluster.pids_of(node, "python", "python3", "python3.11")
        self._folder = folder

    def alive(self) -> bool:
        return any(Path(f"/proc/{pid}/fd").exists() for pid in self.pids)

    def positions(self) -> dict[tuple[int, str], int]:
        """How far processes are in what they have open for writing below the folder."""
        found = {}
        for pid in self.pids:
            for descriptor in _listed(Path(f"/proc/{pid}/fd")):
                try:
                    is_there = str(descriptor.readlink()).startswith(f"{self._folder}/")
                    info = Path(f"/proc/{pid}/fdinfo/{descriptor.name}").read_text().split()
                except OSError:  # closed meanwhile
                    continue
                if is_there and int(info[3], 8) & os.O_ACCMODE != os.O_RDONLY:
                    found[pid, descriptor.name] = int(info[1])
        return found


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # the process has ended
        return []


def hang(site: Site) -> Job:
    """A rank stands still; the watchdog ends the attempt."""
    undisturbed_s = float((site.output / "plain.seconds").read_text())
    timeout = 40 + int(undisturbed_s)  # a busy machine is slow, no machine is dead
    # else the other ranks give up first where the machine is so busy
    patient = f"parallel.timeout_s={3 * timeout}"
    environment = {HANG_ENV: "3", "OPCD_HEARTBEAT_TIMEOUT_S": str(timeout)}
    job = site.submit("hang", patient, environment=environment)
    job.wait_for_end()
    return job


SCENARIOS: tuple[Scenario, ...] = (plain, time_limit, power_cut, partition, preemption, hang)


@pytest.fixture(scope="module")
def jobs(site: Site) -> Iterator[dict[str, Future[Job]]]:
    with started(site, SCENARIOS) as futures:
        yield futures


@pytest.fixture(scope="module")
def undisturbed(jobs: dict[str, Future[Job]]) -> Job:
    return jobs["plain"].result()


def test_a_plain_run_trains_evaluates_and_leaves_its_package(undisturbed: Job) -> None:
    assert undisturbed.restarts == 0
    assert undisturbed.digest()
    assert "4 ranks: tp 2 x pp 1 x dp 2" in undisturbed.ranks_log(0)
    assert "after training" in undisturbed.ranks_log(0)
    assert undisturbed.exit_code() == 0


@pytest.mark.parametrize("name", ["time_limit", "power_cut", "partition", "preemption", "hang"])
def test_a_disturbed_run_continues_to_the_same_weights(
    name: str, jobs: dict[str, Future[Job]], undisturbed: Job
) -> None:
    job = jobs[name].result()
    assert job.digest() == undisturbed.digest()
    assert job.restarts == 1, job.story()
    assert 0 < job.continued_from(1) < STEPS


def test_a_time_limit_is_announced_and_saved_at_once(jobs: dict[str, Future[Job]]) -> None:
    job = jobs["time_limit"].result()
    assert "SIGUSR1: the ranks save after this step" in job.log
    stopped = re.search(r"stopped by SIGUSR1 after step (\d+);", job.ranks_log(0))
    assert stopped
    assert job.continued_from(1) == int(stopped[1])


def test_a_preempted_run_saves_at_once(jobs: dict[str, Future[Job]]) -> None:
    job = jobs["preemption"].result()
    assert "SIGTERM: the ranks save after this step" in job.log
    assert "stopped by SIG" in job.ranks_log(0)


def test_the_watchdog_shows_where_a_rank_hangs(jobs: dict[str, Future[Job]]) -> None:
    job = jobs["hang"].result()
    assert "watchdog: no heartbeat for" in job.log
    assert re.search(r'File ".*slow_task.py", line \d+ in episodes', job.ranks_log(0))
