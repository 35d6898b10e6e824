"""How a job ends: for good, or to be started again, and no more often than is allowed."""

from __future__ import annotations

import re

import pytest

from opcd_nemo.storage.durable import find_damage, read_manifest
from tests.cluster.jobs import STEPS, Site
from tests.cluster.slow_task import PAUSE_ENV

FAIL = {"OPCD_STAGE_COMMAND": "tests/cluster/stage.sh", "OPCD_TEST_FAIL": "train"}


def test_exit_93_and_bad_input_are_not_started_again(site: Site) -> None:
    for code in ("93", "2"):
        environment = {**FAIL, "OPCD_TEST_CODE": code}
        job = site.sbatch(f"exit_{code}", "slurm/opcd_math.sh", environment=environment)
        job.wait_for_end()
        assert (job.state, job.exit_code(), job.restarts) == ("FAILED", int(code), 0), job.story()


def test_a_failing_run_is_started_again_as_often_as_is_allowed(site: Site) -> None:
    environment = {**FAIL, "OPCD_MAX_RESTARTS": "1"}
    job = site.sbatch("cap", "slurm/opcd_math.sh", environment=environment)
    job.wait_for_end()
    assert (job.state, job.exit_code(), job.restarts) == ("FAILED", 93, 1), job.story()
    assert "error: gave up after 1 restarts; allowed:" in job.log
    assert f"attempt {job.id}.0 in" in job.ranks_log(0), job.story()
    assert f"attempt {job.id}.1 in" in job.ranks_log(1)


def test_the_file_stop_ends_a_run_between_two_steps_for_good(site: Site) -> None:
    job = site.submit("stop", environment={PAUSE_ENV: "0.3"})
    job.wait_for_step(3)
    (job.run / "STOP").touch()
    job.wait_for_end()
    assert (job.state, job.exit_code(), job.restarts) == ("FAILED", 93, 0), job.story()
    found = re.search(r"stopped by .*/STOP after step (\d+); saved (\S+);", job.log)
    assert found, job.story()
    assert 3 < int(found[1]) < STEPS
    saved = job.run / "checkpoints" / f"step={found[1]}.ckpt"
    assert str(saved) == found[2]
    entries = read_manifest(saved)
    assert find_damage(saved, entries, sorted(entries)) is None
    assert not (job.run / "DONE").exists()
    again = site.submit("stop")
    again.wait_for_end()
    assert again.exit_code() == 93
    assert f"stopped by {job.run}/STOP; allowed: submit again without that file" in again.log


def test_a_step_longer_than_the_notice_of_the_time_limit_is_started_again(site: Site) -> None:
    command = f"[[ $OPCD_ATTEMPT == *.0 ]] && sleep 300; touch {site.output}/long_step/DONE"
    environment = {**FAIL, "OPCD_TEST_COMMAND": command, "OPCD_TEST_DEAF": "1"}
    environment |= {"OPCD_TEST_FAIL": "", "OPCD_REQUEUE_AFTER_S": "2"}
    (site.output / "long_step").mkdir()
    job = site.sbatch("long_step", "slurm/opcd_math.sh", environment=environment)
    site.cluster.wait_for(lambda: "train on" in job.ranks_log(0), 60, f"start\n{job.log}")
    site.cluster.run(["scancel", "--signal=USR1", "--batch", job.id])
    job.wait_for_end()
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.story()
    assert "the step has not ended in 2 s (OPCD_REQUEUE_AFTER_S)" in job.log
    assert f"attempt {job.id}.1 in" in job.ranks_log(1)


@pytest.mark.parametrize("stage", ["extract", "consolidate"])
def test_the_file_stop_ends_a_stage_for_good(site: Site, stage: str) -> None:
    environment = {"OPCD_PIPELINE_STAGE": stage, "OPCD_TEST_COMMAND": "sleep 300"}
    job = site.submit_stage(f"stop_{stage}", environment=environment)
    site.cluster.wait_for(lambda: f"{stage} on" in job.ranks_log(0), 60, f"start\n{job.log}")
    job.run.mkdir()
    (job.run / "STOP").touch()
    job.wait_for_end()
    assert (job.state, job.exit_code(), job.restarts) == ("FAILED", 93, 0), job.story()
    assert f"stopped by {job.run}/STOP; allowed: submit again without that file" in job.log


def test_a_cancelled_job_is_not_started_again(site: Site) -> None:
    job = site.submit_stage("cancel", environment={"OPCD_TEST_COMMAND": "sleep 300"})
    site.cluster.wait_for(lambda: "extract on" in job.ranks_log(0), 60, f"start\n{job.log}")
    site.cluster.run(["scancel", job.id])
    job.wait_for_end()
    site.cluster.wait_for(lambda: job.site.cluster.run(["squeue", "-h"]).stdout == "", 60, "end")
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.story()


def test_what_the_site_file_sets_reaches_the_ranks(site: Site) -> None:
    file = site.output.parent / "site.sh"
    file.write_text("NCCL_SOCKET_IFNAME=ib7\n")
    environment = {"OPCD_SITE": str(file), "OPCD_TEST_COMMAND": "env"}
    job = site.submit_stage("site_file", environment=environment)
    job.wait_for_end()
    assert job.state == "COMPLETED", job.story()
    assert "NCCL_SOCKET_IFNAME=ib7" in job.ranks_log(0)


def test_what_is_done_is_not_done_again(site: Site) -> None:
    run = site.output / "finished"
    run.mkdir()
    (run / "DONE").touch()
    job = site.submit("finished")
    job.wait_for_end()
    assert job.state == "COMPLETED"
    assert f"nothing to do: {run}/DONE is there" in job.log
