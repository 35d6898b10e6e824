"""The pipeline's table: every row over seeds and questions, with intervals, methods paired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcd_nemo.config.plugs import build_plug
from opcd_nemo.errors import UserError
from opcd_nemo.evaluation.answers_file import read_answers
from opcd_nemo.evaluation.evaluator import Answer, Evaluation
from opcd_nemo.evaluation.intervals import Unit, score, values_SQ, with_intervals
from opcd_nemo.evaluation.report import interval_text
from opcd_nemo.evaluation.statistics import SHARE, compare, estimate, internalised
from opcd_nemo.experience.folder import RUN_ANSWERS, RUN_SUMMARY, PipelineFolder
from opcd_nemo.formats.locate import read_json
from opcd_nemo.report.pipeline_page import RANKED, ROW_WORDS
from opcd_nemo.storage.records import read_object
from opcd_nemo.tasks import Task

_REMEDY = "a copy of the file as it was; or a new run in another folder, without this one"
_COLUMNS = ("score", "internalised", "pass@k", "format", "leaks", "tokens", "retention")
Row = dict[str, dict[str, Evaluation]]
"""Evaluations by seed, then by part: task, retention."""


def summarise(folder: PipelineFolder) -> dict[str, Any]:
    """All of a round's numbers, from the files of its runs and controls."""
    rows = _rows(folder)
    plan, seed = folder.settings.experience.consolidation, int(folder.settings.train.seed)
    task: Task = build_plug(folder.plug("task"))
    retention: Task = build_plug(folder.plug("retention"))
    units = {"task": task.unit_of, "retention": retention.unit_of}
    scores = {name: _scores(row, "task", units) for name, row in rows.items()}
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
            f"{first} - {other}": _paired(scores[first], scores[other])
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
            f"| {ROW_WORDS[name]} | {' | '.join(_cells(row))} |"
            for name, row in summary["rows"].items()
        ),
        "",
    ]
    for pair, result in summary["paired"].items():
        difference, p_value = interval_text(result["difference"], "+.3f"), result["p_value"]
        shown = "?" if p_value is None else f"{p_value:.3f}"
        lines.append(f"* {pair}, paired by seed and question: {difference}, p = {shown}")
    experience, count = summary["experience"], len(summary["seeds"])
    over = f"{count} seeds and the questions" if count > 1 else "the questions of a single seed"
    lines.append(
        f"* seeds {summary['seeds']}; intervals are 95 %, over {over} "
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
    rows |= {name: row for name, row in extra.items() if name in ROW_WORDS and name not in students}
    for method in plan.methods:
        rows[method] = {**_of_runs(folder, method, "student"), **extra.get(f"{method}_best", {})}
        rows[f"{method}_in_context"] = extra[f"{method}_in_context"]
    return rows


def _of_runs(folder: PipelineFolder, method: str, name: str) -> Row:
    found: Row = {}
    for seed in folder.settings.experience.consolidation.seeds:
        file = folder.of_run(RUN_ANSWERS, f"{method}-{seed}")
        answers = read_answers(file, _REMEDY)
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


def _scores(row: Row, part: str, units: Mapping[str, Unit]) -> NDArray[np.float64]:
    """[S, Q]: the score of every unit."""
    return values_SQ([parts[part] for parts in row.values()], score, units[part])


def _paired(first_SQ: NDArray[np.float64], second_SQ: NDArray[np.float64]) -> dict[str, Any]:
    """The difference with its interval, and the p-value of the same model."""
    found = compare(first_SQ, second_SQ)
    return {"difference": asdict(found.difference), "p_value": found.p_value}


def _numbers(row: Row, units: Mapping[str, Unit]) -> dict[str, Any]:
    """Every number of a row with its interval over seeds and questions."""
    numbers = with_intervals([parts["task"] for parts in row.values()], units["task"])
    scores, kept = (_scores(row, part, units) for part in ("task", "retention"))
    return {
        "score": numbers.pop("score"),
        "scores_by_seed": dict(zip(row, scores.mean(-1).tolist(), strict=True)),
        **numbers,
        "retention": asdict(estimate(kept, SHARE)),
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
        interval_text(row["score"], ".3f"),
        "" if share is None else interval_text(share, ".0%"),
        f"{interval_text(row['pass_at_k'][most], '.3f')} (k={most})",
        interval_text(row["format_failure_rate"], ".2f"),
        interval_text(row["leakage_rate"], ".2f"),
        interval_text(row["response_tokens"], ".1f"),
        interval_text(row["retention"], ".2f"),
    ]
