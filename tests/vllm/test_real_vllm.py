"""engine=vllm against a real vLLM on this CPU: minutes each, so not among `make test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opcd_nemo.metrics import read_metrics

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
MODEL = ["recipe=demo_brevity", "student.dtype=fp32", "teacher.dtype=fp32"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*words: str, timeout_s: int = 3 * 3600) -> str:
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
    words = [*MODEL, *ENGINE, f"parallel={layout}", "optim.lr=3e-4"]
    words.append(f"exp_manager.exp_dir={tmp_path}")
    text = run(*torchrun, "-m", "tests.vllm.equal_answers", "2", *words)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert line["equal"] == line["of"] == 8, line
        assert line["largest_gap"] < 1e-3, line
        assert line["same_in_another_batch"], line
    assert any(line["changed"] for line in lines[1:])


def test_a_step_is_sampled_while_the_one_before_it_trains(tmp_path: Path) -> None:
    words = [*MODEL, *ENGINE, "parallel=single", "trainer.max_steps=3"]
    words += ["batching.global_batch_size=4", f"exp_manager.exp_dir={tmp_path}"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone"]
    text = run(*torchrun, "-m", "tests.vllm.ahead", "1", *words)
    on_policy, ahead = (json.loads(line) for line in text.splitlines() if line.startswith("{"))
    assert ahead["rollout/steps_behind"] == [0.0, 1.0, 1.0]
    assert ahead["loss/reverse_kl"][0] == pytest.approx(on_policy["loss/reverse_kl"][0], rel=1e-5)
    before, *others = ahead["time_line"]
    for line in others:
        assert line["sampled"][0] < before["trained"][1]
        assert line["answers"] == 4
        before = line


def test_a_run_scores_as_in_process_and_ends_its_server(tmp_path: Path) -> None:
    words = [
        *("trainer.max_steps=2", "evaluation.num_questions=4", "evaluation.num_retention=4"),
        *("evaluation.controls=[]", *MODEL, f"exp_manager.exp_dir={tmp_path}"),
    ]
    scores = {}
    for name, more in (("served", ENGINE), ("in_process", [])):
        run("-m", "opcd_nemo.cli", "train", *words, *more, f"name={name}")
        scores[name] = json.loads((tmp_path / name / "summary.json").read_text())
    for who in ("base", "in_context", "retention_before"):
        assert scores["served"][who] == scores["in_process"][who]
    first, second = read_metrics(tmp_path / "served" / "metrics.jsonl")
    assert max(line["rollout/mismatch_k3"] for line in (first, second)) < 1e-4
    assert not list(Path("/dev/shm").glob("opcd-[0-9]*"))


def test_a_pipeline_of_games_is_played_written_scored_and_trained_by_servers(
    tmp_path: Path,
) -> None:
    words = [
        *("recipe=demo_games", "name=games", "parallel=single", f"exp_manager.exp_dir={tmp_path}"),
        *("trainer.max_steps=2", "batching.global_batch_size=4", "batching.micro_batch_size=4"),
        *("evaluation.num_questions=4", "evaluation.num_retention=4", *ENGINE),
        *("experience.extraction.num_chains=2", "experience.extraction.num_steps=1"),
        *("experience.scoring.num_questions=4", "experience.scoring.first_questions=4"),
        *("experience.consolidation.methods=[opcd]", "experience.consolidation.seeds=[1]"),
        "experience.controls=[]",
    ]
    run("-m", "opcd_nemo.cli", "experience", *words)
    summary = json.loads((tmp_path / "games" / "summary.json").read_text())
    assert list(summary["rows"])[:2] == ["base", "in_context"]
    trained = read_metrics(tmp_path / "games" / "opcd-1" / "metrics.jsonl")
    assert all(line["rollout/mismatch_k3"] < 1e-4 for line in trained)
    assert not list(Path("/dev/shm").glob("opcd-[0-9]*"))
