"""What a finished run amounts to: summary.json, the other files of its report, lines to print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.evaluation import report
from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.evaluation.validations import ValidationHistory
from opcd_nemo.metrics import METRICS, read_metrics
from opcd_nemo.storage.run_folder import RunFolder

SUMMARY = "summary.json"
_ROWS = {"base": "base", "in_context": "in-context (teacher)", "student": "after training"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is known of a run at its end.

    `scores` are of task and retention: `base` and `in_context` before training, `student` after it.
    `facts` are the other numbers of summary.json.
    """

    scores: Mapping[str, tuple[Evaluation, Evaluation]]
    validations: ValidationHistory
    parallel: Parallel
    facts: Mapping[str, Any]


def write_report(run_folder: RunFolder, outcome: Outcome, config_yaml: str) -> dict[str, Any]:
    """Write the files of a finished run, on rank 0; returns the summary."""
    folder, scores = run_folder.path, outcome.scores
    summary = summarise(outcome, read_metrics(folder / METRICS))
    run_folder.check_held()
    report.write_curves(folder / "curves.png", folder / METRICS)
    report.write_samples(folder / "samples.md", {name: pair[0] for name, pair in scores.items()})
    report.write_answers(folder / "answers.jsonl", scores)
    run_folder.write("config.yaml", config_yaml)
    # last: a pipeline takes a run that has a summary for finished
    run_folder.write(SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False))
    return summary


def summarise(outcome: Outcome, lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The values of summary.json; `lines` are those of metrics.jsonl."""
    parallel, validations = outcome.parallel, outcome.validations
    summary: dict[str, Any] = {name: pair[0].score for name, pair in outcome.scores.items()}
    for name, pair in zip(("before", "in_context", "after"), outcome.scores.values(), strict=True):
        summary[f"retention_{name}"] = pair[1].score
    summary["evaluation"] = {
        name: {"task": pair[0].record(), "retention": pair[1].record()}
        for name, pair in outcome.scores.items()
    }
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
    """The scores of task and retention, as a table."""
    pairs = zip(_ROWS, ("before", "in_context", "after"), strict=True)
    rows = {_ROWS[name]: (summary[name], summary[f"retention_{when}"]) for name, when in pairs}
    return report.results_table(rows)


def summary_lines(summary: Mapping[str, Any], validations: ValidationHistory) -> list[str]:
    """What a program prints at the end of a run."""
    lines = [table_of(summary)]
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


def _cpu_seconds(lines: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """CPU seconds a step over all ranks, in all and by phase."""

    def mean(name: str) -> float:
        return round(sum(line[name] for line in lines) / len(lines), 2)

    phases = [name for name in lines[0] if name.startswith("cpu/") and name != "cpu/step_s"]
    return {
        "cpu_seconds_per_step": mean("cpu/step_s"),
        "cpu_seconds_by_phase": {name[4:-2]: mean(name) for name in phases},
    }
