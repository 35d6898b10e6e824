"""`opcd config`: a composed configuration, and the file of `conf/` that each value is from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opcd_nemo.launch.compose import as_override, choices, compose
from opcd_nemo.launch.recipes import CONF

_COMMENT_COLUMN = 60


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml ships no annotations
    """YAML with lists in a line, and texts of several lines as blocks."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True)
)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def show_config(config_name: str, words: Sequence[str], kind: str = "job") -> int:
    """Print the configuration as YAML; a comment at each value names its file.

    Args:
        config_name: a file of `conf/`, without its ending.
        words: the command's words.
        kind: as Hydra's `--cfg`: the `job`'s configuration, that of `hydra`, or `all`.
    """
    from hydra.core.hydra_config import HydraConfig

    config = compose(config_name, words)
    if kind != "hydra":
        for line in _lines(config, value_sources(config_name, words), ""):
            print(line)  # noqa: T201
    if kind != "job":
        print(OmegaConf.to_yaml({"hydra": HydraConfig.get()}), end="")  # noqa: T201
    return 0


def value_sources(config_name: str, words: Sequence[str]) -> dict[str, str]:
    """The file of `conf/` that each dotted key has its value from, or `command line`.

    The files are read in the order of Hydra's defaults list, so that later ones win as they do
    when Hydra merges them.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    overrides = [as_override(word) for word in words]
    sources: dict[str, str] = {}
    with initialize_config_dir(str(CONF), version_base=None):
        loader: Any = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list(config_name, overrides, RunMode.RUN)
        for entry in defaults.defaults:
            package = "" if entry.package in (None, "_global_") else entry.package
            if entry.config_path is None or package.split(".")[0] == "hydra":
                continue
            loaded = loader.repository.load_config(entry.config_path)
            for key in _leaves(loaded.config):
                sources[f"{package}.{key}".lstrip(".")] = f"conf/{entry.config_path}.yaml"
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if choices(key):
            continue
        sources = {name: file for name, file in sources.items() if not name.startswith(f"{key}.")}
        sources[key] = "command line"
    return sources


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for name in map(str, node):
        if f"{prefix}{name}" == "defaults":
            continue
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not _is_leaf(child):
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_leaf(node: DictConfig) -> bool:
    return node._is_none() or node._is_missing() or node._is_interpolation() or not len(node)


def _lines(node: DictConfig, sources: dict[str, str], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name in map(str, node):
        key = f"{prefix}{name}"
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not _is_leaf(child):
            yield f"{indent}{name}:"
            yield from _lines(child, sources, f"{key}.")
            continue
        entry = {name: _value(node, name)}
        text = yaml.dump(entry, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
        lines = [f"{indent}{line}" for line in text.splitlines()]
        source = f"# {_source(key, sources)}"
        if len(lines) == 1:
            yield f"{lines[0]:{_COMMENT_COLUMN}} {source}"
        else:
            yield f"{indent}{source}"
            yield from lines


def _value(node: DictConfig, name: str) -> Any:
    """A value with its interpolations followed, where they lead to a value."""
    try:
        value = node[name]
    except OmegaConfBaseException:  # a missing value, or an interpolation of a missing value
        return node._get_node(name)._value()  # type: ignore[union-attr]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _source(key: str, sources: dict[str, str]) -> str:
    """The source of a key, or of the nearest group above the key that has a source."""
    while key not in sources and "." in key:
        key = key.rpartition(".")[0]
    return sources.get(key, "unknown")
