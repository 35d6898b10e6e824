"""The NeMo-Run launcher starts what a user would start by hand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.launch.ranks import compose
from tests.tree import ROOT

JOB = "exp_manager=job"
IN_IMAGE = "exp_manager.exp_dir=/workspace/runs"
HAS_NEMO_RUN = importlib.util.find_spec("nemo_run") is not None
needs_nemo_run = pytest.mark.skipif(not HAS_NEMO_RUN, reason="nemo_run: not installed")


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launcher", ROOT / "recipes/launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["executor=slurm", "script=slurm/opcd_games.sh", "optim.lr=1"],
            ("bash", [f"{ROOT}/slurm/opcd_games.sh", "optim.lr=1"]),
        ),
        (
            ["executor=local", "recipe=demo_json"],
            (sys.executable, [f"{ROOT}/recipes/train.py", JOB, "recipe=demo_json"]),
        ),
        (
            ["executor=docker", "optim.lr=1"],
            ("python", ["/opt/opcd/recipes/train.py", JOB, IN_IMAGE, "optim.lr=1"]),
        ),
    ],
)
def test_the_command_is_the_one_by_hand(
    launcher: ModuleType, arguments: list[str], expected: tuple[str, list[str]]
) -> None:
    command = launcher.command(*launcher.split(arguments))
    assert command == expected
    assert not command[1][0].startswith(str(ROOT)) or Path(command[1][0]).is_file()


def test_the_command_leaves_what_the_script_s_job_leaves() -> None:
    manager = compose("train", [JOB]).exp_manager
    assert manager.resume_if_exists
    assert manager.checkpoint_callback_params.save_nemo_on_train_end
    assert not manager.checkpoint_callback_params.save_weights_only
    assert f"overrides+=({JOB})" in (ROOT / "slurm/lib.sh").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "executor=: allowed: local, slurm, docker"),
        (["executor=lsf"], "executor=lsf: allowed: local"),
        (["executor=slurm", "script=x.sh"], "script=x.sh: allowed: slurm/opcd_consolidate.sh"),
        (["executor=docker", "models=nowhere"], "models=nowhere: allowed: a folder that is there"),
        (["executor=local", "dry_run=1"], "dry_run=1: allowed: true, false"),
        (
            ["executor=local", "script=slurm/opcd_math.sh"],
            "script=slurm/opcd_math.sh: allowed: with executor=slurm",
        ),
        (["executor=slurm", "image=mine"], "image=mine: allowed: with executor=docker"),
        (["executor=local", "models=."], "models=.: allowed: with executor=docker"),
    ],
)
def test_a_wrong_setting_is_one_line(
    launcher: ModuleType, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


@pytest.mark.parametrize(
    "run",
    [
        SimpleNamespace(DockerExecutor=SimpleNamespace, Packager=object),
        pytest.param("nemo_run", marks=needs_nemo_run),
    ],
)
def test_the_image_s_run_is_written_where_its_caller_finds_it(
    run: Any, launcher: ModuleType, tmp_path: Path
) -> None:
    run = importlib.import_module(run) if run == "nemo_run" else run
    own, _ = launcher.split(["executor=docker", "image=mine", f"models={tmp_path}"])
    executor = launcher.build_executor(run, own)
    assert executor.container_image == "mine"
    mounts = dict(volume.split(":")[1::-1] for volume in executor.volumes)
    assert mounts == {"/workspace/runs": f"{ROOT}/runs", "/models": str(tmp_path)}
    assert executor.volumes[1].endswith(":ro")
    assert executor.additional_kwargs == {"user": f"{os.getuid()}:{os.getgid()}"}
    assert executor.env_vars["HOME"] == "/tmp"
    own, _ = launcher.split(["executor=docker"])
    assert len(launcher.build_executor(run, own).volumes) == 1


@needs_nemo_run
def test_a_dry_run_shows_the_script(tmp_path: Path) -> None:
    arguments = ["executor=slurm", "dry_run=true", "optim.lr=3e-6"]
    shown = subprocess.run(
        [sys.executable, ROOT / "recipes/launch.py", *arguments],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "COLUMNS": "400"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "slurm/opcd_math.sh" in shown.stdout + shown.stderr
    assert "optim.lr=3e-6" in shown.stdout + shown.stderr
