"""Which curves of a run people look at, under which title, in which unit; the picture of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opcd_nemo.losses import CAPTURED_MASS
from opcd_nemo.metrics import read_metrics
from opcd_nemo.storage.durable import naming


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Some metrics that share an axis: what they are, their unit, and how to read them."""

    title: str
    unit: str
    caption: str
    metrics: Mapping[str, str]
    """By the metric's name: its words in the legend."""


_LOSS_WORDS = {
    "loss/reverse_kl": "KL(student || teacher)",
    "loss/forward_kl": "KL(teacher || student)",
    "loss/jsd": "Jensen-Shannon divergence",
    "loss/nll": "negative log-likelihood of the samples",
}
_PANELS = (
    Panel(
        title="Length of answers",
        unit="tokens an answer",
        caption="Over the answers that the student learned from in a step.",
        metrics={
            "rollout/response_tokens": "mean",
            "length/p10": "shortest tenth below",
            "length/p90": "longest tenth above",
        },
    ),
    Panel(
        title="Gradient norm",
        unit="norm before clipping",
        caption="A spike is a step that was clipped; zero is a step without anything to learn.",
        metrics={"optim/grad_norm": "gradient norm"},
    ),
    Panel(
        title="Throughput",
        unit="answer tokens a second",
        caption=(
            "Sampled tokens over the whole step's wall time. It falls when answers get shorter: "
            "reading prompts, the backward pass and the optimizer cost the same."
        ),
        metrics={"perf/tokens_per_s": "tokens a second"},
    ),
    Panel(
        title="Captured probability",
        unit="share",
        caption="Probability on the k tokens of the top-k loss, under the model that chose them.",
        metrics={CAPTURED_MASS: "captured"},
    ),
    Panel(
        title="Entropy",
        unit="nats a token",
        caption="Of the next token, on a few answers of a step; a student's that falls to 0 is "
        "certain of everything.",
        metrics={"tokens/student_entropy": "student", "tokens/teacher_entropy": "teacher"},
    ),
    Panel(
        title="Agreement",
        unit="share",
        caption="Of the teacher's five likeliest tokens how many are the student's, and how much "
        "of the divergence falls on the 20 token types with most of it.",
        metrics={
            "tokens/top_overlap": "likeliest tokens in common",
            "tokens/heaviest_share": "divergence on the heaviest 20",
        },
    ),
    Panel(
        title="Validation",
        unit="score, 0 to 1",
        caption="Questions that are neither trained on nor in the table, and unrelated questions.",
        metrics={"validation/score": "task", "validation/retention": "unrelated questions"},
    ),
)


def panels(lines: Sequence[Mapping[str, object]]) -> list[Panel]:
    """The panels of a run, without metrics that no line of metrics.jsonl has."""
    known = {name for line in lines for name in line}
    losses = sorted(n for n in known if n.startswith("loss/") and n != CAPTURED_MASS)
    loss = Panel(
        title="Loss",
        unit="nats a token",
        caption="What the student minimises on its answers; 0 is the teacher's own behaviour.",
        metrics={name: _LOSS_WORDS.get(name, name.removeprefix("loss/")) for name in losses},
    )
    found = []
    for panel in (loss, *_PANELS):
        metrics = {name: words for name, words in panel.metrics.items() if name in known}
        if metrics:
            found.append(
                Panel(title=panel.title, unit=panel.unit, caption=panel.caption, metrics=metrics)
            )
    return found


def points(lines: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """A metric over the steps: (steps done, value)."""
    return [(line["step"] + 1, line[name]) for line in lines if name in line]


def write_curves(path: Path, metrics: Path) -> None:
    """Draw loss, length of answers, gradient norm and validation over the steps of a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(metrics)
    shown = panels(lines)
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, shown, strict=False):
        for name, words in panel.metrics.items():
            axis.plot(*zip(*points(lines, name), strict=True), label=words, marker=".")
        axis.set_title(panel.title)
        axis.set_xlabel("training step")
        axis.set_ylabel(panel.unit)
        axis.grid(alpha=0.3)
        if len(panel.metrics) > 1 or panel.title == "Loss":
            axis.legend(fontsize="small")
    with naming(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)
