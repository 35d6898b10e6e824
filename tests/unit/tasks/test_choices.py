"""Multiple choice and labelled texts: identities, scorers, refusals, and the two system prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from opcd_nemo.config.plugs import build_plug, check_plug
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.recipes import CONF
from opcd_nemo.tasks.choices import labelled_texts, multiple_choice
from opcd_nemo.tasks.questions import QuestionEpisode, QuestionTask
from tests.unit.tasks.test_maths import SPLITS, asked, by_split, everything, write

OPTIONS = ["Aspirin", "Vitamin C", "Insulin (human)", "None of the above"]


def rows(numbers: range, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"question": f"What treats case {n}?", "cop": n % 4 + first}
        | dict(zip(["opa", "opb", "opc", "opd"], OPTIONS, strict=True))
        for n in numbers
    ]


def from_conf(name: str, *overrides: str) -> QuestionTask:
    """Build a task as a run does, with its files named."""
    composed = compose("train", [f"task={name}", *overrides])
    plug = OmegaConf.to_object(composed.task)
    assert isinstance(plug, dict)
    check_plug("task", plug)
    task = build_plug(plug)
    assert isinstance(task, QuestionTask)
    return task


def medical(path: str, **changed: Any) -> QuestionTask:
    arguments: dict[str, Any] = {
        "validation": 0.2,
        "test": 0.2,
        "question_column": "question",
        "option_columns": ["opa", "opb", "opc", "opd"],
        "answer_column": "cop",
        "first_option": 0,
        "question": "{question}\n{options}\n<answer>letter</answer>",
        "seed": 1,
    }
    return multiple_choice(train=path, **(arguments | changed))


def source(train: str, **changed: Any) -> dict[str, Any]:
    return {
        "train": train,
        "validation": 0.2,
        "test": 0.2,
        "text_column": "text",
        "label_column": "label",
        "labels": {"0": "no", "1": "yes"},
        "question": "Offensive? {text} <answer>verdict</answer>",
    } | changed


def tweets(numbers: range) -> list[dict[str, Any]]:
    return [{"text": f"Tweet number {n} {{text}}", "label": n % 2} for n in numbers]


def result(episode: QuestionEpisode, reply: str) -> tuple[float, bool]:
    episode.reply(reply)
    return episode.score(), episode.answered


def test_splits_are_disjoint_and_stable_when_rows_are_added(tmp_path: Path) -> None:
    few = by_split(medical(write(tmp_path / "a.jsonl", rows(range(60)))))
    many = by_split(medical(write(tmp_path / "b.jsonl", rows(range(120))[::-1]), seed=4))
    assert len(set().union(*many.values())) == sum(map(len, many.values())) == 120
    assert all(few[split] < many[split] for split in SPLITS)


def test_the_same_options_in_another_order_are_the_same_problem(tmp_path: Path) -> None:
    train, test = rows(range(20)), rows(range(30, 40))
    moved = train[5] | {"opa": "vitamin c", "opb": "Aspirin", "cop": 0}
    paths = write(tmp_path / "a.jsonl", train), write(tmp_path / "b.jsonl", [*test, moved])
    before = by_split(medical(paths[0], test=write(tmp_path / "e.jsonl", test)))
    after = by_split(medical(paths[0], test=paths[1]))
    assert len(after["test"]) == len(before["test"]) + 1
    kept = before["train"] | before["validation"]
    (lost,) = kept - after["train"] - after["validation"]
    assert "case 5?" in lost
    both = write(tmp_path / "c.jsonl", [*train, moved])
    assert sum(map(len, by_split(medical(both)).values())) == 20
    wrong = write(tmp_path / "d.jsonl", [*train, moved | {"cop": 1}])
    with pytest.raises(UserError, match=r"\(first line 6 and line 21: 'vitamin c' and 'aspirin'\)"):
        medical(wrong, max_left_out=0)


def test_the_same_stem_with_other_options_is_another_problem(tmp_path: Path) -> None:
    alike = [row | {"question": "Which is true?", "opd": f"{n}"} for n, row in
             enumerate(rows(range(40)))]  # fmt: skip
    assert sum(map(len, by_split(medical(write(tmp_path / "a.jsonl", alike))).values())) == 40


REPLIES = {
    "right": ["{letter}", "{low}", "({letter})", "{letter}.", " {letter}) {text}", "{text}",
              "{letter}: {text}", "{letter}. its usual dose"],
    "wrong": ["{other}", "{other}. {other_text}", "{other_text}"],
    "none": ["", "letter", "E", "{letter} or {other}", "{letter}{other}", "{letter}. {other_text}",
             "A patient with {text}", "<{letter}>", "{letter} {text} too"],
}  # fmt: skip
RESULTS = {"right": (1.0, True), "wrong": (0.0, True), "none": (0.0, False)}


@pytest.mark.parametrize(("kind", "span"), [(k, s) for k, spans in REPLIES.items() for s in spans])
def test_an_option_is_named_by_its_letter_its_text_or_both(
    tmp_path: Path, kind: str, span: str
) -> None:
    task = medical(write(tmp_path / "a.jsonl", rows(range(60))))
    for episode in everything(task, "train"):
        right = int(asked(episode).partition("?")[0].rpartition(" ")[2]) % 4
        other = (right + 1) % 4
        words = {
            "letter": "ABCD"[right],
            "low": "abcd"[right],
            "text": OPTIONS[right],
            "other": "ABCD"[other],
            "other_text": OPTIONS[other].upper(),
        }
        reply = f"<answer>{'ABCD'[other]}</answer> No: <answer>{span.format(**words)}</answer>."
        assert result(episode, reply) == RESULTS[kind], (words, reply)


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_option_has_the_stated_number(tmp_path: Path, first: int) -> None:
    path = write(tmp_path / "a.jsonl", rows(range(40), first))
    assert result(
        everything(medical(path, first_option=first), "test")[0], "<answer>Z</answer>"
    ) == (0.0, False)
    with pytest.raises(
        UserError, match=r"line \d+: column 'cop' holds [04]; allowed: [01] to [34]"
    ):
        medical(path, first_option=1 - first)


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({"cop": -1}, {}, r": line 1: column 'cop' holds -1; allowed: 0 to 3, as task\.first_op"),
        ({"cop": "A"}, {}, r": line 1: column 'cop' holds A; allowed: 0 to 3"),
        ({"cop": 1.5}, {}, r": line 1: column 'cop' holds 1\.5; allowed: 0 to 3"),
        ({"cop": None}, {}, r": line 1: column 'cop' holds None; allowed: a text or a number"),
        (
            {"opd": "Aspirin "},
            {},
            r"^task\.max_left_out=0\.1: 1 of 1 problems of task\.train=.* are left out: 1 with two "
            r"options alike \(first line 1\); allowed: 1 or more, or a file without them",
        ),
        ({"opa": ""}, {}, r": line 1: column 'opa' holds ''; allowed: a text or a number"),
        ({"question": "\n"}, {}, r": line 1: column 'question' holds "),
        (
            {},
            {"answer_column": "exp"},
            r": line 1: no column 'exp'; allowed: task\.answer_column as",
        ),
        ({}, {"first_option": 2}, r"^task\.first_option=2; allowed: 0 or 1"),
        ({}, {"option_columns": ["opa"]}, r"^task\.option_columns=\['opa'\]; allowed: a list of 2"),
        (
            {},
            {"question": "{question}"},
            r"^task\.question={question}; allowed: a text with {opt",
        ),
    ],
)
def test_bad_choices_are_refused_in_one_line(
    tmp_path: Path, changed: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [rows(range(1))[0] | changed])
    with pytest.raises(UserError, match=message) as refused:
        medical(path, **arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("span", "given"),
    [("yes", "yes"), (" No. ", "no"), ("YES", "yes"), ("yes, it is", None), ("yes|no", None),
     ("verdict", None), ("", None), ("1", None)],
)  # fmt: skip
def test_a_label_is_accepted_alone_and_anything_else_is_no_answer(
    tmp_path: Path, span: str, given: str | None
) -> None:
    path = write(tmp_path / "a.jsonl", tweets(range(60)))
    task = labelled_texts(sources={"tweeteval": source(path)}, seed=1)
    for episode in everything(task, "train"):
        right = "yes" if int(asked(episode).split()[3]) % 2 else "no"
        reply = f"<answer>{right}</answer> <answer>{span}</answer> Because."
        assert result(episode, reply) == (float(given == right), given is not None)


def test_a_threshold_makes_labels_of_shares(tmp_path: Path) -> None:
    shares = [{"text": f"Comment {n}", "label": n / 40} for n in range(40)]
    path = write(tmp_path / "a.jsonl", shares)
    task = labelled_texts(sources={"ethos": source(path, labels=0.5)}, seed=1)
    for split in SPLITS:
        for episode in everything(task, split):
            number = int(asked(episode).split()[2])
            right = "yes" if number >= 20 else "no"
            assert result(episode, f"<answer>{right}</answer>") == (1.0, True)


@pytest.mark.parametrize(("column", "text"), [(1.0, "1"), (True, "true"), (" hateful", "hateful")])
def test_labels_are_compared_as_texts(tmp_path: Path, column: object, text: str) -> None:
    path = write(tmp_path / "a.jsonl", [row | {"label": column} for row in tweets(range(30))])
    labels = {text: "yes", "else": "no"}
    task = labelled_texts(sources={"one": source(path, labels=labels)}, seed=1)
    assert result(everything(task, "test")[0], "<answer>yes</answer>") == (1.0, True)


def test_sources_are_mixed_with_their_own_questions_and_share_no_text(tmp_path: Path) -> None:
    one = source(write(tmp_path / "a.jsonl", tweets(range(60))))
    other = source(write(tmp_path / "b.jsonl", tweets(range(60, 120))), question="Hate? {text}")
    task = labelled_texts(sources={"one": one, "other": other}, seed=1)
    first = [episode.uid.split("/")[1] for episode in task.episodes("test", 0, 12)]
    assert set(first) == {"one", "other"}
    assert {text[:5] for text in by_split(task)["train"]} == {"Offen", "Hate?"}
    overlapping = source(one["train"], test=write(tmp_path / "c.jsonl", tweets(range(61, 64))))
    splits = by_split(labelled_texts(sources={"other": other, "late": overlapping}, seed=1))
    texts = [{text.partition(" ")[2] for text in splits[split]} for split in SPLITS]
    assert sum(map(len, texts)) == len(set.union(*texts))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": {"0": "no", "2": "yes"}}, r"line 2: column 'label' holds '1'; allowed: 0, 2$"),
        ({"labels": {"0": "no"}}, r"^task\.sources\.x\.labels=.*; allowed: a number, or a mapping"),
        ({"labels": {"0": False, "1": True}}, r"^task\.sources\.x\.labels=.*quote \"yes\""),
        ({"labels": None}, r"^task\.sources\.x\.labels=null; allowed: a number, or a mapping"),
        ({"label_column": "gold"}, r"line 1: no column 'gold'; allowed: task\.sources\.x\.label_c"),
        ({"text_column": None}, r"^task\.sources\.x\.text_column=null; allowed: a column's name"),
        ({"question": "Bad?"}, r"^task\.sources\.x\.question=Bad\?; allowed: a text with {text}"),
        ({"extra": 1}, r"^task\.sources\.x=\[.*'extra'.*\]; allowed: the keys train, validat"),
        ({"validation": "no.jsonl"}, r"^task\.sources\.x\.validation=no\.jsonl: No such file or d"),
        ({"train": 3}, r"^task\.sources\.x\.train=3; allowed: a file"),
    ],
)
def test_bad_sources_are_refused_in_one_line(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.jsonl", tweets(range(20)))
    with pytest.raises(UserError, match=message) as refused:
        labelled_texts(sources={"x": source(path) | changed}, seed=1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("sources", [None, {}, [], {"x": 3}])
def test_sources_are_a_mapping_of_mappings(sources: Any) -> None:
    with pytest.raises(UserError, match=r"^task\.sources.*; allowed: "):
        labelled_texts(sources=sources, seed=1)


def test_an_unreadable_share_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "t", "label": "some"}])
    with pytest.raises(UserError, match=r"line 1: column 'label' holds 'some'; allowed: a number"):
        labelled_texts(sources={"x": source(path, labels=0.5)}, seed=1)


def _files(tmp_path: Path) -> dict[str, str]:
    """Write small files in the columns that the public data sets have."""
    dapo = [
        {"prompt": [{"role": "user", "content": f"Problem {n}\nAnswer: $Answer"}],
         "reward_model": {"ground_truth": f"{n}"}} for n in range(200)
    ]  # fmt: skip
    math = [{"problem": f"P{n}", "solution": rf"So \boxed{{{n}}}."} for n in range(200)]
    gsm8k = [{"question": f"G{n}", "answer": f"x\n#### {n}"} for n in range(200)]
    hate = ["case_id,test_case,label_gold\n"]
    hate += [f'{n},"Case, {n}",{"non-hateful" if n % 2 else "hateful"}\n' for n in range(100)]
    (tmp_path / "hate.csv").write_text("".join(hate))
    ethos = ["comment;isHate\n", *(f"Comment, {n};{n / 100}\n" for n in range(100))]
    (tmp_path / "ethos.csv").write_text("".join(ethos))
    return {
        "dapo": write(tmp_path / "dapo.jsonl", dapo),
        "math": write(tmp_path / "math.jsonl", math),
        "math_test": write(tmp_path / "math_test.jsonl", [{"problem": "T", "solution": r"\boxed2"
                           r" \boxed{3}"}]),
        "gsm8k": write(tmp_path / "gsm8k.jsonl", gsm8k),
        "gsm8k_test": write(tmp_path / "gsm8k_test.jsonl", [{"question": "T", "answer": "#### 3"}]),
        "medmcqa": write(tmp_path / "med.jsonl", rows(range(600))),
        "medmcqa_test": write(tmp_path / "med_test.jsonl", rows(range(600, 640))),
        "tweeteval": write(tmp_path / "tweet.jsonl", tweets(range(100))),
        "tweeteval_test": write(tmp_path / "tweet_test.jsonl", tweets(range(100, 120))),
        "hatecheck": str(tmp_path / "hate.csv"),
        "ethos": str(tmp_path / "ethos.csv"),
    }  # fmt: skip


def test_every_configured_task_reads_the_columns_of_its_data_set(tmp_path: Path) -> None:
    files = _files(tmp_path)
    built = {"dapo": from_conf("dapo", f"task.train={files['dapo']}")}
    for name in ("math", "gsm8k", "medmcqa"):
        test = f"task.test={files[f'{name}_test']}"
        built[name] = from_conf(name, f"task.train={files[name]}", test)
    labelled = [f"task.sources.{name}.train={files[name]}" for name in
                ("tweeteval", "hatecheck", "ethos")]  # fmt: skip
    labelled.insert(1, f"task.sources.tweeteval.test={files['tweeteval_test']}")
    built["tweeteval"] = from_conf("tweeteval", *labelled[:2])
    built["hatecheck"] = from_conf("hatecheck", labelled[2])
    built["ethos"] = from_conf("ethos", labelled[3])
    built["safety"] = from_conf("safety", *labelled)
    for name, task in built.items():
        sizes = {split: len(everything(task, split)) for split in SPLITS}
        assert min(sizes.values()) >= 1, (name, sizes)
    assert {one.uid.split("/")[1] for one in everything(built["safety"], "train")} == {
        "tweeteval", "hatecheck", "ethos"
    }  # fmt: skip
    for name in ("medmcqa", "safety", "gsm8k", "dapo"):
        for episode in everything(built[name], "test")[:20]:
            assert result(episode, asked(episode)) == (0.0, name == "dapo"), "an echo is no answer"


@pytest.mark.parametrize("name", ["medical", "safety"])
def test_a_system_prompt_asks_for_the_tag_that_is_scored(name: str) -> None:
    plug = OmegaConf.to_object(OmegaConf.load(CONF / f"context/{name}.yaml"))
    assert isinstance(plug, dict)
    check_plug("context", plug)
    system, question = build_plug(plug).context("uid", 0).messages("Q")
    assert "<answer>" in system["content"]
    assert question == {"role": "user", "content": "Q"}


def test_the_generated_task_needs_no_file() -> None:
    task = from_conf("reasoning_gym", "task.train=8", "task.validation=2", "task.test=4")
    first, *_ = everything(task, "test")
    first.reply(asked(first))
    assert first.score() == 0.0, "an echo is not right"
