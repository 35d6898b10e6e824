"""The page of an experience pipeline: its notes, its table, its games."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from opcd_nemo.context.registry import Registry
from opcd_nemo.evaluation.answers_file import ANSWERS, read_answers
from opcd_nemo.evaluation.evaluator import ANSWER, Answer, Evaluation
from opcd_nemo.evaluation.summary import SUMMARY
from opcd_nemo.report.answers import side_by_side
from opcd_nemo.report.figures import Chart, line_chart
from opcd_nemo.report.page import render, small_page
from opcd_nemo.report.record import ROWS, is_number, number, pick
from opcd_nemo.report.run_page import PAGE
from opcd_nemo.report.words import NOTHING, SHORT, count, p_beside, plain, shown
from opcd_nemo.storage.plain_file import is_there
from opcd_nemo.storage.records import check_record, read_object

ORIGIN, RANKED, REGISTRY = "experience.yaml", "ranked.json", "registry"  # in a pipeline's folder
CONTROLS = "controls.json"
ROW_WORDS = {
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
"""The rows of a pipeline's table, in words."""
_CLASSES = {
    "base": "base",
    "in_context": "in_context",
    "student_in_context": "in_context",
    "wrong": "wrong_context",
    "shuffled": "wrong_context",
}
_REMEDY = "a copy of the file as it was; or stage=evaluate of the pipeline, which writes it anew"
_GAMES = 6
_HASH = 12  # letters of it that tell an entry


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a pipeline's, or a round's."""
    return (folder / ORIGIN).is_file() or (folder / RANKED).is_file()


def pipeline_page(folder: Path) -> str:
    """The page of a pipeline that has a table, or of a round of it.

    Raises:
        UserError: a file is not as it was written.
    """
    summary = read_object(folder / SUMMARY, {"rows": dict, "method": str}, _REMEDY)
    # the last round's table is in the pipeline's folder, its other files in the round's
    number_of_round = number(summary, "round")
    round_folder = folder / f"round={number_of_round:.0f}" if number_of_round else folder
    files = round_folder if round_folder.is_dir() else folder
    root = folder if (folder / ORIGIN).is_file() else folder.resolve().parent
    values = {
        "name": folder.resolve().name,
        "method": ROW_WORDS.get(summary["method"], summary["method"]),
        "rows": _rows(summary),
        "result": {row: _score(summary, row) for row in ("base", "in_context", summary["method"])},
        "student": _score(summary, summary["method"]),
        "share": shown(pick(summary, "rows", summary["method"], "internalised"), ".0%"),
        "before": shown(pick(summary, "rows", "base", "retention")),
        "after": shown(pick(summary, "rows", summary["method"], "retention")),
        "paired": _paired(summary),
        "seeds": plain(summary.get("seeds")),
        "has_seeds": _has_seeds(summary),
        "maps": _maps(summary),
        "notes": _notes(root, summary),
        "candidates": _candidates(files, pick(summary, "experience", "content_hash")),
        "charts": _validations(summary),
        "games": _games(files, summary),
        "runs": _runs(folder, files),
    }
    return small_page(lambda limits: render("pipeline.html.j2", limits, **values))


def _has_seeds(summary: Mapping[str, Any]) -> bool:
    """Whether several seeds tell how another seed may differ."""
    seeds = summary.get("seeds")
    return isinstance(seeds, list) and len(seeds) > 1


def _score(summary: Mapping[str, Any], row: str) -> Any:
    return shown(pick(summary, "rows", row, "score"))


def _rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, row in summary["rows"].items():
        if not isinstance(row, Mapping):
            continue
        rows.append(
            {
                "words": ROW_WORDS.get(name, name),
                "name": _CLASSES.get(name, "student"),
                "score": shown(row.get("score")),
                "share": shown(row.get("internalised"), ".0%"),
                "format": shown(row.get("format_failure_rate")),
                "leaks": shown(row.get("leakage_rate")),
                "tokens": shown(row.get("response_tokens"), ".1f"),
                "retention": shown(row.get("retention")),
            }
        )
    return rows


def _paired(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    found = []
    paired = summary.get("paired")
    for words, result in (paired if isinstance(paired, Mapping) else {}).items():
        value = shown(pick(result, "difference"), "+.3f")
        if value is not NOTHING:
            methods = " - ".join(ROW_WORDS.get(name, name) for name in str(words).split(" - "))
            p_value = p_beside(pick(result, "difference"), pick(result, "p_value"))
            found.append(
                {"words": methods, "value": value.value, "interval": value.interval, "p": p_value}
            )
    return found


def _maps(summary: Mapping[str, Any]) -> dict[str, str] | None:
    maps = summary.get("maps")
    if not isinstance(maps, Mapping):
        return None
    rate = number(maps, "random_win_rate_test")
    return {
        "asked": count(number(maps, "asked")),
        "plays": count(number(maps, "plays")),
        "random": "" if rate is None else f"{rate:.3f}",
    }


def _notes(root: Path, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The selected notes, who wrote them from what, and every earlier selection."""
    if not (root / REGISTRY).is_dir():
        return None
    registry = Registry(root / REGISTRY)
    chosen = pick(summary, "experience", "content_hash")
    entry = registry.find(chosen) if isinstance(chosen, str) and chosen else registry.selected()
    problems = entry.lineage.get("problems")
    problems = problems if isinstance(problems, list) else []
    lineage = [
        (str(name).replace("_", " "), str(len(value)) if isinstance(value, list) else plain(value))
        for name, value in entry.lineage.items()
    ]
    return {
        "items": entry.items,
        "hash": entry.hash[:_HASH],
        "tokens": count(entry.num_tokens),
        "lineage": lineage,
        "problems": [str(uid) for uid in problems],
        "with_it": _validation(summary, "validation"),
        "without": _validation(summary, "validation_without"),
        "history": [
            (line["content_hash"][:_HASH], line["reason"]) for line in reversed(registry.history())
        ],
    }


def _validation(summary: Mapping[str, Any], name: str) -> str:
    value = number(summary, "experience", name)
    return "-" if value is None else f"{value:.2f}"


def _candidates(folder: Path, selected: Any) -> dict[str, Any] | None:
    """The candidates by score, the selected entry among them, and the score without notes."""
    if not is_there(folder / RANKED):
        return None
    ranking = read_object(folder / RANKED, {"without": float, "ranked": list}, _REMEDY)
    scored = [
        (float(record["score"]), record)
        for record in ranking["ranked"]
        if isinstance(record, dict) and is_number(record.get("score"))
    ]
    return {
        "count": len(scored),
        "without": f"{ranking['without']:.2f}",
        "rows": [
            {
                "score": shown({"value": score}),
                "selected": selected is not None and record.get("experience") == selected,
                "questions": plain(record.get("questions")),
                "chain": plain(record.get("chain")),
                "step": plain(record.get("step")),
                "tokens": plain(record.get("num_tokens")),
                "items": [str(item) for item in record.get("items", ())]
                if isinstance(record.get("items"), list)
                else [],
            }
            for score, record in scored
        ],
    }


def _validations(summary: Mapping[str, Any]) -> list[Chart]:
    """The scores on validation of every run that had some."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {"score": {}, "retention": {}}
    runs = summary.get("validations")
    for run, records in (runs if isinstance(runs, Mapping) else {}).items():
        for name, by_run in curves.items():
            points = [
                (record["step"], record[name])
                for record in (records if isinstance(records, list) else [])
                if isinstance(record, dict)
                and all(is_number(record.get(key)) for key in ("step", name))
            ]
            if points:
                by_run[str(run)] = points
    captions = {
        "score": "On validation, which chooses the checkpoint that the table reports.",
        "retention": "Unrelated questions, asked at the same steps.",
    }
    return [
        line_chart(f"Validation: {name}", "from 0 to 1", captions[name], by_run)
        for name, by_run in curves.items()
        if by_run
    ]


def _games(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first test games, or questions, of the method's first run, and how many it has."""
    seeds = summary.get("seeds")
    first = seeds[0] if isinstance(seeds, list) and seeds else ""
    file = folder / f"{summary['method']}-{plain(first)}" / ANSWERS
    if not is_there(file):
        return None
    evaluations = read_answers(file, _REMEDY)
    rows = {row: evaluations[row, "task"] for row in ROWS if (row, "task") in evaluations}
    if not rows:
        return None
    if (best := _best_student(folder / CONTROLS, summary["method"], plain(first))) is not None:
        rows["student"] = best
    found = side_by_side(rows, SHORT, _GAMES)
    played = any(answer.game for question in found for _, answer in question.answers)
    return {
        "shown": found,
        "count": len(next(iter(rows.values())).by_question),
        "what": "games" if played else "questions",
    }


def _best_student(file: Path, method: str, seed: str) -> Evaluation | None:
    """The answers of the checkpoint that validation has chosen, which are in the table.

    None where that checkpoint is the run's last, whose answers the run has.
    """
    rows = read_object(file, {}, _REMEDY) if is_there(file) else {}
    answers = pick(rows, f"{method}_best", seed, "task")
    if not isinstance(answers, list) or not answers:
        return None
    for answer in answers:
        check_record(answer, ANSWER, file, _REMEDY, f"{method}_best, seed {seed}: ")
    return Evaluation(answers=tuple(map(Answer.from_record, answers)))


def _runs(folder: Path, files: Path) -> list[tuple[str, Markup]]:
    """The pages of the training runs, as links from the pipeline's page, which are never cut."""
    return [
        (page.parent.name, Markup(quote(page.relative_to(folder).as_posix())))
        for page in sorted(files.glob(f"*/{PAGE}"))
    ]
