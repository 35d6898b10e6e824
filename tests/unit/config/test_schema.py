"""A field's own words, range and choices make the checks and the help."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import DictConfig, OmegaConf

from opcd_nemo.config.doc import Doc, doc, doc_of
from opcd_nemo.config.groups import split_settings
from opcd_nemo.config.programs import (
    ChatConfig,
    DoctorConfig,
    ExportConfig,
    PlanConfig,
    RehearseConfig,
)
from opcd_nemo.config.schema import described, read_schema
from opcd_nemo.config.train import TrainConfig
from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.experience.config import PipelineKeys
from opcd_nemo.plan.accelerator import Accelerator

SCHEMAS = (
    TrainConfig,
    PipelineKeys,
    DoctorConfig,
    PlanConfig,
    RehearseConfig,
    ChatConfig,
    ExportConfig,
    Accelerator,
)


@dataclass(kw_only=True)
class Part:
    """A part of others' group."""

    depth: int = doc("how deep", minimum=1)
    width: int = doc("how wide", minimum=1, default=2)


@dataclass(kw_only=True)
class Inner:
    """The inner group."""

    share: float = doc("a share", above=0, maximum=1, example="0.5")
    kinds: list[str] = doc("kinds", choices=("a", "b"))


@dataclass(kw_only=True)
class Outer:
    """The outer group."""

    from_: str = doc("where it begins", takes="a place", example="here")
    limit: int | None = doc("a limit", minimum=2)
    is_on: bool = doc("a switch")
    inner: Inner
    others: Any = doc("others' group", keys=Part)
    more: Any = doc("another group of others", keys=Part, default=None)

    def check(self, prefix: str) -> None:
        if self.limit == 99:
            raise UserError(f"{prefix}limit", 99, "another number")


GOOD: dict[str, Any] = {
    "from": "home",
    "limit": None,
    "is_on": True,
    "inner": {"share": 1, "kinds": ["b", "a"]},
    "others": {"depth": 3},
}


def read(prefix: str = "", **changes: Any) -> Outer:
    return read_schema(Outer, OmegaConf.create({**GOOD, **changes}), prefix)


def test_values_come_typed() -> None:
    found = read()
    assert (found.from_, found.inner.share, found.others) == ("home", 1.0, {"depth": 3, "width": 2})
    assert found.more is None
    assert type(found.inner.share) is float


@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        ({"limit": 1}, "limit", "a whole number >= 2, or null"),
        ({"is_on": 1}, "is_on", "true or false"),
        ({"from": None}, "from", "a place"),
        ({"from": "???"}, "from", "a place, e.g. from=here"),
        ({"inner": {"share": 0, "kinds": []}}, "inner.share", "a number > 0 and <= 1"),
        ({"inner": {"share": float("nan"), "kinds": []}}, "inner.share", "a number > 0 and <= 1"),
        (
            {"inner": {"share": 1, "kinds": ["a", "a"]}},
            "inner.kinds",
            "a list of a, b, each at most once",
        ),
        ({"inner": {"share": 1}}, "inner.kinds", "a list of a, b, each at most once"),
        ({"inner": 3}, "inner", "a group with the keys share, kinds"),
        ({"others": {"depth": 0}}, "others.depth", "a whole number >= 1"),
        ({"others": {}}, "others.depth", "a whole number >= 1"),
        ({"others": None}, "others", "a mapping"),
        ({"others": {"depth": 1, "unknown": 1}}, "others.unknown", "depth, width"),
        ({"more": {"depth": 0}}, "more.depth", "a whole number >= 1"),
        ({"limit": 99}, "limit", "another number"),
        ({"from": "a\0b"}, "from", "a place"),
        ({"from": "a\ud800"}, "from", "a place"),
        ({"limits": 3}, "limits", "limit, from, is_on, inner, others, more"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "group."])
def test_a_wrong_value_is_refused(
    changes: dict[str, Any], key: str, allowed: str, prefix: str
) -> None:
    with pytest.raises(UserError) as refused:
        read(prefix, **changes)
    assert refused.value.key == f"{prefix}{key}"
    assert refused.value.allowed.replace(f"e.g. {prefix}", "e.g. ") == allowed


def test_a_key_without_a_value_says_what_it_is() -> None:
    with pytest.raises(UserError) as refused:
        read(inner={"kinds": []})
    assert str(refused.value) == (
        "inner.share: no value is given: a share; allowed: a number > 0 and <= 1, e.g. "
        "inner.share=0.5"
    )
    assert refused.value.value is ABSENT


def test_help_lists_every_key_in_the_order_of_the_fields() -> None:
    keys = [(each.key, each.is_group, each.allowed) for each in described(Outer)]
    assert keys == [
        ("from", False, "a place"),
        ("limit", False, "a whole number >= 2, or null"),
        ("is_on", False, "true or false"),
        ("inner", True, ""),
        ("inner.share", False, "a number > 0 and <= 1"),
        ("inner.kinds", False, "a list of a, b, each at most once"),
        ("others", True, ""),
        ("others.depth", False, "a whole number >= 1"),
        ("others.width", False, "a whole number >= 1"),
        ("more", True, ""),
        ("more.depth", False, "a whole number >= 1"),
        ("more.width", False, "a whole number >= 1"),
    ]


def fields(schema: Any) -> Iterator[tuple[type, str]]:
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from fields(kind)
        else:
            yield schema, name


def test_every_key_of_every_schema_has_words() -> None:
    for schema in SCHEMAS:
        for owner, name in fields(schema):
            assert doc_of(owner, name).words, f"{owner.__name__}.{name}"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, opcd_nemo.config.programs, opcd_nemo.config.train, "
        "opcd_nemo.experience.config, opcd_nemo.plan.accelerator\n"
        "print(sorted({'torch', 'nemo', 'megatron', 'hydra'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def numbers(schema: type, prefix: str = "") -> Iterator[tuple[str, Doc]]:
    for name, kind in get_type_hints(schema).items():
        key = f"{prefix}{name}"
        if isinstance(kind, type) and is_dataclass(kind):
            yield from numbers(kind, f"{key}.")
            continue
        found = doc_of(schema, name)
        if found.keys is not None:
            yield from numbers(found.keys, f"{key}.")
        elif {int, float} & {
            kind,
            *get_args(kind),
            *(a for k in get_args(kind) for a in get_args(k)),
        }:
            yield key, found


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_number_has_a_range(schema: type) -> None:
    for key, found in numbers(schema):
        assert found.minimum is not None or found.above is not None, key
        assert found.maximum is not None or found.below is not None, key


@pytest.mark.parametrize("group", ["null", "3", "[1]"])
def test_a_programs_group_is_a_group(group: str) -> None:
    raw = OmegaConf.create(f"{{seed: 1, doctor: {group}}}")
    assert isinstance(raw, DictConfig)
    with pytest.raises(UserError) as refused:
        split_settings(raw, "doctor", DoctorConfig)
    assert refused.value.key == "doctor"
    assert refused.value.allowed.startswith("a group with the keys environment_only")
