"""The shipped game model: its vocabulary, what it is trained on, and that it plays by notes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from omegaconf import OmegaConf

from opcd_nemo.context.sources import ExperienceContext
from opcd_nemo.experience.config import ExtractionConfig
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.tasks.games.boards import STEPS, Board
from opcd_nemo.tasks.games.frozen_lake import FrozenLake
from opcd_nemo.tasks.games.sokoban import LETTERS as ROOM_LETTERS
from opcd_nemo.tasks.games.sokoban import Sokoban
from recipes.game_model.maps import room
from recipes.game_model.network import Weights, losses, make_batch
from recipes.game_model.samples import Answer, Maps, Sampler, Tree, marks
from recipes.game_model.settings import draw_setting, good_moves, held_out, open_boards
from recipes.game_model.trial import Trial
from recipes.game_model.vocabulary import GAMES, SYMBOLS, USER, drawn, make_tokenizer, words
from tests.unit.tasks.test_games import LETTERS, build

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "opcd_nemo/game_model"
CHAT = ChatTokenizer.from_path(str(MODEL))
ROOMS = {"num_maps": 60, "rounds": 6, "num_validation": 20, "num_test": 20}
LAKES = {"size": 4, "num_holes": 4, "rounds": 8, "num_validation": 80, "num_test": 80}


LAKE = FrozenLake(size=3, holes=frozenset({(1, 1), (1, 2)}))
ROOM = Sokoban(  # a wall at the lower right; the box stands between the player and the target
    size=4,
    walls=frozenset(
        {(r, c) for r in range(4) for c in range(4) if 0 in (r, c) or 3 in (r, c)} - {(3, 1)}
    ),
    targets=frozenset({(3, 1)}),
    boxes=frozenset({(2, 1)}),
    player=(1, 1),
)


@cache
def maps() -> dict[str, list[Board]]:
    return build("frozen_lake", **LAKES).maps


@cache
def rooms() -> dict[str, list[Board]]:
    return build("sokoban", **ROOMS).maps


def sampler(game: str = "lake") -> Sampler:
    boards, rounds = (maps(), 8) if game == "lake" else (rooms(), 6)
    return Sampler(make_tokenizer(), [Maps(boards=boards["train"], rounds=rounds, weight=1.0)])


def trees() -> list[Tree]:
    found = []
    for game in ("lake", "room"):
        rng, draws = Random(1), sampler(game)
        found.append(draws.lesson(rng, 3, hidden=True))
        found += [draws.game(rng, hidden=True), draws.extraction(rng, hidden=True)]
        found += [draws.moves(rng, hidden=True), draws.outcome(rng)]
    return found


@cache
def trial() -> Trial:
    checkpoint = open_model(str(MODEL))
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    return Trial(checkpoint.config, weights, sampler(), seed=3)


def test_any_text_comes_back() -> None:
    texts = ["upper left, 漢字 😀\t\r\n\n x", "\n- H\n-", "".join(map(chr, range(32, 256)))]
    for text in (*texts, *words()):
        assert CHAT.decode(CHAT.encode(text), skip_special=False) == text


def test_the_folder_holds_the_vocabulary_of_todays_prompts() -> None:
    made = make_tokenizer()
    assert {made.id_to_token(index) for index in range(made.get_vocab_size())} == set(
        CHAT._parts.vocabulary.token_ids()
    )
    for symbol in SYMBOLS:
        assert all(len(CHAT.encode(token)) == 1 for token in drawn(symbol))


def test_training_reads_what_the_project_asks() -> None:
    rng, draws = Random(5), sampler()
    tree = draws.game(rng, hidden=True)
    answer = tree.answers[-1]
    read = tree.trunk[: answer.fork] + answer.tokens[: answer.given]
    text = CHAT.decode(read, skip_special=False)
    assert text.startswith(USER)
    assert text.endswith("<|assistant|>")
    question = text.removeprefix(USER).removesuffix("<|assistant|>")
    assert list(CHAT.render(({"role": "user", "content": question},))) == read


def test_notes_and_their_asking_are_those_of_the_configuration() -> None:
    setting = draw_setting(Random(2), maps()["train"][0], 8, hidden=True)
    notes = list(setting.facts().values())
    config = OmegaConf.load(ROOT / "conf/context/experience_games.yaml")
    context = ExperienceContext(path=None, items=notes, lineage={}, template=config.template)
    turn = setting.game(maps()["train"][0]).turn(context.context("", 0))
    asked = turn.teacher_messages[-1]["content"]
    assert all(f"\n- {note}\n" in asked for note in notes)
    prompt = OmegaConf.load(ROOT / "conf/recipe/demo_games.yaml").experience.extraction.prompt
    assert ExtractionConfig.filled(_Prompt(prompt), "T", "O", "") == prompt.format(
        trace="T", outcome="O"
    )


class _Prompt:
    def __init__(self, prompt: str) -> None:
        self.prompt = prompt


@pytest.mark.parametrize(
    ("board", "known", "expected"),
    [
        (  # P . .   the second row is reached by the first column alone
            LAKE,
            {"hole"},
            "you right right / down hole hole / down down down",
        ),
        (LAKE, {"up"}, "you - - / - - - / - - -"),
        (
            ROOM,
            {"goal"},
            "- - - - / - you right - / - push right - / down down down down",
        ),
        (ROOM, {"up"}, "- - - - / - you right - / - - right - / - - - -"),
    ],
)
def test_a_cell_names_what_the_notes_tell_of_it(
    board: Board, known: set[str], expected: str
) -> None:
    short = {GAMES[0]: "you", "never step on": "hole", " onto": "onto", None: "-"}
    names = [short.get(mark, str(mark).removesuffix(" [")) for mark in marks(board, board, known)]
    assert names == expected.replace("/ ", "").split()


@pytest.mark.parametrize("game", ["lake", "room"])
def test_marks_stand_on_the_cells_of_the_board(game: str) -> None:
    for seed in range(20):
        for answer in sampler(game).lesson(Random(seed), 6, hidden=True).answers:
            size = {"lake": 4, "room": 6}[game]
            assert answer.given == size * size + 2  # `Board:`, the cells, the assistant's mark
            assert all(0 < place <= size * size for place in answer.marks)


@pytest.mark.parametrize("kind", ["game", "extraction"])
@pytest.mark.parametrize("game", ["lake", "room"])
def test_in_a_game_the_player_names_the_move_that_led_there(game: str, kind: str) -> None:
    named = 0
    for seed in range(20):
        tree = getattr(sampler(game), kind)(Random(seed), hidden=False)
        seen, names = ([CHAT.decode([ids]) for ids in column] for column in _marked(tree))
        assert all(cell.strip() in SYMBOLS for cell in seen)
        moves = [name for cell, name in zip(seen, names, strict=True) if cell[-1] in "P+"]
        assert moves[0] == GAMES[0]
        assert set(moves[1:]) <= {GAMES[0], *(f"{direction} [" for direction in STEPS)}
        named += sum(name != GAMES[0] for name in moves)
    assert named > 20


def _marked(tree: Tree) -> tuple[list[int], list[int]]:
    return [tree.trunk[place] for place in tree.marks], list(tree.marks.values())


def test_a_board_that_is_held_back_is_shown_in_no_lesson() -> None:
    start = rooms()["train"][0]
    others = [b for boards in open_boards(start).values() for b in boards if b != start]
    shown = Maps(boards=[start], rounds=6, weight=1.0, held_back=set(others))
    draws = Sampler(make_tokenizer(), [shown])
    answers = [a for seed in range(30) for a in draws.lesson(Random(seed), 6, hidden=False).answers]
    drawings = {CHAT.decode(answer.tokens[: answer.given]) for answer in answers}
    assert len(drawings) == 1 < len(others)


def test_an_answer_of_a_tree_is_scored_as_its_own_sequence() -> None:
    checkpoint = open_model(str(MODEL))
    weights: Weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    together = losses(checkpoint.config, weights, make_batch(trees()))
    place = 0
    for tree in trees():
        place += len(tree.marks)
        for answer in tree.answers:
            alone = Tree(trunk=tree.trunk[: answer.fork], answers=[_answer(answer, answer.fork)])
            expected = losses(checkpoint.config, weights, make_batch([alone]))
            found = together[place : place + len(expected)]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            place += len(expected)
    assert place == len(together)


def _answer(answer: Answer, fork: int) -> Answer:
    return Answer(fork=fork, tokens=answer.tokens, given=answer.given, marks=answer.marks)


def test_training_has_no_map_letter_or_symbol_that_is_held_out() -> None:
    rng = Random(4)
    for _ in range(200):
        setting = draw_setting(rng, maps()["train"][0], 8, hidden=True)
        assert not held_out("controls", setting.controls.values())
        assert not held_out("symbols", setting.symbols.values())


@pytest.mark.parametrize("name", ["lake_a", "lake_b", "room_a"])
def test_the_demos_letters_and_symbols_are_held_out(name: str) -> None:
    task = OmegaConf.load(ROOT / f"conf/task/hidden_{name}.yaml")
    roles = ROOM_LETTERS if name == "room_a" else LETTERS
    assert held_out("controls", [task.controls[direction][0] for direction in STEPS])
    assert held_out("symbols", [task.symbols[role] for role in roles])


def test_the_demos_rooms_are_those_that_training_keeps_back() -> None:
    task = OmegaConf.load(ROOT / "conf/task/hidden_room_a.yaml")
    counts = {name: task[name] for name in ("rounds", "num_validation", "num_test")}
    assert build("sokoban", **counts).maps == room(400, 0).maps


def test_a_good_move_comes_nearer() -> None:
    lake = FrozenLake(size=3, holes=frozenset({(0, 1), (2, 1)}))
    assert good_moves(lake, lake) == ["down"]


@pytest.mark.parametrize("hidden", [False, True])
def test_the_model_wins_by_notes_of_what_it_never_met_and_not_without(hidden: bool) -> None:
    boards = maps()["test"][:12]
    assert trial().win_rate(boards, 8, about=None, hidden=hidden) >= 0.7
    assert trial().win_rate(boards[:6], 8, about=(), hidden=hidden) <= 0.2


def test_the_model_pushes_by_notes_of_what_it_never_met() -> None:
    boards = room(400, 0).maps["test"][:12]
    assert trial().win_rate(boards, 6, about=None, hidden=True) >= 0.6


def test_the_model_writes_what_is_mostly_right_of_usual_symbols() -> None:
    items = trial().items(maps()["validation"][:16], 8, hidden=False)
    assert items.num_without <= 8  # 8 of 40 games; the bars leave room for chance
    assert items.num_right / items.num_written >= 0.6  # 38 of 42


def test_the_model_writes_which_symbol_is_a_hole_whatever_it_is() -> None:
    items = trial().items(maps()["validation"][:16], 8, hidden=True)
    right, written = items.kinds["never"]
    assert right / written >= 0.7  # 17 of 17 in 40 games
