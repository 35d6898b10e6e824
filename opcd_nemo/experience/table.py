"""The pipeline's table: every row over seeds and questions, with intervals, methods paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcd_nemo.config.limits import SAMPLES_BYTES
from opcd_nemo.config.plugs import build_plug
from opcd_nemo.errors import UserError
from opcd_nemo.evaluation.evaluator import ANSWER, Answer, Evaluation
from opcd_nemo.evaluation.statistics import (
    Estimate,
    compare,
    crossed_interval,
    internalised,
    mean_interval,
    pass_at_k,
)
from opcd_nemo.experience.folder import (
    RANKED,
    RUN_ANSWERS,
    RUN_SUMMARY,
    PipelineFolder,
)
from opcd_nemo.formats.locate import read_json
from opcd_nemo.storage.records import read_lines, read_object
from opcd_nemo.tasks import Task

_ANSWER = {**ANSWER, "evaluation": str, "part": str}
_REMEDY = "a copy of the file as it was; or a new run in another folder, without this one"
_SHOWN = {
    "base": "base",
    "in_context": "in-context (teacher)",
    "student_in_context": "teacher's experience, base student",
    "wrong": "wrong experience, in context",
    "shuffled": "shuffled experience, in context",
    "opcd": "OPCD",
    "opcd_in_context": "OPCD, in context",
    "off_policy": "off-policy CD",
    "off_policy_in_context": "off-policy CD, in context",
    "sft": "SFT",
    "sft_in_context": "SFT, in context",
}
_COLUMNS = ("score", "internalised", "pass@k", "format", "leaks", "tokens", "retention")
Row = dict[str, dict[str, Evaluation]]
"""Evaluations by seed, then by part: task, retention."""
Unit = Callable[[str], str]
"""What the play of a uid repeats: games on the same map are no independent questions."""
Value = Callable[[Sequence[Answer]], float]
"""Of the samples of one question."""


def summarise(folder: PipelineFolder) -> dict[str, Any]:
    """All of a round's numbers, from the files of its runs and controls."""
    rows = _rows(folder)
    plan, seed = folder.settings.experience.consolidation, int(folder.settings.train.seed)
    task: Task = build_plug(folder.plug("task"))
    retention: Task = build_plug(folder.plug("retention"))
    units = {"task": task.unit_of, "retention": retention.unit_of}
    scores = {name: _values(row, "task", _score, units["task"]) for name, row in rows.items()}
    shares = {
        method: internalised(scores["base"], scores["in_context"], scores[method], seed=seed)
        for method in plan.methods
        if scores["base"].shape[1] > 1  # else nothing tells how it differs by question
    }
    table = {
        name: {
            **_numbers(rows[name], units),
            "internalised": None if (share := shares.get(name)) is None else asdict(share),
        }
        for name in rows
    }
    first = plan.methods[0]
    maps = _maps(task, next(iter(rows["base"].values()))["task"])
    entry = folder.selected()[0]
    ranked = read_object(folder.path / RANKED, {"without": float}, _REMEDY)
    return {
        "base": table["base"]["score"]["value"],
        "in_context": table["in_context"]["score"]["value"],
        "student": table[first]["score"]["value"],
        "internalised": (table[first]["internalised"] or {}).get("value"),
        "method": first,
        "seeds": list(plan.seeds),
        "maps_overlap": None if maps is None else maps.get("maps_overlap"),
        "maps": maps,
        "round": folder.settings.round,
        "experience": {
            "content_hash": entry.hash,
            "num_tokens": entry.num_tokens,
            "items": list(entry.items),
            "validation": entry.scores.get("validation"),
            "validation_without": ranked["without"],
        },
        "rows": table,
        "paired": {
            f"{first} - {other}": _paired(scores[first], scores[other], seed)
            for other in plan.methods[1:]
        },
        "validations": {
            run: read_json(folder.of_run(RUN_SUMMARY, run)).get("validations")
            for run in folder.settings.runs
        },
    }


def table_text(summary: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    lines = [
        f"| | {' | '.join(_COLUMNS)} |",
        f"|---|{'---|' * len(_COLUMNS)}",
        *(
            f"| {_SHOWN[name]} | {' | '.join(_cells(row))} |"
            for name, row in summary["rows"].items()
        ),
        "",
    ]
    for pair, result in summary["paired"].items():
        difference, p_value = _cell(result["difference"], "+.3f"), result["p_value"]
        shown = "?" if p_value is None else f"{p_value:.3f}"
        lines.append(f"* {pair}, paired by question: {difference}, p = {shown}")
    experience, count = summary["experience"], len(summary["seeds"])
    lines.append(
        f"* seeds {summary['seeds']}; intervals are 95 %, over {count} seeds and the questions "
        "(of games: the maps, each its plays' mean)"
    )
    if summary["maps"] is not None:
        lines.append(_about_maps(summary["maps"]))
    lines.append(
        f"* experience {experience['content_hash'][:12]}, {len(experience['items'])} items, "
        f"{experience['num_tokens']} tokens; validation {experience['validation']:.3f} with it, "
        f"{experience['validation_without']:.3f} without"
    )
    return "\n".join(lines)


def _rows(folder: PipelineFolder) -> dict[str, Row]:
    """Every row's evaluations by seed, in the table's order.

    A method's student is its checkpoint of the best validation, where its run had validations.
    """
    plan = folder.settings.experience.consolidation
    first = plan.methods[0]
    extra: dict[str, Row] = {
        name: {seed: _parts(parts) for seed, parts in by_seed.items()}
        for name, by_seed in folder.controls().items()
    }
    rows = {name: _of_runs(folder, first, name) for name in ("base", "in_context")}
    students = [name for method in plan.methods for name in (method, f"{method}_in_context")]
    rows |= {name: row for name, row in extra.items() if name in _SHOWN and name not in students}
    for method in plan.methods:
        rows[method] = {**_of_runs(folder, method, "student"), **extra.get(f"{method}_best", {})}
        rows[f"{method}_in_context"] = extra[f"{method}_in_context"]
    return rows


def _of_runs(folder: PipelineFolder, method: str, name: str) -> Row:
    found: Row = {}
    for seed in folder.settings.experience.consolidation.seeds:
        file = folder.of_run(RUN_ANSWERS, f"{method}-{seed}")
        answers = read_answers(file)
        found[str(seed)] = {}
        for part in ("task", "retention"):
            of_part = answers.get((name, part), Evaluation(answers=()))
            wanted = len(next(iter(found.values())).get(part, of_part).answers)
            if not of_part.answers or len(of_part.answers) != wanted:
                count = f"{len(of_part.answers)} answers of {name}, {part}"
                expected = f", {wanted} with the first seed" if wanted else ""
                raise UserError(file, allowed=_REMEDY, problem=f"{count}{expected}")
            found[str(seed)][part] = of_part
    return found


def _parts(parts: Mapping[str, Any]) -> dict[str, Evaluation]:
    return {
        part: Evaluation(answers=tuple(map(Answer.from_record, answers)))
        for part, answers in parts.items()
    }


def read_answers(file: Path) -> dict[tuple[str, str], Evaluation]:
    """A run's evaluations, by name and part (task, retention)."""
    found: dict[tuple[str, str], list[Answer]] = {}
    for line in read_lines(file, _ANSWER, _REMEDY, SAMPLES_BYTES):
        key = line.pop("evaluation"), line.pop("part")
        found.setdefault(key, []).append(Answer.from_record(line))
    return {key: Evaluation(answers=tuple(answers)) for key, answers in found.items()}


def _values(row: Row, part: str, value: Value, unit: Unit) -> NDArray[np.float64]:
    """[S, Q]: the value of every question, the plays of a unit averaged."""
    values_SQ = []
    for parts in row.values():
        plays: dict[str, list[float]] = {}
        for uid, samples in parts[part].by_question.items():
            plays.setdefault(unit(uid), []).append(value(samples))
        values_SQ.append([np.mean(values) for values in plays.values()])
    return np.array(values_SQ)


def _score(samples: Sequence[Answer]) -> float:
    return sum(one.score for one in samples) / len(samples)


def _interval(scores_SQ: NDArray[np.float64]) -> Estimate:
    if min(scores_SQ.shape) > 1:
        return crossed_interval(scores_SQ)
    flat = scores_SQ.ravel()
    if len(flat) > 1:
        return mean_interval(flat)
    return Estimate(value=float(flat[0]), low=None, high=None)


def _paired(
    first_SQ: NDArray[np.float64], second_SQ: NDArray[np.float64], seed: int
) -> dict[str, Any]:
    """The interval over seeds and questions; the p-value over questions, of means over seeds."""
    first_Q, second_Q = first_SQ.mean(0), second_SQ.mean(0)
    # of one question, or one map, nothing tells the chance
    p_value = compare(first_Q, second_Q, seed=seed).p_value if len(first_Q) > 1 else None
    return {"difference": asdict(_interval(first_SQ - second_SQ)), "p_value": p_value}


def _numbers(row: Row, units: Mapping[str, Unit]) -> dict[str, Any]:
    """Every number of a row with its interval over seeds and questions."""

    def estimate(value: Value) -> dict[str, Any]:
        return asdict(_interval(_values(row, "task", value, units["task"])))

    def mean(one: Callable[[Answer], float]) -> dict[str, Any]:
        return estimate(lambda samples: sum(map(one, samples)) / len(samples))

    def pass_at(k: int) -> Value:
        return lambda samples: pass_at_k(len(samples), sum(a.score == 1 for a in samples), k)

    scores = _values(row, "task", _score, units["task"])
    kept = _values(row, "retention", _score, units["retention"])
    num_samples = len(next(iter(next(iter(row.values()))["task"].by_question.values())))
    return {
        "score": asdict(_interval(scores)),
        "scores_by_seed": dict(zip(row, scores.mean(-1).tolist(), strict=True)),
        "format_failure_rate": mean(lambda answer: not answer.answered),
        "leakage_rate": mean(lambda answer: answer.leaked),
        "response_tokens": mean(lambda answer: answer.num_tokens),
        "pass_at_k": {str(k): estimate(pass_at(k)) for k in range(1, num_samples + 1)},
        "retention": asdict(_interval(kept)),
        "retention_by_seed": dict(zip(row, kept.mean(-1).tolist(), strict=True)),
    }


def _maps(task: Task, asked: Evaluation) -> dict[str, Any] | None:
    """Of a game: its maps, and what is asked of them."""
    maps = task.report()
    if not maps:
        return None
    plays = list(asked.by_question)
    return {**maps, "asked": len({*map(task.unit_of, plays)}), "plays": len(plays)}


def _about_maps(maps: Mapping[str, Any]) -> str:
    words = [f"* {maps['asked']} different maps in {maps['plays']} test games"]
    if "maps" in maps:  # of a game with a solver here
        rate = maps["random_win_rate_test"]
        words.append(
            f"{maps['maps']} in the setting that can be won, {maps['maps_overlap']} in more than "
            f"one split; a random player wins {rate:.3f} of the test split's"
        )
    return ", ".join(words)


def _cells(row: Mapping[str, Any]) -> list[str]:
    most = max(row["pass_at_k"], key=int)
    share = row["internalised"]
    return [
        _cell(row["score"], ".3f"),
        "" if share is None else _cell(share, ".0%"),
        f"{_cell(row['pass_at_k'][most], '.3f')} (k={most})",
        _cell(row["format_failure_rate"], ".2f"),
        _cell(row["leakage_rate"], ".2f"),
        _cell(row["response_tokens"], ".1f"),
        _cell(row["retention"], ".2f"),
    ]


def _cell(estimate: Mapping[str, Any], form: str) -> str:
    low, high = (
        "?" if end is None else f"{end:{form}}" for end in (estimate["low"], estimate["high"])
    )
    return f"{estimate['value']:{form}} [{low}, {high}]"
