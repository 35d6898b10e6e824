"""`opcd --help` and `opcd COMMAND --help`: from the files of `conf/` and the schema's words."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import yaml

from opcd_nemo.config.schema import Described, described
from opcd_nemo.launch.compose import choices
from opcd_nemo.launch.recipes import CONF, is_for_pipeline

if TYPE_CHECKING:
    from opcd_nemo.cli.commands import Command

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TRAIN = ("opcd_nemo.config.train:TrainConfig", "")
_ARGUMENT = re.compile(r"(\w+): *(.*?)(?: +# (.*))?")  # of a plug, as a line of its file
_SCHEMAS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "train": (_TRAIN,),
    "experience": (("opcd_nemo.experience.config:PipelineKeys", ""), _TRAIN),
    "chat": (("opcd_nemo.config.programs:ChatConfig", ""),),
    "export": (("opcd_nemo.config.programs:ExportConfig", ""),),
    "doctor": (("opcd_nemo.config.programs:DoctorConfig", "doctor."), _TRAIN),
    "plan": (
        ("opcd_nemo.config.programs:PlanConfig", "plan."),
        ("opcd_nemo.plan.accelerator:Accelerator", "accelerator."),
        _TRAIN,
    ),
    "rehearse": (
        ("opcd_nemo.config.programs:RehearseConfig", "rehearse."),
        ("opcd_nemo.plan.accelerator:Accelerator", "accelerator."),
        _TRAIN,
    ),
}
"""By file of `conf/`: the dataclasses that describe its keys, and what stands before them."""


def show_version() -> int:
    """Print the version of this package."""
    sys.stdout.write(f"opcd {version('opcd-nemo')}\n")
    return 0


def show_commands(commands: Mapping[str, Command]) -> int:
    """Print what `opcd` can do."""
    width = max(map(len, commands))
    lines = ["usage: opcd COMMAND [word ...]", "", "commands:"]
    lines += [f"  {name:{width}}  {command.about}" for name, command in commands.items()]
    lines += ["", "examples:"]
    lines += [f"  opcd {name} {commands[name].examples[0]}" for name in ("train", "list")]
    lines += ["", "opcd COMMAND --help describes a command; opcd --version prints the version."]
    return _print(lines)


def show_command(name: str, command: Command) -> int:
    """Print a command's usage, its groups and keys, and examples."""
    lines = [
        f"usage: opcd {name} {command.usage}",
        "",
        f"{command.about[0].upper()}{command.about[1:]}.",
    ]
    if command.config is not None:
        lines += ["", *_groups(command.config), "", *_keys(command.config)]
        lines += ["", "options:"]
        lines += ["  --help, -h      print this"]
        lines += ["  --cfg job|all   print the composed configuration; all: with Hydra's"]
    lines += ["", "examples:"]
    lines += [f"  opcd {name} {words}" for words in command.examples]
    return _print(lines)


def _print(lines: list[str]) -> int:
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def default_choices(config_name: str) -> dict[str, str]:
    """The groups of a file of `conf/` and the choice of each, from its defaults list."""
    found: dict[str, str] = {}
    for entry in _load(config_name).get("defaults", []):
        if isinstance(entry, str):
            found |= default_choices(entry) if entry != "_self_" else {}
            continue
        ((key, choice),) = entry.items()
        group = key.split()[-1].lstrip("/")
        if choices(group):
            found[group] = str(choice)
    return found


def _load(config_name: str) -> dict[str, Any]:
    text = (CONF / f"{config_name}.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.load(text, Loader=_LOADER)
    return loaded


def _groups(config_name: str) -> Iterator[str]:
    yield "groups, each with its choices; * is the default; `opcd list GROUP` describes them:"
    defaults = default_choices(config_name)
    width = max(map(len, defaults))
    for group, default in defaults.items():
        fitting, others = choices(group), ""
        if group == "recipe":
            fitting, others = _recipes(config_name)
        names = (f"{name}*" if name == default else name for name in fitting)
        yield from _paragraph(f"  {group:{width}}  ", f"{', '.join(names)}{others}")


def _recipes(config_name: str) -> tuple[list[str], str]:
    """The recipes of a command, and those of the other command in words."""
    piped: dict[bool, list[str]] = {True: [], False: []}
    for name in choices("recipe"):
        piped[is_for_pipeline(CONF / "recipe" / f"{name}.yaml")].append(name)
    is_pipeline = config_name == "experience"
    other = "train" if is_pipeline else "experience"
    return piped[is_pipeline], f"; for opcd {other}: {', '.join(piped[not is_pipeline])}"


def _keys(config_name: str) -> Iterator[str]:
    yield "keys:"
    keys = keys_of(config_name)
    if any(key.key == "engine" for key in keys):
        keys += _engine_keys()
    for key in keys:
        if key.is_group:
            yield ""
            yield from _paragraph(f"  {key.key}: ", key.words.rstrip("."))
            continue
        name = f"    {key.key}  "
        example = f"; e.g. {key.key}={key.example}" if key.example is not None else ""
        yield from _paragraph(f"{name:34}", f"{key.words} [{key.allowed}{example}]")


def keys_of(config_name: str) -> list[Described]:
    """Every key of a command; keys without a group come first."""
    keys = list(_described(config_name))
    alone = [key for key in keys if "." not in key.key and not key.is_group]
    return alone + [key for key in keys if key not in alone]


def _engine_keys() -> Iterator[Described]:
    """The arguments of every engine: no schema has them, the engines' files do."""
    from opcd_nemo.cli.choices import about

    for name in choices("engine"):
        file = CONF / "engine" / f"{name}.yaml"
        words = f"arguments of engine={name}. {about(file)}"
        yield Described(key="engine", words=words, allowed="", example=None, is_group=True)
        for line in file.read_text(encoding="utf-8").splitlines():
            found = _ARGUMENT.fullmatch(line)
            if found and found[1] != "_target_":
                yield Described(
                    key=f"engine.{found[1]}",
                    words=found[3],
                    allowed=f"{found[2]} by default",
                    example=None,
                    is_group=False,
                )


def _described(config_name: str) -> Iterator[Described]:
    for where, prefix in _SCHEMAS[config_name]:
        module, _, name = where.partition(":")
        schema = getattr(importlib.import_module(module), name)
        if prefix:
            words = str(schema.__doc__).splitlines()[0]
            yield Described(
                key=prefix.rstrip("."), words=words, allowed="", example=None, is_group=True
            )
        yield from described(schema, prefix)


def _paragraph(start: str, text: str) -> list[str]:
    columns = min(shutil.get_terminal_size((100, 24)).columns, 120)
    indent = " " * len(f"{'':34}") if len(start) >= 34 else " " * len(start)
    first = indent if len(start) > 34 else start
    lines = textwrap.wrap(
        text, columns, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
    )
    return [start.rstrip(), *lines] if len(start) > 34 else lines
