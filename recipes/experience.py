"""Experience: a model writes down what its own games and answers show, and learns it by heart.

python recipes/experience.py recipe=demo_games              # every stage
python recipes/experience.py recipe=demo_games stage=score  # one of them
python recipes/experience.py list|show|diff|rollback ...    # the registry
"""

import os
import sys
from collections.abc import Callable

from omegaconf import DictConfig

from opcd_nemo.config.train import ParallelConfig
from opcd_nemo.context.registry import COMMANDS, run_command
from opcd_nemo.experience.config import load_experience
from opcd_nemo.experience.workplace import stage_to_check
from opcd_nemo.launch.ranks import Main, check_run, run_alone, run_recipe

Say = Callable[[str], None]
STAGE_ENV = "OPCD_STAGE"  # set where this program has started itself for one stage


def load_stage() -> Main:
    """Import the models' part, which needs seconds, only in the ranks."""
    from opcd_nemo.experience.stages import run_stage

    return run_stage


def check_stage(raw: DictConfig, say: Say) -> ParallelConfig | None:
    """Check a stage as a training run is checked."""
    return check_run(stage_to_check(raw), say)


def load_pipeline() -> Main:
    """Import what goes from stage to stage."""
    from opcd_nemo.experience.pipeline import run_again, run_pipeline

    def main(raw: DictConfig, say: Say) -> int:
        return run_pipeline(load_experience(raw), lambda extra: run_again(extra, STAGE_ENV), say)

    return main


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        sys.exit(run_command(sys.argv[1:], print))
    if STAGE_ENV in os.environ or "RANK" in os.environ:
        run_recipe(load_stage, "experience", check_stage)
    run_alone(load_pipeline, "experience")
