"""A recipe's own group of keys, beside the configuration of a run."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

Settings = TypeVar("Settings")


def split_settings(raw: DictConfig, name: str, kind: type[Settings]) -> tuple[DictConfig, Settings]:
    """The run's configuration without the group `name`, and that group, typed.

    Numbers must be finite and not negative.

    Raises:
        ValueError: one line with the key, its value and what is allowed.
    """
    assert is_dataclass(kind)
    run = raw.copy()
    with open_dict(run):
        group = run.pop(name)
    allowed = ", ".join(field.name for field in fields(kind))
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), group))
    except OmegaConfBaseException as error:
        key, reason = error.full_key or "", (error.msg or str(error)).splitlines()[0]
        shown = f"{name}.{key}={OmegaConf.select(group, key)}"
        raise ValueError(
            f"{shown}: {reason}; allowed: {allowed}, as in conf/{name}.yaml"
        ) from error
    assert isinstance(settings, kind)
    _check(name, group, get_type_hints(kind))
    return run, settings


def _check(name: str, group: Any, hints: dict[str, Any]) -> None:
    for key, hint in hints.items():
        value = OmegaConf.select(group, key)
        if hint is bool and type(value) is not bool:
            raise ValueError(f"{name}.{key}={value}: allowed: true or false")
        number = isinstance(value, int | float) and hint in (int, float)
        if number and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}.{key}={value}: allowed: a finite number >= 0")
