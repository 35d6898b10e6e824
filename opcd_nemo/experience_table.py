"""The pipeline's table: every row over seeds and questions, with intervals, methods paired."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcd_nemo.evaluation import Answer, Evaluation
from opcd_nemo.experience_runs import CONTROLS, RANKED, SUMMARY, Workplace
from opcd_nemo.model_files import read_json
from opcd_nemo.plugs import build_plug
from opcd_nemo.statistics import Estimate, compare, crossed_interval, internalised, mean_interval

ANSWERS = "answers.jsonl"  # of a training run
_SHOWN = {
    "base": "base",
    "in_context": "in-context (teacher)",
    "student_in_context": "teacher's experience, base student",
    "wrong": "wrong experience, in context",
    "shuffled": "shuffled experience, in context",
    "opcd": "OPCD",
    "opcd_in_context": "OPCD, in context",
    "offpolicy": "off-policy CD",
    "offpolicy_in_context": "off-policy CD, in context",
    "sft": "SFT",
    "sft_in_context": "SFT, in context",
}
_COLUMNS = ("score", "interval", "internalised", "pass@k", "format", "leaks", "tokens", "retention")
Row = dict[str, dict[str, Evaluation]]
"""Evaluations by seed, then by part: task, retention."""


def summarise(place: Workplace) -> dict[str, Any]:
    """All of a round's numbers, from the files of its runs and controls."""
    rows = _rows(place)
    plan, seed = place.settings.experience.consolidation, int(place.settings.train.seed)
    scores = {name: _scores(by_seed) for name, by_seed in rows.items()}
    shares = {
        method: internalised(scores["base"], scores["in_context"], scores[method], seed=seed)
        for method in plan.methods
    }
    table = {
        name: {
            "score": asdict(_interval(scores[name])),
            "scores_by_seed": dict(zip(rows[name], scores[name].mean(-1).tolist(), strict=True)),
            **_numbers([parts["task"] for parts in rows[name].values()]),
            "retention": float(
                np.mean([parts["retention"].score for parts in rows[name].values()])
            ),
            "retention_by_seed": {
                seed: parts["retention"].score for seed, parts in rows[name].items()
            },
            "internalised": None if (share := shares.get(name)) is None else asdict(share),
        }
        for name in rows
    }
    first = plan.methods[0]
    entry = place.selected()[0]
    ranked = read_json(place.folder / RANKED)
    return {
        "base": table["base"]["score"]["value"],
        "in_context": table["in_context"]["score"]["value"],
        "student": table[first]["score"]["value"],
        "internalised": (table[first]["internalised"] or {}).get("value"),
        "method": first,
        "seeds": list(plan.seeds),
        "maps_overlap": _maps_overlap(place),
        "round": place.settings.round,
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
            run: read_json(place.folder / run / SUMMARY).get("validations")
            for run in place.settings.runs
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
        difference = _estimate(result["difference"])
        lines.append(f"* {pair}, paired by question: {difference}, p = {result['p_value']:.3f}")
    experience, count = summary["experience"], len(summary["seeds"])
    lines.append(
        f"* seeds {summary['seeds']}; intervals are 95 %, over {count} seeds and the questions"
    )
    if summary["maps_overlap"] is not None:
        lines.append(f"* maps in more than one split: {summary['maps_overlap']}")
    lines.append(
        f"* experience {experience['content_hash'][:12]}, {len(experience['items'])} items, "
        f"{experience['num_tokens']} tokens; validation {experience['validation']:.3f} with it, "
        f"{experience['validation_without']:.3f} without"
    )
    return "\n".join(lines)


def _rows(place: Workplace) -> dict[str, Row]:
    """Every row's evaluations by seed, in the table's order.

    A method's student is its checkpoint of the best validation, where its run had validations.
    """
    plan = place.settings.experience.consolidation
    first = plan.methods[0]
    extra: dict[str, Row] = {
        name: {seed: _parts(parts) for seed, parts in by_seed.items()}
        for name, by_seed in read_json(place.folder / CONTROLS).items()
    }
    rows = {name: _of_runs(place, first, name) for name in ("base", "in_context")}
    students = [name for method in plan.methods for name in (method, f"{method}_in_context")]
    rows |= {name: row for name, row in extra.items() if name in _SHOWN and name not in students}
    for method in plan.methods:
        rows[method] = {**_of_runs(place, method, "student"), **extra.get(f"{method}_best", {})}
        rows[f"{method}_in_context"] = extra[f"{method}_in_context"]
    return rows


def _of_runs(place: Workplace, method: str, name: str) -> Row:
    found = {}
    for seed in place.settings.experience.consolidation.seeds:
        answers = read_answers(place.folder / f"{method}-{seed}" / ANSWERS)
        found[str(seed)] = {part: answers[name, part] for part in ("task", "retention")}
    return found


def _parts(parts: Mapping[str, Any]) -> dict[str, Evaluation]:
    return {
        part: Evaluation(answers=tuple(Answer(**one) for one in answers))
        for part, answers in parts.items()
    }


def read_answers(file: Path) -> dict[tuple[str, str], Evaluation]:
    """A run's evaluations, by name and part (task, retention)."""
    found: dict[tuple[str, str], list[Answer]] = {}
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        key = line.pop("evaluation"), line.pop("part")
        found.setdefault(key, []).append(Answer(**line))
    return {key: Evaluation(answers=tuple(answers)) for key, answers in found.items()}


def _scores(by_seed: Row) -> NDArray[np.float64]:
    """[S, Q]: the mean over the samples of every question."""
    return np.array(
        [
            [np.mean([a.score for a in samples]) for samples in found["task"].by_question.values()]
            for found in by_seed.values()
        ]
    )


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
    p_value = compare(first_SQ.mean(0), second_SQ.mean(0), seed=seed).p_value
    return {"difference": asdict(_interval(first_SQ - second_SQ)), "p_value": p_value}


def _numbers(found: Sequence[Evaluation]) -> dict[str, Any]:
    """Means over seeds of everything but the score."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(one, name) for one in found]))

    names = ("format_failure_rate", "leakage_rate", "response_tokens")
    by_k = [one.pass_at_k for one in found]
    pass_at_k = {str(k): float(np.mean([one[k] for one in by_k])) for k in by_k[0]}
    return {**{name: mean(name) for name in names}, "pass_at_k": pass_at_k}


def _maps_overlap(place: Workplace) -> int | None:
    """Of a game: how many maps are in more than one split."""
    report = getattr(build_plug(place.task_plug()), "report", None)
    return None if report is None else int(report()["maps_overlap"])


def _cells(row: Mapping[str, Any]) -> list[str]:
    share, score = row["internalised"], row["score"]
    most = max(row["pass_at_k"], key=int)
    return [
        f"{score['value']:.3f}",
        _range(score),
        "" if share is None else f"{share['value']:.0%}",
        f"{row['pass_at_k'][most]:.3f} (k={most})",
        f"{row['format_failure_rate']:.2f}",
        f"{row['leakage_rate']:.2f}",
        f"{row['response_tokens']:.1f}",
        f"{row['retention']:.2f}",
    ]


def _estimate(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['value']:+.3f} {_range(estimate)}"


def _range(estimate: Mapping[str, Any]) -> str:
    ends = ["?" if end is None else f"{end:.3f}" for end in (estimate["low"], estimate["high"])]
    return f"[{ends[0]}, {ends[1]}]"
