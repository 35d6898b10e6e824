"""A configuration out of a file from anywhere: plain values, and classes of this package alone.

Who wrote the file is not known: it comes with a model. What its YAML may hold is what JSON holds,
without tags, aliases and interpolations; a class may be named where a run has a plug, and it is
one of the lists below. Nothing of the file is imported or called here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from opcd_nemo.config import limits
from opcd_nemo.config.renamed import present_config
from opcd_nemo.errors import ABSENT, UserError

_MODEL = "opcd_nemo.trainer.model.OPCDModel"
_INTERPOLATION = re.compile(r"(?<!\\)(\\\\)*\$\{")
_TASKS = (
    "opcd_nemo.tasks.choices.labelled_texts",
    "opcd_nemo.tasks.choices.multiple_choice",
    "opcd_nemo.tasks.file_questions.file_questions",
    "opcd_nemo.tasks.games.task.frozen_lake",
    "opcd_nemo.tasks.games.task.sokoban",
    "opcd_nemo.tasks.games.textarena.textarena",
    "opcd_nemo.tasks.instructions.instructions",
    "opcd_nemo.tasks.maths.file_problems",
    "opcd_nemo.tasks.maths.generated_problems",
    "opcd_nemo.tasks.questions.capitals",
    "opcd_nemo.tasks.replay.ReplayTask",
    "opcd_nemo.tasks.system_prompt.StyleTask",
)
_CONTEXTS = tuple(
    f"opcd_nemo.context.{name}"
    for name in (
        "ExperienceContext",
        "ExperiencePool",
        "FewShotContext",
        "FixedContext",
        "NoContext",
    )
)
_LOSSES = tuple(
    f"opcd_nemo.losses.{name}" for name in ("DivergenceLoss", "HardLabelLoss", "TopKLoss")
)
STORED_CLASSES: Mapping[str, tuple[str, ...]] = {
    "task": _TASKS,
    "task.of": _TASKS,
    "retention": _TASKS,
    "context": _CONTEXTS,
    "engine": ("opcd_nemo.engines.megatron.MegatronEngine",),
    "loss": _LOSSES,
    "warmup.loss": _LOSSES,
    "evaluation.wrong_context": _CONTEXTS,
}
"""The classes that a stored configuration may name, by the key under which `_target_` stands."""
_RESERVED = frozenset(("cls", "_args_", "_partial_", "_recursive_", "_convert_"))
"""Keys by which Hydra and NeMo call something; no configuration of this project has them."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's plain values: no dates, and no numbers to the base of 60."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"[-+]?(0|[1-9][0-9]*)\Z") if tag.endswith(":int") else pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":timestamp", ":merge", ":value"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_stored(text: bytes, where: str) -> dict[str, Any]:
    """Read YAML that was written here.

    Raises:
        UserError: another kind of file, or one that `check_stored` refuses.
    """
    present: dict[str, Any] = present_config(parse_plain(text, where))
    check_stored(present, where)
    return present


def parse_plain(text: bytes, where: str) -> dict[str, Any]:
    """Read a mapping of plain values, which name whatever they name: to be shown, not used.

    Raises:
        UserError: another kind of file, or one with tags, aliases or too much in it.
    """
    try:
        if problem := _not_plain(text):
            raise ValueError(problem)
        config = yaml.load(text, _Loader)  # a loader of plain values alone
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(where, ABSENT, "a configuration in YAML", problem=first) from error
    if not isinstance(config, dict):
        raise UserError(where, ABSENT, "a configuration in YAML", problem="is no mapping")
    return config


def _not_plain(text: bytes) -> str | None:
    """Why the text is not even looked at closer; events cost little and build nothing."""
    if len(text) > limits.CONFIGURATION_BYTES:
        return f"more than {limits.CONFIGURATION_BYTES} bytes"
    depth = 0
    for number, event in enumerate(yaml.parse(text, _Loader)):
        if number > limits.CONFIGURATION_ITEMS:
            return f"more than {limits.CONFIGURATION_ITEMS} items"
        if isinstance(event, yaml.AliasEvent):
            return "aliases"
        if getattr(event, "tag", None) is not None:
            return f"the tag {event.tag}"
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > limits.CONFIGURATION_DEPTH:
            return f"more than {limits.CONFIGURATION_DEPTH} levels"
    return None


def check_stored(config: Mapping[str, Any], where: str) -> None:
    """Refuse what could run or read something when the configuration is used.

    Raises:
        UserError: a value that JSON does not have, an interpolation (files are written resolved),
            or a class that is not in `STORED_CLASSES`, or not at its key.
    """
    _check_node(dict(config), "", where)


def _check_node(node: Any, key: str, where: str) -> None:
    if type(node) is dict:
        for name, value in node.items():
            if type(name) not in (str, int):
                raise UserError(f"{key}.{name}", ABSENT, "keys that are texts", where=where)
            _check_name(str(name), value, key, where)
            _check_node(value, f"{key}.{name}" if key else str(name), where)
    elif type(node) is list:
        for index, value in enumerate(node):
            _check_node(value, f"{key}.{index}", where)
    elif type(node) is str:
        if _INTERPOLATION.search(node):
            raise UserError(key, node, "plain values", problem="has an interpolation", where=where)
    elif node is not None and type(node) not in (bool, int, float):
        kind = type(node).__name__
        raise UserError(key, ABSENT, "plain values", problem=f"is a {kind}", where=where)


def _check_name(name: str, value: Any, key: str, where: str) -> None:
    """Refuse a class that a run has no use for at this key, and other ways to name something."""
    full = f"{key}.{name}" if key else name
    if name in _RESERVED:
        raise UserError(full, value, "keys of a run's configuration", where=where)
    if name == "target" and key == "":
        good, allowed = value == _MODEL, _MODEL
    elif name in ("_target_", "target"):
        known = STORED_CLASSES.get(key, ())
        good = name == "_target_" and isinstance(value, str) and value in known
        allowed = (
            "a task, context, engine or loss of opcd_nemo, at its key (one of your own: pass it "
            "with override_config_path)"
        )
    else:
        return
    if not good:
        raise UserError(full, value, allowed, where=where)


def escaped(node: Any) -> Any:
    """Plain values so written that a configuration, which resolves them once, gives them back.

    A model's words go into configurations, and LaTeX is full of `${`.
    """
    if isinstance(node, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", node)
    if isinstance(node, Mapping):
        return {key: escaped(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [escaped(value) for value in node]
    return node
