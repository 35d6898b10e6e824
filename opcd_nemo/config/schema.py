"""Reading a configuration into a dataclass that names all its keys; every error is one line.

The dataclasses are the only description of the keys: `doc(...)` at a field holds its meaning, range
and choices, from which come the checks here, the commands' help and docs/configuration.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol, TypeVar, get_type_hints, runtime_checkable

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from opcd_nemo.config.doc import TYPE_WORDS, allowed_words, check_value, doc_of
from opcd_nemo.config.plugs import missing_argument
from opcd_nemo.config.renamed import refuse_old_key
from opcd_nemo.config.spelling import unknown_name
from opcd_nemo.config.third_parties import refuse_unfollowed_key
from opcd_nemo.errors import ABSENT, UserError

Schema = TypeVar("Schema")
_PLUG = "a choice of the group, or a mapping with a _target_"


@runtime_checkable
class Checked(Protocol):
    """A group whose keys contradict each other, or have no effect beside each other."""

    def check(self, prefix: str) -> None:
        """Raises: UserError; `prefix` stands before the group's keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A key as help shows it; a group of keys comes before them.

    Attributes:
        key: dotted.
        words: its meaning.
        allowed: what it takes, in words: type, range, choices; empty for a group.
        example: a value that works, if the key has no default.
    """

    key: str
    words: str
    allowed: str
    example: str | None
    is_group: bool


def described(schema: type, prefix: str = "") -> Iterator[Described]:
    """Every key of a schema, keys of its groups last; `prefix` is `group.` or nothing."""
    groups: list[Described] = []
    for name, kind in get_type_hints(schema).items():
        key = f"{prefix}{key_of(name)}"
        if isinstance(kind, type) and is_dataclass(kind):
            groups += [_group(key, _first_line(kind)), *described(kind, f"{key}.")]
            continue
        found = doc_of(schema, name)
        if found.keys is not None:
            groups += [_group(key, found.words), *described(found.keys, f"{key}.")]
            continue
        allowed = _PLUG if found.plug else allowed_words(kind, found)
        yield Described(
            key=key, words=found.words, allowed=allowed, example=found.example, is_group=False
        )
    yield from groups


def _group(key: str, words: str) -> Described:
    return Described(key=key, words=words, allowed="", example=None, is_group=True)


def _first_line(schema: Any) -> str:
    return str(schema.__doc__).splitlines()[0]


def key_of(name: str) -> str:
    """The key of a field: `from` cannot name a field, `from_` can."""
    return name.removesuffix("_")


def read_schema(schema: type[Schema], raw: DictConfig, prefix: str = "") -> Schema:
    """Return the values of a configuration as a dataclass that names them all.

    Args:
        schema: a dataclass with `doc(...)` at its fields.
        raw: the values.
        prefix: stands before every key in errors: `doctor.`.

    Raises:
        UserError: a key is misspelt, missing, wrongly typed, out of its range or not among its
            choices.
    """
    raw = _with_field_names(schema, raw)
    try:
        merged: Any = OmegaConf.merge(OmegaConf.structured(schema), raw)
        for key in _keys_without_value(merged):
            raise _missing(schema, key, prefix, merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _user_error(schema, error, raw, prefix) from error
    assert isinstance(config, schema)
    _check_switches(schema, raw, prefix)
    _check_values(schema, config, prefix)
    return config


def _with_field_names(schema: Any, raw: DictConfig) -> DictConfig:
    names = {key_of(name): name for name in schema.__dataclass_fields__}
    if all(key == name for key, name in names.items()):
        return raw
    values: Any = OmegaConf.to_container(raw)
    return OmegaConf.create({names.get(key, key): value for key, value in values.items()})


def _keys_without_value(node: Any, prefix: str = "") -> Iterator[str]:
    for name in node:
        if OmegaConf.is_missing(node, name):
            yield f"{prefix}{name}"
        elif not OmegaConf.is_interpolation(node, name) and isinstance(node[name], DictConfig):
            yield from _keys_without_value(node[name], f"{prefix}{name}.")


def _missing(schema: type, key: str, prefix: str, config: DictConfig) -> UserError:
    """The error for a key without a value: it says what the key is, and shows a value."""
    group, _, name = key.rpartition(".")
    node: Any = OmegaConf.select(config, group) if group else config
    if isinstance(node, DictConfig) and "_target_" in node and not _is_field(schema, key):
        return missing_argument(f"{prefix}{group}", node, name)
    if name == "_target_":
        allowed = "the dotted name of a class or function, as my_module.MyTask"
        return UserError(f"{prefix}{key}", ABSENT, allowed, problem="no value is given")
    shown = f"{prefix}{key_of(key)}"
    owner, kind = _owner(schema, group), _kind(schema, key)
    if owner is None or is_dataclass(kind):
        return UserError(shown, ABSENT, allowed_words(kind, None), problem="no value is given")
    found = doc_of(owner, name)
    allowed = allowed_words(kind, found)
    if found.example is not None:
        allowed += f", e.g. {shown}={found.example}"
    return UserError(shown, ABSENT, allowed, problem=f"no value is given: {found.words}")


def _user_error(
    schema: type, error: OmegaConfBaseException, raw: DictConfig, prefix: str
) -> UserError:
    key = re.sub(r"\[\d+\]$", "", str(error.full_key))
    shown = f"{prefix}{key_of(key)}"
    try:
        value: object = OmegaConf.select(raw, key)
    except OmegaConfBaseException:  # the value is the interpolation that fails
        value = ABSENT
    if isinstance(error, ValidationError):
        return UserError(shown, value, _allowed(schema, key))
    fields = getattr(error.object_type, "__dataclass_fields__", None)
    if isinstance(error, ConfigKeyError) and fields:
        refuse_old_key(shown, value)
        return unknown_name(
            shown,
            map(key_of, fields),
            value=value,
            elsewhere=[
                each.key
                for each in described(schema, prefix)
                if each.key.endswith(f".{key.rpartition('.')[2]}")
            ],
        )
    problem = str(error.msg or error).splitlines()[0]
    return UserError(shown, value, "a key that exists", problem=problem)


def _owner(schema: Any, group: str) -> Any:
    """The dataclass of a dotted group, None within groups of any kind."""
    owner = schema if not group else _kind(schema, group)
    return owner if is_dataclass(owner) else None


def _kind(schema: Any, key: str) -> Any:
    kind: Any = schema
    for name in key.split("."):
        kind = get_type_hints(kind).get(name, Any) if is_dataclass(kind) else Any
    return kind


def _is_field(schema: Any, key: str) -> bool:
    group, _, name = key.rpartition(".")
    owner = _owner(schema, group)
    return owner is not None and name in owner.__dataclass_fields__


def _allowed(schema: type, key: str) -> str:
    """What the schema takes under a dotted key, in words."""
    group, _, name = key.rpartition(".")
    known = _is_field(schema, key) and not is_dataclass(_kind(schema, key))
    return allowed_words(_kind(schema, key), doc_of(_owner(schema, group), name) if known else None)


def _check_switches(schema: type, raw: DictConfig, prefix: str, group: str = "") -> None:
    """Refuse numbers and words where the schema has a switch: OmegaConf takes 3 for true."""
    for name, hint in get_type_hints(schema).items():
        key = f"{group}{name}"
        if isinstance(hint, type) and is_dataclass(hint):
            _check_switches(hint, raw, prefix, f"{key}.")
        elif hint is bool:
            value = OmegaConf.select(raw, key, default=ABSENT)
            if value is not ABSENT and type(value) is not bool:
                raise UserError(f"{prefix}{key}", value, TYPE_WORDS[bool])


def _check_values(schema: type, config: Any, prefix: str) -> None:
    for name, kind in get_type_hints(schema).items():
        key, value = f"{prefix}{key_of(name)}", getattr(config, name)
        if is_dataclass(kind):
            _check_values(kind, value, f"{key}.")  # type: ignore[arg-type]
            continue
        found = doc_of(schema, name)
        check_value(key, value, kind, found)
        may_be_null = schema.__dataclass_fields__[name].default is None  # type: ignore[attr-defined]
        if found.keys is not None and not (value is None and may_be_null):
            setattr(config, name, _read_keys(key, value, found.keys))
    if isinstance(config, Checked):
        config.check(prefix)


def _read_keys(key: str, group: Any, schema: type) -> dict[str, Any]:
    """The checked keys of a third party's group; keys that a run does not follow are refused."""
    if not isinstance(group, Mapping):
        raise UserError(key, group, "a mapping")
    names = schema.__dataclass_fields__  # type: ignore[attr-defined]
    for name, value in group.items():
        if name not in names:
            refuse_unfollowed_key(f"{key}.{name}", value)
            raise unknown_name(f"{key}.{name}", names, value=value)
    return dict(vars(read_schema(schema, OmegaConf.create(dict(group)), prefix=f"{key}.")))
