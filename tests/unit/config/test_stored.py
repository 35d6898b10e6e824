"""What a stranger's file may configure: plain values, and known classes at their keys."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from opcd_nemo.config import limits
from opcd_nemo.config.renamed import present_name
from opcd_nemo.config.stored import STORED_CLASSES, check_stored, escaped, parse_stored
from opcd_nemo.errors import UserError

CONF = Path(__file__).parents[3] / "conf"
STYLE = "opcd_nemo.tasks.system_prompt.StyleTask"


def targets(node: Any) -> list[str]:
    """Every `_target_` in a configuration."""
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [name for value in node.values() for name in targets(value)]
    return [name for value in node for name in targets(value)] if isinstance(node, list) else []


OF_A_USER = ("???", "opcd_nemo.tasks.file_questions.questions_scored_by")
"""Code of a user's own: a stored configuration, which may be a stranger's, cannot name it."""
SERVED = "opcd_nemo.engines.vllm.VllmEngine"
"""Names servers and programs: a package says the engine in process (`export.convert`)."""


def test_every_class_of_conf_may_be_stored() -> None:
    stored = {name for names in STORED_CLASSES.values() for name in names}
    for file in CONF.rglob("*.yaml"):
        for name in targets(yaml.safe_load(file.read_text(encoding="utf-8"))):
            assert present_name(name) in {*stored, *OF_A_USER, SERVED}, file


@pytest.mark.parametrize(
    "text",
    [
        "task: {_target_: os.system}",
        "context: {_target_: opcd_nemo.context.sources.ExperienceContext.frozen}",
        f"context: {{_target_: {STYLE}}}",  # a class at another's key
        f"other: {{_target_: {STYLE}}}",
        f"task: {{of: [[_target_, {STYLE}]], a: [{{_target_: {STYLE}}}]}}",
        "task: {of: {_target_: subprocess.run}}",
        "task: {of: {of: {_target_: os.system}}}",
        "loss: [{_target_: os.system}]",
        "a: [[[{_target_: os.system}]]]",
        "target: nemo.core.classes.modelPT.ModelPT",
        f"task: {{target: {STYLE}}}",
        "task: {cls: os.system}",
        f"task: {{_target_: {STYLE}, _partial_: true}}",
        "task: {_target_: 3}",
        "task: {_target_: [os, system]}",
        "a: ${oc.env:HOME}",
        "a: [b, ['${oc.env:HOME}']]",
        "'${oc.env:HOME}': 1\na: {'x': '${a}'}",
        "a: !!pairs [x: '${oc.env:SECRET}']",
        "a: !!omap [x: 1]",
        "a: !!set {x}",
        "a: !!binary aGVsbG8=",
        "a: !!timestamp 2026-01-01",
        "a: !!python/object/apply:os.system [ls]",
        "!!python/object/new:os.system [ls]",
        "a: !own x",
        "a: &x [1]\nb: *x",
        "[1, 2]",
        "3",
        "a: [",
        "a: 1\n---\nb: 2",
    ],
)
def test_what_is_no_plain_configuration_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_stored(text.encode(), "a package")
    assert "a package" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 500_000,
        b"{a: " * 200_000,
        b"a: " + b"1:" * 250_000 + b"1",
        b"- " * 400_000,
        b"a: [" + b"1," * 500_000 + b"1]",
    ],
)
def test_a_bomb_of_a_configuration_costs_nothing(text: bytes) -> None:
    began = time.process_time()
    with suppress(UserError):
        parse_stored(text, "a package")
    assert time.process_time() - began < 2


def test_values_that_only_python_has_are_refused() -> None:
    for value in ((1, 2), {1}, b"x", object(), OmegaConf.create({"a": 1})):
        with pytest.raises(UserError, match="plain values"):
            check_stored({"task": {"a": value}}, "a checkpoint")


def test_a_run_of_this_project_is_read() -> None:
    config = {
        "target": "opcd_nemo.nemo_model.OPCDModel",
        "name": "12:30:00",
        "optim": {"lr": 1e-05, "betas": [0.9, 0.98]},
        "task": {"_target_": "opcd_nemo.tasks.replay.ReplayTask", "of": {"_target_": STYLE}},
        "context": {"_target_": "opcd_nemo.context.FixedContext", "system": escaped("${x} 2026")},
        "warmup": {"loss": {"_target_": "opcd_nemo.losses.DivergenceLoss"}},
        "labels": {"0": "no", "1": "yes"},
        "nothing": None,
        "switch": True,
    }
    text = OmegaConf.to_yaml(OmegaConf.create(config))
    read = parse_stored(text.encode(), "a package")
    assert read == config | {"target": "opcd_nemo.trainer.model.OPCDModel"}


def test_lists_beside_each_other_are_no_levels() -> None:
    text = "".join(f"k{number}: [[1], {{a: 1}}]\n" for number in range(40))
    assert parse_stored(text.encode(), "a package")["k39"] == [[1], {"a": 1}]


def test_a_configuration_has_so_many_levels_and_no_more() -> None:
    def nested(levels: int) -> bytes:
        return b"{a: " * levels + b"1" + b"}" * levels

    parse_stored(nested(limits.CONFIGURATION_DEPTH), "a package")
    with pytest.raises(UserError) as caught:
        parse_stored(nested(limits.CONFIGURATION_DEPTH + 1), "a package")
    assert caught.value.problem == "more than 32 levels"


def test_a_configuration_has_so_many_bytes_and_items_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = b"{a: 1, b: [2, 3]}"  # 13 events of YAML, counted from 0
    for name, most in (("CONFIGURATION_BYTES", len(text)), ("CONFIGURATION_ITEMS", 12)):
        with monkeypatch.context() as patched:
            patched.setattr(limits, name, most)
            assert parse_stored(text, "a package") == {"a": 1, "b": [2, 3]}
            patched.setattr(limits, name, most - 1)
            with pytest.raises(UserError) as caught:
                parse_stored(text, "a package")
            unit = name.removeprefix("CONFIGURATION_").lower()
            assert caught.value.problem == f"more than {most - 1} {unit}"


def test_what_needs_no_escape_stays_as_it_is() -> None:
    values = {"number": 1.5, "count": 0, "switch": False, "nothing": None, "list": [1, [], "$x"]}
    assert escaped(values) == values
