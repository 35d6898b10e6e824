"""A game's maps and a random player's wins: `python recipes/maps.py task=frozen_lake`."""

import json
from collections.abc import Callable

from omegaconf import DictConfig

from opcd_nemo.launch.ranks import Main, run_alone


def load_main() -> Main:
    """Import the checks of a configuration."""
    from opcd_nemo.config.plugs import build_plug
    from opcd_nemo.config.train import load_config
    from opcd_nemo.tasks.games.task import GameTask

    def main(settings: DictConfig, say: Callable[[str], None]) -> None:
        task = build_plug(load_config(settings).task)
        if not isinstance(task, GameTask):
            raise ValueError(
                f"task._target_={settings.task._target_}: no game; "
                "allowed: task=frozen_lake, task=sokoban"
            )
        say(json.dumps(task.report(), indent=1))

    return main


if __name__ == "__main__":
    run_alone(load_main, "train")
