"""engine=vllm against a real vLLM on this CPU: minutes each, so not among `make test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = Path(os.environ.get("OPCD_VLLM", ".venv-vllm/bin/python")).absolute()
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM here: make vllm")

ENGINE = [
    "engine=vllm",
    "engine.launch=true",
    f"engine.python={PYTHON}",
    "engine.max_batch_size=32",
    'engine.flags=["--max-model-len","1024"]',
    "engine.start_timeout_s=3000",
    "parallel.timeout_s=3600",
]
RUN = ["recipe=demo_brevity", "student.dtype=fp32", "teacher.dtype=fp32", *ENGINE]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*words: str, timeout_s: int = 7200) -> str:
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=timeout_s, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_greedy_answers_are_those_of_the_ranks_after_every_step(
    layout: str, tmp_path: Path
) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    words = [*RUN, f"parallel={layout}", "optim.lr=3e-4", f"exp_manager.exp_dir={tmp_path}"]
    text = run(*torchrun, "-m", "tests.vllm.equal_answers", "2", *words)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["equal"] == line["of"] == 8, line
        assert line["largest_gap"] < 1e-3, line
        assert line["same_in_another_batch"], line
    assert any(line["changed"] for line in lines[1:])


def test_a_run_scores_as_in_process_and_ends_its_server(tmp_path: Path) -> None:
    small = ["trainer.max_steps=2", "evaluation.num_questions=8", "evaluation.num_retention=8"]
    scores = {}
    for name, engine in (("served", ENGINE), ("in_process", [])):
        words = ["recipe=demo_brevity", *small, f"exp_manager.exp_dir={tmp_path}", f"name={name}"]
        run("-m", "opcd_nemo.cli", "train", *words, *engine)
        scores[name] = json.loads((tmp_path / name / "summary.json").read_text())
    for who in ("base", "in_context"):
        assert scores["served"][who] == scores["in_process"][who]
    lines = (tmp_path / "served" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["rollout/mismatch_k3"] < 1e-4 for line in lines)
    assert not list(Path("/dev/shm").glob("opcd-*"))
