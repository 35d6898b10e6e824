"""Training one step ahead beside training on-policy, with a vLLM server: curves and a time line.

    torchrun --standalone --nproc-per-node 1 -m tests.vllm.ahead SEEDS WORD ...

WORDS are those of `opcd train`, with engine=vllm and engine.launch=true; each seed of `1,2,3`
trains both ways. All runs share a server. Writes a JSON line a run. Its `time_line` has the
seconds, since the run began, in which the answers of a step were sampled and in which the step
trained, and how many of its answers were there before the step before it had trained.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from opcd_nemo.distributed.groups import init_parallel
from opcd_nemo.engines.vllm_site import Site
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.output import quiet_libraries
from opcd_nemo.metrics import Stopwatch
from opcd_nemo.training.build import build_run
from opcd_nemo.training.prepared import prepare_run
from opcd_nemo.training.step import Run, distill_step
from opcd_nemo.types import Sample

Span = tuple[float, float]
CURVES = ("loss/reverse_kl", "rollout/steps_behind", "rollout/mismatch_k3", "rollout/logprob")


class Clock(Stopwatch):
    """When the phases of each step began and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.began = time.perf_counter()
        self.spans: dict[str, list[Span]] = {}
        self.sampled: dict[int, Span] = {}
        self.arrived: list[float] = []

    def now(self) -> float:
        return round(time.perf_counter() - self.began, 2)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.spans.setdefault(name, []).append((start, self.now()))

    def watch(self, engine: Any) -> None:
        """Note when the engine's answers come."""
        sample = engine.sample

        def noted(*rest: Any, step: int, **more: Any) -> list[Sample]:
            start = self.now()
            answers: list[Sample] = sample(*rest, step=step, **more)
            self.sampled[step] = (start, self.now())
            return answers

        engine.sample = noted

    def time_line(self) -> list[dict[str, Any]]:
        lines = []
        trained = [
            (start, end)
            for (start, _), (_, end) in zip(
                self.spans["teacher"], self.spans["optimizer"], strict=True
            )
        ]
        for step, (start, end) in sorted(self.sampled.items()):
            mine = [when for when in self.arrived if start <= when <= end]
            before = trained[step - 1][1] if step else 0.0
            early = sum(when <= before for when in mine)
            lines.append(
                {"step": step, "sampled": (start, end), "trained": trained[step],
                 "answers": len(mine), "before_the_step_before_had_trained": early}
            )  # fmt: skip
        return lines


def trained(run: Run, num_steps: int) -> dict[str, Any]:
    """Train; the curves, and the time line."""
    clock = Clock()
    run = replace(run, watch=clock)
    clock.watch(run.engines["student"])
    answer = Site.answer

    def noted(*rest: Any, **more: Any) -> Sample:
        sample = answer(*rest, **more)
        clock.arrived.append(clock.now())
        return sample

    Site.answer = noted  # type: ignore[method-assign]
    steps = [distill_step(run, step).means() for step in range(num_steps)]
    Site.answer = answer  # type: ignore[method-assign]
    curves = {name: [step[name] for step in steps if name in step] for name in CURVES}
    return curves | {"time_line": clock.time_line()}


def main(seeds: str, words: list[str]) -> None:
    """Train each seed both ways."""
    quiet_libraries()
    parallel = None
    for seed in seeds.split(","):
        for ahead in (0, 1):
            of_run = [*words, f"seed={seed}", f"rollout.ahead={ahead}"]
            prepared = prepare_run(compose("train", of_run), int(os.environ["WORLD_SIZE"]))
            config = prepared.config
            parallel = parallel or init_parallel(config.parallel, config.seed)
            run = build_run(config, prepared.inputs, parallel)
            found = trained(run, config.trainer["max_steps"])
            sys.stdout.write(f"{json.dumps({'seed': int(seed), 'ahead': ahead} | found)}\n")
            sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
