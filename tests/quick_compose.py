"""`compose` at a third of its cost: what many cases share is composed once.

Hydra takes 0.2 s for a configuration. Words that only set a value of a key that exists are put into
a copy of the configuration without them; a word that names a choice, adds or removes goes to Hydra.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from opcd_nemo.launch import compose as launch
from opcd_nemo.launch.recipes import CONF


def compose(config_name: str, words: Sequence[str]) -> DictConfig:
    """As `opcd_nemo.launch.compose.compose`."""
    plain = [word for word in words if _sets_a_value(word)]
    base, hydra = _composed(config_name, tuple(word for word in words if word not in plain))
    HydraConfig.instance().set_config(hydra)  # run names interpolate the choices
    config = base.copy()
    for word in plain:
        override = OverridesParser.create().parse_override(launch.as_override(word))
        key = override.key_or_group
        if not _is_there(config, key):
            return launch.compose(config_name, words)
        OmegaConf.update(config, key, override.value())
    launch._resolve(config)
    return config


def _sets_a_value(word: str) -> bool:
    key, equals, value = word.partition("=")
    is_value = equals and value and "${" not in value
    return bool(is_value) and key[0] not in "+~" and not _is_group(key)


def _is_group(key: str) -> bool:
    return "@" in key or (CONF / key.replace(".", "/")).is_dir()


def _is_there(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and name in node


@cache
def _composed(config_name: str, words: tuple[str, ...]) -> tuple[DictConfig, DictConfig]:
    config = launch.compose(config_name, words)
    return config, HydraConfig.instance().cfg.copy()
