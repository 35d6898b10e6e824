"""Whole steps on a GPU, of models without files: `python -m tests.gpu.steps WHAT --out FOLDER`.

    tiny      a step of a tiny fp32 model on the device and on the CPU: loss, gradients; a resume
    wide      two layers as wide as Qwen3-8B's: peaks by phase against rehearsal and plan
    decode    seconds of a decoded token with two depths: what a layer takes
    rehearse  the same wide step on fake GPUs, here, for `wide` to compare with

With `--small` the wide model is a tiny one, to try this program on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opcd_nemo.checkpoint.save_load import load, save
from opcd_nemo.distributed.groups import Parallel, init_parallel
from opcd_nemo.engines.megatron import MegatronEngine
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.rehearsal import play
from opcd_nemo.rehearsal.command import Player, tasks_of
from opcd_nemo.rehearsal.planned import planned_bytes
from opcd_nemo.rehearsal.shapes import lengths_of, read_rehearsal, shapes_of
from opcd_nemo.training.step import (
    Run,
    accumulate_gradients,
    distill_batches,
    learn,
    teacher_scores,
)

REHEARSED = Path(__file__).with_name("rehearsed.json")
MEGATRON = "0.18.0"  # as in wheels.txt
DECODED = 256  # tokens of each answer
ALONE = [
    "recipe=math_qwen3_8b_2n8g",
    "parallel.num_ranks=1",
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
    "batching.global_batch_size=16",
    f"rollout.sampling.max_new_tokens={DECODED}",
]
WIDE = [*ALONE, "rehearse.response_tokens=4096"]
TINY = [*ALONE, "student.dtype=fp32", "teacher.dtype=fp32", "method=opcd"]
SMALL = {
    "hidden_size": 64, "ffn_hidden_size": 176, "num_attention_heads": 4, "num_query_groups": 2,
    "head_dim": 16, "vocab_size": 320,
}  # fmt: skip
_COMPARED = ("device", "reference")
# bounds on what two implementations of fp32 arithmetic may differ by, relative to the largest entry
LOSS_BOUND, GRADIENT_BOUND, RESUME_BOUND = 1e-5, 1e-4, 1e-6


class Meter:
    """Seconds and peak bytes by phase; stands where a run's stopwatch stands."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self.seconds[name] = round(time.perf_counter() - started, 3)


def drawn(shape: Sequence[int]) -> torch.Tensor:
    """A weight: ones of a norm, else small numbers, a block of them again and again."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = shape[0] * shape[1]
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    repeated = block.to(torch.bfloat16).repeat(-(-count // len(block)))
    return repeated[:count].view(*shape)


def opened(
    words: Sequence[str], device: str, *, layers: int, small: bool
) -> tuple[Any, tuple[ModelConfig, ModelConfig], Parallel, play.Lengths]:
    """Configuration, shapes, ranks and lengths of a run alone on the device."""
    config, settings, _ = read_rehearsal(words)
    config.parallel.device = device
    shapes = shapes_of(config, layers)
    lengths = play.Lengths(**lengths_of(config, settings))
    if small:
        student, teacher = (replace(shape, **SMALL) for shape in shapes)
        shapes, lengths = (student, teacher), play.Lengths(prompt=24, context=40, response=48)
    return config, shapes, init_parallel(config.parallel, config.seed), lengths


def tiny(device: str, out: Path, name: str) -> dict[str, Any]:
    """Loss and gradients of a step on this device; what follows a resume is what had followed."""
    config, shapes, parallel, lengths = opened(TINY, device, layers=2, small=True)
    run = play.open_run(config, shapes, parallel, lengths, drawn)
    batches = distill_batches(run, play.rollouts(run, lengths), run.phase.loss)
    scores = teacher_scores(run, batches, run.phase.loss)
    run.optimizer.zero_grad()
    stats = accumulate_gradients(run, batches, scores, run.phase.loss)
    gradients = {
        name: parameter.main_grad.cpu().clone()
        for name, parameter in run.student.module.named_parameters()
    }
    torch.save(gradients, out / f"gradients-{name}.pt")
    run.optimizer.step()
    return {
        "loss": _loss(stats),
        "resume": _resumed(run, lengths, out / f"checkpoint-{name}"),
    }


def _loss(stats: Any) -> float:
    name = next(name for name in stats.sums if name.startswith("loss/reverse_kl"))
    value, weight = stats.sums[name]
    return float(value / weight)


def _resumed(run: Run, lengths: play.Lengths, folder: Path) -> dict[str, Any]:
    """Save, train a step, go back, train it again: the largest difference of a weight."""
    parts = (run.student, run.optimizer, run.teacher)
    started = time.perf_counter()
    save(folder, {"optimizer_states": []}, *parts, run.parallel)
    saved, started = time.perf_counter() - started, time.perf_counter()
    weights = []
    for again in (False, True):
        if again:
            started = time.perf_counter()
            load(folder, *parts)
            read = time.perf_counter() - started
        learn(run, play.rollouts(run, lengths), 2)
        weights.append([p.detach().float().clone() for p in run.student.module.parameters()])
    largest = max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))
    return {"save_s": round(saved, 2), "load_s": round(read, 2), "largest_difference": largest}


def wide(device: str, out: Path, *, small: bool) -> dict[str, Any]:
    """Peaks and seconds by phase, decode speed, a save and a resume."""
    config, shapes, parallel, lengths = opened(WIDE, device, layers=2, small=small)
    meter = Meter(device)
    with meter.phase("build"):
        run = play.open_run(config, shapes, parallel, lengths, drawn)
    run = replace(run, watch=meter)
    rows = play.rows_together(run, config.engine["max_batch_size"])
    losses = [_loss(learn(run, play.rollouts(run, lengths), 0))]
    with meter.phase("rollout"):
        play.sample(run, lengths, rows)
        play.decode_the_last_token(run, lengths, rows)
    losses.append(_loss(learn(run, play.rollouts(run, lengths), 1)))
    result: dict[str, Any] = {
        "losses": losses,
        "seconds": meter.seconds,
        "peak_bytes": meter.peaks,
        "resume": _resumed(run, lengths, out / "checkpoint-wide"),
    }
    if meter.peaks and not small:
        result["against"] = _against(meter.peaks)
    return result


def _against(measured: dict[str, int]) -> dict[str, dict[str, float]]:
    """GiB by phase: measured, rehearsed, planned."""
    rehearsed = json.loads(REHEARSED.read_text())["peak_bytes"]
    planned = planned_bytes(WIDE)
    return {
        phase: {
            "measured": round(measured[phase] / 2**30, 3),
            "rehearsed": round(rehearsed[phase] / 2**30, 3),
            "planned": round(planned.get(phase, 0) / 2**30, 3),
        }
        for phase in measured
    }


def decode(device: str, *, small: bool) -> dict[str, Any]:
    """Seconds of a token with two depths; the difference is what layers take."""
    depths, seconds = (2, 10), []
    for layers in depths:
        config, (shape, _), parallel, lengths = opened(WIDE, device, layers=layers, small=small)
        model = LanguageModel(shape, parallel, torch.bfloat16)
        model.load(play.stored(shape, drawn))
        rows = config.engine["max_batch_size"]
        engine = MegatronEngine(model, (), max_batch_size=rows, pack=False)
        engine.load_weights(0)
        prompts = play.prompts(lengths, rows)
        for count in (8, DECODED):  # the first compiles kernels
            sampling = replace(config.rollout.sampling, max_new_tokens=count)
            started = time.perf_counter()
            engine.generate(prompts, sampling, seed=0, step=0)
            took = time.perf_counter() - started
        seconds.append(took / DECODED)
        del model, engine
    return {
        "rows": rows,
        "tokens_per_s": [round(rows / each, 1) for each in seconds],
        "token_s": [round(each, 5) for each in seconds],
        "layer_s": (seconds[1] - seconds[0]) / (depths[1] - depths[0]),
    }


def compare(out: Path, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How far loss and gradients of the device are from the CPU's."""
    ours, theirs = (torch.load(out / f"gradients-{name}.pt") for name in _COMPARED)
    losses = [results[name]["loss"] for name in _COMPARED]
    errors = {
        name: float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max())
        for name in theirs
    }
    worst = max(errors, key=errors.__getitem__)
    resumes = [results[name]["resume"]["largest_difference"] for name in _COMPARED]
    found = {
        "loss": abs(losses[0] / losses[1] - 1),
        "gradient": errors[worst],
        "worst": worst,
        "resume": max(resumes),
    }
    found["passed"] = (
        found["loss"] <= LOSS_BOUND
        and found["gradient"] <= GRADIENT_BOUND
        and found["resume"] <= RESUME_BOUND
    )
    return found


def rehearse() -> dict[str, Any]:
    """Play the wide step on fake GPUs and keep what it asks for."""
    (task,), path = tasks_of([*WIDE, f"rehearse.megatron_core={MEGATRON}"])
    with Player(path) as player:
        result = player.play(task)
    assert result is not None
    kept = {"words": WIDE, "torch": torch.__version__, "megatron": MEGATRON}
    kept["peak_bytes"] = result["peak_bytes"]
    REHEARSED.write_text(f"{json.dumps(kept, indent=1)}\n")
    return kept


def main() -> int:
    """Do what is asked, and write it to FOLDER/WHAT.json; 1 where a bound is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["tiny", "one", "wide", "decode", "rehearse"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--name", default="device", help="of the files of `one`")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out, device, small = options.out, options.device, options.small
    if options.what == "tiny":  # a process each: Megatron is made for one device
        pairs = zip(_COMPARED, (device, "cpu"), strict=True)
        results = {name: _in_a_process(each, out, name) for name, each in pairs}
        found = {**results, "compared": compare(out, results)}
    else:
        found = {
            "one": lambda: tiny(device, out, options.name),
            "wide": lambda: wide(device, out, small=small),
            "decode": lambda: decode(device, small=small),
            "rehearse": rehearse,
        }[options.what]()
    (out / f"{options.what}.{options.name}.json").write_text(json.dumps(found))
    sys.stdout.write(f"{options.what}: {json.dumps(found)}\n")
    return int(not found.get("compared", {"passed": True})["passed"])


def _in_a_process(device: str, out: Path, name: str) -> dict[str, Any]:
    words = ["one", f"--device={device}", f"--out={out}", f"--name={name}"]
    subprocess.run([sys.executable, "-m", "tests.gpu.steps", *words], check=True)
    result: dict[str, Any] = json.loads((out / f"one.{name}.json").read_text())
    return result


if __name__ == "__main__":
    sys.exit(main())
