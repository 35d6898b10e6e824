"""What happens when a run breaks half-way: everybody stops, nothing is spoilt."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from opcd_nemo.metrics import read_metrics
from tests.recipes.conftest import Train

BREAKS_IN_STEP_2 = ["parallel=dp2", "trainer.max_steps=3"]
SAVES_EVERY_STEP = ["exp_manager.checkpoint_callback_params.every_n_train_steps=1"]


@dataclass(frozen=True)
class Failure:
    process: subprocess.CompletedProcess[str]
    seconds: float
    folder: Path

    @property
    def last_line(self) -> str:
        return self.process.stderr.splitlines()[-1]


def fail(train: Train, folder: Path, plug: str) -> Failure:
    started = time.monotonic()
    process = train(
        *BREAKS_IN_STEP_2, *SAVES_EVERY_STEP, f"exp_manager.exp_dir={folder}", "name=run", plug
    )
    return Failure(process, time.monotonic() - started, folder / "run")


def assert_first_checkpoint_is_whole(folder: Path, tmp_path: Path) -> None:
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == "step=1.ckpt"
    dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
    tensors = [
        value
        for value in _leaves(torch.load(tmp_path / "whole.pt", weights_only=False))
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    assert len(tensors) > 10
    assert all(tensor.isfinite().all() for tensor in tensors)


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for one in value.values() for leaf in _leaves(one)]
    return [value]


@pytest.mark.parametrize(
    ("plug", "code", "words"),
    [
        ("RaisingTask", 1, "RuntimeError: this rank's task broke"),
        ("ExitingTask", 7, "it ended without an exception, exit code 7"),
    ],
)
def test_one_dying_rank_ends_all_and_has_the_last_word(
    train: Train, tmp_path: Path, plug: str, code: int, words: str
) -> None:
    failure = fail(train, tmp_path, f"task._target_=tests.recipes.faulty_parts.{plug}")
    assert failure.last_line == f"error: rank 1 failed first: {words}"
    assert failure.process.returncode == code
    assert failure.seconds < 60 + 30  # 60 after the death, which comes after start and imports
    assert len(read_metrics(failure.folder / "metrics.jsonl")) == 1


def test_a_bug_in_a_run_shows_its_traceback_and_is_no_bad_input(train: Train) -> None:
    buggy = "task._target_=tests.recipes.faulty_parts.BuggyTask"
    done = train("parallel=single", "trainer.max_steps=2", buggy)
    assert done.returncode == 1, done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert "in episodes\n    make_dataclass(" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: rank 0 failed first: ValueError: mutable default")
    assert "is not allowed: use default_factory" in last


def test_non_finite_loss_stops_all_ranks_and_leaves_the_last_checkpoint(
    train: Train, tmp_path: Path
) -> None:
    failure = fail(train, tmp_path, "loss._target_=tests.recipes.faulty_parts.NanLoss")
    errors = [line for line in failure.process.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1, failure.process.stderr
    assert "loss/reverse_kl is nan: stopped before the optimizer step" in errors[0]
    assert failure.last_line == errors[0]
    assert failure.process.returncode == 1
    assert len(read_metrics(failure.folder / "metrics.jsonl")) == 1
    assert_first_checkpoint_is_whole(failure.folder, tmp_path)
