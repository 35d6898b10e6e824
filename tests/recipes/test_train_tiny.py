"""Whole runs of a tiny random model: what they leave, and how they end when a rank fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from tests.recipes.runs import recipe
from tests.tiny import write_chat_model

STEPS = 2
SUMMARY_KEYS = set(
    "base in_context student retention_before retention_after retention_in_context steps "
    "seconds_total cpu_seconds_per_step peak_rss_gib world_size tp pp dp seed versions".split()
)
SMALL = [
    "batching.global_batch_size=4",
    "batching.micro_batch_size=2",
    "evaluation.num_questions=2",
    "evaluation.num_retention=2",
    "evaluation.retention_max_new_tokens=4",
    "rollout.max_new_tokens=4",
    f"trainer.max_steps={STEPS}",
    "parallel.device=cpu",
    "name=tiny",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_a_run_leaves_its_files(model: Path, tmp_path: Path, layout: str) -> None:
    done = recipe(
        *SMALL, f"student.path={model}", f"exp_manager.exp_dir={tmp_path}", f"parallel={layout}"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("device cpu (parallel.device=cpu); 2 ranks: ")
    assert "in-context gap before training: " in done.stdout
    folder = tmp_path / "tiny"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(STEPS))
    assert all(line["optim/grad_norm"] > 0 for line in metrics)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    sizes = (1, 1, 2) if layout == "dp2" else (2, 1, 1)
    assert (summary["tp"], summary["pp"], summary["dp"]) == sizes
    assert (summary["steps"], summary["world_size"]) == (STEPS, 2)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples.md").read_text().startswith("# Samples\n")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["student"]["path"] == str(model)
    assert config["trainer"]["max_steps"] == STEPS
    assert checkpoint_steps(folder) == [STEPS]


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, in order; each has Megatron's metadata."""
    found = sorted((folder / "checkpoints").iterdir())
    assert all((checkpoint / "metadata.json").is_file() for checkpoint in found), found
    return sorted(int(path.name.split("step=")[1].split("-")[0].split(".")[0]) for path in found)


def test_a_dying_rank_ends_the_run(model: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    done = recipe(
        *SMALL,
        f"student.path={model}",
        f"exp_manager.exp_dir={tmp_path}",
        "task._target_=tests.recipes.plugs.ExitingTask",
        timeout_s=60,
    )
    assert time.monotonic() - started < 60
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1].startswith("error: rank 1 failed first (exit code 7): ")


def test_a_loss_that_is_not_finite_stops_every_rank(model: Path, tmp_path: Path) -> None:
    done = recipe(
        *SMALL,
        f"student.path={model}",
        f"exp_manager.exp_dir={tmp_path}",
        "loss._target_=tests.recipes.plugs.NanLoss",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        "exp_manager.checkpoint_callback_params.save_top_k=-1",
        timeout_s=60,
    )
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "nan: stopped before the optimizer step" in errors[0]
    assert done.stderr.splitlines()[-1] == errors[0]
    folder = tmp_path / "tiny"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert checkpoint_steps(folder) == [1]
