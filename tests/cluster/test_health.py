"""Sick nodes are named and left out; without a spare node the job ends with one clear line."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.cluster.jobs import Job, Site
from tests.recipes.conftest import ROOT

GPUS = {
    "PATH": f"{ROOT}/tests/cluster/bin:{os.environ['PATH']}",
    "OPCD_TEST_SICK_NODE": "node2",
    "OPCD_RANKS_PER_NODE": "2",
}
SPARE = ["--nodes=3", "--nodelist=node1,node2,node3"]
NO_SPARE = ["--nodes=2", "--nodelist=node1,node2"]


def finished(job: Job) -> Job:
    job.wait_for_end()
    return job


def assert_ran_without(job: Job, node: str, why: str) -> None:
    assert job.state == "COMPLETED", job.story()
    assert f"health gate: {node}: {why}" in job.log
    assert "extract on node1 as 0 of 2" in job.ranks_log(0)
    assert "extract on node3 as 1 of 2" in job.ranks_log(0)
    assert f"on {node} as" not in job.ranks_log(0)


def assert_stopped_for(job: Job, node: str) -> None:
    assert job.state == "FAILED"
    assert job.exit_code() == 93
    assert job.restarts == 0
    (line,) = [line for line in job.log.splitlines() if "error:" in line]
    assert f"1 nodes are fit for work, 2 are needed, not fit: {node}; allowed" in line
    assert job.ranks_log(0) == ""


def test_a_node_with_a_missing_gpu_is_left_out(site: Site) -> None:
    flags = [*SPARE, "--gpus-per-node=8"]
    environment = {**GPUS, "OPCD_SPARE_NODES": "1"}
    job = finished(site.submit_stage("gpu", flags=flags, environment=environment))
    assert_ran_without(job, "node2", "7 of 8 GPUs")


def test_without_a_spare_a_missing_gpu_ends_the_job(site: Site) -> None:
    flags = [*NO_SPARE, "--gpus-per-node=8"]
    job = finished(site.submit_stage("gpu_alone", flags=flags, environment=GPUS))
    assert "health gate: node2: 7 of 8 GPUs" in job.log
    assert_stopped_for(job, "node2")


@pytest.mark.parametrize("spare", [True, False])
def test_a_node_that_cannot_write_the_shared_folder_is_left_out(site: Site, spare: bool) -> None:
    site.cluster.make_read_only("node2", site.output)
    try:
        job = finished(
            site.submit_stage(
                f"read_only_{spare}",
                flags=SPARE if spare else NO_SPARE,
                environment={"OPCD_SPARE_NODES": str(int(spare))},
            )
        )
    finally:
        site.cluster.make_read_only("node2", site.output, read_only=False)
    if spare:
        assert_ran_without(job, "node2", f"{site.output}/slurm/{job.id}/attempt-0: cannot be writ")
    else:
        assert_stopped_for(job, "node2")


def test_the_node_of_the_script_is_named_when_it_cannot_write_the_shared_folder(
    site: Site,
) -> None:
    site.cluster.make_read_only("node1", site.output)
    try:
        # its own log is on the login node's side of the folder
        flags = [*NO_SPARE, f"--output={site.output.parent}/first_node.log"]
        job = finished(site.submit_stage("first_node", flags=flags))
    finally:
        site.cluster.make_read_only("node1", site.output, read_only=False)
    assert (job.state, job.exit_code()) == ("FAILED", 2)
    (line,) = (site.output.parent / "first_node.log").read_text().splitlines()
    assert f"error: OPCD_OUTPUT={site.output}: node1 cannot write there; allowed: " in line


def test_a_relative_output_is_a_folder_of_all_nodes(site: Site) -> None:
    relative = os.path.relpath(site.output / "relative", ROOT)
    environment = {"OPCD_OUTPUT": relative}
    job = finished(site.submit_stage("relative", flags=NO_SPARE, environment=environment))
    assert job.state == "COMPLETED", job.story()
    assert (site.output / f"relative/slurm/{job.id}/attempt-0/ranks.log").exists()


def test_a_node_behind_a_slow_link_is_left_out(site: Site) -> None:
    interface = ["ip", "netns", "exec", f"{site.cluster.tag}node2", "tc", "qdisc"]
    limit = ["root", "tbf", "rate", "40mbit", "burst", "32kbit", "latency", "400ms"]
    subprocess.run([*interface, "add", "dev", "eth0", *limit], check=True)
    try:
        environment = {"OPCD_SPARE_NODES": "1", "OPCD_PROBE_MIB": "1", "OPCD_RANKS_PER_NODE": "1"}
        job = finished(site.submit_stage("slow", flags=SPARE, environment=environment))
    finally:
        subprocess.run([*interface, "del", "dev", "eth0", "root"], check=True)
    assert_ran_without(job, "node2", "all-reduce at 0.0")


def test_a_host_without_enough_free_memory_or_with_another_time_is_not_fit(site: Site) -> None:
    environment = {"OPCD_MIN_FREE_GIB": "100000"}
    job = finished(site.submit_stage("memory", flags=NO_SPARE, environment=environment))
    assert "GiB of free memory, OPCD_MIN_FREE_GIB=100000" in job.log
    assert job.exit_code() == 93
    check = ["bash", f"{ROOT}/slurm/node_check.sh", str(site.output), "0", "1000000000.0"]
    environment = {"OPCD_MIN_FREE_GIB": "0", "OPCD_MAX_CLOCK_SKEW_S": "5", "SLURMD_NODENAME": "n"}
    answer = site.cluster.run(check, environment).stdout
    assert answer.startswith("n: its clock is ")
