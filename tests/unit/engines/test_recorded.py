"""Samples are drawn once and read ever after."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.engines.recorded import RecordedEngine, check_samples
from opcd_nemo.errors import UserError
from opcd_nemo.types import Prompt, Sample

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=3)


def rank(tp_rank: int, from_first: Callable[[Any], Any] = lambda value: value) -> Any:
    """A rank of a replica; `from_first` makes of its own value what the first rank sends."""
    return SimpleNamespace(
        rank=tp_rank,
        tp_rank=tp_rank,
        pp_rank=0,
        gather_objects=lambda value: [value],
        from_first_of_model=from_first,
    )


ALONE = rank(0)


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
    other = rank(1, lambda _: (None, None))  # the first has no samples, then has written them
    recorded(Counting(), tmp_path, other).generate(prompts(0), SAMPLING, seed=1, step=0)
    assert not list(tmp_path.iterdir())


def test_one_replica_says_whose_the_samples_are(tmp_path: Path) -> None:
    """Two that write the same file at once take each other's unfinished file away."""
    replica = rank(0)
    replica.rank = 2  # the first rank of the second replica
    recorded(Counting(), tmp_path, replica)
    assert not list(tmp_path.iterdir())
    recorded(Counting(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["samples_of.json"]


def test_what_the_first_rank_has_recorded_is_what_the_others_take(tmp_path: Path) -> None:
    sample = Sample(response_ids=(7,), logprobs=(-0.5,), finish_reason="eos")
    inner = Counting()
    other = recorded(inner, tmp_path, rank(1, lambda _: ([sample], None)))
    assert other.generate(prompts(0), SAMPLING, seed=1, step=0) == [sample]
    assert inner.calls == 0


@pytest.mark.parametrize("when", ["read", "written"])
def test_a_disk_that_fails_the_first_rank_fails_its_whole_replica(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank would wait in its next exchange for the first, which has ended."""
    sent: list[Any] = []

    def send(value: Any) -> Any:
        sent.append(value)
        return value

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first = recorded(Counting(), tmp_path, rank(0, send))
    other = recorded(Counting(), tmp_path, rank(1, lambda _: received.pop(0)))
    if when == "written":
        monkeypatch.setattr("opcd_nemo.engines.recorded.write_whole", full)
    else:
        (tmp_path / "step=0000.index=0-0.jsonl").write_text("{\n")
        first = recorded(Counting(), tmp_path, rank(0, send))
    with pytest.raises((OSError, UserError)) as of_first:
        first.generate(prompts(0), SAMPLING, seed=1, step=0)
    received = list(sent)
    with pytest.raises((OSError, UserError)) as of_other:
        other.generate(prompts(0), SAMPLING, seed=1, step=0)
    assert of_other.value is of_first.value


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
