"""Whole runs of a tiny model with servers that a script stands in for: order, resume, failures.

The stand-in's answers are a function of the bytes of the weights it was given, so two runs that
agree have given it the same weights at the same steps.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.metrics import read_metrics
from tests.recipes.conftest import SMOKE, run_python
from tests.tiny import write_chat_model

FAKE = Path(__file__).parents[1] / "unit" / "engines" / "fake_vllm.py"
Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ntest "$1" = -m && shift 2\nexec {sys.executable} -S -E {FAKE} "$@"\n'
    )
    python.chmod(0o755)
    model = write_chat_model(tmp_path / "model")
    (tmp_path / "memory").mkdir()

    def run(name: str, *words: str, code: int = 0) -> str:
        done = run_python(
            *("-m", "opcd_nemo.cli", "train", *SMOKE, "exp_manager=resumable", f"name={name}"),
            *("engine=vllm", "engine.launch=true", f"engine.python={python}"),
            *(
                "engine.start_timeout_s=900",
                "parallel.timeout_s=1000",
                f"engine.folder={tmp_path / 'memory'}",
            ),
            *("rollout.max_mismatch=null", "optim.lr=1e-3", f"student.path={model}"),
            *("exp_manager.checkpoint_callback_params.every_n_train_steps=4",),
            *("trainer.max_steps=6", f"exp_manager.exp_dir={tmp_path}", *words),
            timeout_s=3600,
        )
        assert done.returncode == code, done.stderr
        # its keeper comes after it
        until(lambda: not list((tmp_path / "memory").glob("opcd-*-*")))
        return str(done.stderr)

    return run


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 1800
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def curves(folder: Path) -> list[dict[str, float]]:
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time/", "perf/", "cpu/"))
        }
        for line in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_a_run_that_stops_between_plans_goes_on_to_the_same_metrics_one_step_ahead(
    layout: str, run: Run, tmp_path: Path
) -> None:
    words = (f"parallel={layout}", "rollout.ahead=1")
    run("whole", *words)
    behind = [line["rollout/steps_behind"] for line in curves(tmp_path / "whole")]
    assert behind == [0, 1, 1, 1, 0, 1]  # the first, and the one after the planned checkpoint
    stop, lines = tmp_path / "parts" / "STOP", tmp_path / "parts" / "metrics.jsonl"
    stopping = threading.Thread(target=lambda: until(lines.exists) or stop.touch())
    stopping.start()
    assert "stopped by" in run("parts", *words, code=93)
    stopping.join()
    stop.unlink()
    assert len(curves(tmp_path / "parts")) < 4
    run("parts", *words)
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")


def test_layouts_and_a_server_that_dies_give_the_same_run(run: Run, tmp_path: Path) -> None:
    run("one", "parallel=single")
    run("two", "parallel=tp2", "batching.micro_batch_size=2")
    dying = 'engine.flags=["--dies-after-nine"]'
    said = run("dying", "parallel=single", "engine.max_restarts=9", dying)
    assert "restart 1 of 9" in said
    assert curves(tmp_path / "dying") == curves(tmp_path / "one")
    tokens = [
        [line["rollout/response_tokens"] for line in curves(tmp_path / name)]
        for name in ("one", "two")
    ]
    assert tokens[0][0] == tokens[1][0]  # before rounding differs
