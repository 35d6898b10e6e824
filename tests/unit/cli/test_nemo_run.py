"""The NeMo-Run launcher starts what a user would start by hand."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.cli import nemo_run
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose
from tests.tree import ROOT

JOB = "exp_manager=job"
TRAIN = ("-m", "opcd_nemo.cli", "train")
IN_IMAGE = "exp_manager.exp_dir=/workspace/runs"
HAS_NEMO_RUN = importlib.util.find_spec("nemo_run") is not None
needs_nemo_run = pytest.mark.skipif(not HAS_NEMO_RUN, reason="nemo_run: not installed")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["executor=slurm", "script=slurm/opcd_games.sh", "optim.lr=1"],
            ("bash", [f"{ROOT}/slurm/opcd_games.sh", "optim.lr=1"]),
        ),
        (
            ["executor=local", "recipe=demo_json"],
            (sys.executable, [*TRAIN, JOB, "recipe=demo_json"]),
        ),
        (
            ["executor=docker", "optim.lr=1"],
            ("python", [*TRAIN, JOB, IN_IMAGE, "optim.lr=1"]),
        ),
    ],
)
def test_the_command_is_the_one_by_hand(
    arguments: list[str], expected: tuple[str, list[str]]
) -> None:
    assert nemo_run.command(*nemo_run.split(arguments)) == expected


def test_the_command_leaves_what_the_script_s_job_leaves() -> None:
    manager = compose("train", [JOB]).exp_manager
    assert manager.resume_if_exists
    assert manager.checkpoint_callback_params.save_nemo_on_train_end
    assert not manager.checkpoint_callback_params.save_weights_only
    assert f"overrides+=({JOB})" in (ROOT / "slurm/lib.sh").read_text()


@pytest.mark.parametrize(
    ("arguments", "key", "allowed"),
    [
        ([], "executor", "local, slurm, docker"),
        (["executor=lsf"], "executor", "local, slurm, docker"),
        (["executor=slurm", "script=x.sh"], "script", "slurm/opcd_consolidate.sh"),
        (["executor=docker", "models=nowhere"], "models", "a folder that exists"),
        (["executor=local", "dry_run=1"], "dry_run", "true, false"),
        (["executor=local", "script=slurm/opcd_math.sh"], "script", "with executor=slurm"),
        (["executor=slurm", "image=mine"], "image", "with executor=docker"),
        (["executor=local", "models=."], "models", "with executor=docker"),
    ],
)
def test_a_wrong_setting_is_named(arguments: list[str], key: str, allowed: str) -> None:
    with pytest.raises(UserError) as refused:
        nemo_run.split(arguments)
    assert refused.value.key == key
    assert refused.value.allowed.startswith(allowed)


@pytest.mark.parametrize(
    "run",
    [
        SimpleNamespace(DockerExecutor=SimpleNamespace, Packager=object),
        pytest.param("nemo_run", marks=needs_nemo_run),
    ],
)
def test_the_image_s_run_is_written_where_its_caller_finds_it(run: Any, tmp_path: Path) -> None:
    run = importlib.import_module(run) if run == "nemo_run" else run
    settings, _ = nemo_run.split(["executor=docker", "image=mine", f"models={tmp_path}"])
    executor = nemo_run.build_executor(run, settings)
    assert executor.container_image == "mine"
    mounts = dict(volume.split(":")[1::-1] for volume in executor.volumes)
    assert mounts == {"/workspace/runs": f"{ROOT}/runs", "/models": str(tmp_path)}
    assert executor.volumes[1].endswith(":ro")
    assert executor.additional_kwargs == {"user": f"{os.getuid()}:{os.getgid()}"}
    assert executor.env_vars["HOME"] == "/tmp"
    settings, _ = nemo_run.split(["executor=docker"])
    assert len(nemo_run.build_executor(run, settings).volumes) == 1


@needs_nemo_run
def test_a_dry_run_shows_the_script(tmp_path: Path) -> None:
    arguments = ["executor=slurm", "dry_run=true", "optim.lr=3e-6"]
    shown = subprocess.run(
        [sys.executable, "-m", "opcd_nemo.cli", "launch", *arguments],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "COLUMNS": "400"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "slurm/opcd_math.sh" in shown.stdout + shown.stderr
    assert "optim.lr=3e-6" in shown.stdout + shown.stderr
