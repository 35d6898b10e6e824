"""Reading a configuration into a dataclass that names all its keys; every error is one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

Schema = TypeVar("Schema")

TYPE_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    str | None: "a text, or null",
    int | None: "a whole number, or null",
    float | None: "a number, or null",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    list[int] | None: "a list of whole numbers, or null",
    dict[str, Any]: "a mapping",
}


def read_schema(schema: type[Schema], raw: DictConfig) -> Schema:
    """Return the values of a configuration as a dataclass that names them all.

    Raises:
        ValueError: a key is misspelt, missing or wrongly typed.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), raw)
        for key in _keys_without_value(merged):
            allowed = _allowed_type(schema, key)
            raise ValueError(f"{key}: no value is given; allowed: {allowed}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(schema, error, raw)) from error
    assert isinstance(config, schema)
    _check_switches(schema, raw)
    return config


def _keys_without_value(node: Any, prefix: str = "") -> Iterator[str]:
    for name in node:
        if OmegaConf.is_missing(node, name):
            yield f"{prefix}{name}"
        elif not OmegaConf.is_interpolation(node, name) and isinstance(node[name], DictConfig):
            yield from _keys_without_value(node[name], f"{prefix}{name}.")


def _one_line(schema: type, error: OmegaConfBaseException, raw: DictConfig) -> str:
    key = re.sub(r"\[\d+\]$", "", str(error.full_key))
    try:
        shown = f"{key}={OmegaConf.select(raw, key)}"
    except OmegaConfBaseException:  # the value is the interpolation that fails
        shown = key
    if isinstance(error, ValidationError):
        return f"{shown}: allowed: {_allowed_type(schema, key)}"
    fields = getattr(error.object_type, "__dataclass_fields__", None)
    if isinstance(error, ConfigKeyError) and fields:
        return f"{shown}: no such key; allowed: {', '.join(fields)}"
    return f"{shown}: {str(error.msg or error).splitlines()[0]}; allowed: a key that exists"


def _allowed_type(schema: type, key: str) -> str:
    """What the schema takes under a dotted key, in words."""
    kind: Any = schema
    for name in key.split("."):
        kind = get_type_hints(kind).get(name, Any) if is_dataclass(kind) else Any
    if is_dataclass(kind):
        return f"a group with the keys {', '.join(kind.__dataclass_fields__)}"
    return TYPE_WORDS.get(kind, "a value in conf/, or key=value")


def _check_switches(schema: type, raw: DictConfig, prefix: str = "") -> None:
    """Refuse numbers and words where the schema has a switch: OmegaConf takes 3 for true."""
    for name, hint in get_type_hints(schema).items():
        key = f"{prefix}{name}"
        if isinstance(hint, type) and is_dataclass(hint):
            _check_switches(hint, raw, f"{key}.")
        elif hint is bool and type(value := OmegaConf.select(raw, key)) is not bool:
            raise ValueError(f"{key}={value}: allowed: {TYPE_WORDS[bool]}")
