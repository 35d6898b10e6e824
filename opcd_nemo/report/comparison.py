"""One page of several runs: tables joined, curves over each other, and the keys that differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opcd_nemo.errors import UserError
from opcd_nemo.evaluation.curves import panels, points
from opcd_nemo.evaluation.intervals import paired
from opcd_nemo.report.figures import Chart, line_chart
from opcd_nemo.report.page import render, small_page
from opcd_nemo.report.record import ROWS, RunRecord, number, pick
from opcd_nemo.report.run_page import estimate
from opcd_nemo.report.words import count, p_beside, plain, seconds, shown

_MOST_RUNS = 8  # so many colours of curves are told apart
_WITHOUT_MEANING = ("name", "exp_manager.explicit_log_dir")


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """The page, as text.

    Raises:
        UserError: more runs than can be told apart.
    """
    if len(runs) > _MOST_RUNS:
        raise UserError("opcd report", len(runs), f"at most {_MOST_RUNS} folders of runs")
    names = _names(runs)
    values = {
        "names": names,
        "rows": [_row(name, run) for name, run in zip(names, runs, strict=True)],
        "differences": [
            _difference(f"{name} - {names[0]}", runs[0], run)
            for name, run in zip(names[1:], runs[1:], strict=True)
        ],
        "charts": _charts(names, runs),
        "lacking": [
            f"{name}: {words}"
            for name, run in zip(names, runs, strict=True)
            for words in run.lacking
        ],
        "keys": _keys(runs),
    }
    return small_page(lambda limits: render("comparison.html.j2", limits, **values))


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """The runs' names; with the folder above where two have the same."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.name}" for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _row(name: str, run: RunRecord) -> dict[str, Any]:
    a_step, steps = number(run.summary, "cpu_seconds_per_step"), number(run.summary, "steps")
    training = None if a_step is None or steps is None else a_step * steps
    return {
        "name": name,
        **{row: shown(estimate(run, row, "task", "score")) for row in ROWS},
        "share": shown(pick(run.summary, "internalised"), ".0%"),
        "before": shown(estimate(run, "base", "retention", "score")),
        "after": shown(estimate(run, "student", "retention", "score")),
        "tokens": shown(estimate(run, "student", "task", "response_tokens"), ".1f"),
        "steps": count(steps),
        "training": seconds(training),
    }


def _difference(words: str, first: RunRecord, other: RunRecord) -> dict[str, str] | None:
    """The other run's student minus the first run's, if both were asked the same questions."""
    student, against = (run.evaluations["student", "task"] for run in (other, first))
    if list(student.by_question) != list(against.by_question):
        return None
    found = paired(student, against, str)
    value = shown(found, "+.2f")
    return {
        "words": words,
        "value": value.value,
        "interval": value.interval,
        "p": p_beside(found, found["p_value"]),
    }


def _charts(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Chart]:
    """A chart for each metric that any of the runs has."""
    titles = {
        metric: (panel.title if len(panel.metrics) == 1 else f"{panel.title}: {words}", panel)
        for run in runs
        for panel in panels(run.lines)
        for metric, words in panel.metrics.items()
    }
    charts = []
    for metric, (title, panel) in titles.items():
        curves = {
            name: found
            for name, run in zip(names, runs, strict=True)
            if (found := points(run.lines, metric))
        }
        charts.append(line_chart(title, panel.unit, panel.caption, curves))
    return charts


def _keys(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Configuration keys whose values differ, with each run's value."""
    every = dict.fromkeys(key for run in runs for key in run.config)
    found = []
    for key in every:
        values = [plain(run.config[key]) if key in run.config else "(absent)" for run in runs]
        if len(set(values)) > 1 and key not in _WITHOUT_MEANING:
            found.append((key, values))
    return found
