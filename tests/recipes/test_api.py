"""`from opcd_nemo import distill, load_model` in a program of somebody's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.conftest import SMOKE, run_python

PROGRAM = """\
import gc
import json
import random
import signal
import sys

import torch
from lightning.pytorch.trainer.connectors import accelerator_connector

from opcd_nemo import distill, load_model
from opcd_nemo.errors import UserError

accelerator_connector._IS_INTERACTIVE = True  # what Lightning finds in a notebook
student, runs, *settings = sys.argv[1:]
questions = [f"What is thing {number}?" for number in range(12)]


def ends(answer: str) -> float:
    return float(answer.endswith("."))


def run(**changes):
    given = {"context": "Be brief.", "questions": questions, "steps": 2, "max_new_tokens": 4}
    return distill(student, folder=runs, settings=settings, **(given | changes))


random.seed(3)
state, handler, argv = random.getstate(), signal.getsignal(signal.SIGINT), list(sys.argv)
first = run(score=ends)
second = run(context=[("What is a bell?", "A bell rings.")], quiet=True)
assert (random.getstate(), signal.getsignal(signal.SIGINT), sys.argv) == (state, handler, argv)
left = sum(isinstance(each, torch.nn.Parameter) for each in gc.get_objects())
model = load_model(second.student, max_new_tokens=4)
answers = [model.chat("What is a violin?") for _ in range(2)]
third = run()  # while a model is loaded
try:
    model.chat("word " * 3000)
except UserError as error:
    too_long = error.key
print(json.dumps({
    "folders": [str(each.folder) for each in (first, second, third)],
    "losses": [[line["loss/reverse_kl"] for line in each.metrics] for each in (second, third)],
    "table": first.table,
    "page": first.report(show=False).stat().st_size,
    "answers": [*answers, model.chat("What is a violin?")],
    "with_context": model.chat("What is a violin?", with_context=True),
    "too_long": too_long,
    "parameters_left": left,
}))
"""
RANKS = """\
import sys

from opcd_nemo import distill
from opcd_nemo.errors import UserError

student, runs, *settings = sys.argv[1:]
questions = [f"What is thing {number}?" for number in range(12)]
run = distill(student, context="Be brief.", questions=questions, steps=2, max_new_tokens=4,
              ranks=2, folder=runs, name="two", settings=settings)
print(run.summary["world_size"], run.student.is_dir())
try:
    distill("nowhere", context="Be brief.", questions=questions, ranks=2, folder=runs)
except UserError as error:
    print(error.key, error.value)
"""
KEPT = [word for word in SMOKE if "num_questions" not in word and "max_new" not in word]
SETTINGS = [word for word in KEPT if "max_steps" not in word]


@pytest.fixture(scope="module")
def found(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the program printed last."""
    folder = tmp_path_factory.mktemp("api")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    done = run_python(str(program), str(tiny), str(folder / "runs"), *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 2, "the second run is quiet"
    assert "[NeMo" not in done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(last, dict)
    return last


def test_runs_of_a_process_follow_each_other(found: dict[str, object]) -> None:
    names = [Path(folder).name for folder in found["folders"]]
    assert names == ["distill-1", "distill-2", "distill-3"]
    assert "after training" in found["table"]
    assert found["page"] > 10_000


def test_the_models_of_a_run_are_freed_after_it(found: dict[str, object]) -> None:
    assert found["parameters_left"] == 0


def test_a_loaded_model_survives_a_run(found: dict[str, object]) -> None:
    first, second, third = found["answers"]
    assert first == second == third
    assert found["too_long"] == "question"


def test_ranks_are_started_as_the_command_starts_them(tiny: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(RANKS)
    done = run_python(str(program), str(tiny), str(tmp_path / "runs"), *SETTINGS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["2 True", "student.path nowhere"]
    assert any(line.startswith("device cpu") for line in lines)
