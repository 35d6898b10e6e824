"""Rollouts of the engine against transformers' `generate`: tokens a CPU-second, one thread each.

python -m tests.bench_rollout [--model PATH] [--new-tokens 24] [--temperature 0] [--repeats 5]

Both continue the same prompts of the demo's task, in their own process, taking turns. No sequence
may end early, so both compute the same number of tokens. The engine takes the weights anew before
every rollout, as a training step makes it do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from opcd_nemo.formats.huggingface import write_hf_folder
from opcd_nemo.formats.locate import BUNDLED_MODEL
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.tasks.system_prompt import StyleTask

BATCHES = (8, 32)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Ids = list[tuple[int, ...]]
Rollout = Callable[[Ids], Ids]


def main() -> None:
    """Print one line for each dtype and batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # of the workers
    prompts = _prompts(options.model, max(BATCHES))
    for dtype in DTYPES:
        workers = {
            name: _start(make, options.model, dtype, options.new_tokens, options.temperature)
            for name, make in {"engine": _engine, "transformers": _transformers}.items()
        }
        for batch in BATCHES:
            seconds: dict[str, list[float]] = {name: [] for name in workers}
            answers: dict[str, Ids] = {}
            for turn in range(options.repeats + 1):  # the first turn is not counted
                for name, worker in workers.items():
                    worker.send(prompts[:batch])
                    answers[name], cpu_s = worker.recv()
                    if turn:
                        seconds[name].append(cpu_s)
            count = batch * options.new_tokens
            assert all(len(row) == options.new_tokens for a in answers.values() for row in a)
            rates = {name: count / statistics.median(times) for name, times in seconds.items()}
            same = sum(a == b for a, b in zip(*answers.values(), strict=True))
            sys.stdout.write(
                f"{dtype}, batch {batch:2d}: {rates['engine']:6.1f} tokens a CPU-second, "
                f"transformers {rates['transformers']:6.1f}: "
                f"{rates['engine'] / rates['transformers']:.2f}x; {same} rows alike\n"
            )
            sys.stdout.flush()
        for worker in workers.values():
            worker.send([])  # ends it


def _prompts(model: str, count: int) -> Ids:
    tokenizer = ChatTokenizer.from_path(model)
    questions = StyleTask(verifier="brevity", seed=0).episodes("train", 0, count)
    no_context: Any = SimpleNamespace(messages=lambda _: ())
    return [tokenizer.render(q.turn(no_context).student_messages) for q in questions]


def _start(make: Callable[..., Rollout], *arguments: object) -> Connection:
    context = multiprocessing.get_context("spawn")  # the CPU shim stays in the engine's process
    mine, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs, make, *arguments), daemon=True).start()
    return mine


def _serve(
    connection: Connection, make: Callable[..., Rollout], model: str, dtype: str, *rest: Any
) -> None:
    torch.set_num_threads(1)
    rollout = make(model, DTYPES[dtype], *rest)
    while prompts := connection.recv():
        before = time.process_time()
        answers = rollout(prompts)
        connection.send((answers, time.process_time() - before))
    os._exit(0)  # gloo's own teardown can abort


def _engine(model: str, dtype: torch.dtype, new_tokens: int, temperature: float) -> Rollout:
    from opcd_nemo.config.sampling import Sampling
    from opcd_nemo.engines.megatron import MegatronEngine
    from opcd_nemo.model.language_model import LanguageModel
    from opcd_nemo.types import Prompt
    from tests.distributed.shards import start

    source = open_model(model)
    language_model = LanguageModel(source.config, start("one"), dtype)
    language_model.load(source)
    engine = MegatronEngine(language_model, (), max_batch_size=max(BATCHES), pack=True)
    sampling = Sampling(temperature=temperature, top_p=1.0, top_k=0, max_new_tokens=new_tokens)

    def rollout(prompts: Ids) -> Ids:
        engine.load_weights(engine.weights_version + 1)
        rows = [Prompt(token_ids=ids, index=index) for index, ids in enumerate(prompts)]
        return [s.response_ids for s in engine.generate(rows, sampling, seed=0, step=0)]

    return rollout


def _transformers(model: str, dtype: torch.dtype, new_tokens: int, temperature: float) -> Rollout:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    source = open_model(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        tensors = {name: source.tensor(name) for name in source.names()}
        write_hf_folder(path, source.config, tensors, dtype)
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    reference.generation_config.eos_token_id = None
    drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}

    def rollout(prompts: Ids) -> Ids:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        out = reference.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=bool(temperature),
            pad_token_id=0,
            **drawn,
        )
        return [tuple(row) for row in out[:, width:].tolist()]

    return rollout


if __name__ == "__main__":
    main()
