"""Exports a model and compares transformers' greedy answers with the engine's own.

    python -m tests.compare_export runs/demo_brevity-dp2/checkpoints/step=30.ckpt [--prompts 32]

Both compute in fp32. The questions are those of `conf/task/brevity.yaml`, without a context. Exit
status 1 shows the answers that differ; the largest difference of the logits at the last token of a
prompt is shown beside.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from opcd_nemo.config.plugs import build_plug
from opcd_nemo.context.sources import Context

ROOT = Path(__file__).parents[1]


def questions(count: int) -> list[str]:
    """The last messages of the test episodes."""
    task: Any = build_plug(OmegaConf.to_container(OmegaConf.load(ROOT / "conf/task/brevity.yaml")))
    bare = Context(system=None, demonstrations=())
    turns = [episode.turn(bare) for episode in task.episodes("test", 0, count)]
    return [str(turn.student_messages[-1]["content"]) for turn in turns]


def engine_answers(source: str, count: int, tokens: int) -> tuple[list[list[int]], Any]:
    """Prompts' continuations by the engine, and logits at the prompts' last tokens."""
    import torch

    from opcd_nemo.config.sampling import Sampling
    from opcd_nemo.engines.megatron import MegatronEngine
    from opcd_nemo.formats.stored_model import open_model
    from opcd_nemo.formats.tokenizer import ChatTokenizer
    from opcd_nemo.model.language_model import LanguageModel
    from opcd_nemo.model.packing import pack
    from opcd_nemo.types import Prompt
    from tests.distributed.shards import start

    checkpoint, tokenizer = open_model(source), ChatTokenizer.from_path(source)
    model = LanguageModel(checkpoint.config, start("one"), torch.float32)
    model.load(checkpoint)
    engine = MegatronEngine(model, tokenizer.eos_ids, max_batch_size=8, pack=True)
    engine.load_weights(0)
    ids = [tokenizer.render([{"role": "user", "content": text}]) for text in questions(count)]
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=tokens)
    prompts = [Prompt(token_ids=row, index=index) for index, row in enumerate(ids)]
    samples = engine.generate(prompts, sampling, seed=0, step=0)
    engine.release_weights()
    hidden = model.score([pack(ids, [1] * len(ids), device=model.parallel.device)], [None])[0]
    return [list(sample.response_ids) for sample in samples], model.logits(hidden).detach()


def transformers_answers(folder: str, count: int, tokens: int) -> tuple[list[list[int]], Any]:
    """The same by transformers, as its user would: tokenizer, template and generation settings."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ends = model.generation_config.eos_token_id
    answers, logits = [], []
    for text in questions(count):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            logits.append(model(**chat).logits[0, -1])
            out = model.generate(**chat, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
        new = out[0, chat["input_ids"].shape[1] :].tolist()
        assert ends, "no end of sequence in generation_config.json"
        answers.append(new)
    return answers, torch.stack(logits)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        target = f"{name}/hf"
        subprocess.run(
            [sys.executable, "recipes/export.py", "format=hf", f"from={options.source}",
             f"to={target}"],
            cwd=ROOT, check=True,
        )  # fmt: skip
        # transformers first: Megatron's CPU shim changes what its loader sees
        expected, logits = transformers_answers(target, options.prompts, options.tokens)
    found, own_logits = engine_answers(options.source, options.prompts, options.tokens)
    differ = [index for index, pair in enumerate(zip(found, expected, strict=True))
              if pair[0] != pair[1]]  # fmt: skip
    for index in differ:
        sys.stdout.write(
            f"{index}: engine {found[index]}\n{index}: transformers {expected[index]}\n"
        )
    error = float((own_logits - logits).abs().max())
    equal = f"{len(found) - len(differ)} of {len(found)} answers equal"
    sys.stdout.write(f"{equal}; logits within {error:.1e} of transformers'\n")
    return 1 if differ or not error <= 1e-4 else 0


if __name__ == "__main__":
    sys.exit(main())
