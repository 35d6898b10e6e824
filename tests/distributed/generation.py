"""Samples of every variant of batch, cache and prefix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.engines.megatron import MegatronEngine
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.types import Prompt, Sample
from tests.distributed import cases
from tests.distributed.shards import build

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=cases.NEW_TOKENS)
DRAWN = Sampling(temperature=0.8, top_p=0.9, top_k=20, max_new_tokens=cases.NEW_TOKENS)


@dataclass
class Generator:
    """A model that continues this rank's share of prompts, in several ways."""

    model: LanguageModel
    eos: Sequence[int]
    rows: list[int] = field(default_factory=list)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = GREEDY,
        *,
        pack: bool = True,
        width: int = 32,
        prefix: Sequence[int] = (),
        parts: int = 1,
        after: Sequence[Prompt] = (),
    ) -> list[Sample]:
        """All prompts' samples, in order; the share is generated in `parts` calls.

        `after` are prompts of a turn before.
        """
        parallel = self.model.parallel
        engine = MegatronEngine(
            self.model, self.eos, max_batch_size=width, pack=pack, keep_turns=bool(after)
        )
        engine.load_weights(0)
        mine = [prompts[place] for place in parallel.share(len(prompts))]
        if after:
            first = [after[place] for place in parallel.share(len(prompts))]
            engine.generate(first, sampling, seed=3, step=5, prefix_ids=prefix)
        samples: list[Sample] = []
        for part in range(parts):
            chosen = mine[len(mine) * part // parts : len(mine) * (part + 1) // parts]
            samples += engine.generate(chosen, sampling, seed=3, step=5, prefix_ids=prefix)
        engine.release_weights()
        return parallel.gather_over_dp(samples)


def generate_all(parallel: Parallel, models: Path) -> dict[str, Any]:
    """Samples of every variant, by name; wide worlds leave out what narrow ones show."""
    ends = json.loads((models / "ends.json").read_text())
    ragged, led = (cases.generation_prompts(led=led) for led in (False, True))
    found: dict[str, Any] = {}
    for name in cases.GENERATORS:
        generator = Generator(build(parallel, models / name), ends[name])
        found[f"{name}/packed"] = generator(ragged)
        if parallel.world_size <= 2 and not parallel.sequence_parallel:
            found[f"{name}/plain"] = generator(ragged, pack=False)
    generator = Generator(build(parallel, models / cases.SAMPLED_FROM), ends[cases.SAMPLED_FROM])
    found |= {
        "led, held": generator(led, prefix=cases.PREFIX),
        "drawn": generator(led, DRAWN),
        "drawn, split": generator(led, DRAWN, parts=3),
        "decoded rows": _decoded_rows(generator, ragged),
        "second turn": generator(led, prefix=cases.PREFIX, after=cases.first_turns(led)),
        "second turn, narrow": generator(led, width=5, after=cases.first_turns(led)),
        "turns rows": _decoded_rows(generator, led, after=cases.first_turns(led)),
    }
    if parallel.world_size <= 2:
        found |= _more_variants(generator, ragged, led)
    generator = Generator(build(parallel, models / cases.PADDING_WINS), ())
    found["padding, greedy"] = generator(ragged[:8])
    hot = replace(DRAWN, temperature=5.0, top_p=1.0, top_k=0)
    found["padding, hot"] = generator(ragged[:8], hot)
    return found


def _more_variants(
    generator: Generator, ragged: list[Prompt], led: list[Prompt]
) -> dict[str, list[Sample]]:
    prefix, in_stream = cases.PREFIX, cases.IN_STREAM
    half = [p if p.index % 2 else replace(p, token_ids=p.token_ids[1:]) for p in led]
    return {
        "narrow": generator(ragged, width=5),
        "led": generator(led),
        "led, held, plain": generator(led, prefix=prefix, pack=False, width=7),
        "led, all held": generator(led, prefix=(*prefix, *in_stream)),
        "half led": generator(half),
        "half led, held": generator(half, prefix=prefix),
        "drawn, plain": generator(led, DRAWN, pack=False),
        "drawn, narrow": generator(led, DRAWN, width=5),
        "drawn, held": generator(led, DRAWN, prefix=prefix),
        "drawn, reversed": generator(led[::-1], DRAWN)[::-1],
    }


def _decoded_rows(generator: Generator, prompts: Sequence[Prompt], **variant: Any) -> list[int]:
    """Stream length of every forward of this rank, from prefill to the last step."""
    model, lengths = generator.model, []
    forward = model.stage_forward

    def counting(stream: Any) -> torch.Tensor | None:
        lengths.append(len(stream.token_ids_T))
        return forward(stream)

    model.stage_forward = counting  # type: ignore[method-assign]
    generator(prompts, **variant)
    del model.stage_forward
    return lengths
