"""Examine a run before it costs anything: `python recipes/doctor.py <as recipes/train.py>`."""

from collections.abc import Callable

from omegaconf import DictConfig

from opcd_nemo.config.train import ParallelConfig
from opcd_nemo.launch.ranks import Main, run_recipe


def load_main() -> Main:
    """Import the models' checks only in the ranks."""
    from opcd_nemo.doctor.examination import examine

    return examine


def check(raw: DictConfig, say: Callable[[str], None]) -> ParallelConfig | None:
    """What needs no weights; it is imported in a child of the launcher."""
    from opcd_nemo.doctor.examination import before_launch

    return before_launch(raw, say)


if __name__ == "__main__":
    run_recipe(load_main, "doctor", check)
