"""Rollouts of the engine against another's: tokens a CPU-second, one thread each.

python -m tests.bench_rollout [--against transformers] [--model PATH] [--dtypes bf16 fp32]
    [--batches 8 32] [--new-tokens 24] [--temperature 0] [--repeats 5]

Both continue the same prompts of the demo's task, in processes of their own, taking turns. No
sequence may end early, so both compute the same number of tokens. Engines take the weights anew
before every rollout, as a training step makes them do; the second number of a line leaves that out.
`--against vllm` starts the vLLM server of `OPCD_VLLM` (else of `make vllm`): what all its processes
compute counts, and what the engine does that speaks to it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf

from opcd_nemo.config.plugs import build_plug
from opcd_nemo.formats.huggingface import write_hf_folder
from opcd_nemo.formats.locate import BUNDLED_MODEL
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.launch.compose import compose
from opcd_nemo.tasks.system_prompt import StyleTask

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Ids = list[tuple[int, ...]]
Rollout = Callable[[Ids], tuple[Ids, float]]
"""Answers, and the CPU-seconds of taking the weights before them."""


def main() -> None:
    """Print one line for each dtype, number of tokens and batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--new-tokens", nargs="+", type=int, default=[24])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # of the workers
    prompts = _prompts(options.model, max(options.batches))
    for dtype in options.dtypes:
        for num_tokens in options.new_tokens:
            given = (options.model, dtype, num_tokens, options.temperature, max(options.batches))
            workers = {
                "engine": _start("megatron", *given),
                options.against: _start(options.against, *given),
            }
            for worker in workers.values():  # the first rollout is not counted
                worker.send(prompts[:2])
                worker.recv()
            for batch in options.batches:
                line = _compared(workers, prompts[:batch], num_tokens, options.repeats)
                sys.stdout.write(f"{dtype}, {batch:3d} x {num_tokens}: {line}\n")
                sys.stdout.flush()
            for worker in workers.values():
                worker.send([])  # ends it


def _compared(workers: dict[str, Connection], prompts: Ids, num_tokens: int, repeats: int) -> str:
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    answers: dict[str, Ids] = {}
    for _ in range(repeats):
        for name, worker in workers.items():
            worker.send(prompts)
            answers[name], whole_s, weights_s = worker.recv()
            seconds[name].append((whole_s, whole_s - weights_s))
    assert all(len(row) == num_tokens for rows in answers.values() for row in rows)
    count = len(prompts) * num_tokens
    rates = {
        name: [count / statistics.median(times) for times in zip(*taken, strict=True)]
        for name, taken in seconds.items()
    }
    ours, theirs = rates.values()
    shown = ", ".join(f"{name} {a:.1f} ({b:.1f})" for name, (a, b) in rates.items())
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    ratios = f"{ours[0] / theirs[0]:.2f}x ({ours[1] / theirs[1]:.2f}x)"
    return f"{shown} tokens a CPU-second: {ratios}; {same} rows alike"


def _prompts(model: str, count: int) -> Ids:
    tokenizer = ChatTokenizer.from_path(model)
    questions = StyleTask(verifier="brevity", seed=0).episodes("train", 0, count)
    no_context: Any = SimpleNamespace(messages=lambda _: ())
    return [tokenizer.render(q.turn(no_context).student_messages) for q in questions]


def _start(provider: str, *arguments: object) -> Connection:
    context = multiprocessing.get_context("spawn")  # the CPU shim stays in the engine's process
    mine, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs, provider, *arguments), daemon=True).start()
    return mine


def _serve(connection: Connection, provider: str, model: str, dtype: str, *rest: Any) -> None:
    torch.set_num_threads(1)
    make = _transformers if provider == "transformers" else _engine(provider)
    rollout = make(model, DTYPES[dtype], *rest)
    while prompts := connection.recv():
        before = _cpu_s()
        answers, weights_s = rollout(prompts)
        connection.send((answers, _cpu_s() - before, weights_s))
    os._exit(0)  # gloo's own teardown can abort


def _cpu_s() -> float:
    """What this process has computed, and those below it that still are."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _engine(name: str) -> Callable[..., Rollout]:
    def make(
        model: str, dtype: torch.dtype, num_tokens: int, temperature: float, width: int
    ) -> Rollout:
        from opcd_nemo.config.sampling import Sampling
        from opcd_nemo.model.language_model import LanguageModel
        from opcd_nemo.types import Prompt
        from tests.distributed.shards import start

        source = open_model(model)
        language_model = LanguageModel(source.config, start("one"), dtype)
        language_model.load(source)
        words = [f"engine={name}", f"engine.max_batch_size={width}"]
        if name == "vllm":
            words += ["engine.launch=true", 'engine.flags=["--max-model-len","1024"]']
            words += [f"engine.python={python}"] if (python := os.environ.get("OPCD_VLLM")) else []
            words.append("engine.start_timeout_s=3000")
        plug: Any = OmegaConf.to_container(compose("train", words).engine, resolve=True)
        engine = build_plug(plug, model=language_model, eos_ids=())
        sampling = Sampling(temperature=temperature, top_p=1.0, top_k=0, max_new_tokens=num_tokens)

        def rollout(prompts: Ids) -> tuple[Ids, float]:
            before = _cpu_s()
            engine.load_weights(engine.weights_version + 1)
            weights_s = _cpu_s() - before
            rows = [Prompt(token_ids=ids, index=index) for index, ids in enumerate(prompts)]
            samples = engine.generate(rows, sampling, seed=0, step=0)
            return [sample.response_ids for sample in samples], weights_s

        return rollout

    return make


def _transformers(
    model: str, dtype: torch.dtype, num_tokens: int, temperature: float, _: int
) -> Rollout:
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

    def rollout(prompts: Ids) -> tuple[Ids, float]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        out = reference.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            do_sample=bool(temperature),
            pad_token_id=0,
            **drawn,
        )
        return [tuple(row) for row in out[:, width:].tolist()], 0.0

    return rollout


if __name__ == "__main__":
    main()
