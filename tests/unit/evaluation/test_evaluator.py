"""Evaluations: samples, rates, pass@k, leakage, and the same answers on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.config.train import load_config
from opcd_nemo.errors import UserError
from opcd_nemo.evaluation.evaluator import (
    Answer,
    Evaluation,
    EvaluationPlan,
    Evaluator,
    leakage_pattern,
)
from opcd_nemo.launch.compose import compose
from opcd_nemo.rollout.sampling import row_uniforms
from opcd_nemo.tasks.questions import Question, QuestionTask, capitals
from opcd_nemo.types import Prompt, Sample
from tests.unit.rollout.test_game_rollouts import Letters, conversation
from tests.unit.tasks.test_games import build

SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20, max_new_tokens=8)
REPLIES = ("yes", "no", "hm", "yes, by my experience")


def judge(reply: str) -> float | None:
    return None if reply == "hm" else reply.startswith("yes")  # a bool, as verifiers say


TASK = QuestionTask(
    {
        split: [
            Question(uid=f"{split}/{n}", text=f"Is {n} a number?", judge=judge) for n in range(7)
        ]
        for split in ("train", "validation", "test")
    },
    seed=0,
)


class Guesser:
    """Draws a reply from the prompt's own random number; remembers how it was asked."""

    weights_version = 0

    def __init__(self) -> None:
        self.asked: list[tuple[Prompt, Sampling, int]] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, step: int, **_: Any
    ) -> list[Sample]:
        samples = []
        for prompt in prompts:
            self.asked.append((prompt, sampling, step))
            (uniform,) = row_uniforms(seed, step, prompt.index, 1).tolist()
            ids = tuple(map(ord, REPLIES[int(4 * uniform)]))
            samples.append(
                Sample(response_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="eos")
            )
        return samples


def evaluate(
    ranks: int = 1, samples: int = 4, num_questions: int = 7, seed: int = 5, engine: Any = None
) -> Evaluation:
    """What every one of `ranks` processes has after its evaluation."""
    plan = EvaluationPlan(
        num_questions=num_questions,
        num_retention=3,
        sampling=SAMPLING,
        retention_sampling=Sampling(temperature=0.7, top_p=1.0, top_k=0, max_new_tokens=2),
        samples_per_question=samples,
        leakage_phrases=["experience"],
        seed=seed,
    )
    answers: list[Answer] = []
    for rank in range(ranks):
        parallel: Any = SimpleNamespace(
            share=lambda n, rank=rank: range(n * rank // ranks, n * (rank + 1) // ranks),
            gather_over_dp=list,
        )
        evaluator = Evaluator(TASK, capitals(), conversation(), plan, parallel, ())
        found = evaluator.task_score(engine or Guesser(), "test", with_context=False)
        answers += found.answers
    return Evaluation(answers=tuple(answers))


def test_answers_are_in_the_tasks_order_with_their_samples_side_by_side() -> None:
    found = evaluate()
    assert [(answer.uid, answer.sample) for answer in found.answers] == [
        (f"test/{question}", sample) for question in range(7) for sample in range(4)
    ]
    assert list(found.by_question) == [f"test/{question}" for question in range(7)]
    assert {answer.question for answer in found.answers if answer.uid == "test/3"} == {
        "Is 3 a number?"
    }


def test_an_answer_that_was_stored_without_its_question_is_read() -> None:
    stored = asdict(answer("test/a", 0, 1.0))
    assert Answer.from_record(stored) == answer("test/a", 0, 1.0)
    assert Answer.from_record({**stored, "score": True}).score is not True  # as judges once said
    del stored["question"]
    assert Answer.from_record(stored).question == "test/a"


def test_a_sample_is_pure_in_seed_question_and_its_number() -> None:
    whole = evaluate()
    assert evaluate(ranks=3) == whole
    fewer = evaluate(samples=2, num_questions=3).answers
    assert fewer == tuple(a for a in whole.answers if a.sample < 2 and a.uid < "test/3")
    assert evaluate(seed=6) != whole
    assert len({tuple(a.text for a in samples) for samples in whole.by_question.values()}) > 3


def test_an_evaluation_draws_no_number_of_the_training() -> None:
    engine = Guesser()
    evaluate(engine=engine)
    assert {step for *_, step in engine.asked} == {-1, -2, -3, -4}
    assert all(sampling == SAMPLING for _, sampling, _ in engine.asked)


def test_retention_is_asked_of_its_own_task_with_its_own_length() -> None:
    engine: Any = Guesser()
    plan = EvaluationPlan(
        num_questions=1,
        num_retention=3,
        sampling=SAMPLING,
        retention_sampling=Sampling(temperature=0.7, top_p=1.0, top_k=0, max_new_tokens=2),
        samples_per_question=1,
        leakage_phrases=["experience"],
        seed=0,
    )
    parallel: Any = SimpleNamespace(share=range, gather_over_dp=list)
    given: list[tuple[Any, ...]] = []
    task: Any = SimpleNamespace(
        episodes=lambda *words: given.append(words) or capitals().episodes(*words)
    )
    evaluator = Evaluator(TASK, task, conversation(), plan, parallel, ())
    found = evaluator.retention(engine, with_context=True)
    assert given == [("test", 0, 3)]  # the same questions at every step
    wanted = [episode.uid for episode in capitals().episodes("test", 0, 3)]
    assert [answer.uid for answer in found.answers] == wanted
    assert {sampling.max_new_tokens for _, sampling, _ in engine.asked} == {2}
    text = Letters().decode(engine.asked[0][0].token_ids)
    assert text.endswith("What is the capital of Afghanistan?")
    assert text.startswith("Go down and right."), "the context"


def test_the_rates_are_those_of_the_answers() -> None:
    found = evaluate()
    texts = [answer.text for answer in found.answers]
    assert {type(answer.score) for answer in found.answers} == {float}
    assert set(texts) == set(REPLIES)
    assert found.score == sum(text.startswith("yes") for text in texts) / 28
    assert found.format_failure_rate == texts.count("hm") / 28
    assert found.leakage_rate == texts.count(REPLIES[3]) / 28
    assert found.response_tokens == sum(map(len, texts)) / 28
    assert found.record() == {
        "score": found.score,
        "pass_at_k": {str(k): found.pass_at_k[k] for k in (1, 2, 3, 4)},
        "format_failure_rate": found.format_failure_rate,
        "response_tokens": found.response_tokens,
        "leakage_rate": found.leakage_rate,
        "reflection_words": 0.0,
        **{
            f"response_tokens_{word}": float(length)
            for word, length in {"p10": 2, "p50": 3, "p90": 21, "max": 21}.items()
        },
    }


def answer(uid: str, sample: int, score: float) -> Answer:
    return Answer(
        uid=uid,
        question=f"{uid}?",
        sample=sample,
        text="",
        score=score,
        answered=True,
        num_tokens=1,
        leaked=False,
    )


def test_pass_at_k_is_the_mean_over_questions_of_the_unbiased_estimator() -> None:
    scores = {"a": (1.0, 0.0, 0.0), "b": (0.5, 0.0, 0.9), "c": (1.0, 1.0, 0.0)}
    answers = [answer(uid, n, score) for uid, row in scores.items() for n, score in enumerate(row)]
    found = Evaluation(answers=tuple(answers)).pass_at_k
    # of a: 1 of 3, so 2 of 3 pairs hold it; of b: no full score; of c: every pair
    assert found == pytest.approx({1: 1 / 3, 2: (2 / 3 + 0 + 1) / 3, 3: 2 / 3})


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("From Experience, I go right.", True),
        ("According\n  to it, no.", True),
        ("as the notes say: up", True),
        ("She is experienced, an experiencer.", False),
        ("according, to", False),
        ("inexperience", False),
        ("", False),
    ],
)
def test_leakage_is_a_phrase_of_whole_words(text: str, leaks: bool) -> None:
    pattern = leakage_pattern(["experience", "according to", "as the notes say"])
    assert (pattern.search(text) is not None) is leaks


def test_a_phrase_is_no_pattern() -> None:
    assert leakage_pattern(["a.c"]).search("abc") is None
    assert leakage_pattern(["a.c"]).search("(a.c)")


def test_a_game_is_answered_when_every_turn_names_an_action() -> None:
    for replies, answered in (
        (["[up]", "[up]"], True),  # invalid moves, but moves
        (["[right]", "no idea", "[up]", "[down]", "[up]"], False),
    ):
        (game,) = build().episodes("test", 0, 1)
        for reply in replies:
            if not game.done:
                game.reply(reply)
        assert game.answered is answered


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("sampling.temperature=-1", "0, or a number >= 0.001 and <= 100"),
        ("sampling.temperature=1e-40", "0, or a number >= 0.001 and <= 100"),
        ("sampling.top_p=0", "a number > 0 and <= 1"),
        ("sampling.top_p=1.5", "a number > 0 and <= 1"),
        ("sampling.top_p=0.9", "1.0 with evaluation.sampling.temperature=0, which is greedy"),
        ("sampling.top_k=20", "0 with evaluation.sampling.temperature=0, which is greedy"),
        ("samples_per_question=4", "1 with evaluation.sampling.temperature=0, which is greedy"),
        ("samples_per_question=0", "a whole number >= 1 and <= 1000000"),
        ("min_retention=0.8", "null with evaluation.every_n_steps=0"),
        ("min_retention=0", "a number > 0 and <= 1, or null"),
        ("min_retention=1.1", "a number > 0 and <= 1, or null"),
        ("min_retention=half", "a number > 0 and <= 1, or null"),
        ("min_gap=2", "a number >= 0 and <= 1, or null"),
        (
            "controls=[right_context]",
            "a list of wrong_context, context_returned, trained_wrong_context, "
            "trained_without_context, each at most once",
        ),
        (
            "controls=[trained_without_context]",
            "no trained_without_context where the teacher has the student's weights",
        ),
        ("leakage_phrases=[]", "a list of one phrase or more, each with a word in it"),
        ("leakage_phrases=[a,.]", "a list of one phrase or more, each with a word in it"),
    ],
)
def test_a_setting_without_effect_is_refused(override: str, allowed: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(compose("train", [f"evaluation.{override}"]))
    assert refused.value.key == f"evaluation.{override.partition('=')[0]}"
    assert refused.value.allowed == allowed


def test_sampled_evaluations_are_configured_like_rollouts() -> None:
    words = "temperature=0.7 top_p=0.8 top_k=20 max_new_tokens=8".split()
    config = load_config(compose("train", [f"evaluation.sampling.{word}" for word in words]))
    assert config.evaluation.sampling == SAMPLING
