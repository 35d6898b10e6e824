"""A finished run as an object: what a hand or a disk has changed is an error with fields."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opcd_nemo.api import FinishedRun
from opcd_nemo.errors import UserError
from tests.report_folders import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return FinishedRun(write_run(tmp_path_factory.mktemp("runs") / "run"))


def test_a_run_says_its_table_its_steps_and_its_student(run: FinishedRun) -> None:
    assert "in-context (teacher)    1.00" in run.table
    assert run.student.name == "step=30.ckpt"
    assert [line["step"] for line in run.metrics] == list(range(30))


DAMAGES: list[tuple[str, Any]] = [
    ("table", {}),
    ("table", {"evaluation": {}}),
    ("table", {"evaluation": 3}),
    ("table", {"evaluation": {"base": []}}),
    ("table", {"base": "x", "evaluation": {}}),
    ("student", {}),
    ("student", {"steps": "30"}),
    ("student", {"steps": None}),
]


@pytest.mark.parametrize(("attribute", "changes"), DAMAGES)
def test_a_damaged_summary_is_an_error_with_fields(
    run: FinishedRun, attribute: str, changes: dict[str, Any]
) -> None:
    file = run.folder / "summary.json"
    before = file.read_text(encoding="utf-8")
    file.write_text(json.dumps((json.loads(before) | changes) if changes else {}))
    try:
        with pytest.raises(UserError) as refused:
            getattr(run, attribute)
    finally:
        file.write_text(before, encoding="utf-8")
    assert refused.value.key == str(file)
    assert refused.value.problem
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ['{"step": 0}\nno\n', '{"loss": 1}\n', "[]\n"])
def test_damaged_metrics_are_an_error_with_fields(run: FinishedRun, text: str) -> None:
    file = run.folder / "metrics.jsonl"
    before = file.read_text(encoding="utf-8")
    file.write_text(text)
    try:
        with pytest.raises(UserError) as refused:
            _ = run.metrics
    finally:
        file.write_text(before, encoding="utf-8")
    assert refused.value.key == str(file)
    assert str(refused.value.problem).startswith("line ")
