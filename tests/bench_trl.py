"""A step of ours and a step of TRL's self-distillation trainer: CPU-seconds, in one run.

python -m tests.bench_trl TRL_PYTHON [--steps 5]

Both distil the demo's context into the demo's model: the same questions, batch, answer length,
temperature, learning rate and loss (exact reverse KL). TRL has no layout for CPUs, so it runs in
one process with one thread; this project in one process, and under dp2. Steps are on-policy: each
trainer's answers are its student's, so the table shows how many tokens there were. The first step
is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opcd_nemo.formats.huggingface import write_hf_folder
from opcd_nemo.formats.locate import BUNDLED_MODEL
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.tokenizer import write_tokenizer
from opcd_nemo.launch.compose import compose
from opcd_nemo.tasks import Episode
from opcd_nemo.training.prepared import PreparedRun, prepare_run
from opcd_nemo.types import Message

TRAINER = Path(__file__).with_name("bench_trl_trainer.py")
DEFAULT = "default"
PRECISIONS = (DEFAULT, "bf16", "fp32")
LAYOUTS = ("single", "dp2")


@dataclass(frozen=True)
class Measured:
    """What one trainer took: CPU-seconds and answer tokens of each step but the first."""

    name: str
    precision: str
    cpu_s: Sequence[float]
    tokens: Sequence[float]

    @property
    def cpu_s_a_step(self) -> float:
        """The median, for other work may disturb a step."""
        return statistics.median(self.cpu_s)


def main() -> None:
    """Print a row for each trainer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trl_python", help="the Python of an environment with TRL")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    prepared = prepare_run(compose("train", _words(options.steps, "single")), 1)
    with tempfile.TemporaryDirectory() as folder:
        work = _work(prepared, Path(folder), options.steps)
        rows = [_theirs(options.trl_python, work, precision) for precision in PRECISIONS]
        rows += [_ours(prepared, Path(folder), options.steps, layout) for layout in LAYOUTS]
    base = next(row for row in rows if DEFAULT in row.name).cpu_s_a_step
    _print("trainer", "precision", "CPU-s a step", "of TRL's", "tokens a step")
    for row in rows:
        share, tokens = row.cpu_s_a_step / base, statistics.mean(row.tokens)
        _print(row.name, row.precision, f"{row.cpu_s_a_step:.2f}", f"{share:.2f}", f"{tokens:.0f}")


def _words(steps: int, layout: str) -> list[str]:
    return [
        "recipe=demo_brevity",
        f"parallel={layout}",
        f"trainer.max_steps={steps}",
        "evaluation.num_questions=1",
        "evaluation.num_retention=1",
        "evaluation.controls=[]",
    ]


def _work(prepared: PreparedRun, folder: Path, steps: int) -> Path:
    """What TRL's side needs, in files: the model in fp32, and the run's settings."""
    config, model = prepared.config, folder / "model"
    source = open_model(BUNDLED_MODEL)
    tensors = {name: source.tensor(name) for name in source.names()}
    write_hf_folder(model, source.config, tensors, torch.float32)
    write_tokenizer(BUNDLED_MODEL, model)
    count = config.batching.global_batch_size
    chats = [
        _teachers_chat(prepared, episode)
        for step in range(steps)
        for episode in prepared.inputs.task.episodes("train", step, count)
    ]
    work = {
        "model": str(model),
        "folder": str(folder / "trl"),
        "questions": [chat[-1]["content"] for chat in chats],
        "context": [{**message} for message in chats[0][:-1]],
        "steps": steps,
        "prompts_per_step": count,
        "max_new_tokens": config.rollout.sampling.max_new_tokens,
        "temperature": config.rollout.sampling.temperature,
        "lr": config.optim.lr,
        "clip_grad": config.optim.clip_grad,
        "seed": config.seed,
    }
    path = folder / "work.json"
    path.write_text(json.dumps(work))
    return path


def _teachers_chat(prepared: PreparedRun, episode: Episode) -> Sequence[Message]:
    source = prepared.inputs.conversation.source
    return episode.turn(source.context(episode.uid, 0)).teacher_messages


def _theirs(python: str, work: Path, precision: str) -> Measured:
    command = [python, str(TRAINER), str(work), precision]
    quiet = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=quiet, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    name = f"{versions}, {precision}"
    return Measured(name, found["precision"], found["cpu_s"][1:], found["tokens"][1:])


def _ours(prepared: PreparedRun, folder: Path, steps: int, layout: str) -> Measured:
    command = [sys.executable, "-m", "opcd_nemo.cli", "train", *_words(steps, layout)]
    out = folder / layout
    command += [f"exp_manager.exp_dir={out}", "name=run"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=quiet, check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    counted = [line for line in lines if "cpu/step_s" in line][1:]
    count = prepared.config.batching.global_batch_size
    return Measured(
        f"opcd_nemo, {layout}",
        f"{prepared.config.student.dtype}",
        [line["cpu/step_s"] for line in counted],
        [line["rollout/response_tokens"] * count for line in counted],  # of an answer, on average
    )


def _print(*cells: str) -> None:
    sys.stdout.write("| " + " | ".join(cells) + " |\n")


if __name__ == "__main__":
    main()
