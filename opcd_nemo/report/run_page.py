"""The page of a run: its result, the certainty of the result, and the answers behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opcd_nemo.evaluation.curves import panels, points
from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.evaluation.intervals import with_intervals
from opcd_nemo.report.answers import changed, side_by_side, whereabouts
from opcd_nemo.report.costs import commands, costs, origin
from opcd_nemo.report.figures import Chart, line_chart
from opcd_nemo.report.heat import heat
from opcd_nemo.report.page import Limits, render, small_page
from opcd_nemo.report.record import ROWS, RunRecord, mapping, number, pick, read_run
from opcd_nemo.report.words import (
    LABELS,
    NOTHING,
    SHORT,
    changes,
    count,
    p_beside,
    shown,
)
from opcd_nemo.storage.run_folder import RunFolder

PAGE = "report.html"
_QUESTIONS = 12
_CHANGED = 6
_ORDER = ("base", "wrong_context", "in_context", "student", "context_returned")
_PARTS = ("task", "retention")
_NUMBERS = {
    "score": ".2f",
    "format_failure_rate": ".2f",
    "leakage_rate": ".2f",
    "response_tokens": ".1f",
}
_DIFFERENCES = {
    "student - base": "what training brought, without context",
    "in_context - base": "what the context gives the teacher",
    "student - in_context": "the trained student beside the teacher",
}


def write_run_page(run_folder: RunFolder) -> None:
    """Write the page of a run whose other files are written, on the rank that writes."""
    if run_folder.writes:
        run_folder.write(PAGE, run_page(read_run(run_folder.path)))


def run_page(run: RunRecord) -> str:
    """The page, as text."""
    return small_page(lambda limits: _page(run, limits))


def _page(run: RunRecord, limits: Limits) -> str:
    return render(
        "run.html.j2",
        limits,
        name=run.name,
        result=_result(run),
        rows=_rows(run),
        differences=changes(mapping(run, "differences"), _DIFFERENCES),
        notes=_notes(run),
        context=_context(run),
        questions=side_by_side(
            {row: run.evaluations[row, "task"] for row in ROWS}, SHORT, _QUESTIONS
        ),
        charts=charts(run),
        lacking=run.lacking,
        heat=heat(run, limits),
        where=[whereabouts(LABELS[row], run.evaluations[row, "task"]) for row in ROWS],
        forgotten=changed(*_unrelated(run), -1, _CHANGED),
        learned=changed(*_unrelated(run), 1, _CHANGED),
        costs=costs(run),
        facts=origin(run),
        commands=commands(run),
    )


def _unrelated(run: RunRecord) -> tuple[Evaluation, Evaluation]:
    return run.evaluations["base", "retention"], run.evaluations["student", "retention"]


def estimate(run: RunRecord, row: str, part: str, name: str) -> Mapping[str, Any]:
    """A number with its interval: as the run has it, else over the questions of its answers."""
    where = ("evaluation", row, part) if row in ROWS else ("controls", row, part)
    known = pick(run.summary, *where, "intervals", name)
    if isinstance(known, Mapping):
        return known
    evaluation = run.evaluations.get((row, part))
    if evaluation is None:
        return {}
    found: Mapping[str, Any] = with_intervals([evaluation], str)[name]
    return found


def _result(run: RunRecord) -> dict[str, Any]:
    """What the sentence at the top says."""
    share = pick(run.summary, "internalised")
    if not isinstance(share, Mapping):
        share = {}
    return {
        **{row: shown(estimate(run, row, "task", "score")) for row in ROWS},
        "share": shown(share, ".0%"),
        "before": shown(estimate(run, "base", "retention", "score")),
        "after": shown(estimate(run, "student", "retention", "score")),
        "questions": len(run.evaluations["student", "task"].by_question),
        "unrelated": len(run.evaluations["student", "retention"].by_question),
        "steps": count(number(run.summary, "steps")),
        "stopped": pick(run.summary, "stopped_by_retention") is not None,
    }


def _rows(run: RunRecord) -> list[dict[str, Any]]:
    rows = [_trained_control(run, name) for name in mapping(run, "trained_controls")]
    for row in reversed(_ORDER):
        evaluation = run.evaluations.get((row, "task"))
        if evaluation is None:
            continue
        numbers = {
            name: shown(estimate(run, row, "task", name), form) for name, form in _NUMBERS.items()
        }
        known = row in ROWS
        rows.insert(
            0,
            {
                "name": row,
                "words": LABELS[row],
                "questions": len(evaluation.by_question),
                "retention": shown(estimate(run, row, "retention", "score")) if known else NOTHING,
                **numbers,
            },
        )
    return rows


def _trained_control(run: RunRecord, name: str) -> dict[str, Any]:
    """A row of another run's student."""
    where = ("trained_controls", name)
    task, retention = (pick(run.summary, *where, part, "intervals") for part in _PARTS)
    return {
        "name": "wrong_context",
        "words": LABELS.get(name, name),
        "questions": len(run.evaluations["student", "task"].by_question),
        "retention": shown(pick(retention, "score")),
        **{number: shown(pick(task, number), form) for number, form in _NUMBERS.items()},
    }


def _notes(run: RunRecord) -> dict[str, Any]:
    """Forecast, break-even, forgetting and controls, each as far as the run has it."""
    law, even = mapping(run, "forecast"), mapping(run, "break_even")
    return {
        "forecast": [
            f"{value:.2f}"
            for name in ("low", "high", "came")
            if (value := number(law, name)) is not None
        ],
        "gap": shown(pick(law, "gap"), "+.2f"),
        "even_tokens": count(number(even, "answers_by_tokens")),
        "even_seconds": count(number(even, "answers_by_cpu_seconds")),
        "context_tokens": count(number(even, "context_tokens")),
        "has_even": bool(even),
        "lost": count(number(run.summary, "forgetting", "worse")),
        "won": count(number(run.summary, "forgetting", "better")),
        "has_lost": "forgetting" in run.summary,
        "forgetting": shown(pick(run.summary, "forgetting", "difference"), "+.2f"),
        "controls": [_control(run, name) for name in mapping(run, "controls")],
    }


def _control(run: RunRecord, name: str) -> dict[str, Any]:
    other = "in_context" if name == "wrong_context" else "student"
    where = ("controls", name, "differences", f"control - {other}")
    difference = pick(run.summary, *where)
    return {
        "name": name,
        "score": shown(estimate(run, name, "task", "score")),
        "questions": count(number(run.summary, "controls", name, "questions")),
        "other": SHORT[other],
        "difference": shown(difference, "+.2f"),
        "p": p_beside(difference, pick(difference, "p_value")),
    }


def _context(run: RunRecord) -> list[dict[str, Any]]:
    """What the teacher read, every context of a pool."""
    whole = mapping(run, "context")
    contexts = whole.get("pool", [whole] if whole else [])
    found = []
    for context in contexts if isinstance(contexts, list) else []:
        pairs = pick(context, "demonstrations")
        pairs = pairs if isinstance(pairs, list) else []
        found.append(
            {
                "system": _text(pick(context, "system")),
                "demonstrations": [
                    pair
                    for pair in pairs
                    if isinstance(pair, list) and len(pair) == 2 and all(map(_text, pair))
                ],
                "experience": _text(pick(context, "experience")),
                "wrap": _text(pick(context, "wrap")),
            }
        )
    return [context for context in found if any(context.values())]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def charts(run: RunRecord) -> list[Chart]:
    """The curves of metrics.jsonl."""
    return [
        line_chart(
            panel.title,
            panel.unit,
            panel.caption,
            {words: points(run.lines, name) for name, words in panel.metrics.items()},
        )
        for panel in panels(run.lines)
    ]
