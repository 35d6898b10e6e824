"""Jobs with a server on each node: a node is lost, a job preempted, a server killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.cluster.jobs import NODES, STEPS, Job, Site, started
from tests.cluster.slow_task import PAUSE_ENV

DOUBLE = Path(__file__).with_name("vllm_double.py")


def submit(site: Site, name: str) -> Job:
    """A training that samples by a server on each of its nodes."""
    python = site.output / "python-with-vllm"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {DOUBLE} "$@"\n')
        python.chmod(0o755)
    words = ["engine=vllm", "engine.launch=true", f"engine.python={python}"]
    words += ["engine.start_timeout_s=100", "rollout.max_mismatch=null"]
    return site.submit(name, *words, environment={PAUSE_ENV: "0.2"})


def servers(site: Site, node: str) -> list[int]:
    """The server's processes on a node."""
    found = []
    for pid in site.cluster.pids_of(node):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if str(DOUBLE).encode() in words and b"--uds" in words:
            found.append(pid)
    return found


def served(site: Site) -> Job:
    job = submit(site, "served")
    job.wait_for_step(15)
    assert [len(servers(site, node)) for node in job.nodes] == [1] * NODES, job.story()
    nodes = job.nodes
    job.wait_for_end()
    assert not any(servers(site, node) for node in nodes)
    return job


def served_power_cut(site: Site) -> Job:
    job = submit(site, "served_power_cut")
    job.wait_for_step(15)
    victim = job.nodes[1]
    site.cluster.power_off(victim)
    job.wait_for_end()
    site.cluster.power_on(victim)
    return job


def served_preemption(site: Site) -> Job:
    job = submit(site, "served_preemption")
    job.wait_for_step(15)
    before = job.nodes
    words = ["-p", "high", "--exclusive", "-o", "/dev/null", "-w", ",".join(before)]
    site.cluster.run(["sbatch", *words, "--wrap", "sleep 1"])
    job.wait_for_end()
    assert not any(servers(site, node) for node in before)
    return job


def served_killed(site: Site) -> Job:
    """The server of the second node is killed; its ranks start it again."""
    job = submit(site, "served_killed")
    job.wait_for_step(15)
    (victim,) = servers(site, job.nodes[1])
    os.kill(victim, signal.SIGKILL)
    job.wait_for_end()
    return job


SCENARIOS = (served, served_killed, served_power_cut, served_preemption)


@pytest.fixture(scope="module")
def jobs(site: Site) -> Iterator[dict[str, Future[Job]]]:
    with started(site, SCENARIOS) as futures:
        yield futures


def test_each_node_has_a_server_as_long_as_the_job_runs(jobs: dict[str, Future[Job]]) -> None:
    job = jobs["served"].result()
    assert job.restarts == 0, job.story()
    assert job.digest()


def test_a_killed_server_is_started_again_without_a_new_attempt(
    jobs: dict[str, Future[Job]],
) -> None:
    job = jobs["served_killed"].result()
    assert job.restarts == 0, job.story()
    assert "restart 1 of 3" in job.ranks_log(0)
    assert job.digest() == jobs["served"].result().digest()


@pytest.mark.parametrize("name", ["served_power_cut", "served_preemption"])
def test_a_new_attempt_has_new_servers_and_ends_with_the_same_weights(
    name: str, jobs: dict[str, Future[Job]]
) -> None:
    job = jobs[name].result()
    assert job.restarts == 1, job.story()
    assert 0 < job.continued_from(1) < STEPS
    assert job.digest() == jobs["served"].result().digest()
