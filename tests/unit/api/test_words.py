"""Python values come back from a command line as they were given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from opcd_nemo.api.words import word
from opcd_nemo.launch.compose import as_override

TEXTS = [
    "plain",
    "",
    "true",
    "3",
    "[a, b]",
    'it\'s "quoted"',
    "a=b, c#d",
    "two\nlines",
    "é ${x} \\",
]
TEXTS += [
    "~/folder",
    "ends with \\'",
    "null",
    "{a: 1}",
    "${oc.env:HOME}",
    "\\${escaped}",
    "  blanks ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_itself(text: str) -> None:
    assert _back(text) == text


@pytest.mark.parametrize("value", [None, True, 3, 2.5e-5, ["a, b", "c"], [{"question": "x: y"}]])
def test_a_value_keeps_its_type(value: Any) -> None:
    assert _back(value) == value


def test_a_path_is_its_text() -> None:
    assert _back(Path("runs/a b")) == "runs/a b"


def _back(value: Any) -> Any:
    override = OverridesParser.create().parse_override(as_override(word("key", value)))
    config = OmegaConf.create({"key": override.value()})
    return OmegaConf.to_container(config, resolve=True)["key"]
