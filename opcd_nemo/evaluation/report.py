"""What a run leaves for people: tables, curves, samples and the summary."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import resource
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from opcd_nemo.errors import visible
from opcd_nemo.evaluation.evaluator import Answer, Evaluation
from opcd_nemo.losses import CAPTURED_MASS
from opcd_nemo.metrics import read_metrics
from opcd_nemo.storage.durable import naming

_VERSIONS = ("opcd-nemo", "torch", "megatron-core", "nemo-toolkit", "lightning", "numpy")
_KIB_PER_GIB = 2**20


def peak_rss_kib() -> int:
    """This process's peak resident memory, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_rss_of(pid: int) -> int:
    """Another process's peak resident memory, in KiB (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError(f"/proc/{pid}/status has no VmHWM")


def gib(kib: Sequence[int]) -> float:
    """A sum of KiB, in GiB."""
    return round(sum(kib) / _KIB_PER_GIB, 2)


def versions() -> dict[str, str]:
    """Python's version and those of the packages a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def results_table(rows: Mapping[str, tuple[float, float | None]]) -> str:
    """A table of (task score, retention) by row name."""
    lines = [f"{'':24}{'task':>8}{'retention':>12}"]
    for name, (score, retention) in rows.items():
        lines.append(f"{name:24}{score:8.2f}{'' if retention is None else f'{retention:12.2f}'}")
    return "\n".join(lines)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """What metrics.jsonl has of a validation beside its score: one name a number."""
    record = evaluation.record()
    of_k = {f"validation/pass_at_{k}": value for k, value in record.pop("pass_at_k").items()}
    del record["score"]
    return of_k | {f"validation/{name}": value for name, value in record.items()}


def write_samples(path: Path, columns: Mapping[str, Evaluation], count: int = 12) -> None:
    """The first questions of every evaluation, all samples side by side, as Markdown."""
    lines = ["# Samples", ""]
    for name, evaluation in columns.items():
        lines.append(
            f"- **{name}**: score {evaluation.score:.2f}, without an answer "
            f"{evaluation.format_failure_rate:.2f}, leaking {evaluation.leakage_rate:.2f}, "
            f"{evaluation.response_tokens:.1f} tokens"
        )
    lines.append("")
    answers = {name: evaluation.by_question for name, evaluation in columns.items()}
    for uid, samples in list(next(iter(answers.values())).items())[:count]:
        lines += _heading(uid, samples[0].question)
        for name, by_uid in answers.items():
            for answer in by_uid[uid]:
                text = _quoted(answer.text.strip()).replace("\n", "\n  > ")
                lines += [f"- **{name}** ({_about(answer)})", f"  > {text}"]
        lines.append("")
    with naming(path):
        path.write_text("\n".join(lines), encoding="utf-8")


def _heading(uid: str, question: str) -> list[str]:
    """The question's first line as the heading, the others (a game's board) as they are."""
    first, _, others = question.strip().partition("\n")
    shown = [textwrap.indent(visible(others.strip("\n")), "    "), ""] if others.strip() else []
    name = " ".join(visible(uid).replace("`", "'").split())
    return [f"## {_quoted(first)}", "", f"`{name}`", "", *shown]


def _quoted(text: str) -> str:
    """A model's or a stranger's text as Markdown: no HTML, no image or link to elsewhere."""
    text = visible(text).replace("<", "&lt;").replace("![", "!\\[")
    return re.sub(r"\](?=[(\[:])", r"]\\", text)


def _about(answer: Answer) -> str:
    words = [f"score {answer.score:.3g}", f"{answer.num_tokens} tokens"]
    words += ["no answer found"] * (not answer.answered) + ["leaks"] * answer.leaked
    return ", ".join(words)


def write_answers(path: Path, evaluations: Mapping[str, tuple[Evaluation, Evaluation]]) -> None:
    """Every answer as one JSON object a line: what two runs are compared by, question by question.

    Args:
        path: of the file.
        evaluations: of task and retention, by name.
    """
    with naming(path), path.open("w", encoding="utf-8") as file:
        for name, pair in evaluations.items():
            for part, evaluation in zip(("task", "retention"), pair, strict=True):
                for answer in evaluation.answers:
                    line = {"evaluation": name, "part": part, **asdict(answer)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_curves(path: Path, metrics: Path) -> None:
    """Loss, response length, gradient norm and validation over the steps of a metrics file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(metrics)
    losses = sorted({name for line in lines for name in line if name.startswith("loss/")})
    shares = [name for name in losses if name == CAPTURED_MASS]
    losses = [name for name in losses if name not in shares]
    panels = [losses, ["rollout/response_tokens"], ["optim/grad_norm"], ["perf/tokens_per_s"]]
    if shares:
        panels.append(shares)
    if any("validation/score" in line for line in lines):
        panels.append(["validation/score", "validation/retention"])
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), label=name, marker=".")
        axis.set_xlabel("step")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    with naming(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)
