"""What was called otherwise before: dotted names in files and YAML, and configuration keys.

Checkpoints, `.nemo` files and users' YAML hold the old names. Nothing else of the project knows
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def present_name(dotted: str) -> str:
    """The present dotted name of a class or function that a file or a configuration names."""
    module, _, name = dotted.rpartition(".")
    return f"{_MODULES.get(module, module)}.{name}"


def present_config(node: Any) -> Any:
    """A stored configuration in which every `_target_` and `target` has its present name."""
    if isinstance(node, Mapping):
        return {
            key: present_name(value)
            if key in ("_target_", "target") and isinstance(value, str)
            else present_config(value)
            for key, value in node.items()
        }
    return [present_config(value) for value in node] if isinstance(node, list) else node
