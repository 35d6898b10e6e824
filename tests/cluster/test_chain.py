"""The stages of the experience pipeline wait for each other, and stop when one fails."""

from __future__ import annotations

import itertools
import json
import os
import re

from tests.cluster.jobs import NODES, Job, Site
from tests.recipes.conftest import SMOKE
from tests.recipes.test_experience import PROMPT, SETTINGS

PIPELINE = [
    *SETTINGS[:3],
    PROMPT,
    "experience.extraction.keep=trace",
    "experience.extraction.num_chains=2",
    "experience.extraction.num_steps=1",
    "experience.extraction.sampling.max_new_tokens=4",
]
STAGES = ["extract", "consolidate", "evaluate"]


def submit(site: Site, name: str, **environment: str) -> dict[str, Job]:
    settings = {
        "OPCD_STAGE_COMMAND": "tests/cluster/stage.sh",
        "OPCD_NAME": name,
        "OPCD_STAGES": " ".join(STAGES),
        "OPCD_NODES": "1",
        "OPCD_TIME": "10",
        "OPCD_SBATCH_FLAGS": f"--output={site.output}/%x-%j.log",
        **environment,
    }
    chained = site.front_door("slurm/chain.sh", environment=settings)
    assert chained.returncode == 0, chained
    ids = dict(re.findall(r"^(\w+): job (\d+)$", chained.stdout, re.MULTILINE))
    assert list(ids) == STAGES
    jobs = {}
    for stage, job in ids.items():
        jobs[stage] = Job(site, job, name, site.output / f"opcd-{stage}-{job}.log")
    for job in jobs.values():
        job.wait_for_end()
    return jobs


def test_the_stages_run_one_after_the_other(site: Site) -> None:
    jobs = submit(site, "chain")
    assert [job.state for job in jobs.values()] == ["COMPLETED"] * 3
    shown = [site.cluster.job(job.id) for job in jobs.values()]
    for before, after in itertools.pairwise(shown):
        assert before["EndTime"] <= after["StartTime"]
    for stage, job in jobs.items():
        assert f"{stage} on node" in job.ranks_log(0)
    telling = site.output / f"slurm/chain-{jobs['extract'].id}.log"
    assert not telling.exists()


def test_a_failed_stage_stops_the_chain_and_says_so(site: Site) -> None:
    jobs = submit(site, "broken_chain", OPCD_TEST_FAIL="consolidate", OPCD_MAX_RESTARTS="1")
    assert [job.state for job in jobs.values()] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert (jobs["consolidate"].exit_code(), jobs["consolidate"].restarts) == (93, 1)
    assert "error: gave up after 1 restarts" in jobs["consolidate"].log
    telling = site.output / f"slurm/chain-{jobs['extract'].id}.log"
    site.cluster.wait_for(lambda: telling.exists() and "evaluate" in telling.read_text(), 30, "it")
    failed, skipped = telling.read_text().splitlines()
    assert failed.startswith("chain: stage consolidate (job ")
    assert failed.endswith("failed: FAILED; the chain stops")
    assert skipped.endswith("does not run: CANCELLED")


def test_a_stage_that_crashes_once_is_started_again_and_the_chain_goes_on(site: Site) -> None:
    command = "[[ $OPCD_ATTEMPT != *.0 ]] || kill -KILL $PPID"
    jobs = submit(site, "crashed_chain", OPCD_TEST_COMMAND=command)
    assert [job.state for job in jobs.values()] == ["COMPLETED"] * 3
    assert [job.restarts for job in jobs.values()] == [1, 1, 1]


def test_bad_input_of_a_stage_is_not_started_again(site: Site) -> None:
    jobs = submit(site, "wrong_chain", OPCD_TEST_FAIL="extract", OPCD_TEST_CODE="2")
    assert [job.state for job in jobs.values()] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert (jobs["extract"].exit_code(), jobs["extract"].restarts) == (2, 0)


def test_the_whole_pipeline_is_the_default(site: Site) -> None:
    settings = {"DRY_RUN": "1", "OPCD_STAGE_COMMAND": "tests/cluster/stage.sh", "OPCD_NODES": "1"}
    shown = site.front_door("slurm/chain.sh", environment=settings)
    assert shown.returncode == 0, shown
    stages = re.findall(r"# stage (\w+)", shown.stdout)
    assert stages == ["extract", "score", "select", "consolidate", "evaluate"]
    for stage in stages:
        assert f"stage={stage}" in shown.stdout


def test_a_chain_whose_report_is_refused_is_cancelled(site: Site) -> None:
    programs = site.output.parent / "programs"  # an sbatch that refuses one script
    programs.mkdir()
    refusing = '#!/bin/bash\n[[ "$*" != *chain_report* ]] || exit 1\nexec /usr/bin/sbatch "$@"\n'
    (programs / "sbatch").write_text(refusing)
    (programs / "sbatch").chmod(0o755)
    settings = {
        "OPCD_STAGE_COMMAND": "tests/cluster/stage.sh",
        "OPCD_STAGES": " ".join(STAGES),
        "OPCD_NODES": "1",
        "OPCD_SBATCH_FLAGS": f"--begin=now+1hour --output={site.output}/%x-%j.log",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    refused = site.front_door("slurm/chain.sh", environment=settings)
    assert refused.returncode == 2, refused
    assert "error: sbatch refuses the job that tells of a failed stage" in refused.stderr
    ids = re.findall(r": job (\d+)$", refused.stdout, re.MULTILINE)
    assert [site.cluster.job(job)["JobState"] for job in ids] == ["CANCELLED"] * 3


def test_the_report_has_the_flags_of_the_site(site: Site) -> None:
    flags = f"--comment=ours --output={site.output}/%x-%j.log"
    jobs = submit(
        site, "flags", OPCD_TEST_FAIL="extract", OPCD_TEST_CODE="2", OPCD_SBATCH_FLAGS=flags
    )
    shown = site.cluster.run(["scontrol", "show", "job", "-o"]).stdout.splitlines()
    (report,) = [one for one in shown if f"chain-{jobs['extract'].id}.log" in one]
    assert "Comment=ours" in report


def test_a_stage_of_the_real_pipeline_runs_on_two_nodes(site: Site) -> None:
    settings = {"OPCD_PARALLEL": "single", "OPCD_RANKS_PER_NODE": "1"}
    settings |= {"OPCD_PROBE_MIB": "1", "OPCD_MIN_GBPS": "0.0001"}
    arguments = [*SMOKE, *PIPELINE, f"student.path={site.model}"]
    script, flags = "slurm/opcd_extract.sh", [f"--nodes={NODES}"]
    job = site.sbatch("lake", script, *arguments, flags=flags, environment=settings)
    job.wait_for_end()
    assert (job.state, job.restarts) == ("COMPLETED", 0), job.story()
    assert "extraction: wave 0: 2 extractions" in job.ranks_log(0)
    assert len(json.loads((job.run / "candidates.json").read_text())) == 2


def test_a_chain_that_must_fail_is_not_queued(site: Site) -> None:
    settings = {"OPCD_RECIPE": "math_qwen3_8b_2n8g", "OPCD_NODES": "1"}
    before = site.cluster.run(["squeue", "-h", "-o", "%i"]).stdout
    refused = site.front_door("slurm/chain.sh", environment=settings)
    assert refused.returncode == 2
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: task.train: no value is given: ")
    assert site.cluster.run(["squeue", "-h", "-o", "%i"]).stdout == before
