"""Samples are drawn once and read ever after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.engines.recorded import RecordedEngine, check_samples
from opcd_nemo.errors import UserError
from opcd_nemo.types import Prompt, Sample

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=3)
ALONE: Any = SimpleNamespace(rank=0, tp_rank=0, pp_rank=0, gather_objects=lambda value: [value])


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


MADE_OF = {"the teacher": "sha256 ab", "rollout.sampling": {"temperature": 1.0}, "seed": 1}


def recorded(inner: Counting, folder: Path, parallel: Any = ALONE) -> RecordedEngine:
    check_samples(folder, MADE_OF)
    return RecordedEngine(inner, folder, parallel, made_of=MADE_OF, vocab_size=9)


def prompts(*indices: int, token: int = 1) -> list[Prompt]:
    return [Prompt(token_ids=(token, 2), index=index) for index in indices]


def test_what_is_recorded_is_not_drawn_again(tmp_path: Path) -> None:
    inner = Counting()
    first = recorded(inner, tmp_path).generate(prompts(0, 1), SAMPLING, seed=1, step=3)
    again = recorded(inner, tmp_path)
    assert again.generate(prompts(0, 1), SAMPLING, seed=1, step=3) == first
    assert again.generate(prompts(1), SAMPLING, seed=1, step=3) == first[1:]  # another layout
    assert inner.calls == 1


@pytest.mark.parametrize("other", ["seed", "step", "prompt", "index", "sampling"])
def test_what_differs_is_drawn_anew(tmp_path: Path, other: str) -> None:
    inner = Counting()
    recorded(inner, tmp_path).generate(prompts(0), SAMPLING, seed=1, step=3)
    engine = recorded(inner, tmp_path)
    changed = Sampling(temperature=0.5, top_p=1.0, top_k=0, max_new_tokens=3)
    engine.generate(
        prompts(1 if other == "index" else 0, token=7 if other == "prompt" else 1),
        changed if other == "sampling" else SAMPLING,
        seed=2 if other == "seed" else 1,
        step=4 if other == "step" else 3,
    )
    assert inner.calls == 2


def test_only_one_rank_of_a_replica_writes(tmp_path: Path) -> None:
    other: Any = SimpleNamespace(rank=0, tp_rank=1, pp_rank=0, gather_objects=lambda value: [value])
    recorded(Counting(), tmp_path, other).generate(prompts(0), SAMPLING, seed=1, step=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"key": "a"}',
        '{"key":"a","response_ids":[1],"logprobs":[],"finish_reason":"eos"}',
        '{"key":"a","response_ids":[1],"logprobs":[0],"finish_reason":1}',
        '{"key":"a","response_ids":[9],"logprobs":[0],"finish_reason":"eos"}',
        '{"key":"a","response_ids":[-1],"logprobs":[0],"finish_reason":"eos"}',
        '{"key":"a","response_ids":[1.5],"logprobs":[0],"finish_reason":"eos"}',
        '{"key":"a","response_ids":[true],"logprobs":[0],"finish_reason":"eos"}',
        '{"key":"a","response_ids":"1","logprobs":[0],"finish_reason":"eos"}',
        '{"key":"a","response_ids":[1],"logprobs":[NaN],"finish_reason":"eos"}',
        '{"key":"a","response_ids":[1],"logprobs":["0"],"finish_reason":"eos"}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    recorded(Counting(), tmp_path)
    (tmp_path / "step=0003.index=0-0.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"step=0003.index=0-0.jsonl, line 1 cannot"):
        recorded(Counting(), tmp_path).generate(prompts(0), SAMPLING, seed=1, step=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("the teacher", "sha256 cd"), ("rollout.sampling", {"temperature": 0.5}), ("seed", 2)],
)
def test_samples_of_another_teacher_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    recorded(Counting(), tmp_path).generate(prompts(0), SAMPLING, seed=1, step=3)
    check_samples(tmp_path, MADE_OF)
    with pytest.raises(UserError) as refused:
        check_samples(tmp_path, {**MADE_OF, name: value})
    assert refused.value.key == "rollout.teacher_data"
    assert (
        refused.value.problem == f"its samples are others: {name} was {MADE_OF[name]}, is {value}"
    )


def test_samples_that_do_not_say_whose_they_are_are_refused(tmp_path: Path) -> None:
    (tmp_path / "step=0003.index=0-0.jsonl").touch()
    with pytest.raises(UserError, match=r"has samples and no samples_of\.json"):
        check_samples(tmp_path, MADE_OF)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "samples_of.json").write_text(text)
    with pytest.raises(UserError, match=r"samples_of\.json: .*a JSON object"):
        check_samples(tmp_path, MADE_OF)


def test_a_file_is_no_folder_of_samples(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError) as refused:
            check_samples(path, MADE_OF)
        assert refused.value.key == "rollout.teacher_data"
    check_samples(tmp_path / "new", MADE_OF)
    assert not (tmp_path / "new").exists()
