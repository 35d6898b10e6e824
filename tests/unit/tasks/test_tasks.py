"""Style tasks: splits, draws, episodes and verifiers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from opcd_nemo.config.plugs import makes
from opcd_nemo.config.stored import STORED_CLASSES
from opcd_nemo.context.sources import Context
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.tasks.prompts import ANCHORS, CAPITALS, NOUNS, TEMPLATES
from opcd_nemo.tasks.questions import capitals
from opcd_nemo.tasks.replay import ReplayTask
from opcd_nemo.tasks.system_prompt import StyleTask
from opcd_nemo.tasks.verifiers import (
    VERIFIERS,
    is_brief,
    is_bullets,
    is_json,
    is_pirate,
    mentions,
)
from opcd_nemo.types import Split

CONF = Path(__file__).parents[3] / "conf"
NUM_PROMPTS: dict[Split, int] = {"train": 440, "validation": 64, "test": 200}
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
STYLED = {
    "brevity": "A bridge crosses a river.",
    "bullets": "- one\n- two\n- three",
    "json": '{"answer": "It rings."}',
    "pirate": "Aye, matey.",
}
PIRATE = Context(system="Talk like a pirate.", demonstrations=())


def _task(verifier: str = "brevity", seed: int = 1) -> Task:
    return StyleTask(verifier=verifier, seed=seed)


def _retention(n: int) -> list[Episode]:
    return capitals().episodes("test", 0, n)


def _uids(episodes: list[Episode]) -> list[str]:
    return [episode.uid for episode in episodes]


def _question(episode: Episode) -> str:
    (message,) = episode.turn(PIRATE).student_messages
    return message["content"]


def _questions(episodes: list[Episode]) -> set[str]:
    return {_question(episode) for episode in episodes}


def _nouns(split: Split) -> set[str]:
    return {uid.split("/")[2] for uid in _uids(_task().episodes(split, 0, NUM_PROMPTS[split]))}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_the_splits_share_no_noun_and_use_them_all() -> None:
    train, validation, test = map(_nouns, SPLITS)
    assert (len(train), len(validation), len(test)) == (110, 16, 50)
    assert train | validation | test == set(NOUNS)
    assert len(set(NOUNS)) == 176


def test_no_noun_begins_one_of_another_split() -> None:
    split_of = {noun: split for split in SPLITS for noun in _nouns(split)}
    begun = [(a, b) for a in NOUNS for b in NOUNS if a != b and b.startswith(a)]
    assert begun, "the list holds compounds such as wheel and wheelbarrow"
    assert not [pair for pair in begun if split_of[pair[0]] != split_of[pair[1]]]


CONTEXTS = [  # but those whose words are a user's, or a registry's
    path
    for path in sorted((CONF / "context").glob("*.yaml"))
    if "???" not in path.read_text() and not path.stem.startswith("experience")
]


def test_no_demonstration_speaks_of_a_noun() -> None:
    for path in CONTEXTS:
        messages = instantiate(OmegaConf.load(path)).context("uid", 0).messages("")
        spoken = _words(" ".join(message["content"] for message in messages))
        assert not {noun for noun in NOUNS if noun in spoken or f"{noun}s" in spoken}, path


def test_anchors_are_no_test_or_retention_prompts_and_name_no_noun() -> None:
    task = _task()
    anchors = _questions(task.anchors(0, len(ANCHORS)))
    assert len(anchors) == len(ANCHORS) == 96
    assert not anchors & _questions(_retention(len(CAPITALS)))
    for split in SPLITS:
        assert not anchors & _questions(task.episodes(split, 0, NUM_PROMPTS[split]))
    spoken = _words(" ".join(anchors))
    assert not spoken & set(NOUNS)
    for name in ["capital", *CAPITALS, *CAPITALS.values()]:
        assert not [anchor for anchor in anchors if mentions(name, anchor)], name


def test_uids_are_unique_and_questions_too() -> None:
    task = _task()
    for split in SPLITS:
        episodes = task.episodes(split, 0, NUM_PROMPTS[split])
        assert len(set(_uids(episodes))) == len(_questions(episodes)) == NUM_PROMPTS[split]


def test_fifty_test_prompts_take_every_test_noun_once_and_the_templates_in_turn() -> None:
    uids = [uid.split("/") for uid in _uids(_task().episodes("test", 0, 50))]
    assert {noun for _, _, noun in uids} == _nouns("test")
    counts = [sum(name == template for _, name, _ in uids) for template in TEMPLATES]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_prompts_do_not_depend_on_seed_step_or_style(split: Split) -> None:
    wanted = _uids(_task().episodes(split, 0, 20))
    assert _uids(_task(verifier="json", seed=9).episodes(split, 5, 20)) == wanted
    assert _uids(_task().episodes(split, 0, 30))[:20] == wanted


@pytest.mark.parametrize("n", [1, 7, 8, 440])
def test_no_training_prompt_comes_twice_in_an_epoch(n: int) -> None:
    task = _task()
    num_batches = NUM_PROMPTS["train"] // n
    for epoch in range(2):
        steps = range(epoch * num_batches, (epoch + 1) * num_batches)
        drawn = [uid for step in steps for uid in _uids(task.episodes("train", step, n))]
        assert len(set(drawn)) == len(drawn) == n * num_batches


def test_training_prompts_are_pure_in_seed_and_step() -> None:
    later_first = _task()
    later = _uids(later_first.episodes("train", 100, 8))
    first = _uids(later_first.episodes("train", 0, 8))
    in_order = _task()
    drawn = [_uids(in_order.episodes("train", step, 8)) for step in range(101)]
    assert (drawn[0], drawn[100]) == (first, later)
    assert _uids(in_order.anchors(3, 4)) == _uids(later_first.anchors(3, 4))


def test_each_seed_and_each_epoch_has_its_own_order() -> None:
    orders = {
        tuple(_uids(_task(seed=seed).episodes("train", step, 440)))
        for seed in range(3)
        for step in range(3)
    }
    assert len(orders) == 9


def test_the_first_training_prompts_of_a_seed_stay_what_they_are() -> None:
    assert _uids(_task(seed=1).episodes("train", 0, 3)) == [
        "train/why/hinge",
        "train/why/spoon",
        "train/what/bicycle",
    ]


def test_anchors_come_once_an_epoch() -> None:
    task = _task()
    drawn = [uid for step in range(24) for uid in _uids(task.anchors(step, 4))]
    assert len(set(drawn)) == 96


@pytest.mark.parametrize("n", [0, -1, 10_000])
def test_a_wrong_number_of_prompts_names_both_numbers(n: int) -> None:
    task = _task()
    draws: dict[str, tuple[Callable[[], list[Episode]], int]] = {
        "train": (lambda: task.episodes("train", 0, n), 440),
        "validation": (lambda: task.episodes("validation", 0, n), 64),
        "test": (lambda: task.episodes("test", 0, n), 200),
        "retention": (lambda: _retention(n), 64),
        "anchors": (lambda: task.anchors(0, n), 96),
    }
    for name, (draw, allowed) in draws.items():
        split = "test" if name == "retention" else name
        with pytest.raises(UserError, match=f"{split}: n={n}; allowed: 1 to {allowed}"):
            draw()


def test_an_unknown_verifier_names_key_value_and_what_is_allowed() -> None:
    wanted = r"task\.verifier=haiku; allowed: brevity, bullets, json, pirate"
    with pytest.raises(UserError, match=wanted):
        _task(verifier="haiku")


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_each_configured_task_builds(verifier: str) -> None:
    config = OmegaConf.create({"seed": 1, "task": OmegaConf.load(CONF / f"task/{verifier}.yaml")})
    configured: Task = instantiate(config.task)
    drawn = configured.episodes("train", 2, 8)
    assert _uids(drawn) == _uids(_task(verifier).episodes("train", 2, 8))
    for episode, other in zip(drawn, _task(verifier).episodes("train", 2, 8), strict=True):
        episode.reply(STYLED[verifier])
        other.reply(STYLED[verifier])
        assert episode.score() == other.score() == 1.0


def test_student_and_teacher_differ_by_the_context_alone() -> None:
    task = _task()
    for episode in task.episodes("train", 0, 8) + _retention(8):
        turn = episode.turn(PIRATE)
        (message,) = turn.student_messages
        assert message["role"] == "user"
        assert turn.teacher_messages == PIRATE.messages(message["content"])


def test_the_teacher_of_an_anchor_sees_no_context() -> None:
    for episode in _task().anchors(0, 96):
        turn = episode.turn(PIRATE)
        assert turn.teacher_messages == turn.student_messages


def test_an_article_fits_its_noun() -> None:
    text = " ".join(_questions(_task().episodes("train", 0, 440)))
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)


def test_an_episode_takes_one_reply_and_then_a_score() -> None:
    (episode,) = _task(verifier="pirate").episodes("test", 0, 1)
    assert not episode.done
    with pytest.raises(AssertionError):
        episode.score()
    episode.reply("Aye, a fine thing.")
    assert episode.done
    assert episode.score() == 1.0
    with pytest.raises(AssertionError):
        episode.reply("Again.")
    with pytest.raises(AssertionError):
        episode.turn(PIRATE)


def test_an_anchor_has_no_score() -> None:
    (anchor,) = _task().anchors(0, 1)
    anchor.reply("Cold.")
    with pytest.raises(AssertionError):
        anchor.score()


def test_retention_is_scored_by_the_capital() -> None:
    for right, episode in zip(CAPITALS.values(), _retention(64), strict=True):
        episode.reply(f"It is {right}, I think.")
        assert episode.score() == 1.0
    for episode in _retention(64):
        episode.reply(_question(episode))
        assert episode.score() == 0.0, "an echo of the question"


TWENTY = (
    "A bridge is a long and strong thing that many people use to walk over a wide river every day."
)


@pytest.mark.parametrize(
    ("text", "brief"),
    [
        ("A bridge crosses a river.", True),
        ("  A bridge crosses a river!\n", True),
        ("Is it a bridge?", True),
        ('He said "a bridge crosses it."', True),
        ("It weighs 3.5 tons.", True),
        ("Dr. Smith, e.g., owns one.", True),
        ("It helps, i.e. it carries things.", True),
        (TWENTY, True),
        (TWENTY.replace("every day", "each single day"), False),
        ("It crosses - by day - a river.", True),
        ("", False),
        (" \n ", False),
        (".", False),
        ("...", False),
        ("A.", False),
        ("- - - .", False),
        ("It moves.", False),
        ("A bridge crosses a", False),
        ("A bridge crosses a...", False),
        ("A bridge crosses a…", False),
        ("A bridge crosses a river. It", False),
        ("A bridge crosses it. It is long.", False),
        ("A bridge crosses it.It is long.", False),
        ('"A bridge crosses it." It is long.', False),
        ("A bridge crosses it! and more.", False),
        ("A bridge crosses\na river.", False),
        ("A bridge:\n- it is long.", False),
    ],
)
def test_brief_is_one_whole_sentence_of_three_to_twenty_words(text: str, brief: bool) -> None:
    assert is_brief(text) is brief


def test_the_longest_brief_sentence_has_twenty_words() -> None:
    assert len(TWENTY.split()) == 20


@pytest.mark.parametrize(
    ("text", "bullets"),
    [
        ("- one\n- two\n- three", True),
        ("* one\n* two\n* three", True),
        ("• one\n• two\n• three", True),
        ("- one\n* two\n• three", True),
        ("Here they are:\n\n  - one\n\n  - two\n\n  - three\nThat is all.", True),
        ("- one\r\n- two\r\n- three", True),
        ("- one\n- two\n- thr", True),
        ("- one\n- one\n- one", True),
        ("", False),
        ("- one\n- two", False),
        ("- one\n- two\n-", False),
        ("- one\n- two\n- ", False),
        ("- one\n- two\n- -", False),
        ("-one\n-two\n-three", False),
        ("1. one\n2. two\n3. three", False),
        ("**one**\n**two**\n**three**", False),
        ("- one - two - three", False),
        ("---\n---\n---", False),
    ],
)
def test_bullets_are_three_marked_lines(text: str, bullets: bool) -> None:
    assert is_bullets(text) is bullets


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"answer": "It rings."}', True),
        (' {"answer": "It rings.", "source": null}\n', True),
        ('{"answer": "Ça sonne."}', True),
        ('{"answer": ""}', False),
        ('{"answer": " "}', False),
        ('{"answer": null}', False),
        ('{"answer": 4}', False),
        ('{"answer": ["It rings."]}', False),
        ('{"Answer": "It rings."}', False),
        ('["answer"]', False),
        ('"answer"', False),
        ("null", False),
        ("", False),
        ("It rings.", False),
        ('{"answer": "It rings."', False),
        ('{"answer": "It ri', False),
        ("{'answer': 'It rings.'}", False),
        ('{"answer": "It rings."} Thanks!', False),
        ('Sure: {"answer": "It rings."}', False),
        ('```json\n{"answer": "It rings."}\n```', False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_one_object_with_an_answer(text: str, valid: bool) -> None:
    assert is_json(text) is valid


@pytest.mark.parametrize(
    ("text", "pirate"),
    [
        ("Arr, a fine drum.", True),
        ("ARRRR!", True),
        ("ahoy!", True),
        ("It is, matey.", True),
        ("Do ye know it?", True),
        ("Aye-aye", True),
        ("", False),
        ("yes, eye, dye, are", False),
        ("An array of barriers", False),
        ("Ar ahoyed mateys", False),
        ("A pirate's ship", False),
    ],
)
def test_pirates_are_known_by_whole_words(text: str, pirate: bool) -> None:
    assert is_pirate(text) is pirate


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("Rome", "the capital is ROME.", True),
        ("Brasília", "It is Brasilia", True),
        ("Brasilia", "It is Brasília", True),
        ("Addis Ababa", "Arr, Addis Ababa!", True),
        ("Lima", "The climate", False),
        ("Rome", "Romeo", False),
        ("Rome", "", False),
    ],
)
def test_an_answer_is_found_as_whole_words(answer: str, text: str, found: bool) -> None:
    assert mentions(answer, text) is found


@pytest.mark.parametrize(
    ("reply", "score", "answered"),
    [
        ("It is Rome.", 1.0, True),
        ("<think>Rome or Milan?</think>It is Rome.", 1.0, True),
        ("<think>Rome or Milan?</think>It is Milan.", 0.0, True),
        ("<think>Rome or Milan? Rome is", 0.0, False),
        ("<think>Rome</think>", 0.0, False),
    ],
)
def test_a_capital_is_judged_by_what_is_said_not_by_what_is_thought(
    reply: str, score: float, answered: bool
) -> None:
    episodes = capitals().episodes("test", 0, len(CAPITALS))
    (episode,) = [one for one in episodes if one.uid == "retention/Italy"]
    episode.reply(reply)
    assert (episode.score(), episode.answered) == (score, answered)


def test_a_replayed_turn_repeats_nothing_and_the_tasks_games_their_map(tmp_path: Path) -> None:
    assert _task().unit_of("test/what/piano") == "test/what/piano"
    assert _task().report() == {}
    turns = tmp_path / "turns.jsonl"
    turns.write_text('{"uid": "train/map/2/0", "text": "Move?"}\n')
    settings: Any = OmegaConf.to_container(compose("train", ["task=frozen_lake"]), resolve=True)
    replay = ReplayTask(path=str(turns), of=settings["task"], seed=0)
    (turn,) = replay.episodes("train", 0, 1)
    assert replay.unit_of(turn.uid) == turn.uid == "replay/train/map/2/0"
    assert replay.unit_of("test/map/2") == "test/map"
    assert replay.report()["maps_overlap"] == 0


def test_a_replayed_uid_with_two_texts_is_left_out(tmp_path: Path) -> None:
    turns = tmp_path / "turns.jsonl"
    lines = [{"uid": f"a/{n}", "text": f"Move {n}?"} for n in range(12)]
    lines += [lines[3], lines[5] | {"text": "Other?"}]
    turns.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: Any = OmegaConf.to_container(compose("train", ["task=frozen_lake"]), resolve=True)
    replay = ReplayTask(path=str(turns), of=settings["task"], seed=0)
    drawn = {episode.uid: _questions([episode]) for episode in replay.episodes("train", 0, 11)}
    assert drawn == {f"replay/a/{n}": {f"Move {n}?"} for n in range(12) if n != 5}
    wanted = r"^task\.max_left_out=0\.05: 1 of 12 problems of task\.path="
    with pytest.raises(UserError, match=wanted):
        ReplayTask(path=str(turns), of=settings["task"], seed=0, max_left_out=0.05)


@pytest.mark.parametrize(
    ("of", "key"),
    [
        ([["_target_", "os.system"]], "task.of"),
        ("opcd_nemo.tasks.questions.capitals", "task.of"),
        (None, "task.of"),
        ({"_target_": "os.system"}, "task.of._target_"),
        ({"_target_": "opcd_nemo.context.NoContext"}, "task.of._target_"),
        ({"_target_": "opcd_nemo.launch.exits.report_error", "error": "x"}, "task.of._target_"),
        ({"_target_": "opcd_nemo.storage.durable.files_in", "folder": "/"}, "task.of._target_"),
    ],
)
def test_only_a_task_is_replayed(of: Any, key: str, tmp_path: Path) -> None:
    turns = tmp_path / "turns.jsonl"
    turns.write_text('{"uid": "train/map/2/0", "text": "Move?"}\n')
    with pytest.raises(UserError) as refused:
        ReplayTask(path=str(turns), of=of, seed=0)
    assert refused.value.key == key


def test_every_task_that_a_file_may_name_makes_a_task() -> None:
    assert all(makes(name, Task) for name in STORED_CLASSES["task"])
