"""Questions without a right answer, from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.context.sources import Context
from opcd_nemo.errors import UserError
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.tasks.file_questions import file_questions, questions_scored_by

NOTHING = Context(system=None, demonstrations=())


def is_short(answer: str) -> float | None:
    return None if not answer else float(len(answer) < 5)


def is_counted(answer: str) -> int:
    return len(answer)


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "questions.jsonl"
    lines = [json.dumps({"question": f"What is {number}?"}) for number in range(40)]
    file.write_text("\n".join(lines))
    shares = {"validation": 0.2, "test": 0.3, "question_column": "question"}
    return {"train": str(file), **shares, "seed": 1, "max_left_out": 0.1}


def test_a_question_is_asked_as_it_is_written(arguments: dict[str, Any]) -> None:
    (episode,) = file_questions(**arguments, verifier=None).episodes("test", 0, 1)
    (message,) = episode.turn(NOTHING).student_messages
    assert message["content"].startswith("What is ")


@pytest.mark.parametrize(
    ("verifier", "reply", "score", "answered"),
    [
        (None, "Anything.", 1.0, True),
        (None, " \n", 0.0, False),
        (None, "<think>Hm", 0.0, False),
        ("pirate", "Ahoy!", 1.0, True),
        ("pirate", "Hello.", 0.0, True),
    ],
)
def test_a_style_is_the_score(
    arguments: dict[str, Any], verifier: str | None, reply: str, score: float, answered: bool
) -> None:
    episode = _answered(file_questions(**arguments, verifier=verifier), reply)
    assert (episode.score(), episode.answered) == (score, answered)


@pytest.mark.parametrize(("reply", "score"), [("No.", 1.0), ("Certainly.", 0.0), ("", 0.0)])
def test_a_function_is_the_score(arguments: dict[str, Any], reply: str, score: float) -> None:
    task = questions_scored_by(**arguments, score=f"{__name__}.is_short")
    episode = _answered(task, reply)
    assert (episode.score(), episode.answered) == (score, bool(reply))


def test_a_score_that_is_none_is_refused(arguments: dict[str, Any]) -> None:
    task = questions_scored_by(**arguments, score=f"{__name__}.is_counted")
    with pytest.raises(UserError, match="returned 8"):
        _answered(task, "8 lettrs").score()


@pytest.mark.parametrize(
    "name", ["no_module.x", "json.nothing", "sys.version", "plain", "os.system"]
)
def test_a_name_of_no_function_is_refused(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError) as refused:
        questions_scored_by(**arguments, score=name)
    assert refused.value.key == "task.score"


def test_an_unknown_style_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        file_questions(**arguments, verifier="haiku")
    assert refused.value.key == "task.verifier"


def _answered(task: Task, reply: str) -> Episode:
    (episode,) = task.episodes("test", 0, 1)
    episode.reply(reply)
    return episode
