"""What a run cost, what it was made of, and what to type next."""

from __future__ import annotations

import shlex
from typing import Any

from opcd_nemo.checkpoint.newest import of_step
from opcd_nemo.errors import visible
from opcd_nemo.report.record import RunRecord, mapping, number
from opcd_nemo.report.words import LABELS, count, plain, seconds

_WEIGHTS_ALONE = "exp_manager.checkpoint_callback_params.save_weights_only"
_SETTINGS = {
    "student.path": "student",
    "teacher.path": "teacher",
    "task._target_": "task",
    "loss._target_": "loss",
    "loss.kind": "kind of loss",
    "rollout.sampler": "who samples",
    "trainer.max_steps": "steps",
    "batching.global_batch_size": "answers a step",
    "optim.lr": "learning rate",
    "teacher.update": "teacher's weights follow the student",
    "seed": "seed",
}


def costs(run: RunRecord) -> dict[str, Any]:
    """CPU-seconds by phase, memory, and how much the student was trained on."""
    summary, steps = run.summary, number(run.summary, "steps") or 0
    phases = [
        {"name": name, "step": f"{value:.2f}", "all": seconds(value * steps)}
        for name in mapping(run, "cpu_seconds_by_phase")
        if (value := number(summary, "cpu_seconds_by_phase", name)) is not None
    ]
    evaluations = [
        {"name": _in_words(name), "all": seconds(value)}
        for name in mapping(run, "cpu_seconds_of_evaluations")
        if (value := number(summary, "cpu_seconds_of_evaluations", name)) is not None
    ]
    memory = [
        {"name": name, "gib": f"{value:.2f}"}
        for name in mapping(run, "peak_rss_gib_by_phase")
        if (value := number(summary, "peak_rss_gib_by_phase", name)) is not None
    ]
    a_step = number(summary, "cpu_seconds_per_step")
    device = str(summary.get("device", "cpu"))
    wall, ranks = number(summary, "seconds_total"), number(summary, "world_size")
    gpu = None
    if not device.startswith("cpu") and wall is not None and ranks is not None:
        gpu = seconds(wall * ranks)
    return {
        "phases": phases,
        "evaluations": evaluations,
        "memory": memory,
        "step": "-" if a_step is None else f"{a_step:.2f}",
        "training": seconds(None if a_step is None else a_step * steps),
        "wall": seconds(wall),
        "gpu": gpu,
        "peak": "-" if (gib := number(summary, "peak_rss_gib")) is None else f"{gib:.2f}",
        "answers": count(number(summary, "trained_on", "answers")),
        "tokens": count(number(summary, "trained_on", "response_tokens")),
    }


def origin(run: RunRecord) -> dict[str, list[tuple[str, str]]]:
    """Settings, layout and versions."""
    summary = run.summary
    layout = [(axis, plain(summary.get(axis))) for axis in ("tp", "pp", "dp", "cp")]
    return {
        "settings": [
            (words, _setting(key, run.config[key]))
            for key, words in _SETTINGS.items()
            if key in run.config
        ],
        "layout": [
            ("device", plain(summary.get("device", "-"))),
            ("processes", plain(summary.get("world_size"))),
            ("layout", " x ".join(f"{axis} {size}" for axis, size in layout)),
            ("context, SHA-256", plain(summary.get("context_hash"))[:16]),
            ("weights, SHA-256", plain(summary.get("weights_sha256"))[:16]),
        ],
        "versions": [(str(n), plain(v)) for n, v in mapping(run, "versions").items()],
    }


def _in_words(evaluation: str) -> str:
    """`base, unrelated questions` and its like, with the words that the page has for a row."""
    row, comma, part = evaluation.removeprefix("control ").partition(",")
    return f"{LABELS.get(row, row)}{comma}{part}"


def _setting(key: str, value: Any) -> str:
    if key == "teacher.path" and value is None:
        return "the same as the student"
    text = plain(value)
    is_ours = key.endswith("._target_") and text.startswith("opcd_nemo.")
    return text.rpartition(".")[2] if is_ours else text


def _longer(given: list[str], steps: float, weights_alone: bool) -> tuple[str, str]:
    """The command for more steps: weights alone cannot be trained on, so such a run begins anew."""
    words = [word for word in given if not word.startswith("trainer.max_steps=")]
    said = "twice as many steps, from the first step on: this run has kept its weights alone"
    if not weights_alone:
        words = [word for word in words if not word.startswith("exp_manager=")]
        words.append("exp_manager=resumable")
        said = "twice as many steps, from here on"
    return said, shlex.join(["opcd", "train", *words, f"trainer.max_steps={steps:.0f}"])


def commands(run: RunRecord) -> list[tuple[str, str]]:
    """What to type next, in the folder in which the run was started."""
    steps = number(run.summary, "steps")
    best = number(run.summary, "best_step")
    folder = shlex.quote(visible(str(run.path)))
    given = run.summary.get("command")
    found = []
    if isinstance(given, list) and all(isinstance(word, str) for word in given):
        of_pipeline = any(word.startswith("stage=") for word in given)
        program = "experience" if of_pipeline else "train"
        found.append(("the same run again", shlex.join(["opcd", program, *given])))
        if steps is not None and not of_pipeline:
            found.append(_longer(given, 2 * steps, run.config.get(_WEIGHTS_ALONE) is True))

    def checkpoint(step: float) -> str:
        return shlex.quote(visible(str(of_step(run.path / "checkpoints", int(step)))))

    if steps is not None:
        last = checkpoint(steps)
        found += [
            ("talk to the student", f"opcd chat from={last}"),
            ("export the student", f"opcd export format=hf from={last} to=exports/hf"),
        ]
    if best is not None and best != steps:  # the table is of the last step
        words = "talk to the student of the best validation score"
        found.append((words, f"opcd chat from={checkpoint(best)}"))
    found.append(("this page anew", f"opcd report {folder}"))
    return found
