"""Games of several turns go through rollouts, weights, evaluation and the checks of a start."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.config.train import load_config
from opcd_nemo.context.sources import FixedContext
from opcd_nemo.evaluation.evaluator import EvaluationPlan, Evaluator
from opcd_nemo.launch.compose import compose
from opcd_nemo.rollout.collect import collect_rollouts
from opcd_nemo.rollout.conversation import Conversation
from opcd_nemo.rollout.sampling import row_uniforms
from opcd_nemo.tasks.games.task import GameTask
from opcd_nemo.tasks.questions import capitals
from opcd_nemo.training.batches import make_distill_batches
from opcd_nemo.training.inputs import open_inputs
from opcd_nemo.types import Message, Prompt, Rollout, Sample
from tests.tiny import write_chat_model
from tests.unit.tasks.test_games import build

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8)
NOTES = "Go down and right."


class Letters:
    """A tokenizer of one letter a token."""

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(ord(letter) for message in messages for letter in message["content"])

    def reply(self, _prompt: Sequence[int], ids: Sequence[int]) -> str:
        return self.decode(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class RandomPlayer:
    """Draws one of the four moves from the prompt's own random numbers; remembers the prompts."""

    weights_version = 3

    def __init__(self) -> None:
        self.asked: list[Prompt] = []

    def generate(
        self, prompts: Sequence[Prompt], _: object, *, seed: int, step: int, **__: object
    ) -> list[Sample]:
        self.asked += prompts
        samples = []
        for prompt in prompts:
            (uniform,) = row_uniforms(seed, step, prompt.index, 1).tolist()
            text = ("[up]", "go [down]", "[left]", "now [right]")[int(4 * uniform)]
            ids = tuple(map(ord, text))
            samples.append(
                Sample(response_ids=ids, logprobs=(-1.0,) * len(ids), finish_reason="eos")
            )
        return samples


def conversation(max_positions: int = 100_000) -> Conversation:
    letters: Any = Letters()
    return Conversation(
        tokenizer=letters, source=FixedContext(system=NOTES), max_positions=max_positions
    )


def play(
    task: GameTask, places: range, step: int = 2, engine: Any = None, repeat: int = 8
) -> list[Rollout]:
    episodes = task.episodes("train", step, repeat)
    return collect_rollouts(
        engine or RandomPlayer(),
        "student",
        [episodes[place] for place in places],
        conversation(),
        SAMPLING,
        seed=5,
        step=step,
        first_index=places.start,
    )


def by_turn(rollouts: list[Rollout]) -> dict[tuple[str, int], Rollout]:
    return {(rollout.uid, rollout.turn_index): rollout for rollout in rollouts}


def test_every_turn_is_a_sample_that_shows_the_turns_before() -> None:
    found = by_turn(play(build(), range(8)))
    turns = {uid: 1 + max(t for u, t in found if u == uid) for uid, _ in found}
    assert len(turns) == 8
    assert len(set(turns.values())) > 1, "games end after different numbers of turns"
    assert max(turns.values()) <= 5
    letters = Letters()
    for (uid, turn), rollout in found.items():
        text = letters.decode(rollout.prompt_ids)
        assert text.count("Board:") == turn + 1
        assert text.count("Move:") == turn
        assert letters.decode(rollout.teacher_prompt_ids) == NOTES + text
        if turn:
            before = found[uid, turn - 1]
            assert text.startswith(letters.decode(before.prompt_ids))
            move = letters.decode(before.response_ids).split("[")[1]
            assert f"Move: [{move}" in text.rsplit("Board:", 1)[0].rsplit("Board:", 1)[1]


def test_samples_are_pure_in_seed_step_place_and_turn() -> None:
    task = build()
    whole = by_turn(play(task, range(8)))
    first, second = play(task, range(3)), play(build(), range(3, 8))
    assert by_turn(first + second) == whole
    assert by_turn(play(task, range(8), step=3)) != whole


def test_every_turn_of_every_place_has_random_numbers_of_its_own() -> None:
    player = RandomPlayer()
    play(build(repeat_maps=True), range(64), engine=player, repeat=64)
    indices = [prompt.index for prompt in player.asked]
    assert len(set(indices)) == len(indices) > 128
    assert len({float(row_uniforms(5, 2, index, 1)) for index in indices}) == len(indices)


def test_repeated_maps_are_games_of_their_own() -> None:
    rollouts = play(build(repeat_maps=True), range(30), repeat=30)
    assert len({rollout.uid for rollout in rollouts}) == 30
    assert len({rollout.prompt_ids for rollout in rollouts if not rollout.turn_index}) == 10


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_weights_are_those_of_all_turns_of_all_ranks(aggregation: Any) -> None:
    parts = [play(build(), range(3)), play(build(), range(3, 8))]
    assert len(parts[0]) != len(parts[1])
    sequences = sum(map(len, parts))
    tokens = sum(len(rollout.response_ids) for part in parts for rollout in part)
    total = 0.0
    for part in parts:
        batches = make_distill_batches(
            part,
            micro_batch_size=4,
            aggregation=aggregation,
            sum_over_ranks=lambda counts: torch.tensor([sequences, tokens], dtype=counts.dtype),
            device=torch.device("cpu"),
            teacher_prefix=(),
        )
        weights = torch.cat([batch.weight_N for batch in batches]).tolist()
        wanted = [
            1 / tokens if aggregation == "token_mean" else 1 / (sequences * len(r.response_ids))
            for r in part
            for _ in r.response_ids
        ]
        assert weights == pytest.approx(wanted, rel=1e-6)
        total += sum(weights)
    assert total == pytest.approx(1.0, rel=1e-5)


def evaluator(task: GameTask, num_questions: int) -> Evaluator:
    parallel: Any = SimpleNamespace(share=range, gather_over_dp=list)
    plan = EvaluationPlan(
        num_questions=num_questions,
        num_retention=1,
        sampling=SAMPLING,
        retention_sampling=SAMPLING,
        samples_per_question=1,
        leakage_phrases=["experience"],
        seed=0,
    )
    return Evaluator(task, capitals(), conversation(), plan, parallel, ())


class Solver(RandomPlayer):
    """Plays the solver's moves, game by game."""

    def __init__(self, task: GameTask, games: int) -> None:
        from opcd_nemo.tasks.games.boards import solve

        super().__init__()
        boards = task.maps["test"]
        self.moves = [[*(solve(boards[game % len(boards)], 5) or ())] for game in range(games)]

    def generate(self, prompts: Sequence[Prompt], *_: object, **__: object) -> list[Sample]:
        texts = [f"[{self.moves[prompt.index % 1_000_000].pop(0)}]" for prompt in prompts]
        return [
            Sample(
                response_ids=tuple(map(ord, text)),
                logprobs=(0.0,) * len(text),
                finish_reason="eos",
            )
            for text in texts
        ]


def test_an_evaluation_plays_games_to_their_end_and_keeps_the_answers_of_all_turns() -> None:
    task = build(repeat_maps=True)
    solver: Any = Solver(task, 12)
    found = evaluator(task, 12).task_score(solver, "test", with_context=False)
    assert found.score == 1.0
    assert len({answer.uid for answer in found.answers}) == 12
    for answer in found.answers:
        assert len(answer.text.split("\n\n")) == 4
        assert answer.text.count("[") == 4


def test_a_random_player_is_evaluated_as_the_report_says() -> None:
    task = build(repeat_maps=True)
    player: Any = RandomPlayer()
    score = evaluator(task, 4000).task_score(player, "test", with_context=True).score
    exact = task.report()["random_win_rate_test"]
    assert abs(score - exact) < 4 * (exact * (1 - exact) / 4000) ** 0.5


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    runs = tmp_path_factory.mktemp("runs")
    return [
        "task=frozen_lake",
        f"exp_manager.exp_dir={runs}",
        "evaluation.num_questions=2",
        "evaluation.num_retention=2",
        "rollout.sampling.max_new_tokens=4",
        "evaluation.retention_max_new_tokens=4",
    ]


def test_a_game_whose_last_turn_does_not_fit_is_refused_before_anything_loads(
    settings: list[str], tmp_path: Path
) -> None:
    model = write_chat_model(tmp_path / "model")
    config = load_config(compose("train", [*settings, f"student.path={model}"]))
    inputs = open_inputs(config, 2)
    (episode,) = inputs.task.episodes("test", 0, 1)
    _, *prompts = inputs.conversation.prompts(episode)
    first = max(map(len, prompts))
    last = max(map(len, inputs.conversation.longest_prompts(episode)))
    assert first + 50 < last
    draw_answers = random.Random(0)
    while not episode.done:
        episode.reply(draw_answers.choice(["[up]", "[right]", "[down]", ""]))
    short = write_chat_model(tmp_path / "short", max_positions=last + 3)
    config = load_config(compose("train", [*settings, f"student.path={short}"]))
    with pytest.raises(ValueError, match=f"prompt of {last} tokens .* {last + 3} positions"):
        open_inputs(config, 2)


def test_more_games_than_maps_are_refused_with_the_key(settings: list[str], tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "model")
    command = [*settings, f"student.path={model}", "evaluation.num_questions=50"]
    with pytest.raises(ValueError, match=r"^evaluation.num_questions=50: test: .* 1 to 5 "):
        open_inputs(load_config(compose("train", command)), 2)
    open_inputs(load_config(compose("train", [*command, "task.repeat_maps=true"])), 2)
