"""Prints the checked configuration of a recipe: `compose.py train recipe=... key=value ...`."""

import sys
from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from opcd_nemo.config import load_config
from opcd_nemo.launch import run_alone


def show(config: DictConfig, say: Callable[[str], None]) -> None:
    """Check a training's configuration, and print any."""
    if config_name == "train":
        load_config(config)
    say(OmegaConf.to_yaml(config, resolve=True))


if __name__ == "__main__":
    config_name = sys.argv.pop(1)
    run_alone(lambda: show, config_name)
