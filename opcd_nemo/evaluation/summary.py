"""What a finished run amounts to: summary.json, the other files of its report, lines to print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.evaluation import report
from opcd_nemo.evaluation.answers_file import ANSWERS, write_answers
from opcd_nemo.evaluation.curves import write_curves
from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.evaluation.findings import Pair, findings
from opcd_nemo.evaluation.forecast import Forecast
from opcd_nemo.evaluation.intervals import Unit, with_intervals
from opcd_nemo.evaluation.validations import ValidationHistory
from opcd_nemo.metrics import METRICS, read_metrics
from opcd_nemo.storage.run_folder import RunFolder

SUMMARY = "summary.json"
README = "README.md"
_PARTS = ("task", "retention")
_ROWS = {"base": "base", "in_context": "in-context (teacher)", "student": "after training"}
_CONTROLS = {
    "wrong_context": "a wrong context, read by the teacher",
    "context_returned": "the context given back to the trained student",
}
_FILES = {
    "report.html": "everything below in one page, for a browser; `opcd report` writes it anew",
    SUMMARY: "scores with intervals, costs, layout, versions",
    METRICS: "one line of numbers a training step",
    "curves.png": "loss, length of answers, gradient norm and validation over the steps",
    "samples.md": "a dozen questions with the answers before, with the context, and after",
    ANSWERS: "every answer of every evaluation, one a line",
    "tokens.json": "a few answers token by token: student and teacher, before and after",
    "config.yaml": "every configuration key with its value",
    "checkpoints/": "weights, optimizer and schedule; `opcd chat` and `opcd export` read them",
    "nemo/": "files of NeMo's exp_manager: logs of the loggers that were switched on",
    "hub.json": "the commits of models and data that came from a hub",
    "DONE": "written last; holds the digest of the weights",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is known of a run at its end.

    `scores` are of task and retention: `base` and `in_context` before training, `student` after it.
    `controls` are evaluations of the task alone. `units` tell what a play is a repetition of, by
    part. `facts` are the other numbers of summary.json.
    """

    scores: Mapping[str, Pair]
    validations: ValidationHistory
    parallel: Parallel
    units: Mapping[str, Unit]
    facts: Mapping[str, Any]
    controls: Mapping[str, Evaluation] = field(default_factory=dict)
    forecast: Forecast | None = None


def write_report(run_folder: RunFolder, outcome: Outcome, config_yaml: str) -> dict[str, Any]:
    """Write the files of a finished run, on rank 0; returns the summary."""
    folder, scores = run_folder.path, outcome.scores
    summary = summarise(outcome, read_metrics(folder / METRICS))
    run_folder.check_held()
    write_curves(folder / "curves.png", folder / METRICS)
    report.write_samples(folder / "samples.md", {name: pair[0] for name, pair in scores.items()})
    write_answers(folder / ANSWERS, scores, outcome.controls)
    run_folder.write("config.yaml", config_yaml)
    run_folder.write(README, _readme(folder.name))
    # last: a pipeline takes a run that has a summary for finished
    run_folder.write(SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False))
    return summary


def _readme(name: str) -> str:
    lines = [f"# Run {name}", "", "Open `report.html` in a browser first.", ""]
    lines += [f"* `{file}`: {words}" for file, words in _FILES.items()]
    return "\n".join(lines) + "\n"


def summarise(outcome: Outcome, lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The values of summary.json; `lines` are those of metrics.jsonl."""
    parallel, validations = outcome.parallel, outcome.validations
    summary: dict[str, Any] = {name: pair[0].score for name, pair in outcome.scores.items()}
    for name, pair in zip(("before", "in_context", "after"), outcome.scores.values(), strict=True):
        summary[f"retention_{name}"] = pair[1].score
    summary["evaluation"] = {
        name: {
            part: {**each.record(), "intervals": with_intervals([each], outcome.units[part])}
            for part, each in zip(_PARTS, pair, strict=True)
        }
        for name, pair in outcome.scores.items()
    }
    seed = int(outcome.facts["seed"])
    summary |= findings(outcome.scores, outcome.controls, outcome.units, seed)
    if outcome.forecast is not None:
        summary["forecast"] = {**outcome.forecast.record(), "came": summary["student"]}
    summary |= {
        "steps": len(lines),
        **_cpu_seconds(lines),
        "world_size": parallel.world_size,
        "tp": parallel.tp,
        "pp": parallel.pp,
        "dp": parallel.dp,
        "cp": parallel.cp,
        **outcome.facts,
        "versions": report.versions(),
    }
    if (best := validations.best) is not None:
        summary |= {"best_step": best.step, "best_validation": best.score}
        summary["validations"] = validations.records()
    stopped = validations.stopped_by_retention
    summary["stopped_by_retention"] = stopped.step if stopped else None
    return summary


def table_of(summary: Mapping[str, Any]) -> str:
    """The scores of task and retention, as a table; a run of before has no intervals."""
    pairs = zip(_ROWS, ("before", "in_context", "after"), strict=True)
    rows = {
        _ROWS[name]: [
            summary["evaluation"][name][part].get("intervals", {}).get("score", alone)
            for part, alone in zip(
                _PARTS, (_alone(summary[name]), _alone(summary[f"retention_{when}"])), strict=True
            )
        ]
        for name, when in pairs
    }
    return report.results_table(rows)


def _alone(value: float) -> dict[str, float | None]:
    return {"value": value, "low": None, "high": None}


def summary_lines(summary: Mapping[str, Any], validations: ValidationHistory) -> list[str]:
    """What a program prints at the end of a run."""
    lines = [table_of(summary), *_finding_lines(summary)]
    if (stopped := validations.stopped_by_retention) is not None:
        lines.append(
            f"stopped by retention after step {stopped.step}: {stopped.retention:.2f} is below "
            f"evaluation.min_retention={validations.min_retention} of "
            f"{summary['retention_before']:.2f}, the score before training"
        )
    if (best := validations.best) is not None:
        lines.append(f"best on validation: {best.score:.2f} after {best.step} steps")
    phases = ", ".join(f"{k} {v:.2f}" for k, v in summary["cpu_seconds_by_phase"].items())
    lines.append(
        f"{summary['steps']} steps, {summary['cpu_seconds_per_step']:.2f} CPU-seconds a step over "
        f"all ranks ({phases}); peak RSS {summary['peak_rss_gib']:.2f} GiB; "
        f"{summary['seconds_total']:.0f} s in all"
    )
    return lines


def _finding_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    if (share := summary["internalised"]) is not None:
        shown = report.interval_text(share, ".0%")
        lines.append(f"in the weights: {shown} of what the context gives")
    if (law := summary.get("forecast")) is not None:
        lines.append(f"forecast: {law['low']:.2f} to {law['high']:.2f}; came: {law['came']:.2f}")
    for name, control in summary["controls"].items():
        same = ", ".join(
            f"{_ROWS[row]} {score:.2f}" for row, score in control["same_questions"].items()
        )
        shown = report.interval_text(control["task"]["intervals"]["score"], ".2f")
        lines.append(
            f"control, {_CONTROLS[name]}: {shown} on {control['questions']} questions ({same})"
        )
    lost = summary["forgetting"]
    lines.append(
        f"forgetting: of {lost['questions']} questions that training never saw {lost['worse']} are "
        f"answered worse than before, {lost['better']} better; accuracy "
        f"{report.interval_text(lost['difference'], '+.2f')}"
    )
    return lines


def _cpu_seconds(lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """CPU seconds a step over all ranks, in all and by phase."""

    def mean(name: str) -> float:
        return round(sum(line[name] for line in lines) / len(lines), 2)

    phases = [name for name in lines[0] if name.startswith("cpu/") and name != "cpu/step_s"]
    return {
        "cpu_seconds_per_step": mean("cpu/step_s"),
        "cpu_seconds_by_phase": {name[4:-2]: mean(name) for name in phases},
    }
