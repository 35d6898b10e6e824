"""What may change between a checkpoint and the run that continues it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from opcd_nemo.config.secrets import recorded
from opcd_nemo.errors import UserError

RESULT_KEYS = (
    "seed student teacher task retention context engine loss rollout warmup batching optim "
    "context_hash draw"
).split()
_SHOWN = 3  # files of a model
_WITHOUT_EFFECT = (
    *("task.max_left_out", "task.of.max_left_out", "task.draw", "task.of.draw"),
    # where servers are and how they are looked after: a sample is the same from any of them
    *(f"engine.{name}" for name in ("urls", "launch", "python", "gpus", "folder")),
    "engine.colocated",
    *(f"engine.{name}" for name in ("timeout_s", "start_timeout_s", "max_restarts")),
    "rollout.max_mismatch",
    "engine.keep_turns",  # changes the last bits, as a layout does
)
"""What is refused or changes nothing; the draw that a run has is in the origin by itself."""
_ABSENT = "(absent)"
Digests = Mapping[str, Mapping[str, str]]
"""The content of models and files of data: of each key that names some, by the file's name."""


def run_origin(config: DictConfig, context_hash: str, draw: int) -> dict[str, Any]:
    """What a run is made of: its values without secrets, its context's hash, its prompts' draw.

    The first version of the draw is not written: runs from before there were versions have it.
    """
    version = {} if draw == 1 else {"draw": draw}
    origin = {**recorded(config), "context_hash": context_hash, **version}
    if origin.get("rollout", {}).get("ahead") == 0:  # as in runs from before there was the key
        del origin["rollout"]["ahead"]
    return origin


def check_unchanged(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    allowed: Sequence[str],
    contents: tuple[Digests, Digests] = ({}, {}),
) -> None:
    """Compare the keys that a result depends on; layout, lengths and outputs may change.

    A key that names files may name others of the same content.

    Args:
        saved: the origin of the checkpoint.
        now: the origin of this run.
        allowed: dotted keys, or groups of them, that may differ.
        contents: of the checkpoint's files and of this run's, where they are known.

    Raises:
        UserError: one line with every other difference.
    """
    groups = list(RESULT_KEYS)
    if saved["optim"]["schedule"] != "constant":
        groups.append("trainer.max_steps")  # the end of the schedule
    # of a path and its content the path is named
    changed = changed_contents(*contents, allowed) | differences(saved, now, groups, allowed)
    for key in contents[0].keys() & contents[1].keys():
        if contents[0][key] == contents[1][key]:
            changed.pop(key, None)
    if changed:
        raise UserError(
            "exp_manager.resume_if_exists",
            True,
            f"the checkpoint's values, or resume.allow_changes=[{','.join(changed)}]",
            problem="; ".join(changed.values()),
        )


def changed_contents(saved: Digests, now: Digests, allowed: Sequence[str]) -> dict[str, str]:
    """A text for every key whose files differ, except keys in `allowed`."""
    return {
        key: f"{key} has another content than the run began with{_named(saved[key], now[key])}"
        for key in sorted(saved.keys() & now.keys())
        if saved[key] != now[key] and not _within(key, allowed)
    }


def _named(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """The files whose digests differ, where they have names beside the key's."""
    names = sorted(filter(None, before.keys() | after.keys()))
    changed = [name for name in names if before.get(name) != after.get(name)]
    return f" ({', '.join(changed[:_SHOWN])}{', ...' * (len(changed) > _SHOWN)})" * bool(changed)


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], groups: Sequence[str], allowed: Sequence[str]
) -> dict[str, str]:
    """Old and new value, by dotted key: keys in `groups` that are not in `allowed`."""
    before, after = (dict(_leaves(config)) for config in (saved, now))
    return {
        key: f"{key} was {before.get(key, _ABSENT)}, is {after.get(key, _ABSENT)}"
        for key in sorted(before.keys() | after.keys())
        if _within(key, groups)
        and not _within(key, (*allowed, *_WITHOUT_EFFECT))
        and before.get(key, _ABSENT) != after.get(key, _ABSENT)
    }


def _within(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in config.items():
        key = f"{prefix}{name}"
        leaves += _leaves(value, f"{key}.") if isinstance(value, Mapping) else [(key, value)]
    return leaves
