"""Boards, rules, multi-turn episodes and map-level splits of the games."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any, get_args

import pytest
from omegaconf import OmegaConf

from opcd_nemo.config.plugs import build_plug, check_plug
from opcd_nemo.context.sources import Context
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose
from opcd_nemo.tasks.games.boards import STEPS, Board, Direction, draw, images, solve
from opcd_nemo.tasks.games.frozen_lake import FrozenLake, frozen_lake_maps
from opcd_nemo.tasks.games.rules import Play, Rules, make_rules, random_win_rate
from opcd_nemo.tasks.games.sokoban import Sokoban, sokoban_maps
from opcd_nemo.tasks.games.task import GameEpisode, GameTask
from opcd_nemo.types import Split
from tests.tiny import write_chat_tokenizer

CONF = Path(__file__).parents[3] / "conf"
SPLITS: tuple[Split, ...] = get_args(Split)
NO_CONTEXT = Context(system=None, demonstrations=())
NOTES = Context(system="Walk around H.", demonstrations=())
CONTROLS = {
    "up": ["up", "w"],
    "down": ["down", "s"],
    "left": ["left", "a"],
    "right": ["right", "d"],
}
LETTERS = {"player": "P", "goal": "G", "hole": "H", "ice": "."}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lake 3x3": ("frozen_lake", {}),
    "lake 4x4": ("frozen_lake", {"size": 4, "num_holes": 4, "rounds": 8, "num_test": 80}),
    "lake 6x6, drawn": (
        "frozen_lake",
        {"size": 6, "num_holes": 8, "rounds": 12, "num_maps": 40},
    ),
    "room 6x6": ("sokoban", {"num_maps": 60, "num_validation": 10, "num_test": 20}),
    "room 7x7, two boxes": (
        "sokoban",
        {"size": 7, "num_boxes": 2, "rounds": 6, "num_maps": 12, "num_test": 4}
        | {"num_validation": 2},
    ),
}


def plug(name: str, **changes: Any) -> dict[str, Any]:
    config = OmegaConf.create({"seed": 1, "task": OmegaConf.load(CONF / f"task/{name}.yaml")})
    settings: Any = OmegaConf.to_container(config, resolve=True)
    return {**settings["task"], **changes}


def build(name: str = "frozen_lake", **changes: Any) -> GameTask:
    settings = plug(name, **changes)
    check_plug("task", settings)
    task: GameTask = build_plug(settings)
    return task


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> tuple[GameTask, dict[str, Any]]:
    name, changes = SETTINGS[request.param]
    return build(name, **changes), plug(name, **changes)


def all_maps(task: GameTask) -> list[Board]:
    return [board for split in SPLITS for board in task.maps[split]]


def uids(episodes: Sequence[Any]) -> list[str]:
    return [episode.uid for episode in episodes]


def question(episode: Any) -> str:
    (message,) = episode.turn(NO_CONTEXT).student_messages
    return str(message["content"])


def lake(*rows: str) -> FrozenLake:
    """A lake drawn in letters."""
    cells = {(i, j): letter for i, row in enumerate(rows) for j, letter in enumerate(row)}
    (player,) = (cell for cell, letter in cells.items() if letter == "P")
    holes = frozenset(cell for cell, letter in cells.items() if letter == "H")
    return FrozenLake(size=len(rows), holes=holes, player=player)


def room(*rows: str) -> Sokoban:
    cells = {(i, j): letter for i, row in enumerate(rows) for j, letter in enumerate(row)}

    def where(letters: str) -> frozenset[tuple[int, int]]:
        return frozenset(cell for cell, letter in cells.items() if letter in letters)

    (player,) = where("P+")
    return Sokoban(
        size=len(rows), walls=where("#"), boxes=where("X*"), targets=where("O*+"), player=player
    )


def rules(rounds: int = 5, controls: Any = CONTROLS) -> Rules:
    return make_rules(rounds, LETTERS, controls, won="P reached G.", lost="P stepped on H.")


def game(*rows: str, rounds: int = 5) -> GameEpisode:
    return GameEpisode(uid="u", board=lake(*rows), rules=rules(rounds))


def answered(episode: GameEpisode, *answers: str) -> GameEpisode:
    for answer in answers:
        episode.reply(answer)
    return episode


# The maps


def test_three_by_three_with_two_holes_has_nineteen_solvable_maps() -> None:
    pool = frozen_lake_maps(size=3, num_holes=2, rounds=99, num_maps=None, map_seed=0)
    assert (pool.num_layouts, len(pool.maps), pool.complete) == (comb(7, 2), 19, True)
    assert {len(solve(board, 99) or ()) for board in pool.maps} == {4}
    report = build().report()
    assert (report["layouts"], report["maps"], report["maps_overlap"]) == (21, 19, 0)


def test_four_by_four_with_four_holes_has_757() -> None:
    pool = frozen_lake_maps(size=4, num_holes=4, rounds=16, num_maps=None, map_seed=0)
    assert (pool.num_layouts, len(pool.maps)) == (comb(14, 4), 757)


def test_every_map_is_won_by_the_solver_within_the_rounds(
    setting: tuple[GameTask, dict[str, Any]],
) -> None:
    task, settings = setting
    shortest = settings.get("min_moves", 2 * (settings["size"] - 1))
    for split in SPLITS:
        for episode in task.episodes(split, 0, len(task.maps[split])):
            assert isinstance(episode, GameEpisode)
            moves = solve(episode.play.board, settings["rounds"])
            assert moves is not None
            assert shortest <= len(moves) <= settings["rounds"], episode.uid
            for place, move in enumerate(moves):
                assert not episode.done
                episode.reply(f"I go [{settings['controls'][move][place % 2]}].")
            assert episode.done
            assert episode.score() == 1.0
            assert episode.outcome.startswith("The game is won: ")


def test_the_solver_finds_no_longer_way_than_any_walk_that_wins() -> None:
    draw_moves = random.Random(0)
    boards = all_maps(build("sokoban", num_maps=20, num_validation=5, num_test=5))
    wins = 0
    for board in boards:
        best = len(solve(board, 5) or ())
        for _ in range(200):
            reached: Board | None = board
            for length in range(1, 6):
                before = reached
                assert before is not None
                reached = before.moved(draw_moves.choice(list(STEPS))) or before
                if reached.won:
                    assert length >= best
                    wins += 1
                    break
    assert wins > 20


def test_a_map_without_a_way_is_not_solved() -> None:
    assert solve(lake("PH.", "H..", "..G"), 50) is None
    assert solve(lake("P..", "...", "..G"), 3) is None
    assert solve(lake("P..", "...", "..G"), 4) is not None
    assert solve(room("#####", "#X_P#", "#___#", "#__O#", "#####"), 50) is None


def test_the_splits_share_no_map_and_hold_them_all(
    setting: tuple[GameTask, dict[str, Any]],
) -> None:
    task, settings = setting
    names = {split: {board.name for board in task.maps[split]} for split in SPLITS}
    drawings = {draw(board, settings["symbols"]) for board in all_maps(task)}
    assert all(len(names[split]) == len(task.maps[split]) > 0 for split in SPLITS)
    assert len(set().union(*names.values())) == sum(map(len, names.values())) == len(drawings)
    report = task.report()
    assert report["maps"] == len(drawings)
    assert report["maps_overlap"] == 0
    assert report["maps_test"] == settings["num_test"]


def test_a_board_has_eight_images_and_their_solutions_are_as_long() -> None:
    board = room("#####", "#PX_#", "#__O#", "#___#", "#####")
    names = images(board.name)
    assert len(names) == 8
    assert all(images(name) == names for name in names)
    lengths = {len(solve(room(*name.split("-")), 9) or ()) for name in names}
    assert lengths == {len(solve(board, 9) or ())}
    assert images("P.-.G") >= {"P.-.G", "G.-.P"}
    assert len(images("P.-.G")) == 4


def test_test_maps_that_mirror_a_training_map_are_counted() -> None:
    task = build()
    train = {board.name for board in task.maps["train"]}
    twins = [
        "-".join(map("".join, zip(*board.name.split("-"), strict=True))) in train
        for board in task.maps["test"]
    ]
    assert task.report()["maps_test_mirrored"] == sum(twins) == 4


def test_an_overlap_would_be_reported() -> None:
    task = build()
    task.maps["test"] = [*task.maps["test"], *task.maps["train"][:2]]
    assert task.report()["maps_overlap"] == 2


def test_maps_and_splits_do_not_depend_on_the_seed_of_the_run() -> None:
    for name, changes in (SETTINGS["lake 3x3"], SETTINGS["room 6x6"]):
        one, other = build(name, **changes), build(name, **changes, seed=9)
        assert one.maps == other.maps
        assert uids(one.episodes("test", 0, 5)) == uids(other.episodes("test", 7, 5))
        assert uids(one.episodes("train", 0, 8)) != uids(other.episodes("train", 0, 8))


def test_another_map_seed_draws_other_rooms() -> None:
    drawn = [
        sokoban_maps(
            size=6, num_boxes=1, num_walls=2, min_moves=3, rounds=5, num_maps=20, map_seed=seed
        ).maps
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_the_first_maps_of_each_game_stay_what_they_are() -> None:
    assert build().maps["test"][0].name == "P..-.HH-..G"
    assert build("sokoban").maps["test"][0].name == "######-#_OX_#-##_P_#-#____#-#__#_#-######"


# Draws


@pytest.mark.parametrize("n", [1, 3, 10])
def test_no_training_map_comes_twice_in_an_epoch(n: int) -> None:
    task = build()
    num_batches = 10 // n
    for epoch in range(2):
        steps = range(epoch * num_batches, (epoch + 1) * num_batches)
        drawn = [uid for step in steps for uid in uids(task.episodes("train", step, n))]
        assert len(set(drawn)) == len(drawn) == n * num_batches


@pytest.mark.parametrize("repeat_maps", [False, True])
def test_training_maps_are_pure_in_seed_and_step(repeat_maps: bool) -> None:
    later_first = build(repeat_maps=repeat_maps)
    later = uids(later_first.episodes("train", 50, 8))
    first = uids(later_first.episodes("train", 0, 8))
    in_order = build(repeat_maps=repeat_maps)
    drawn = [uids(in_order.episodes("train", step, 8)) for step in range(51)]
    assert (drawn[0], drawn[50]) == (first, later)
    assert len({tuple(batch) for batch in drawn}) > 40


def test_repeated_maps_come_equally_often_under_uids_of_their_own() -> None:
    task = build(repeat_maps=True)
    batches = [uids(task.episodes("train", step, 25)) for step in range(4)]
    assert all(len(set(batch)) == 25 for batch in batches)
    names = [uid.split("/")[1] for batch in batches for uid in batch]
    assert {names.count(name) for name in names} == {10}
    held_out = task.episodes("test", 0, 12)
    assert uids(held_out)[5] == f"{held_out[0].uid}/1"
    assert uids(held_out)[10] == f"{held_out[0].uid}/2"
    assert [task.unit_of(uid) for uid in uids(held_out)[::5]] == [held_out[0].uid] * 3
    assert question(held_out[5]) == question(held_out[0])


def test_an_anchor_is_a_question_whose_teacher_reads_no_context() -> None:
    (anchor,) = build().anchors(0, 1)
    turn = anchor.turn(NOTES)
    assert turn.student_messages == turn.teacher_messages


# How answers are read


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("[up]", "up"),
        ("I think [left] is bad, so [right].", "right"),
        ("<think>[up] or [down]?</think> [a]", "a"),
        ("[UP]", "up"),
        ("[ Down ]", "down"),
        ("**[w]**", "w"),
        ("[[s]]", "s"),
        ("[down] since [this] is best", "down"),
        ("[up][left]", "left"),
        ("[d", None),
        ("up", None),
        ("(up)", None),
        ("[up left]", None),
        ("[north]", None),
        ("[]", None),
        ("", None),
        ("[" * 50_000, None),
    ],
)
def test_the_last_bracketed_legal_action_of_the_whole_answer_counts(
    answer: str, word: str | None
) -> None:
    assert rules().action(answer) == word


def test_words_and_letters_are_the_same_moves() -> None:
    for direction, words in CONTROLS.items():
        for word in words:
            assert rules().actions[word] == direction


def test_controls_may_be_others_than_they_say() -> None:
    hidden = rules(controls={"up": ["d"], "down": ["w"], "left": ["s"], "right": ["a"]})
    episode = GameEpisode(uid="u", board=lake("P..", "...", "..G"), rules=hidden)
    answered(episode, "[up] [w]", "[w]", "[a]", "[a]")
    assert episode.score() == 1.0
    # the order of the words in the prompt does not tell which is which
    straight = rules(controls={"up": ["w"], "down": ["s"], "left": ["a"], "right": ["d"]})
    assert hidden.opening == straight.opening


# Moves, and how a game ends


def test_the_lake_holds_edges_holes_and_the_goal() -> None:
    board = lake("PH.", "...", "..G")
    assert board.moved("up") is None
    assert board.moved("left") is None
    into = board.moved("right")
    assert into is not None
    assert (into.lost, into.won) == (True, False)
    down = board.moved("down")
    assert down is not None
    assert down.name == ".H.-P..-..G"


@pytest.mark.parametrize(
    ("before", "direction", "after"),
    [
        ("#####-#P__#-#_XO#-#___#-#####", "down", "#####-#___#-#PXO#-#___#-#####"),
        ("#####-#___#-#PXO#-#___#-#####", "right", "#####-#___#-#_P*#-#___#-#####"),
        ("#####-#___#-#P*_#-#___#-#####", "right", "#####-#___#-#_+X#-#___#-#####"),
        ("#####-#___#-#_PX#-#__O#-#####", "right", None),
        ("#####-#___#-#P__#-#__O#-#####", "left", None),
        ("#####-#OO_#-#PXX#-#___#-#####", "right", None),
    ],
)
def test_boxes_are_pushed_one_at_a_time_and_not_through_walls(
    before: str, direction: Direction, after: str | None
) -> None:
    board = room(*before.split("-"))
    assert board.name == before
    moved = board.moved(direction)
    assert (None if moved is None else moved.name) == after


def test_every_move_of_a_room_keeps_walls_targets_and_the_number_of_boxes() -> None:
    draw_moves = random.Random(1)
    for board in all_maps(build("sokoban", num_maps=30, num_validation=5, num_test=5)):
        assert isinstance(board, Sokoban)
        reached = board
        for _ in range(40):
            reached = reached.moved(draw_moves.choice(list(STEPS))) or reached
            assert (reached.walls, reached.targets) == (board.walls, board.targets)
            assert len(reached.boxes) == 1
            assert not reached.boxes & reached.walls
            assert reached.player not in reached.boxes | reached.walls


def test_one_invalid_move_is_tolerated_and_uses_a_round() -> None:
    episode = answered(game("P..", "...", "..G"), "[up]", "[right]", "[right]", "[down]")
    assert not episode.done
    assert answered(episode, "[down]").score() == 1.0


@pytest.mark.parametrize("first", ["[up]", "no move"])
@pytest.mark.parametrize("second", ["[left]", "nor here"])
def test_two_invalid_moves_in_a_row_end_the_game(first: str, second: str) -> None:
    episode = answered(game("P..", "...", "..G"), first)
    assert not episode.done
    answered(episode, second)
    assert episode.done
    assert (episode.play.ending, episode.score()) == ("invalid", 0.0)
    assert "times in a row" in episode.outcome


def test_a_valid_move_resets_the_count() -> None:
    answers = ["[up]", "[right]", "[up]", "[left]", "[up]"]
    episode = answered(game("P..", "...", "..G", rounds=6), *answers)
    assert not episode.done
    assert answered(episode, "?").play.ending == "invalid"


def test_a_hole_and_the_last_round_end_the_game_with_a_reason() -> None:
    hole = answered(game("PH.", "...", "..G"), "[right]")
    assert (hole.score(), hole.outcome) == (0.0, "The game is lost: P stepped on H.")
    late = answered(game("P..", "...", "..G"), *["[right]", "[left]"] * 2, "[down]")
    assert (late.score(), late.play.ending) == (0.0, "rounds")
    assert late.outcome == "The game is not won: all 5 moves are used."
    won = answered(game("P..", "...", "..G"), *["[right]", "[down]"] * 2)
    assert (won.score(), won.outcome) == (1.0, "The game is won: P reached G.")


def test_an_episode_that_is_done_takes_nothing_more_and_has_no_score_before() -> None:
    episode = game("PH.", "...", "..G")
    with pytest.raises(AssertionError):
        episode.score()
    with pytest.raises(AssertionError):
        _ = episode.outcome
    episode.reply("[right]")
    with pytest.raises(AssertionError):
        episode.reply("[down]")
    with pytest.raises(AssertionError):
        episode.turn(NO_CONTEXT)


# What the players read


def test_a_turn_shows_the_game_and_no_reasoning() -> None:
    episode = answered(game("P..", ".H.", "..G"), "my secret thought [right]", "hmm")
    text = question(episode)
    assert text == episode.transcript()
    assert "secret" not in text
    assert text.endswith(
        "Board:\nP . .\n. H .\n. . G\n\nMove: [right]\n\nBoard:\n. P .\n. H .\n. . G\n\n"
        "Move: none was found in the answer.\n\nBoard:\n. P .\n. H .\n. . G"
    )
    answered(episode, "[up]")
    assert "Move: [up]\nThat move cannot be made." in episode.transcript()
    assert episode.transcript().endswith(". P .\n. H .\n. . G")


def test_student_and_teacher_differ_by_the_context_alone() -> None:
    episode = build().episodes("train", 0, 1)[0]
    for answer in ("[up]", "[right]", "[down]"):
        turn = episode.turn(NOTES)
        (message,) = turn.student_messages
        assert message["role"] == "user"
        assert turn.teacher_messages == NOTES.messages(message["content"])
        if not episode.done:
            episode.reply(answer)
        if episode.done:
            break


@pytest.mark.parametrize("name", ["frozen_lake", "sokoban"])
def test_the_opening_explains_no_symbol_and_no_rule(name: str) -> None:
    settings = plug(name)
    episode = build(name).episodes("test", 0, 1)[0]
    opening = question(episode).split("Board:")[0]
    for hint in ("hole", "ice", "box", "push", "wall", "target", "floor", "lose", "lost", "round"):
        assert hint not in opening.lower()
    shown = set(re.findall(r"\[(\w+)\]", opening))
    assert shown == {word for words in settings["controls"].values() for word in words}


def test_symbols_may_be_any_characters() -> None:
    signs = {"player": "@", "goal": "?", "hole": "%", "ice": "~"}
    letters, other = build(), build(symbols=signs)
    for mine, theirs in zip(
        letters.episodes("test", 0, 5), other.episodes("test", 0, 5), strict=True
    ):
        assert mine.uid == theirs.uid
        board = question(mine).split("Board:\n")[1]
        for name, sign in signs.items():
            board = board.replace(LETTERS[name], sign)
        assert question(theirs).split("Board:\n")[1] == board
        assert "you are the @" in question(theirs)
        for _ in range(2):
            theirs.reply("none")
    loser = GameEpisode(
        uid="u",
        board=lake("PH.", "...", "..G"),
        rules=other.episodes("test", 0, 1)[0]._rules,  # type: ignore[attr-defined]
    )
    assert answered(loser, "[d]").outcome == "The game is lost: @ stepped on %."


def test_no_turn_is_longer_than_the_longest(tmp_path: Path) -> None:
    from opcd_nemo.formats.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.from_path(str(write_chat_tokenizer(tmp_path)))
    answers = ["[up]", "[down]", "[left]", "[right]", "[d]", "none"]
    draw_answers = random.Random(0)

    def tokens(messages: Any) -> int:
        return len(tokenizer.render(messages))

    closest = 0.0
    for _ in range(60):
        episode = game("P..", "...", "..G")
        longest = tokens(episode.longest_turn(NOTES).teacher_messages)
        while not episode.done:
            now = tokens(episode.turn(NOTES).teacher_messages)
            assert now <= longest
            assert tokens(episode.longest_turn(NOTES).teacher_messages) <= longest
            closest = max(closest, now / longest)
            episode.reply(draw_answers.choice(answers))
    assert closest > 0.7


# A random player


def test_the_random_rate_is_that_of_played_games() -> None:
    player = random.Random(0)
    board = lake("P..", "...", "..G")
    exact = random_win_rate(Play(board=board, rounds_left=5, invalid_moves=0))
    wins = 0
    for _ in range(20_000):
        episode = GameEpisode(uid="u", board=board, rules=rules())
        while not episode.done:
            episode.reply(f"[{player.choice('wasd')}]")
        wins += episode.score() == 1.0
    assert abs(wins / 20_000 - exact) < 4 * (exact * (1 - exact) / 20_000) ** 0.5
    # six ways of four moves; one round more wins by one bump before, between or after them
    assert random_win_rate(Play(board=board, rounds_left=4, invalid_moves=0)) == 6 / 4**4


@pytest.mark.parametrize("name", ["frozen_lake", "sokoban"])
def test_a_random_player_wins_under_three_games_in_a_hundred(name: str) -> None:
    report = build(name).report()
    for split in SPLITS:
        assert 0 < report[f"random_win_rate_{split}"] < 0.03


# Settings that cannot be


def with_word(**changes: Any) -> dict[str, Any]:
    return {"controls": {**copy.deepcopy(CONTROLS), **changes}}


BAD = [
    ("frozen_lake", {"size": 1}, "task.size", "2 or more"),
    ("frozen_lake", {"num_holes": 8}, "task.num_holes", "0 to 7"),
    ("frozen_lake", {"num_holes": -1}, "task.num_holes", "0 to 7"),
    ("frozen_lake", {"rounds": 3}, "task.rounds", "4 or more"),
    ("frozen_lake", {"num_holes": 7}, "task.num_maps", "at most 0, or a setting with more maps"),
    ("frozen_lake", {"num_maps": 20}, "task.num_maps", "at most 19"),
    ("frozen_lake", {"num_maps": 2}, "task.num_maps", "3 or more"),
    ("frozen_lake", {"num_maps": "all"}, "task.num_maps", "3 or more"),
    ("frozen_lake", {"size": 8, "rounds": 16, "num_holes": 10}, "task.num_maps", "a number of map"),
    ("frozen_lake", {"num_test": 0}, "task.num_test", "1 or more"),
    ("frozen_lake", {"num_test": 15}, "task.num_validation + task.num_test", "fewer than that"),
    ("frozen_lake", {"symbols": {"player": "P"}}, "task.symbols", "a mapping with the keys player"),
    ("frozen_lake", {"symbols": None}, "task.symbols", "a mapping with the keys player, goal, h"),
    ("frozen_lake", {"symbols": LETTERS | {"ice": "P"}}, "task.symbols.player", "a visible"),
    ("frozen_lake", {"symbols": LETTERS | {"ice": "ab"}}, "task.symbols.ice", "a visible"),
    ("frozen_lake", {"symbols": LETTERS | {"ice": " "}}, "task.symbols.ice", "a visible character"),
    ("frozen_lake", {"symbols": LETTERS | {"ice": 1}}, "task.symbols.ice", "a visible character"),
    ("frozen_lake", {"controls": {"up": ["w"]}}, "task.controls", "a mapping with the keys up, do"),
    ("frozen_lake", with_word(up="w"), "task.controls.up", "a list"),
    ("frozen_lake", with_word(up=[]), "task.controls.up", "a list"),
    ("frozen_lake", with_word(up=["UP"]), "task.controls.up", "words in lower case"),
    ("frozen_lake", with_word(up=["s"]), "task.controls.down", "words in lower case"),
    ("frozen_lake", with_word(up=["[w]"]), "task.controls.up", "words in lower case"),
    ("frozen_lake", with_word(up=[True]), "task.controls.up", "words in lower case"),
    ("sokoban", {"size": 3}, "task.size", "4 or more"),
    ("sokoban", {"num_boxes": 0}, "task.num_boxes", "1 to 7"),
    ("sokoban", {"num_walls": 14}, "task.num_walls", "0 to 13"),
    ("sokoban", {"rounds": 0}, "task.rounds", "1 or more"),
    ("sokoban", {"min_moves": 6}, "task.min_moves", "1 to task.rounds=5"),
    ("sokoban", {"size": 4, "num_walls": 0}, "task.num_maps", "at most 0"),
]


@pytest.mark.parametrize(("name", "changes", "key", "allowed"), BAD)
def test_a_bad_setting_is_refused_by_its_key(
    name: str, changes: dict[str, Any], key: str, allowed: str
) -> None:
    with pytest.raises(UserError) as caught:
        build(name, **changes)
    assert caught.value.key == key
    assert caught.value.allowed.startswith(allowed)


def test_what_is_wrong_with_a_number_of_maps_is_told() -> None:
    with pytest.raises(UserError, match=r"^task.num_maps=20: 19 maps .* in 21 different layouts;"):
        build(num_maps=20)


@pytest.mark.parametrize(("split", "allowed"), [("train", 10), ("validation", 4), ("test", 5)])
def test_more_episodes_than_maps_are_refused_unless_maps_repeat(split: Split, allowed: int) -> None:
    with pytest.raises(UserError) as refused:
        build().episodes(split, 0, allowed + 1)
    error = refused.value
    assert (error.where, error.key, error.value) == (split, "n", allowed + 1)
    assert error.allowed == f"1 to {allowed} (each map once), or task.repeat_maps=true"
    assert len(build(repeat_maps=True).episodes(split, 0, allowed + 1)) == allowed + 1
    with pytest.raises(UserError, match=f"^{split}: n=0; allowed: 1 to {allowed}$"):
        build(repeat_maps=True).episodes(split, 0, 0)


@pytest.mark.parametrize("name", ["frozen_lake", "sokoban"])
def test_the_command_line_reaches_symbols_and_controls(name: str) -> None:
    composed: Any = OmegaConf.to_container(
        compose("train", [f"task={name}", "task.symbols.player=@", "task.controls.up=[u]"]).task,
        resolve=True,
    )
    check_plug("task", composed)
    (episode,) = build_plug(composed).episodes("test", 0, 1)
    assert "you are the @" in question(episode)
    assert "[u]" in question(episode)


def test_a_hint_is_read_by_student_and_teacher() -> None:
    episode = build(hint="Notes: none.").episodes("test", 0, 1)[0]
    context = Context(system="Look.", demonstrations=())
    turn = episode.turn(context)
    opening, hint, board = turn.student_messages[-1]["content"].split("\n\n")
    assert hint == "Notes: none."
    assert (opening[-1], board[:6]) == (".", "Board:")
    assert turn.teacher_messages[-1] == turn.student_messages[-1]
    bare = build().episodes("test", 0, 1)[0].turn(context)
    assert "Notes" not in bare.student_messages[-1]["content"]
