"""Convert a model: `python recipes/export.py format=hf|nemo|mcore from=<model> to=<path>`."""

from collections.abc import Callable

from omegaconf import DictConfig

from opcd_nemo.launch.ranks import Main, compose, run_alone


def load_main() -> Main:
    """Import Megatron only when the command is in order."""
    from opcd_nemo.export.convert import export

    def main(settings: DictConfig, say: Callable[[str], None]) -> None:
        say(f"written: {export(settings, lambda: compose('train', []))}")

    return main


if __name__ == "__main__":
    run_alone(load_main, "export")
