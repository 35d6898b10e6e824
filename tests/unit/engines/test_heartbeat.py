"""Whatever generates beats: long evaluations, extractions and scorings too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.engines import megatron
from opcd_nemo.storage import heartbeat
from opcd_nemo.types import Prompt

VOCABULARY = 5


class Endless:
    """A model that says 1 for ever, on one stage."""

    module = SimpleNamespace(eval=lambda: None)
    parallel = SimpleNamespace(pp=1, device=torch.device("cpu"), flush=lambda: None)
    stream_multiple = 1

    def prefill(self, batch: Any, *_: Any) -> torch.Tensor:
        return self._hidden(len(batch.predict_index_N))

    def stage_forward(self, stream: Any) -> torch.Tensor:
        return self._hidden(len(stream.token_ids_T))

    def rotary_tables(self, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(0), torch.empty(0)

    def logits(self, hidden: torch.Tensor, _: None) -> torch.Tensor:
        return hidden

    def _hidden(self, rows: int) -> torch.Tensor:
        return torch.eye(VOCABULARY)[[1] * rows]


@pytest.mark.parametrize(("num_prompts", "num_tokens", "beats"), [(1, 4, 1), (5, 4, 3), (2, 10, 3)])
def test_the_engine_beats_for_every_batch_and_within_long_ones(
    num_prompts: int, num_tokens: int, beats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[None] = []
    monkeypatch.setattr(heartbeat, "touch", lambda: touched.append(None))
    monkeypatch.setattr(megatron, "_TOKENS_PER_BEAT", 4)
    model: Any = Endless()
    engine = megatron.MegatronEngine(model, [0], max_batch_size=2, pack=False)
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=num_tokens)
    prompts = [Prompt(token_ids=(2, 3), index=index) for index in range(num_prompts)]
    samples = engine.generate(prompts, sampling, seed=0, step=0)
    assert [sample.response_ids for sample in samples] == [(1,) * num_tokens] * num_prompts
    assert len(touched) == beats
