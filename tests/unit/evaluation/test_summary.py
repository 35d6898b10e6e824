"""A finished run's numbers, files and lines on the screen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.evaluation.summary import Outcome, summarise, summary_lines, write_report
from opcd_nemo.evaluation.validations import Validation, ValidationHistory
from opcd_nemo.metrics import METRICS, metric_line
from opcd_nemo.storage.run_folder import RunFolder
from tests.unit.evaluation.test_report import evaluation

LINES: list[dict[str, float]] = [
    {
        "cpu/step_s": 3.0 + step,
        "cpu/rollout_s": 1.0,
        "loss/reverse_kl": 0.5,
        "rollout/response_tokens": 20.0,
        "optim/grad_norm": 1.0,
        "perf/tokens_per_s": 30.0,
    }
    for step in range(2)
]


def outcome(min_retention: float | None = None) -> Outcome:
    validations = ValidationHistory(min_retention)
    validations.base_retention = 1.0
    validations.add(Validation(step=1, score=0.5, retention=0.25))
    pair: tuple[Evaluation, Evaluation] = evaluation(("a", 1.0), ("b", 0.0)), evaluation(("c", 1.0))
    parallel: Any = SimpleNamespace(world_size=2, tp=2, pp=1, dp=1, cp=1)
    return Outcome(
        scores=dict.fromkeys(("base", "in_context", "student"), pair),
        validations=validations,
        parallel=parallel,
        units={"task": str, "retention": str},
        facts={"seed": 7, "seconds_total": 12.3, "peak_rss_gib": 1.5},
    )


def test_the_summary_has_the_scores_and_the_costs() -> None:
    summary = summarise(outcome(), LINES)
    assert [summary[name] for name in ("base", "in_context", "student")] == [0.5] * 3
    assert summary["retention_after"] == 1.0
    assert summary["evaluation"]["student"]["task"]["score"] == 0.5
    assert (summary["steps"], summary["cpu_seconds_per_step"]) == (2, 3.5)
    assert summary["cpu_seconds_by_phase"] == {"rollout": 1.0}
    assert (summary["world_size"], summary["seed"]) == (2, 7)
    assert (summary["best_step"], summary["stopped_by_retention"]) == (1, None)


def test_the_lines_say_what_stopped_a_run_and_what_was_best() -> None:
    made = outcome(min_retention=0.5)
    lines = summary_lines(summarise(made, LINES), made.validations)
    assert "in-context (teacher)" in lines[0]
    assert lines[1].startswith("forgetting: of 1 questions that training never saw 0 are answered")
    assert lines[2].startswith("stopped by retention after step 1: 0.25 is below")
    assert lines[3] == "best on validation: 0.50 after 1 steps"
    assert lines[4].startswith("2 steps, 3.50 CPU-seconds a step over all ranks (rollout 1.00)")


def test_a_report_ends_with_the_summary(tmp_path: Path) -> None:
    lines = map(metric_line, range(2), LINES)
    (tmp_path / METRICS).write_text("".join(lines))
    summary = write_report(RunFolder(tmp_path), outcome(), "name: run\n")
    written = (tmp_path / "summary.json").read_text()
    assert json.loads(written) == summary
    assert '\n  "steps": 2,' in written  # for people, too
    names = {"curves.png", "samples.md", "answers.jsonl", "config.yaml", "summary.json", METRICS}
    names.add("README.md")
    assert {path.name for path in tmp_path.iterdir()} == names
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    assert max(times, key=times.__getitem__) == "summary.json"


def test_a_run_that_is_taken_over_writes_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = map(metric_line, range(2), LINES)
    (tmp_path / METRICS).write_text("".join(lines))

    def taken() -> None:
        raise OSError("now held by another")

    folder = RunFolder(tmp_path)
    monkeypatch.setattr(folder, "check_held", taken)
    with pytest.raises(OSError, match="now held"):
        write_report(folder, outcome(), "")
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_every_number_of_a_row_has_its_interval_and_a_control_its_line() -> None:
    made = replace(outcome(), controls={"wrong_context": evaluation(("x", 0.0))})
    summary = summarise(made, LINES)
    for row in ("base", "in_context", "student"):
        for part in ("task", "retention"):
            numbers = summary["evaluation"][row][part]["intervals"]
            for name in ("score", "format_failure_rate", "leakage_rate", "response_tokens"):
                assert numbers[name]["value"] == summary["evaluation"][row][part][name]
    assert summary["differences"]["student - base"]["value"] == 0
    (line,) = [line for line in summary_lines(summary, made.validations) if "control" in line]
    assert line.startswith("control, a wrong context, read by the teacher: 0.00 [?, ?] on 1 quest")
    assert "in-context (teacher) 1.00" in line
