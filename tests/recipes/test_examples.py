"""Every example runs, and the file that shows the method computes what a run computes."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch

from opcd_nemo.distributed.groups import init_parallel
from opcd_nemo.launch.compose import compose
from opcd_nemo.training.build import build_run
from opcd_nemo.training.prepared import prepare_run
from opcd_nemo.training.step import _rollouts, accumulate_gradients, distill_batches, teacher_scores
from tests.recipes.conftest import ROOT, SMOKE, run_python

EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.name for path in EXAMPLES.iterdir() if (path / "README.md").is_file())
ONE_FILE = EXAMPLES / "opcd_in_one_file.py"
COMMAND = re.compile(r"^    \.venv/bin/(opcd train|python) ((?:.*\\\n)*.*)$", re.MULTILINE)


def command_of(folder: str) -> list[str]:
    """The words of the command in an example's README, of which every example has one."""
    text = (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
    ((program, words),) = COMMAND.findall(text)
    start = ["-m", "opcd_nemo.cli", "train"] if program == "opcd train" else []
    return [*start, *shlex.split(words.replace("\\\n", " "))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_example_runs(folder: str, tiny: Path, tmp_path: Path) -> None:
    words = [*SMOKE, f"student.path={tiny}", f"exp_manager.exp_dir={tmp_path}", "name=example"]
    words += ["evaluation.sampling.max_new_tokens=4", "retention=capitals"]
    done = run_python(*command_of(folder), *words)
    assert done.returncode == 0, done.stderr
    assert "after training" in done.stdout
    (summary,) = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["steps"] == 2


def test_the_file_of_the_method_runs(
    tiny: Path, capsys: pytest.CaptureFixture[str], one_file: ModuleType
) -> None:
    losses = one_file.main(
        [*("--model", str(tiny), "--steps", "2"), *("--batch-size", "2", "--max-new-tokens", "3")]
    )
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    assert "step 2: loss" in capsys.readouterr().out


def test_the_file_of_the_method_computes_the_loss_and_gradient_of_a_step(
    tiny: Path, one_file: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.distributed.shards import full_tensors

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    raw = compose("train", [*SMOKE, f"student.path={tiny}", "parallel=single", "name=x"])
    prepared = prepare_run(raw, 1)
    run = build_run(prepared.config, prepared.inputs, init_parallel(prepared.config.parallel, 1))
    rollouts = _rollouts(run, "student", 0)
    batches = distill_batches(run, rollouts, run.phase.loss)
    run.optimizer.zero_grad()
    scores = teacher_scores(run, batches, run.phase.loss)
    stats = accumulate_gradients(run, batches, scores, run.phase.loss)
    gradients, _ = full_tensors(run.student, lambda parameter: parameter.main_grad)

    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    loss = one_file.accumulate_gradients(
        student,
        teacher,
        [
            one_file.Answer(each.prompt_ids, each.teacher_prompt_ids, each.response_ids)
            for each in rollouts
        ],
    )
    assert loss == pytest.approx(stats.mean("loss/reverse_kl"), rel=1e-5)
    assert len(gradients) == len(dict(student.named_parameters()))
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def one_file() -> ModuleType:
    """The module, which lies in no package."""
    spec = importlib.util.spec_from_file_location(ONE_FILE.stem, ONE_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
