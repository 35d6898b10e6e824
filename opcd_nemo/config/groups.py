"""A recipe's own group of keys, beside the configuration of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, make_dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf, open_dict

from opcd_nemo.config.schema import read_schema

Settings = TypeVar("Settings")


def split_settings(raw: DictConfig, name: str, kind: type[Settings]) -> tuple[DictConfig, Settings]:
    """The run's configuration without the group `name`, and that group, typed.

    Numbers must be finite and not negative.

    Raises:
        ValueError: one line with the key, its value and what is allowed.
    """
    run = raw.copy()
    with open_dict(run):
        group = run.pop(name)
    parent: Any = make_dataclass(name, [(name, kind)])  # so that errors name the whole key
    settings: Any = getattr(read_schema(parent, OmegaConf.create({name: group})), name)
    for key, value in asdict(settings).items():
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}.{key}={group[key]}: allowed: a finite number >= 0")
    return run, settings
