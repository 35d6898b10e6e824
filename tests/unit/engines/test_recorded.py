"""Samples are drawn once and read ever after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.engines.recorded import RecordedEngine
from opcd_nemo.types import Prompt, Sample

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=3)
ALONE: Any = SimpleNamespace(tp_rank=0, pp_rank=0)


class Counting:
    """Answers with the number of the call."""

    weights_version = 0

    def __init__(self) -> None:
        self.calls = 0

    def load_weights(self, version: int) -> None: ...

    def release_weights(self) -> None: ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, **_: Any) -> list[Sample]:
        self.calls += 1
        return [
            Sample(response_ids=(self.calls, 5), logprobs=(-0.1, -1 / 3), finish_reason="eos")
            for _ in prompts
        ]


def prompts(*indices: int, token: int = 1) -> list[Prompt]:
    return [Prompt(token_ids=(token, 2), index=index) for index in indices]


def test_what_is_recorded_is_not_drawn_again(tmp_path: Path) -> None:
    inner = Counting()
    first = RecordedEngine(inner, tmp_path, ALONE).generate(prompts(0, 1), SAMPLING, seed=1, step=3)
    again = RecordedEngine(inner, tmp_path, ALONE)
    assert again.generate(prompts(0, 1), SAMPLING, seed=1, step=3) == first
    assert again.generate(prompts(1), SAMPLING, seed=1, step=3) == first[1:]  # another layout
    assert inner.calls == 1


@pytest.mark.parametrize("other", ["seed", "step", "prompt", "index", "sampling"])
def test_what_differs_is_drawn_anew(tmp_path: Path, other: str) -> None:
    inner = Counting()
    RecordedEngine(inner, tmp_path, ALONE).generate(prompts(0), SAMPLING, seed=1, step=3)
    engine = RecordedEngine(inner, tmp_path, ALONE)
    changed = Sampling(temperature=0.5, top_p=1.0, top_k=0, max_new_tokens=3)
    engine.generate(
        prompts(1 if other == "index" else 0, token=7 if other == "prompt" else 1),
        changed if other == "sampling" else SAMPLING,
        seed=2 if other == "seed" else 1,
        step=4 if other == "step" else 3,
    )
    assert inner.calls == 2


def test_only_one_rank_of_a_replica_writes(tmp_path: Path) -> None:
    other: Any = SimpleNamespace(tp_rank=1, pp_rank=0)
    RecordedEngine(Counting(), tmp_path, other).generate(prompts(0), SAMPLING, seed=1, step=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"key": "a"}',
        '{"key":"a","response_ids":[1],"logprobs":[],"finish_reason":"eos"}',
        '{"key":"a","response_ids":[1],"logprobs":[0],"finish_reason":1}',
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "step=0003.index=0-0.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"step=0003.index=0-0.jsonl, line 1 cannot"):
        RecordedEngine(Counting(), tmp_path, ALONE).generate(prompts(0), SAMPLING, seed=1, step=3)
