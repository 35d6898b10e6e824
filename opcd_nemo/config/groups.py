"""The keys of a program beside the configuration of a run."""

from __future__ import annotations

from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf, open_dict

from opcd_nemo.config.doc import allowed_words
from opcd_nemo.config.schema import read_schema
from opcd_nemo.errors import UserError

Settings = TypeVar("Settings")


def split_settings(raw: DictConfig, name: str, kind: type[Settings]) -> tuple[DictConfig, Settings]:
    """The run's configuration without the group `name`, and that group, typed.

    Raises:
        UserError: a key of the group is wrong.
    """
    run = raw.copy()
    with open_dict(run):
        group: Any = run.pop(name)
    if not isinstance(group, DictConfig):
        raise UserError(name, group, allowed_words(kind, None))
    return run, read_schema(kind, OmegaConf.create(group), prefix=f"{name}.")
