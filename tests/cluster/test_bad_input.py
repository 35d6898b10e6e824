"""Mistakes are refused in one line before anything is queued, or in the first second of the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.jobs import Site
from tests.recipes.conftest import ROOT

MATH = "slurm/opcd_math.sh"
# what is wrong -> the environment that says so, and words of the one line
MISTAKES: dict[str, tuple[dict[str, str], list[str]]] = {
    "an unknown recipe": (
        {"OPCD_RECIPE": "nothing"},
        ["OPCD_RECIPE=nothing: no such file in conf/recipe; allowed: ", "demo_brevity"],
    ),
    "a missing image": (
        {"OPCD_IMAGE": "/nowhere/opcd.sqsh"},
        ["OPCD_IMAGE=/nowhere/opcd.sqsh: not there; allowed: a file"],
    ),
    "a mount that does not exist": (
        {"OPCD_IMAGE": "registry.example#x:1", "OPCD_MOUNTS": "/usr:/usr,/lustre/data:/data"},
        ["OPCD_MOUNTS=/lustre/data:/data: /lustre/data is not there; allowed: a folder"],
    ),
    "an output that cannot be written": (
        {"OPCD_OUTPUT": "/proc/runs"},
        ["OPCD_OUTPUT=/proc/runs: ", " cannot write there; allowed: a writable folder"],
    ),
    "a missing Python": (
        {"OPCD_PYTHON": "/nowhere/python"},
        ["OPCD_PYTHON=/nowhere/python: not there; allowed: a Python"],
    ),
    "a missing site file": ({"OPCD_SITE": "/nowhere.sh"}, ["OPCD_SITE=/nowhere.sh: not there"]),
    "no ranks": ({"OPCD_RANKS_PER_NODE": "0"}, ["OPCD_RANKS_PER_NODE=0: allowed: 1 or more"]),
    "a word for a speed": (
        {"OPCD_MIN_GBPS": "fast"},
        ["OPCD_MIN_GBPS=fast: allowed: a number, as 20"],
    ),
    "a mount for no image": (
        {"OPCD_MOUNTS": "/usr:/usr"},
        ["OPCD_MOUNTS=/usr:/usr: allowed: with OPCD_IMAGE"],
    ),
    "a word for a number": ({"OPCD_MAX_RESTARTS": "x"}, ["OPCD_MAX_RESTARTS=x: allowed: a whole"]),
}
AT_THE_FRONT_DOOR: dict[str, tuple[dict[str, str], list[str]]] = {
    **MISTAKES,
    "more GPUs than nodes have": (
        {"OPCD_GPUS_PER_NODE": "9"},
        ["OPCD_GPUS_PER_NODE=9: nodes of partition batch have 8; allowed: at most that"],
    ),
    "an absent account": (
        {"OPCD_PARTITION": "paid", "OPCD_ACCOUNT": "arts"},
        ["OPCD_ACCOUNT=arts: no account of partition paid; allowed: science"],
    ),
    "no account": ({"OPCD_PARTITION": "paid"}, ["OPCD_ACCOUNT=: no account of partition paid"]),
    "an unknown one of two partitions": (
        {"OPCD_PARTITION": "batch,nowhere"},
        ["sbatch refuses: ", "partition", "; allowed: "],
    ),
    "an unknown partition": (
        {"OPCD_PARTITION": "nowhere"},
        ["OPCD_PARTITION=nowhere: no such partition; allowed: batch,high,paid"],
    ),
    "more nodes than there are": ({"OPCD_NODES": "99"}, ["sbatch refuses: ", "; allowed: "]),
    "a wrong configuration": (
        {"OPCD_PARALLEL": "tp99"},
        ["parallel=tp99: no such file", "allowed"],
    ),
    "a wrong configuration for an image": (
        {"OPCD_IMAGE": "registry.example#x:1", "OPCD_PARALLEL": "tp99"},
        ["parallel=tp99: no such file", "allowed"],
    ),
    "a missing Python beside the image": (
        {"OPCD_IMAGE": "registry.example#x:1", "OPCD_PYTHON_HOST": "/nowhere/python"},
        ["OPCD_PYTHON_HOST=/nowhere/python: not there; allowed: a Python"],
    ),
}


def queue(site: Site) -> str:
    return site.cluster.run(["squeue", "-h", "-o", "%i %T"]).stdout


@pytest.mark.parametrize("mistake", AT_THE_FRONT_DOOR)
def test_a_mistake_is_refused_before_anything_is_queued(site: Site, mistake: str) -> None:
    environment, words = AT_THE_FRONT_DOOR[mistake]
    before = queue(site)
    refused = site.front_door(MATH, environment=environment)
    assert refused.returncode == 2, refused
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert queue(site) == before


def test_a_mistake_ends_the_job_in_its_first_second(site: Site) -> None:
    jobs = {
        mistake: site.sbatch(f"mistake {number}", MATH, environment=environment)
        for number, (mistake, (environment, _)) in enumerate(MISTAKES.items())
    }
    for mistake, job in jobs.items():
        job.wait_for_end()
        assert (job.state, job.exit_code(), job.restarts) == ("FAILED", 2, 0), mistake
        shown = site.cluster.job(job.id)
        assert shown["RunTime"] <= "00:00:03"  # whole seconds, on a busy machine
        (line,) = job.log.splitlines()
        assert line.startswith("error: ")
        for word in MISTAKES[mistake][1]:
            assert word in line


@pytest.mark.parametrize("argument", ["name=x", "exp_manager.exp_dir=/x", "recipe=demo_json"])
def test_what_the_script_must_know_is_given_as_a_variable(site: Site, argument: str) -> None:
    refused = site.front_door(MATH, argument, environment={})
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {argument}: allowed: as a variable")


def test_a_dry_run_shows_the_job_and_queues_nothing(site: Site) -> None:
    environment = {
        "DRY_RUN": "1",
        "OPCD_PARTITION": "paid",
        "OPCD_ACCOUNT": "science",
        "OPCD_SPARE_NODES": "1",
        "OPCD_TIME": "1:00:00",
    }
    before = queue(site)
    shown = site.front_door(
        MATH, f"student.path={site.model}", "optim.lr=3e-4", environment=environment
    )
    assert shown.returncode == 0, shown.stderr
    submission, step, *configuration = shown.stdout.splitlines()
    assert submission.startswith("sbatch --export=ALL --nodes=3 --gpus-per-node=0")
    for flag in ("--account=science", "--partition=paid", "--time=1:00:00"):
        assert flag in submission
    assert step.startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=node1\\,node2")
    assert "-m opcd_nemo.cli train recipe=demo_brevity name=front" in step
    assert "parallel.num_ranks=4" in step
    assert "name: front" in configuration
    assert "  lr: 0.0003" in configuration
    assert queue(site) == before


def test_without_a_python_the_configuration_is_left_to_the_image(
    site: Site, tmp_path: Path
) -> None:
    # neither .venv nor python3: a root of the project without the first, a PATH without the second
    for name in ("slurm", "conf", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in Path("/usr/bin").iterdir():
        if not program.name.startswith("python"):
            (programs / program.name).symlink_to(program)
    environment = {
        "DRY_RUN": "1",
        "OPCD_IMAGE": "registry.example#x:1",
        "OPCD_PYTHON": "python",
        "OPCD_ROOT": str(tmp_path),
        "PATH": str(programs),
    }
    shown = site.front_door(MATH, environment=environment)
    assert shown.returncode == 0, shown
    (line,) = shown.stderr.splitlines()
    assert line.startswith("# no Python of this machine has the project")
    assert "-m opcd_nemo.cli train recipe=demo_brevity" in shown.stdout


# the command lines of slurm/README.md, on the nodes that the scripts ask for
DOCUMENTED = {
    "slurm/opcd_math.sh": ["task.train=dapo/train.parquet", "context.path=experience/math"],
    "slurm/opcd_games.sh": ["context.path=experience/frozen_lake"],
    "slurm/opcd_system_prompt.sh": [
        "task.train=medmcqa/train.parquet",
        "task.test=medmcqa/validation.parquet",
    ],
    "slurm/opcd_extract.sh": ["task.train=dapo/train.parquet"],
}


@pytest.mark.parametrize("script", DOCUMENTED)
def test_a_documented_command_line_is_complete(site: Site, script: str) -> None:
    environment = {
        "DRY_RUN": "1",
        "OPCD_RECIPE": "",
        "OPCD_GPUS_PER_NODE": "8",
        "OPCD_RANKS_PER_NODE": "8",
        "OPCD_MODELS": "/lustre/models",
    }
    shown = site.front_door(script, *DOCUMENTED[script], environment=environment)
    assert shown.returncode == 0, shown
    assert " ".join(DOCUMENTED[script]) in shown.stdout.splitlines()[1]
    assert "  path: /lustre/models/Qwen" in shown.stdout
