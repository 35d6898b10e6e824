"""What the front door of `slurm/` shows and refuses where no Slurm answers, or one of stand-ins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SINFO = """
case "$*" in
  *"-p nowhere"*) ;;
  *%G*) echo gpu:8 ;;
  *%R*) echo batch ;;
  *) echo 'batch*' ;;
esac
"""
SLURM = {
    "sinfo": SINFO,
    "scontrol": "echo AllowAccounts=ALL",
    "sacctmgr": "echo science",
    "sbatch": "[ $1 = --test-only ] || echo 17",
    "srun": "echo --container-image",
}
SILENT = "for i in 1 2 3; do echo 'error: Unable to contact the controller' >&2; done; exit 1"
RECIPE = "medical_llama3p2_3b_1n8g"
DATA = ["task.train=medmcqa/train.parquet", "task.test=medmcqa/validation.parquet"]


def front_door(
    folder: Path,
    programs: dict[str, str],
    *arguments: str,
    without: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script by hand in `folder`, beside programs of which these are the bodies."""
    (folder / "bin").mkdir()
    for program in Path("/usr/bin").iterdir():  # where a Slurm may be installed, too
        if program.name not in (*SLURM, *without, *programs):  # a body must not go through a link
            (folder / "bin" / program.name).symlink_to(program)
    for name, body in programs.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    settings = {
        "PATH": f"{folder}/bin",
        "OPCD_RECIPE": RECIPE,
        "OPCD_PYTHON": sys.executable,
        "OPCD_PYTHON_HOST": sys.executable,
        "OPCD_OUTPUT": str(folder / "runs"),
        "OPCD_MODELS": "/lustre/models",
    }
    return subprocess.run(
        [ROOT / "slurm/opcd_system_prompt.sh", *arguments],
        cwd=folder,
        env=settings | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def only_line(shown: subprocess.CompletedProcess[str]) -> str:
    (line,) = shown.stderr.splitlines()
    return line


@pytest.mark.parametrize("image", ["img/x.sqsh", "x.sqsh", "./x", "/nowhere/x"])
def test_an_image_that_is_a_missing_file_is_refused(tmp_path: Path, image: str) -> None:
    refused = front_door(tmp_path, SLURM, *DATA, OPCD_IMAGE=image)
    assert refused.returncode == 2
    assert only_line(refused).startswith(f"error: OPCD_IMAGE={image}: not there; allowed: a file")


@pytest.mark.parametrize(
    ("image", "given"),
    [
        ("img/x.sqsh", "{folder}/img/x.sqsh"),  # pyxis takes it for a name in a registry
        ("./img/x.sqsh", "{folder}/img/x.sqsh"),
        ("registry.example#img/x.sqsh:1", "registry.example#img/x.sqsh:1"),
    ],
)
def test_pyxis_gets_an_image_s_file_by_its_whole_path(
    tmp_path: Path, image: str, given: str
) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img/x.sqsh").touch()
    shown = front_door(tmp_path, SLURM, OPCD_IMAGE=image, OPCD_STAGE_COMMAND="true", DRY_RUN="1")
    assert shown.returncode == 0, shown.stderr
    option = "--container-image=" + given.format(folder=tmp_path)
    assert option in shown.stdout.replace("\\", "").split()


@pytest.mark.parametrize("programs", [{}, {**SLURM, "sinfo": SILENT}])
def test_a_dry_run_needs_no_slurm(tmp_path: Path, programs: dict[str, str]) -> None:
    shown = front_door(tmp_path, programs, *DATA, "optim.lr=3e-6", DRY_RUN="1")
    assert shown.returncode == 0, shown.stderr
    submission, step, *configuration = shown.stdout.splitlines()
    assert submission.startswith("sbatch --export=ALL --nodes=1 --gpus-per-node=8")
    assert step.startswith("srun --nodes=1 --ntasks=1")
    assert "  lr: 3.0e-06" in configuration
    assert only_line(shown).startswith("# no Slurm answers: partition, account and size are not")


@pytest.mark.parametrize(
    ("without", "environment", "said"),
    [
        ((), {"OPCD_REHEARSE": "1"}, f"-m opcd_nemo.cli rehearse recipe={RECIPE} name={RECIPE}"),
        (("g++",), {"OPCD_REHEARSE": "1"}, "# g++ is not there: the run is not rehearsed"),
        ((), {"OPCD_REHEARSE": "0"}, None),
    ],
)
def test_a_dry_run_rehearses_where_it_is_asked_to(
    tmp_path: Path, without: tuple[str, ...], environment: dict[str, str], said: str | None
) -> None:
    programs = {"python": 'echo "ran $*"', "g++": "true"}
    settings = {"OPCD_PYTHON": "python", "DRY_RUN": "1", **environment}
    if "g++" in without:
        del programs["g++"]
    shown = front_door(tmp_path, programs, *DATA, without=without, **settings)
    assert shown.returncode == 0, shown.stderr
    lines = (shown.stdout + shown.stderr).splitlines()
    told = [line for line in lines if line.startswith(("ran -m opcd_nemo.cli", "# g++"))]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]


def test_a_rehearsal_without_a_dry_run_is_refused(tmp_path: Path) -> None:
    refused = front_door(tmp_path, SLURM, *DATA, OPCD_REHEARSE="1")
    assert refused.returncode == 2
    assert only_line(refused) == "error: OPCD_REHEARSE=1: allowed: 0, or 1 with DRY_RUN=1"


def test_without_a_slurm_nothing_is_queued(tmp_path: Path) -> None:
    refused = front_door(tmp_path, {**SLURM, "sinfo": SILENT}, *DATA)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert only_line(refused) == (
        "error: sinfo: error: Unable to contact the controller; allowed: a machine of a Slurm"
        " cluster that answers"
    )


def test_a_dry_run_shows_the_job_and_then_what_the_cluster_lacks(tmp_path: Path) -> None:
    shown = front_door(tmp_path, SLURM, *DATA, DRY_RUN="1", OPCD_PARTITION="nowhere")
    assert shown.returncode == 2
    assert "name: " + RECIPE in shown.stdout.splitlines()
    assert only_line(shown) == ("error: OPCD_PARTITION=nowhere: no such partition; allowed: batch")


def test_servers_have_the_gpus_that_ranks_leave(tmp_path: Path) -> None:
    words = {"OPCD_ENGINE_GPUS_PER_NODE": "4", "DRY_RUN": "1"}
    shown = front_door(tmp_path, {}, *DATA, **words)
    assert shown.returncode == 0, shown.stderr
    submission, step, *configuration = shown.stdout.splitlines()
    assert "--gpus-per-node=8" in submission
    assert "parallel.num_ranks=4" in step
    for line in ("  gpus: 4", "  launch: true", "  max_batch_size: 128", "  num_ranks: 4"):
        assert line in configuration


@pytest.mark.parametrize(
    ("ranks", "gpus", "line"),
    [
        ("4", "8", "OPCD_ENGINE_GPUS_PER_NODE=8: allowed: fewer than the 8 GPUs of a node; 0: "),
        ("4", "x", "OPCD_ENGINE_GPUS_PER_NODE=x: allowed: a whole number"),
        ("5", "4", "OPCD_RANKS_PER_NODE=5: allowed: at most 4 of the 8 GPUs of a node"),
    ],
)
def test_more_gpus_than_a_node_has_are_refused(
    tmp_path: Path, ranks: str, gpus: str, line: str
) -> None:
    words = {"OPCD_ENGINE_GPUS_PER_NODE": gpus, "OPCD_RANKS_PER_NODE": ranks}
    refused = front_door(tmp_path, SLURM, *DATA, **words)
    assert refused.returncode == 2
    assert only_line(refused).startswith(f"error: {line}")
