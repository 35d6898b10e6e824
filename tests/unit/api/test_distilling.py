"""What `distill` makes of its arguments before anything starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.api import distilling
from opcd_nemo.api.distilling import distill
from opcd_nemo.errors import RunFailed, StoppedByFile, StoppedBySignal, UserError

QUESTIONS = [f"What is thing {number}?" for number in range(20)]


def is_polite(answer: str) -> float:
    return float("please" in answer)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, opcd_nemo; dir(opcd_nemo); assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("questions", {"questions": "What is a violin?"}),
        ("questions", {"questions": []}),
        ("questions", {"questions": ["a", "b"]}),
        ("questions[1]", {"questions": ["a", " "]}),
        ("questions[0]", {"questions": [3]}),
        ("test_questions", {"test_questions": []}),
        ("score", {"score": lambda answer: 1.0}),
        ("score", {"score": print}),
        ("context", {"context": [("question", "answer", "more")]}),
        ("context", {"context": None}),
        ("context", {"context": 5}),
        ("questions[0]", {"questions": ["What is \ud800?", *QUESTIONS]}),
        ("name", {"name": "questions"}),
        ("folder", {"folder": 5}),
        ("folder", {"folder": "/proc/nowhere"}),
        ("settings", {"settings": "optim.lr=1"}),
        ("settings", {"settings": None}),
        ("settings[0]", {"settings": [5]}),
        ("ranks", {"ranks": 0}),
        ("ranks", {"ranks": True}),
    ],
)
def test_a_wrong_argument_is_named(key: str, changes: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"context": "Be brief.", "questions": QUESTIONS, "folder": tmp_path, **changes}
    with pytest.raises(UserError) as refused:
        distill("smollm2-135m-instruct", **arguments)
    assert refused.value.key == key


def test_a_key_of_the_settings_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        distill(
            "smollm2-135m-instruct",
            context="Be brief.",
            questions=QUESTIONS,
            folder=tmp_path,
            settings=["optim.learning_rate=1"],
            quiet=True,
        )
    assert refused.value.key == "optim.learning_rate"
    assert (refused.value.value, "lr" in refused.value.allowed) == ("1", True)


def test_questions_are_split_once_and_for_all(tmp_path: Path) -> None:
    splits = distilling._split([*QUESTIONS, QUESTIONS[0].upper()], None)
    assert {split: len(asked) for split, asked in splits.items()} == {
        "train": 15,
        "validation": 1,
        "test": 4,
    }
    assert splits == distilling._split(QUESTIONS[::-1], None)
    files = distilling._write_questions(tmp_path, splits)
    assert files == distilling._write_questions(tmp_path, splits)
    rows = [json.loads(line) for line in files["test"].read_text().splitlines()]
    assert [row["question"] for row in rows] == splits["test"]


def test_a_function_is_named_by_its_module() -> None:
    assert distilling._score_words(is_polite)[-1].endswith("test_distilling.is_polite'")


def test_a_layout_of_the_settings_wins() -> None:
    assert distilling._layout_words(1, ["parallel=tp2"]) == []
    assert distilling._layout_words(3, []) == ["parallel=dp2", "parallel.num_ranks=3"]


def test_names_of_runs_do_not_repeat(tmp_path: Path) -> None:
    (tmp_path / "distill-1").mkdir()
    assert distilling._free_name(tmp_path) == "distill-2"


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, RunFailed), (75, StoppedBySignal), (93, StoppedByFile), (130, KeyboardInterrupt)],
)
def test_an_exit_code_is_an_exception(code: int, kind: type[BaseException]) -> None:
    with pytest.raises(kind) as raised:
        distilling._raise_end(code, "error: rank 1 failed first: no memory")
    if isinstance(raised.value, RunFailed):
        assert (raised.value.code, raised.value.line) == (1, "rank 1 failed first: no memory")
        assert str(raised.value) == "rank 1 failed first: no memory (exit code 1)"


def test_a_word_that_no_program_takes_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        distilling._run_command(["train", f"context.system='{'x' * 2**17}'"], quiet=True)
    assert refused.value.key == "context.system"
