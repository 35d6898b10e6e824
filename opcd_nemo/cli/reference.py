"""docs/configuration.md: every key of every command, from the schema and the values of `conf/`.

python -m opcd_nemo.cli.reference > docs/configuration.md
"""

from __future__ import annotations

import sys
from typing import Any

import yaml
from omegaconf import OmegaConf

from opcd_nemo.cli.usage import keys_of
from opcd_nemo.config.schema import Described
from opcd_nemo.launch.compose import compose

_START = """# Configuration

Every key of every command: what it means, what it takes, and its value in `conf/` where the
command line names no other recipe or choice. `opcd COMMAND --help` prints the same; `opcd config
recipe=NAME` prints the values of a recipe and the files they are from. Tasks, contexts, engines and
losses are mappings with a `_target_`: `opcd list tasks` and its like show the choices, whose
arguments are in their files.

This file is generated: `make docs` writes it from the dataclasses that check the configuration.
"""
_TITLES = {
    "train": "`opcd train`: a training run",
    "experience": "`opcd experience`: the pipeline, besides the keys of its training runs",
    "doctor": "`opcd doctor`, besides the keys of the run",
    "plan": "`opcd plan`, besides the keys of the run",
    "rehearse": "`opcd rehearse`, besides the keys of the run and of the accelerator",
    "chat": "`opcd chat`, besides `engine` and `parallel` as above",
    "export": "`opcd export`, besides `parallel` as above",
}
_HEAD = "\n| key | meaning | takes | value |\n|---|---|---|---|\n"
_LONGEST = 60  # characters of a value


def reference() -> str:
    """The text of docs/configuration.md."""
    shown: set[Described] = set()
    parts = [_START]
    for command, title in _TITLES.items():
        values: Any = OmegaConf.to_container(compose(command, []))
        parts.append(f"\n## {title}\n{_HEAD}")
        for key in keys_of(command):
            if key not in shown:
                shown.add(key)
                parts.append(_group(key) if key.is_group else _row(key, values))
    return "".join(parts).replace(f"{_HEAD}\n###", "\n###")


def _group(key: Described) -> str:
    return f"\n### {key.key}\n\n{key.words.rstrip('.')}.\n{_HEAD}"


def _row(key: Described, values: dict[str, Any]) -> str:
    value = _shown(_value(values, key.key))
    return f"| `{key.key}` | {_cell(key.words)} | {_cell(key.allowed)} | {value} |\n"


def _value(values: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return "???"
        values = values[name]
    return values


def _shown(value: Any) -> str:
    """A value as YAML, if the YAML fits in a cell."""
    if value == "???" or isinstance(value, dict):
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n")
    text = " ".join(text.split())
    return f"`{_cell(text)}`" if len(text) <= _LONGEST else f"`{_cell(text[:_LONGEST])} ...`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(reference())
