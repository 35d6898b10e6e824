"""Recipes run as a user runs them: a subprocess in the repository's root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.fork_server import choose_python
from tests.tiny import write_chat_model
from tests.tree import PYTHONPATH, ROOT

Train = Callable[..., subprocess.CompletedProcess[str]]

SMOKE = (
    "student.dtype=fp32 trainer.max_steps=2 evaluation.num_questions=2 evaluation.num_retention=2 "
    "evaluation.retention_max_new_tokens=4 rollout.sampling.max_new_tokens=4 "
    "batching.global_batch_size=4 batching.micro_batch_size=2 parallel.timeout_s=60 "
    "parallel.device=cpu"
).split()


@pytest.fixture(scope="session", autouse=True)
def _forked(fork_server: None) -> None:
    """Every recipe here, but those that a test wants `fresh`."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random chat model."""
    return write_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def smoke(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run of seconds; later ones win."""
    runs = tmp_path_factory.mktemp("runs")
    return [*SMOKE, f"student.path={tiny}", f"exp_manager.exp_dir={runs}"]


@pytest.fixture(scope="session")
def train(smoke: list[str]) -> Train:
    """Runs `recipes/train.py` on the tiny model."""

    def run(
        *overrides: str, environment: Mapping[str, str] | None = None, fresh: bool = False
    ) -> subprocess.CompletedProcess[str]:
        command = ("recipes/train.py", *smoke, *overrides)
        return run_python(*command, environment=environment, fresh=fresh)

    return run


def run_python(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
    fresh: bool = False,
    cwd: Path = ROOT,
    timeout_s: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run this Python; `fresh`: with all imports of its own."""
    python = sys.executable if fresh else choose_python()
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env=_clean_environment() | {"PYTHONPATH": PYTHONPATH} | dict(environment or {}),
        capture_output=True,
        input=stdin,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _clean_environment() -> dict[str, str]:
    """Without what a torchrun around pytest would have set."""
    launcher = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    return {key: value for key, value in os.environ.items() if key not in launcher}
