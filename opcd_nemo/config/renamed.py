"""What was called otherwise before: dotted names in files and YAML, and configuration keys.

Checkpoints, `.nemo` files and users' YAML hold the old names. Nothing else of the project knows
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opcd_nemo.errors import UserError

_CONSOLIDATION = "experience.consolidation"
_KEYS = {
    "teacher.life": "teacher.update",
    **{
        f"{group}.{name}": f"{group}.sampling.{name}"
        for group in ("rollout", "evaluation", "experience.extraction")
        for name in ("temperature", "top_p", "top_k", "max_new_tokens")
    },
    **{
        f"{_CONSOLIDATION}.losses.{old}.{name}": f"{_CONSOLIDATION}.settings.{new}.loss.{name}"
        for old, new in (("offpolicy", "off_policy"), ("sft", "sft"))
        for name in ("kind", "beta", "temperature", "chunk_tokens")
    },
}
"""Old key -> new key."""

_DROPPED = (
    *(
        f"exp_manager.{name}"
        for name in (
            "create_preemption_callback",
            "log_step_timing",
            "log_tflops_per_sec_per_gpu",
            "resume_ignore_no_checkpoint",
            "seconds_to_sleep",
        )
    ),
    *(
        f"exp_manager.checkpoint_callback_params.{name}"
        for name in ("every_n_epochs", "mode", "model_parallel_size", "monitor", "save_last")
    ),
)
"""Former keys of `conf/`, which had a single value that a run could follow."""

_VALUES = {
    "teacher.update": {"frozen": "never", "hard_sync": "every_n_steps", "live": "shared"},
}
"""New key -> old value -> new value."""

_MODULES = {
    "opcd_nemo.nemo_model": "opcd_nemo.trainer.model",
    "opcd_nemo.tasks.boards": "opcd_nemo.tasks.games.boards",
    "opcd_nemo.tasks.frozen_lake": "opcd_nemo.tasks.games.frozen_lake",
    "opcd_nemo.tasks.rules": "opcd_nemo.tasks.games.rules",
    "opcd_nemo.tasks.sokoban": "opcd_nemo.tasks.games.sokoban",
    "opcd_nemo.tasks.textarena": "opcd_nemo.tasks.games.textarena",
    "opcd_nemo.tasks.games": "opcd_nemo.tasks.games.task",
}
"""Old module -> new module; a name in a module moves with it."""


_MODELS = {"recipes/game_model": "game-notes"}
"""Old path of a model -> the word for it."""


def present_model(path: str) -> str:
    """The present name of a model that a file or a configuration names."""
    return _MODELS.get(path, path)


def present_name(dotted: str) -> str:
    """The present dotted name of a class or function that a file or a configuration names."""
    module, dot, name = dotted.rpartition(".")
    return f"{_MODULES.get(module, module)}{dot}{name}"


_PRESENT = {"_target_": present_name, "target": present_name, "path": present_model}


def refuse_old_key(key: str, value: object) -> None:
    """Name the new key where an old key was given.

    Raises:
        UserError: the key has another name now.
    """
    if key in _KEYS:
        present = _present_value(_KEYS[key], value)
        raise UserError(key, value, f"{_KEYS[key]}={present}", problem="was renamed")


def present_config(config: Any) -> Any:
    """A stored configuration with the present names of keys, classes and bundled models."""
    present = _present_names(config)
    for old, new in _KEYS.items():
        _move(present, old.split("."), new.split("."))
    for key in _DROPPED:
        group, name = _group_of(present, key)
        if group is not None:
            group.pop(name, None)
    return present


def present_update(checkpoint: Mapping[str, Any]) -> str:
    """`teacher.update` of the run that wrote a checkpoint's unsharded part."""
    old = checkpoint.get("teacher_life", "frozen")
    return str(checkpoint.get("teacher_update", _present_value("teacher.update", old)))


def _present_value(key: str, value: Any) -> Any:
    """The present word for an old value of a key."""
    return _VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def _present_names(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {
            key: _PRESENT[key](value)
            if key in _PRESENT and isinstance(value, str)
            else _present_names(value)
            for key, value in node.items()
        }
    return [_present_names(value) for value in node] if isinstance(node, list) else node


def _group_of(config: Any, key: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that holds a dotted key, if it is a mapping, and the key's last name."""
    *groups, name = key.split(".")
    node = config
    for group in groups:
        node = node.get(group) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), name


def _move(config: Any, old: list[str], new: list[str]) -> None:
    """Move a value within the configuration, if the old key has a value."""
    node, name = _group_of(config, ".".join(old))
    if node is None or name not in node:
        return
    value = _present_value(".".join(new), node.pop(name))
    *groups, name = new
    for group in groups:
        config = config.setdefault(group, {})
    config[name] = value


_STYLES = ("brevity", "bullets", "json", "pirate")
CHOICES: dict[str, str] = {
    **{
        f"recipe=demo_{style}_offpolicy": f"recipe=demo_{style} method=off_policy"
        for style in _STYLES
    },
    **{f"recipe=demo_{style}_sft": f"recipe=demo_{style} method=sft" for style in _STYLES},
    "method=offpolicy": "method=off_policy",
    "rollout=student": "method=opcd",
    "rollout=teacher": "method=off_policy, method=sft, or rollout.sampler=teacher",
    "warmup=none": "method=opcd",
    "warmup=off_policy": "method=opcd_warmup",
    "batching=laptop": "",
    "evaluation=demo": "",
    "optim=adamw": "",
    "trainer=default": "",
}
"""A choice that was a file of `conf/` -> the words that say it now; none: it is what stands in
`conf/train.yaml`, and is left out."""

_METHODS = {"offpolicy": "off_policy"}


def present_method(name: str) -> str:
    """The present name of a method, of a run of it (`sft-1`), or of a row of it (`sft_best`)."""
    for old, new in _METHODS.items():
        if re.fullmatch(rf"{old}([-_].*)?", name):
            return new + name.removeprefix(old)
    return name


def former_method(name: str) -> str:
    """The former name of a method or of a run of it, under which a folder may exist."""
    for old, new in _METHODS.items():
        if re.fullmatch(rf"{new}([-_].*)?", name):
            return old + name.removeprefix(new)
    return name


def present_pipeline(saved: Any) -> dict[str, Any]:
    """A pipeline's stored settings, where every method has its settings and its present name."""
    present: dict[str, Any] = _present_names(saved)
    consolidation = present["experience"]["consolidation"]
    consolidation["methods"] = list(map(present_method, consolidation["methods"]))
    if "losses" in consolidation:
        # the rest of a method stood in code
        rest = {"name": None, "rollout": {"sampler": "teacher"}, "warmup": {"steps": 0}}
        consolidation["settings"] = {
            present_method(method): {"loss": loss, **rest}
            for method, loss in consolidation.pop("losses").items()
        }
    moved: dict[str, Any] = present_config(present)
    return moved
