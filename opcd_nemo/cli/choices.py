"""`opcd list`: the groups of `conf/` and the choices of a group, each with its first comment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from opcd_nemo.config.schema import described
from opcd_nemo.config.spelling import unknown_name
from opcd_nemo.config.train import TrainConfig
from opcd_nemo.errors import UserError
from opcd_nemo.experience.config import PipelineKeys
from opcd_nemo.launch.compose import choices
from opcd_nemo.launch.recipes import CONF, is_for_pipeline


def show_choices(words: Sequence[str]) -> int:
    """Print the groups, or the choices of the group that is named.

    Raises:
        UserError: no group has that name, or several groups are named.
    """
    if len(words) > 1:
        raise UserError("opcd list", " ".join(words), "a single group, as opcd list recipes")
    if not words:
        meanings = group_words()
        _print_table(
            [(name, f"{meanings[name]} ({len(choices(name))} choices)") for name in groups()]
        )
        return 0
    group = group_of(words[0])
    files = [CONF / group / f"{name}.yaml" for name in choices(group)]
    _print_table([(file.stem, first_words(group, file)) for file in files])
    return 0


def first_words(group: str, file: Path) -> str:
    """The first sentence of what a choice says of itself, and whether a pipeline runs a recipe."""
    sentence = re.split(r"(?<=[.!?])\s+(?=\S)", about(file), maxsplit=1)[0]
    is_piped = group == "recipe" and is_for_pipeline(file)
    return f"[experience] {sentence}" if is_piped else sentence


def group_words() -> dict[str, str]:
    """What every group is, in the schema's words where the schema has the group."""
    found = {
        "recipe": "an experiment: what differs from the defaults",
        "method": "who samples the answers, which loss learns from them, and the first steps",
        "accelerator": "the processors that opcd plan reckons with",
    }
    for key in (*described(TrainConfig), *described(PipelineKeys)):
        found.setdefault(key.key, key.words.rstrip("."))
    return {name: f"{words[:1].upper()}{words[1:]}" for name, words in found.items()}


def groups() -> list[str]:
    """The groups of `conf/`."""
    return sorted(path.name for path in CONF.iterdir() if choices(path.name))


def group_of(word: str) -> str:
    """The group that a word names, in the singular or the plural.

    Raises:
        UserError: no group has that name.
    """
    known: dict[str, str] = {}
    for group in groups():
        known |= {group: group, f"{group}s": group, f"{group}es": group}
    if word not in known:
        raise unknown_name(f"opcd list {word}", groups(), name=word, what="group")
    return known[word]


def about(file: Path) -> str:
    """The leading comment of a file of `conf/`, in one line."""
    words = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# "))
    return " ".join(words)


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, words in rows:
        print(f"{name:{width}}  {words}".rstrip())  # noqa: T201
