"""`opcd experience`: the pipeline's process, and the ranks that it starts for a stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NoReturn

from opcd_nemo.errors import UserError
from opcd_nemo.experience import STAGE_OPTION
from opcd_nemo.experience.config import load_experience
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.ranks import Main, is_rank, launch_ranks, run_and_exit, run_rank
from opcd_nemo.launch.recipes import for_another_program

_CONFIG = "experience"


def run_experience(words: Sequence[str]) -> NoReturn:
    """Go through the pipeline, or be a rank of the stage that the words name; then exit."""
    overrides = [word for word in words if word != STAGE_OPTION]
    if STAGE_OPTION in words or is_rank():
        run_and_exit(lambda: run_rank(overrides, _load_stage, _CONFIG))
    run_and_exit(lambda: _pipeline(overrides))


def _load_stage() -> Main:
    from opcd_nemo.experience.pipeline import run_stage

    return run_stage


def _pipeline(overrides: Sequence[str]) -> int:
    from opcd_nemo.experience.pipeline import check_pipeline, run_pipeline

    settings = load_experience(compose(_CONFIG, overrides))
    try:
        parallel = check_pipeline(settings)
    except UserError as error:
        raise for_another_program(error, _CONFIG) from error
    number = itertools.count()

    def launch(more: Sequence[str]) -> int:
        return launch_ranks([_CONFIG, STAGE_OPTION, *overrides, *more], parallel, next(number))

    return run_pipeline(settings, launch)
