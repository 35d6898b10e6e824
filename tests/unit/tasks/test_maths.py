"""Problems from files and generators: splits, answers, verifiers, refusals."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from opcd_nemo.context.sources import Context
from opcd_nemo.errors import UserError
from opcd_nemo.tasks import Episode
from opcd_nemo.tasks.answers import marked, plain, tagged
from opcd_nemo.tasks.maths import file_problems, generated_problems
from opcd_nemo.tasks.questions import QuestionEpisode, QuestionTask
from opcd_nemo.tasks.templates import fill, require_slots
from opcd_nemo.tasks.timed import TimedVerifier
from opcd_nemo.types import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
BARE = Context(system=None, demonstrations=())


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems(numbers: range) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} + {n}?", "answer": f"Twice.\n#### {2 * n}"} for n in numbers]


def task(train: str, **changed: Any) -> QuestionTask:
    arguments: dict[str, Any] = {
        "validation": 0.2,
        "test": 0.3,
        "problem_column": "question",
        "answer_column": "answer",
        "answer_form": "hashes",
        "question": r"{problem} Answer in \boxed{}.",
        "time_limit_s": 10.0,
        "seed": 1,
    }
    return file_problems(train=train, **(arguments | changed))


def generated(**changed: Any) -> QuestionTask:
    arguments: dict[str, Any] = {
        "dataset": "chain_sum",
        "arguments": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "train": 40,
        "validation": 10,
        "test": 20,
        "question": "{problem} Answer:",
        "time_limit_s": 10.0,
        "seed": 1,
    }
    return generated_problems(**(arguments | changed))


def everything(task: QuestionTask, split: Split) -> list[QuestionEpisode]:
    with pytest.raises(UserError) as refused:
        task.episodes(split, 0, 1_000_000)
    drawn = task.episodes(split, 0, int(refused.value.allowed.rpartition(" ")[2]))
    assert all(isinstance(episode, QuestionEpisode) for episode in drawn)
    return drawn  # type: ignore[return-value]


def asked(episode: Episode) -> str:
    (message,) = episode.turn(BARE).student_messages
    return message["content"]


def by_split(task: QuestionTask) -> dict[Split, set[str]]:
    return {split: {asked(one) for one in everything(task, split)} for split in SPLITS}


def test_splits_by_hash_share_no_problem_and_lose_none(tmp_path: Path) -> None:
    splits = by_split(task(write(tmp_path / "a.jsonl", problems(range(400)))))
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 400
    assert 50 <= len(splits["validation"]) <= 110
    assert 90 <= len(splits["test"]) <= 150


def test_a_problem_keeps_its_split_when_rows_are_added_and_moved(tmp_path: Path) -> None:
    rows = problems(range(200))
    few = by_split(task(write(tmp_path / "a.jsonl", rows[:100])))
    many = by_split(task(write(tmp_path / "b.jsonl", rows[::-1]), seed=7))
    for split in SPLITS:
        assert few[split] < many[split], split


def test_one_share_does_not_move_the_other_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", problems(range(200)))
    one, other = by_split(task(path)), by_split(task(path, test=0.1))
    assert one["validation"] == other["validation"]
    assert other["test"] < one["test"]


def test_held_out_problems_come_in_an_order_that_added_rows_keep(tmp_path: Path) -> None:
    few = task(write(tmp_path / "a.jsonl", problems(range(100))))
    many = task(write(tmp_path / "b.jsonl", problems(range(200))), seed=9)
    before = [one.uid for one in everything(few, "test")]
    assert [one.uid for one in everything(many, "test") if one.uid in set(before)] == before


def test_files_of_their_own_are_the_splits(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{start}.jsonl", problems(range(start, start + 20)))
        for start in (0, 20, 40)
    ]
    splits = by_split(task(paths[0], validation=paths[1], test=paths[2]))
    assert list(map(len, splits.values())) == [20, 20, 20]
    assert r"What is 41 + 41? Answer in \boxed{}." in splits["test"]


def test_a_problem_in_two_files_stays_in_the_test(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write(tmp_path / "a.jsonl", problems(range(20)))
    rows = [*problems(range(20, 25)), {"question": "what is  7 + 7?", "answer": "#### 14"}]
    test = write(tmp_path / "b.jsonl", rows)
    others = {"validation": write(tmp_path / "c.jsonl", problems(range(30, 35))), "test": test}
    splits = by_split(task(train, **others))
    assert [len(splits[split]) for split in SPLITS] == [19, 5, 6]
    assert any("7 + 7" in text for text in splits["test"])
    told = (
        f"1 of 20 problems of task.train={train} are left out: 1 that test has, too (first line 8)"
    )
    assert caplog.messages == [f"{told}; 19 are left, task.max_left_out=0.1"]
    with pytest.raises(UserError) as refused:
        task(train, **others, max_left_out=0.04)
    assert (refused.value.key, refused.value.problem) == ("task.max_left_out", told)
    assert refused.value.allowed == "0.05 or more, or a file without them"


def test_a_repeated_row_counts_once_and_contradictions_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = problems(range(50))
    path = write(tmp_path / "a.jsonl", [*rows, *rows])
    assert sum(map(len, by_split(task(path)).values())) == 50
    ((_, level, text),) = caplog.record_tuples
    assert level >= logging.WARNING  # what nobody has asked to see is shown from here on
    assert text == (
        f"50 rows that repeat an earlier problem are left out, the last of them task.train={path}, "
        "line 100; 50 problems"
    )
    caplog.clear()
    # the same problem for every reader, three times, in between and with the right answer again
    other = {"question": " WHAT is 4  + 4?", "answer": "#### 9"}
    path = write(tmp_path / "b.jsonl", [other, *rows, rows[4], other | {"answer": "#### 10"}])
    splits = by_split(task(path))
    assert sum(map(len, splits.values())) == 49
    assert not any("is 4 + 4?" in text for texts in splits.values() for text in texts)
    assert caplog.messages == [
        f"1 of 50 problems of task.train={path} are left out: 1 with different answers in "
        "different rows (first line 1 and line 6: '9' and '8'); 49 are left, task.max_left_out=0.1"
    ]
    for share in (-0.1, 1.1, float("nan"), "some", None):
        wanted = r"^task\.max_left_out=.*; allowed: a number >= 0 and <= 1"
        with pytest.raises(UserError, match=wanted):
            task(path, max_left_out=share)
    with pytest.raises(
        UserError, match=r"^task\.max_left_out=0: 1 of 50 problems .*; allowed: 0\.02"
    ):
        task(path, max_left_out=0)


GOLD = [
    ("plain", "34", "34"),
    ("plain", r"\frac{3}{4}", "0.75"),
    ("plain", 34, "34.0"),
    ("plain", r"\text{even}", "even"),
    ("plain", "(1, 2)", "(1,2)"),
    ("hashes", "She has 3 + 4.\n#### 1,007", "1007"),
    ("hashes", "#### -3", "-3"),
    ("boxed", r"So $x = \boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{\sqrt{2}}{2}"),
    ("boxed", r"First \boxed{1}, then \boxed{x^2+1}.", "1 + x^2"),
]


@pytest.mark.parametrize(("form", "written", "equal"), GOLD)
def test_every_gold_answer_is_accepted_in_every_mark_and_a_wrong_one_refused(
    tmp_path: Path, form: str, written: object, equal: str
) -> None:
    rows = [{"question": f"Problem {n}", "answer": written} for n in range(40)]
    built = task(write(tmp_path / "a.jsonl", rows), answer_form=form)
    replies = [rf"It is \boxed{{{equal}}}.", f"So\n#### {equal}", f"<answer> {equal} </answer>"]
    replies += [f"**Answer:** ${equal}$.", f"<think>\\boxed{{0}}</think>The final answer: {equal}"]
    for reply, episode in zip(replies, everything(built, "train"), strict=False):
        episode.reply(reply)
        assert (episode.score(), episode.answered) == (1.0, True), reply
    for wrong, episode in zip(["-77", "17", "x", "?"], everything(built, "test"), strict=False):
        episode.reply(rf"\boxed{{{wrong}}}")
        assert (episode.score(), episode.answered) == (0.0, True), wrong


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The result is 42.",
        r"\boxed{42",
        r"\boxed{}",
        "#### ",
        "Answer:",
        "Answer: $$",
        "<answer></answer>",
        "<answer>42",
        r"<think>\boxed{42}",
        r"<think>\boxed{42}</think> I am done.",
        r"Answer: 42} \boxed{4",
    ],
)
def test_a_reply_without_an_answer_is_told_apart_from_a_wrong_one(
    tmp_path: Path, reply: str
) -> None:
    rows = [{"question": f"Problem {n}", "answer": "#### 42"} for n in range(20)]
    episode = everything(task(write(tmp_path / "a.jsonl", rows)), "train")[0]
    episode.reply(reply)
    assert marked(reply) is None
    assert (episode.score(), episode.answered) == (0.0, False)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{a_{1} + \{2\}}", r"a_{1} + \{2\}"),
        (r"#### \boxed{3}", "3"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\{ { \boxed {\frac{3}{4}} }", r"\frac{3}{4}"),
        (r"Answer: \(4\)", "4"),
        ("Answer: 5.\nBye", "5"),
        ("**Final Answer**: 6", "6"),
        ("Answer: -7", "-7"),
        ("Answer: **8**", "8"),
        ("Answer: 1\nAnswer: 9", "9"),
        ("<answer>a</answer> <answer>b\nc</answer>", "b\nc"),
        ("<answer><answer>d</answer>", "d"),
        (r"$\boxed{10}$ <answer>11</answer>", "11"),
    ],
)
def test_the_last_marked_answer_counts(reply: str, answer: str) -> None:
    written = marked(reply)
    assert written is not None
    assert plain(written) == answer


@pytest.mark.parametrize("loop", [r"\boxed{", "<answer>", "#### ", "Answer: ", "{", "</answer>"])
def test_a_reply_that_repeats_itself_is_read_in_no_time(loop: str) -> None:
    begun = time.process_time()
    assert marked(loop * (200_000 // len(loop)) + "<think>") is None
    marked(loop * (200_000 // len(loop)))
    assert time.process_time() - begun < 2


def test_a_tag_is_the_last_closed_one_after_the_thinking() -> None:
    assert tagged("<answer>a</answer> <ANSWER> b </ANSWER> <answer>c") == "b"
    assert tagged("<answer>a</answer></think> so") is None


@pytest.mark.parametrize(
    ("rows", "changed", "message"),
    [
        (
            [{"question": "q"}],
            {},
            r"task\.train=.*: line 1: no column 'answer'; allowed: task\.ans",
        ),
        ([{"question": " ", "answer": "#### 1"}], {}, r"line 1: column 'question' holds ' '; all"),
        ([{"question": "q", "answer": ""}], {}, r"line 1: column 'answer' holds ''; allowed: a t"),
        ([{"question": "q", "answer": "42"}], {}, r"line 1: column 'answer' has no answer in the"),
        ([{"question": "q", "answer": "####"}], {}, r"line 1: column 'answer' has no answer in"),
        (problems(range(9)), {"test": 0.0}, r"^task\.test=0\.0; allowed: a file, or a share of t"),
        (problems(range(9)), {"test": True}, r"^task\.test=true; allowed: a file, or a share"),
        (problems(range(9)), {"test": None}, r"^task\.test=null; allowed: a file, or a share"),
        (problems(range(9)), {"test": 0.9}, r"^task\.validation \+ task\.test=1\.1: nothing"),
        (problems(range(1)), {}, r"none of the 1 problems of .* falls to it; allowed: more rows"),
        (problems(range(9)), {"question": "?"}, r"^task\.question=\?; allowed: a text with {pr"),
        (problems(range(9)), {"time_limit_s": 0}, r"^task\.time_limit_s=0; allowed: a number of"),
    ],
)
def test_bad_rows_and_values_are_refused_in_one_line(
    tmp_path: Path, rows: list[dict[str, Any]], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        task(write(tmp_path / "a.jsonl", rows), **changed)
    assert "\n" not in str(refused.value)


def test_a_slot_inside_a_text_is_only_text() -> None:
    assert fill(r"{a} {b} \boxed{}", {"a": "{b}", "b": "x"}) == r"{b} x \boxed{}"
    with pytest.raises(UserError, match=r"^k={a} {a}; allowed: a text with {a} in it once$"):
        require_slots("k", "{a} {a}", ["a"])


@pytest.fixture
def maths() -> TimedVerifier:
    return TimedVerifier("maths", limit_s=1.0)


HANGS = "9^{9^{9^{9}}}"


def test_an_answer_that_takes_too_long_is_not_accepted_and_the_next_is_judged(
    maths: TimedVerifier, caplog: pytest.LogCaptureFixture
) -> None:
    assert maths("42", "42.0") is True
    begun = time.monotonic()
    assert maths("42", HANGS) is None
    assert time.monotonic() - begun < 60
    assert f"took more than 1.0 CPU-seconds; the answer is not accepted: '{HANGS}'" in caplog.text
    assert maths("42", "43") is False


def test_the_limit_holds_outside_the_main_thread_and_touches_no_signal(
    maths: TimedVerifier,
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGALRM, signal.SIGPROF)]
    results: list[object] = []
    threads = [
        threading.Thread(target=lambda text=text: results.append(maths("42", text)))
        for text in (HANGS, "42", "41")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(map(str, results)) == ["False", "None", "True"]
    assert [signal.getsignal(one) for one in (signal.SIGALRM, signal.SIGPROF)] == before
    for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
        assert signal.getitimer(timer) == (0.0, 0.0)


def test_a_verifier_killed_while_idle_is_started_anew(maths: TimedVerifier) -> None:
    assert maths("1", "1.0") is True
    process = maths._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert maths("1", "1.0") is True


def test_the_verifier_ends_with_its_owner_in_the_middle_of_an_answer() -> None:
    code = (
        "import os, signal, threading\n"
        "from opcd_nemo.tasks.timed import TimedVerifier\n"
        "verifier = TimedVerifier('maths', limit_s=600.0)\n"
        "assert verifier('1', '1.0')\n"
        "print(verifier._process.pid, flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        f"verifier('1', '{HANGS}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(10)


def test_a_fork_does_not_share_its_parents_verifier(maths: TimedVerifier) -> None:
    assert maths("1", "1.0") is True
    assert maths._process is not None
    owned = maths._process.pid
    child = os.fork()
    if child == 0:
        ok = maths("2", "2.0") is True and maths._process.pid != owned
        maths._end()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert maths("3", "3.0") is True
    assert maths._process.pid == owned


def test_generated_splits_share_no_question_and_a_longer_one_keeps_the_shorter() -> None:
    few, many = by_split(generated()), by_split(generated(train=60, seed=3))
    assert [len(few[split]) for split in SPLITS] == [40, 10, 20]
    assert len(set().union(*few.values())) == 70
    assert few["train"] < many["train"]
    assert (few["validation"], few["test"]) == (many["validation"], many["test"])


@pytest.mark.parametrize(
    ("dataset", "arguments"),
    [
        ("chain_sum", {"max_terms": 2}),
        ("gsm_symbolic", {}),
        ("countdown", {}),
        ("fraction_simplification", {}),  # the dollar signs are part of its answers
    ],
)
def test_every_generated_answer_is_accepted_and_another_problems_is_not(
    dataset: str, arguments: dict[str, Any]
) -> None:
    import reasoning_gym

    given = {"seed": 200_000_001, "size": 4 * 6 + 100, **arguments}
    items = reasoning_gym.create_dataset(dataset, **given)
    built = generated(dataset=dataset, arguments=arguments, train=6, validation=1, test=1)
    right, wrong = everything(built, "train"), everything(built, "train")
    golds = [items[int(one.uid.rpartition("/")[2])]["answer"] for one in right]
    for episode, other, gold in zip(right, wrong, golds, strict=True):
        episode.reply(f"I think <answer>{gold}</answer>")
        assert (episode.score(), episode.answered) == (1.0, True)
        other.reply(f"Answer: {next(one for one in golds if one != gold)}")
        assert (other.score(), other.answered) == (0.0, True)
    silent = everything(built, "test")[0]
    silent.reply("It is 42.")
    assert (silent.score(), silent.answered) == (0.0, False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "chain_sums"}, r"^task\.dataset=chain_sums; allowed: one of reasoning-gym's "
         r"\d+ data sets, such as chain_sum, "),
        ({"arguments": {"terms": 2}}, r"^task\.arguments=.*: chain_sum takes no 'terms'; allo"),
        ({"arguments": {"seed": 2}}, r"^task\.arguments=.*: chain_sum takes no 'seed'; allowe"),
        ({"arguments": [1]}, r"^task\.arguments=.*: chain_sum takes no \[1\]; allowed: allow_neg"),
        ({"arguments": {"min_terms": 0}}, r"^task\.arguments={'min_terms': 0}: min_terms must be"),
        ({"arguments": {"min_terms": "x"}}, r"^task\.arguments={'min_terms': 'x'}: .*; allowed: "),
        ({"train": 10_000}, r"^task\.train=10000: chain_sum makes \d+ different problems that no"),
        ({"test": 0}, r"^task\.test=0; allowed: 1 to "),
        ({"dataset": "rush_hour", "arguments": {}}, r"^task\.dataset=rush_hour: item 0 has the an"),
        ({"dataset": "graph_color", "arguments": {}}, r"^task\.dataset=graph_color: item 0"),
        ({"dataset": "game_of_life_halting", "arguments": {}}, r"item \d+ has a verifier that "
         r"gives 1\.0 to the right answer and 1\.0 to '\?'; allowed: data sets with 1"),
        ({"dataset": "composite", "arguments": {}}, r"^task\.arguments={}: Must specify at least"),
    ],
)  # fmt: skip
def test_a_bad_generator_is_refused_in_one_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        generated(**changed)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("build", [lambda path: task(path), lambda _: generated()])
def test_anchors_are_those_of_the_style_tasks(
    tmp_path: Path, build: Callable[[str], QuestionTask]
) -> None:
    built = build(write(tmp_path / "a.jsonl", problems(range(40))))
    context = Context(system="Be brief.", demonstrations=())
    anchor = built.anchors(0, 96)[0].turn(context)
    assert anchor.student_messages == anchor.teacher_messages
