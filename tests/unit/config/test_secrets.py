"""What files hold of a configuration: every value but those of keys that name secrets."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

import pytest
from omegaconf import OmegaConf

from opcd_nemo.config.schema import described
from opcd_nemo.config.secrets import (
    HIDDEN,
    hidden_keys,
    is_secret,
    recorded,
    without_secrets,
    words_without_secrets,
)
from opcd_nemo.config.stored import STORED_CLASSES
from opcd_nemo.config.train import TrainConfig


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("api_key", True),
        ("HF_TOKEN", True),
        ("token", True),
        ("wandbKey", True),
        ("Password", True),
        ("client-secret", True),
        ("a.b.api_key", True),
        ("eos_token", False),
        ("pad_token", False),
        ("tokens", False),
        ("max_new_tokens", False),
        ("tokenizer", False),
        ("keys", False),
        ("keep", False),
        ("secretary", False),
    ],
)
def test_the_end_of_a_name_tells(name: str, secret: bool) -> None:
    assert is_secret(name) == secret


def test_secrets_go_at_any_depth_and_nothing_else_does() -> None:
    values = {
        "engine": {"api_key": "abcdefgh", "port": 5, "eos_token": "</s>", "url": "x://abcdefgh@y"},
        "list": [{"deep": [{"HF_TOKEN": 12345}]}, "plain"],
        "tokens": "three of them",
        "login": {"password": {"old": "one-long-word", "new": ["another-word"]}},
        "note": "one-long-word and another-word",
        "empty": {"key": None, "token": "", "secret": False},
    }
    assert without_secrets(values) == {
        "engine": {
            "api_key": HIDDEN,
            "port": 5,
            "eos_token": "</s>",
            "url": f"x://{HIDDEN}@y",
        },
        "list": [{"deep": [{"HF_TOKEN": HIDDEN}]}, "plain"],
        "tokens": "three of them",
        "login": {"password": HIDDEN},
        "note": f"{HIDDEN} and {HIDDEN}",
        "empty": {"key": None, "token": "", "secret": False},
    }
    assert without_secrets(without_secrets(values)) == without_secrets(values)


def test_a_short_secret_is_a_word_of_other_values_too() -> None:
    assert without_secrets({"key": "run", "name": "run"}) == {"key": HIDDEN, "name": "run"}


def test_a_variables_secret_goes_and_paths_stay_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "letters-of-a-token")
    monkeypatch.setenv("SHORT_KEY", "xy")
    monkeypatch.setenv("DATA", "/data")
    config = OmegaConf.create(
        {
            "notes": "${oc.env:A_TOKEN}",
            "tags": ["a", "by ${oc.env:SHORT_KEY}", "${oc.env:A_TOKEN,none}"],
            "again": "${notes}",
            "path": "${oc.env:DATA}/x",
            "group": "${tags}",
        }
    )
    assert recorded(config) == {
        "notes": HIDDEN,
        "tags": ["a", HIDDEN, HIDDEN],
        "again": HIDDEN,
        "path": "/data/x",
        "group": ["a", HIDDEN, HIDDEN],
    }


def test_words_of_a_command_line() -> None:
    config = OmegaConf.create({"api_key": "letters-of-a-key", "url": "x"})
    words = [
        "+engine.API_KEY=letters-of-a-key",
        "engine.api_key=",
        "eos_token=</s>",
        "+a={b: {my_password: 'x y'}, c: 1}",
        "+a=[{token: 5}]",
        "+a={b: 1}",
        "+a={broken",
        "url=x://letters-of-a-key@y",
        "~token",
        "seed=3",
    ]
    assert words_without_secrets(words, config) == [
        f"+engine.API_KEY={HIDDEN}",
        "engine.api_key=",
        "eos_token=</s>",
        f'+a={{"b": {{"my_password": "{HIDDEN}"}}, "c": 1}}',
        f'+a=[{{"token": "{HIDDEN}"}}]',
        "+a={b: 1}",
        "+a={broken",
        f"url=x://{HIDDEN}@y",
        "~token",
        "seed=3",
    ]


def test_what_was_left_out_is_found_again() -> None:
    values = {"a": [1, {"b_key": HIDDEN}], "c": {"d": f"x {HIDDEN}"}, "e": "f"}
    assert list(hidden_keys(values)) == ["a.1.b_key", "c.d"]


def test_no_key_of_the_project_looks_like_a_secret() -> None:
    """Such a key would be left out of files that need it: it must get another name."""
    names = [key.key for key in described(TrainConfig)]
    names += list(_parameters())
    assert len(names) > 100
    assert [name for name in names if is_secret(name)] == []


def _parameters() -> Iterator[str]:
    for targets in STORED_CLASSES.values():
        for target in targets:
            module, _, name = target.rpartition(".")
            yield from inspect.signature(getattr(importlib.import_module(module), name)).parameters
