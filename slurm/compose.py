"""Prints the checked configuration of a recipe: `compose.py train recipe=... key=value ...`."""

import sys

from omegaconf import OmegaConf

from opcd_nemo.config import load_config
from opcd_nemo.launch import compose, quoted, report_error


def main(config_name: str, overrides: list[str]) -> int:
    """Compose, check what is a training, and print; returns the exit code."""
    try:
        config = compose(config_name, [quoted(override) for override in overrides])
        if config_name == "train":
            load_config(config)
        print(OmegaConf.to_yaml(config, resolve=True), end="")
    except Exception as error:
        return report_error(error, config_name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
