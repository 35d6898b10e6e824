"""What a run leaves for people: tables, curves, samples and the summary."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

from opcd_nemo.evaluation import Evaluation
from opcd_nemo.losses import CAPTURED_MASS
from opcd_nemo.metrics import read_metrics

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


def write_samples(path: Path, columns: Mapping[str, Evaluation], count: int = 12) -> None:
    """The first answers of every evaluation, side by side, as Markdown."""
    first = next(iter(columns.values()))
    lines = ["# Samples", ""]
    for index, answer in enumerate(first.answers[:count]):
        lines += [f"## {answer.uid}", ""]
        for name, evaluation in columns.items():
            shown = evaluation.answers[index]
            text = shown.text.strip().replace("\n", "\n  > ")
            lines += [f"- **{name}** (score {shown.score:.0f})", f"  > {text}"]
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


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
    figure.savefig(path, dpi=110)
    plt.close(figure)
