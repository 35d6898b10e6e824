"""What a run leaves for people: its table, samples, memory and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd_nemo.errors import visible
from opcd_nemo.evaluation.evaluator import Answer, Evaluation
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


def results_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A table of (task score, retention) by row name, each with its interval of 95 %."""
    lines = [f"{'':24}{'task':20}retention"]
    for name, (score, retention) in rows.items():
        shown = interval_text(score, ".2f")
        lines.append(f"{name:24}{shown:20}{interval_text(retention, '.2f')}")
    return "\n".join(lines)


def interval_text(estimate: Mapping[str, Any], form: str) -> str:
    """`value [low, high]`; an end that nothing bounds is a question mark."""
    ends = (estimate["low"], estimate["high"])
    low, high = ("?" if end is None else f"{end:{form}}" for end in ends)
    return f"{estimate['value']:{form}} [{low}, {high}]"


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
