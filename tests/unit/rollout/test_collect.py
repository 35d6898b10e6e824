"""Episodes become rollouts, prompts that do not fit are refused, the context's prefix is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.errors import UserError
from opcd_nemo.rollout.collect import collect_rollouts
from opcd_nemo.rollout.conversation import Conversation, shared_start
from opcd_nemo.types import Message, Prompt, Sample, Turn

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=4)


@dataclass
class Game:
    """Asks `turns` times; the student's chat grows by every reply."""

    uid: str
    turns: int
    answered: bool = True
    replies: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.replies) == self.turns

    def turn(self, context: Any) -> Turn:
        chat: tuple[Message, ...] = ({"role": "user", "content": self.uid + "".join(self.replies)},)
        return Turn(student_messages=chat, teacher_messages=(context, *chat))

    def reply(self, text: str) -> None:
        self.replies.append(text)

    def score(self) -> float:
        return 1.0


class Letters:
    """A tokenizer of one letter a token."""

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(ord(letter) for message in messages for letter in message["content"])

    def reply(self, _prompt: Sequence[int], ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Echo:
    """Answers each prompt with its last letter, and remembers what it was asked."""

    weights_version = 7

    def __init__(self) -> None:
        self.asked: list[tuple[list[Prompt], dict[str, Any]]] = []

    def generate(self, prompts: Sequence[Prompt], _: object, **keywords: Any) -> list[Sample]:
        self.asked.append((list(prompts), keywords))
        return [
            Sample(
                response_ids=(prompt.token_ids[-1], 33), logprobs=(-1.0, -2.0), finish_reason="eos"
            )
            for prompt in prompts
        ]


def conversation(max_positions: int = 100) -> Conversation:
    source = SimpleNamespace(context=lambda *_: {"role": "system", "content": "<ctx>"})
    letters: Any = Letters()
    contexts: Any = source
    return Conversation(tokenizer=letters, source=contexts, max_positions=max_positions)


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def collect(engine: Any, games: list[Any], sampler: Any = "student", **keywords: Any) -> Any:
    settings = {"seed": 1, "step": 2, "first_index": 0} | keywords
    return collect_rollouts(engine, sampler, games, conversation(), SAMPLING, **settings)


def test_every_turn_is_a_rollout_with_both_prompts() -> None:
    engine = Echo()
    rollouts = collect(engine, [Game("a", 1), Game("b", 3), Game("c", 2)], first_index=10)
    assert [(r.uid, r.turn_index) for r in rollouts] == [
        ("a", 0),
        ("b", 0),
        ("c", 0),
        ("b", 1),
        ("c", 1),
        ("b", 2),
    ]
    assert all(r.teacher_prompt_ids == ids("<ctx>") + r.prompt_ids for r in rollouts)
    assert [r.episode_index for r in rollouts] == [10, 11, 12, 11, 12, 11]
    assert rollouts[3].prompt_ids == ids("bb!")
    assert rollouts[3].question == "bb!", "the turn's question, without the context"
    assert rollouts[5].prompt_ids == ids("bb!!!")
    assert {r.weights_version for r in rollouts} == {7}
    assert rollouts[0].sampled_logprobs == (-1.0, -2.0)
    indices = [prompt.index for prompts, _ in engine.asked for prompt in prompts]
    assert indices[:3] == [10, 11, 12]
    assert len(set(indices)) == len(indices)
    # a prompt keeps its index when others of its batch have ended
    alone = Echo()
    collect(alone, [Game("c", 2)], first_index=12)
    assert [prompt.index for prompts, _ in alone.asked for prompt in prompts] == [
        indices[2],
        indices[4],
    ]


def test_the_student_never_reads_the_context_and_the_teacher_does() -> None:
    student, teacher = Echo(), Echo()
    collect(student, [Game("a", 1)])
    collect(teacher, [Game("a", 1)], "teacher", prefix_ids=(60,))
    assert student.asked[0][0][0].token_ids == ids("a")
    assert teacher.asked[0][0][0].token_ids == ids("<ctx>a")
    assert teacher.asked[0][1] == {"seed": 1, "step": 2, "prefix_ids": (60,)}


def test_anchors_are_the_last_and_their_teacher_reads_no_context() -> None:
    rollouts = collect(Echo(), [Game("a", 1), Game("b", 1), Game("c", 1)], num_anchors=2)
    assert rollouts[0].teacher_prompt_ids == ids("<ctx>a")
    assert [r.teacher_prompt_ids for r in rollouts[1:]] == [ids("b"), ids("c")]


def test_a_prompt_that_does_not_fit_is_refused_with_both_lengths() -> None:
    talk = conversation(max_positions=9)
    talk.check_fits((1,) * 5, 4)
    with pytest.raises(
        ValueError, match=r"^max_new_tokens=4: .* prompt of 6 tokens .* 9 positions; allowed"
    ):
        talk.check_fits((1,) * 6, 4)
    with pytest.raises(UserError):  # the student's fits, the teacher's does not
        collect_rollouts(
            Echo(), "student", [Game("a", 1)], talk, SAMPLING, seed=0, step=0, first_index=0
        )


def test_the_shared_start_is_what_two_questions_share() -> None:
    assert shared_start([(5, 6, 7, *ids(question), 8) for question in ("A", "7")]) == (5, 6, 7)
    assert shared_start([ids("A"), ids("7")]) == ()
