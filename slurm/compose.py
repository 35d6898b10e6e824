"""Prints the checked configuration of a recipe: `compose.py train|experience key=value ...`."""

import sys

from omegaconf import OmegaConf

from opcd_nemo.config.train import load_config
from opcd_nemo.experience.run_configs import configs_before_start
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.exits import report_error
from opcd_nemo.launch.output import quiet_imports


def main(config_name: str, overrides: list[str]) -> int:
    """Compose, check every training of it, and print; returns the exit code."""
    quiet_imports()
    try:
        config = compose(config_name, overrides)
        for one in [config] if config_name == "train" else configs_before_start(config):
            load_config(one)
        print(OmegaConf.to_yaml(config, resolve=True), end="")
    except Exception as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
