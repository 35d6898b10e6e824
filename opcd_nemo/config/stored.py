"""A configuration out of a file from anywhere: plain values, and classes of this package alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from opcd_nemo.config.renamed import present_config
from opcd_nemo.errors import ABSENT, UserError

_MAX_BYTES = 1 << 20
_MODEL = "opcd_nemo.trainer.model.OPCDModel"
_INTERPOLATION = re.compile(r"(?<!\\)(\\\\)*\$\{")
_PLUGS = re.compile(r"opcd_nemo\.(context|losses|(tasks|tasks\.games|engines)\.\w+)\.\w+")


def parse_stored(text: bytes, where: str) -> dict[str, Any]:
    """Read YAML that was written here.

    Raises:
        UserError: another kind of file, or one that `check_stored` refuses.
    """
    try:
        if len(text) > _MAX_BYTES or any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text)):
            raise ValueError(f"more than {_MAX_BYTES} bytes, or aliases")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise UserError(where, ABSENT, "a configuration in YAML", problem=first) from error
    if not isinstance(config, dict):
        raise UserError(where, ABSENT, "a configuration in YAML", problem="is no mapping")
    present: dict[str, Any] = present_config(config)
    check_stored(present, where)
    return present


def check_stored(config: Mapping[str, Any], where: str) -> None:
    """Refuse what could run or read something when the configuration is used.

    Raises:
        UserError: an interpolation (files are written resolved), or a class of another package.
    """
    for key, value in _leaves(config):
        if isinstance(value, str) and _INTERPOLATION.search(value):
            raise UserError(key, value, "plain values", problem="has an interpolation", where=where)
        if key.split(".")[-1] in ("_target_", "target", "cls") and not (
            value == _MODEL or _PLUGS.fullmatch(str(value))
        ):
            raise UserError(
                key,
                value,
                "a task, context, engine or loss of opcd_nemo (one of your own: pass it with "
                "override_config_path)",
                where=where,
            )


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


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    for key, value in items:
        if isinstance(value, Mapping | list):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
