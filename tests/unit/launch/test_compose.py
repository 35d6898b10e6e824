"""What Hydra makes of a command's words, and which mistakes are named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.launch.compose import as_override, compose


def given(word: str) -> object:
    return compose("train", [word]).student.path


@pytest.mark.parametrize(
    "path",
    [
        *("a b", "x#1", "/x (copy)", "été", "模型", "x,v2", "step=3.ckpt", "100%", "it's", 'a"b'),
        *(
            "[draft] model",
            "a]",
            "a&b;c",
            "<x>",
            "^x",
            "a`b",
            "x ",
            "range(1,3)",
            "hf://a/b@main/c",
        ),
    ],
)
def test_a_plain_path_comes_as_it_is(path: str) -> None:
    assert given(f"student.path={path}") == path


def test_any_text_that_is_no_other_value_comes_as_it_is() -> None:
    rng, parser = random.Random(1), OverridesParser.create()
    letters = "ab é模 ,=#()&;<>^`|!@%+-_./~?*'\""
    for _ in range(1000):
        text = "x" + "".join(rng.choices(letters, k=rng.randint(0, 8)))
        read = parser.parse_override(as_override(f"student.path={text}")).value()
        assert (read.text if isinstance(read, QuotedString) else read) == text


def test_the_home_folder_is_found() -> None:
    assert given("student.path=~/x y") == str(Path.home() / "x y")
    assert given("student.path=~") == str(Path.home())
    assert given("student.path=a~/x") == "a~/x"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(("3", 3), ("1e-4", 1e-4), ("true", True), ("null", None), ("'a b'", "a b")),
        *(('""', ""), ("[1,2]", [1, 2]), ("[a,'b c']", ["a", "b c"]), ("{a: 1}", {"a": 1})),
        ("${seed}", 1234),
    ],
)
def test_what_hydra_reads_keeps_its_meaning(value: str, expected: object) -> None:
    assert compose("train", [f"+trainer.x={value}"]).trainer.x == expected


@pytest.mark.parametrize(
    ("word", "key", "value", "problem"),
    [
        ("optimm.lr=1", "optimm.lr", "1", "no such key; did you mean optim.lr?"),
        ("optim.lrr=1", "optim.lrr", "1", "no such key; did you mean lr?"),
        ("loss=reverse", "loss", "reverse", "no such file in conf/loss; did you mean reverse_kl"),
        ("parallel=3", "parallel", "3", "no such file in conf/parallel"),
        (
            "recipe=demo_brevty",
            "recipe",
            "demo_brevty",
            "no such file in conf/recipe; did you mean",
        ),
        ("recipe=demo_json_sft", "recipe", "demo_json_sft", "is an old name"),
        ("optim.lr=", "optim.lr", "", "is empty"),
        ("demo_brevity", "demo_brevity", ABSENT, "is no key with a value"),
        ("+trainer.x=${nothing.here}", "trainer.x", ABSENT, "Interpolation key"),
        ("optim.betas=[1,~/x]", "optim.betas", "[1,~/x]", "cannot be read"),
    ],
)
def test_a_mistake_is_named(word: str, key: str, value: object, problem: str) -> None:
    with pytest.raises(UserError) as refused:
        compose("train", [word])
    assert (refused.value.key, refused.value.value) == (key, value)
    assert refused.value.problem is not None
    assert refused.value.problem.startswith(problem)
    assert str(refused.value).count(",") < 16


def test_a_key_may_be_taken_away() -> None:
    assert as_override("~optim.lr") == "~optim.lr"
    assert "lr" not in compose("train", ["~optim.lr"]).optim


@pytest.mark.parametrize("word", ["=3", "+=3", "~=", "=", "foo", "~", ""])
def test_a_word_without_a_key_is_one_line(word: str) -> None:
    with pytest.raises(UserError) as caught:
        compose("train", [word])
    assert "key=value" in caught.value.allowed
