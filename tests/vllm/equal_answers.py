"""Both engines on one run: after every step the same greedy answers, in fp32.

    torchrun --standalone --nproc-per-node 2 -m tests.vllm.equal_answers STEPS WORD ...

WORDS are those of `opcd train`, with engine=vllm. Rank 0 prints a JSON line a step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from typing import Any

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.distributed.groups import init_parallel
from opcd_nemo.engines.megatron import MegatronEngine
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.output import quiet_libraries
from opcd_nemo.training.build import build_run
from opcd_nemo.training.prepared import prepare_run
from opcd_nemo.training.step import distill_step
from opcd_nemo.types import Prompt

NUM_PROMPTS, NUM_TOKENS = 8, 16


def main(num_steps: int, words: list[str]) -> None:
    """Compare, train a step, compare again."""
    quiet_libraries()
    prepared = prepare_run(compose("train", words), int(os.environ["WORLD_SIZE"]))
    config, inputs = prepared.config, prepared.inputs
    parallel = init_parallel(config.parallel, config.seed)
    run = build_run(config, inputs, parallel)
    theirs = run.engines["student"]
    ours = MegatronEngine(run.student, inputs.tokenizer.eos_ids, max_batch_size=32, pack=True)
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=NUM_TOKENS)
    episodes = run.task.episodes("validation", 0, NUM_PROMPTS)
    prompts = [
        Prompt(token_ids=run.conversation.prompts(episode).student_ids, index=index)
        for index, episode in enumerate(episodes)
    ]
    before: Any = None
    for step in range(num_steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        theirs.load_weights(step)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        ours.load_weights(step)
        mine = ours.generate(prompts, greedy, seed=0, step=0)
        its = theirs.generate(prompts, greedy, seed=0, step=0)
        pairs = list(zip(mine, its, strict=True))
        equal = [a.response_ids == b.response_ids for a, b in pairs]
        gaps = [
            abs(x - y)
            for (a, b), same in zip(pairs, equal, strict=True)
            if same
            for x, y in zip(a.logprobs, b.logprobs, strict=True)
        ]
        drawn = replace(greedy, temperature=1.0)
        whole = theirs.generate(prompts, drawn, seed=1, step=step)
        part = theirs.generate(prompts[::-1][:3], drawn, seed=1, step=step)[::-1]
        ours.release_weights()
        answers = [sample.response_ids for sample in mine]
        line = {
            "step": step,
            "equal": sum(equal),
            "of": len(equal),
            "changed": None if before is None else sum(map(tuple.__ne__, before, answers)),
            "largest_gap": max(gaps, default=None),
            "same_in_another_batch": part == whole[-3:],
            "push_wall_s": round(wall, 2),
            "push_cpu_s": round(cpu, 2),
        }
        before = answers
        if parallel.rank == 0:
            sys.stdout.write(f"{json.dumps(line)}\n")
            sys.stdout.flush()
        if step < num_steps:
            distill_step(run, step)
    parallel.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
