"""Answers token by token: divergence, likeliest tokens, and statistics, against closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opcd_nemo.training.token_scores import (
    MOST_ANSWERS,
    MOST_TOKENS,
    score_answers,
    token_statistics,
)
from opcd_nemo.types import Rollout

VOCABULARY = 11


def rollout(number: int, num_tokens: int) -> Rollout:
    return Rollout(
        uid=f"test/{number}",
        episode_index=number,
        turn_index=0,
        question=f"What is {number}?",
        prompt_ids=(1, 2, 3 + number % 4),
        teacher_prompt_ids=(9, 8, 1, 2, 3 + number % 4),
        response_ids=tuple(range(num_tokens)) if num_tokens < VOCABULARY else (5,) * num_tokens,
        sampled_logprobs=(0.0,) * num_tokens,
        weights_version=0,
        finish_reason="eos",
    )


class Model:
    """Hidden states are logits: drawn once for every call, and kept."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.logits_seen: list[torch.Tensor] = []
        self.split_multiple = 1

    def score(self, batches: Sequence[Any], prefixes: Any = None) -> list[torch.Tensor]:
        found = []
        for batch in batches:
            count = len(getattr(batch, "student", batch).predict_index_N)
            found.append(torch.randn(count, VOCABULARY, generator=self._generator))
        self.logits_seen += found
        return found

    @staticmethod
    def logits(hidden_NH: torch.Tensor) -> torch.Tensor:
        return hidden_NH


def run_of(student: Model, teacher: Model, rank: int = 0) -> Any:
    parallel = SimpleNamespace(
        rank=rank,
        tp_rank=0,
        device=torch.device("cpu"),
        gather_objects=lambda value: [[], value],
        give_back_memory=lambda: None,
    )
    of_teacher = SimpleNamespace(score=teacher.score, prefix_ids=(9, 8), model=teacher)
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special: f"<{ids[0]}>")
    return SimpleNamespace(
        parallel=parallel,
        student=student,
        teacher=of_teacher,
        micro_batch_size=2,
        conversation=SimpleNamespace(tokenizer=tokenizer),
    )


def test_every_token_has_its_divergence_and_the_likeliest_of_both() -> None:
    student, teacher = Model(1), Model(2)
    rollouts = [rollout(0, 4), rollout(1, 3), rollout(2, 5)]
    records = score_answers(run_of(student, teacher), rollouts)
    assert [record["uid"] for record in records] == ["test/0", "test/1", "test/2"]
    assert [len(record["tokens"]) for record in records] == [4, 3, 5]
    assert [token["text"] for token in records[1]["tokens"]] == ["<0>", "<1>", "<2>"]
    p, q = (torch.cat(model.logits_seen).log_softmax(-1).double() for model in (student, teacher))
    kl = (p.exp() * (p - q)).sum(-1)
    tokens = [token for record in records for token in record["tokens"]]
    assert [token["kl"] for token in tokens] == pytest.approx(kl.tolist(), abs=1e-4)
    assert [t["student_entropy"] for t in tokens] == pytest.approx(
        (-(p.exp() * p).sum(-1)).tolist(), abs=1e-4
    )
    for index, token in enumerate(tokens):
        text, probability = token["teacher"][0]
        assert text == f"<{int(q[index].argmax())}>"
        assert probability == pytest.approx(float(q[index].exp().max()), abs=1e-4)
        assert len(token["student"]) == len(token["teacher"]) == 5


def test_of_long_and_many_answers_the_first_are_scored_and_the_rest_is_counted() -> None:
    rollouts = [rollout(number, MOST_TOKENS + 30) for number in range(MOST_ANSWERS + 2)]
    records = score_answers(run_of(Model(1), Model(2)), rollouts)
    assert len(records) == MOST_ANSWERS
    assert {len(record["tokens"]) for record in records} == {MOST_TOKENS}
    assert {record["num_tokens"] for record in records} == {MOST_TOKENS + 30}
    assert score_answers(run_of(Model(1), Model(2), rank=1), rollouts) == []


def test_scoring_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    score_answers(run_of(Model(1), Model(2)), [rollout(0, 4)])
    assert torch.equal(torch.get_rng_state(), state)


def test_statistics_say_where_the_divergence_lies() -> None:
    def token(text: str, kl: float, student: str, teacher: str) -> dict[str, Any]:
        sides = {
            name: [[letter, 0.1] for letter in letters]
            for name, letters in (("student", student), ("teacher", teacher))
        }
        return {"text": text, "kl": kl, "student_entropy": 1.0, "teacher_entropy": 0.5, **sides}

    tokens = [token(str(n), 1.0, "abcde", "abxyz") for n in range(30)]
    tokens += [token("0", 9.0, "abcde", "abcde")]
    found = token_statistics([{"tokens": tokens}])
    assert found["kl"] == pytest.approx(39 / 31)
    assert (found["student_entropy"], found["teacher_entropy"]) == (1.0, 0.5)
    assert found["top_overlap"] == pytest.approx((30 * 0.4 + 1.0) / 31)
    assert found["heaviest_share"] == pytest.approx((10 + 19) / 39)
