"""The whole pipeline: stage after stage; a finished stage is skipped.

The pipeline's process runs on every node and starts that node's ranks; what needs no ranks it does
itself, on the first node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from opcd_nemo.config.train import ParallelConfig, load_config
from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.evaluation.summary import SUMMARY
from opcd_nemo.experience.config import Settings, load_experience
from opcd_nemo.experience.contents import check_contents
from opcd_nemo.experience.folder import PipelineFolder
from opcd_nemo.experience.run_configs import checked_configs
from opcd_nemo.experience.stages import STAGES
from opcd_nemo.experience.stages.context import Stage, StageContext
from opcd_nemo.launch.exits import EXIT_BAD_INPUT
from opcd_nemo.launch.ranks import check_run
from opcd_nemo.storage.attempt import is_first_node
from opcd_nemo.storage.records import check_record, read_object

logger = logging.getLogger(__name__)

Launch = Callable[[Sequence[str]], int]
"""Starts ranks with the command's words and these; returns their exit code."""


def check_pipeline(settings: Settings) -> ParallelConfig:
    """Check what can be checked before the first stage; returns the layout of the ranks.

    Raises:
        UserError: a key is wrong, a file does not fit, or the folder has other settings, or began
            with other files.
    """
    folder = PipelineFolder(settings)
    configs = checked_configs(folder)
    for config in configs:
        load_config(config)
    if settings.stage != "all" and not _named(settings.stage).needs_ranks:
        return load_config(configs[0]).parallel
    parallel = check_run(configs[0])
    assert parallel is not None
    check_contents(folder)
    return parallel


def run_pipeline(settings: Settings, launch: Launch) -> int:
    """Do the unfinished part of the given stages; returns the exit code of the first failure.

    Raises:
        UserError: a key is wrong, or what a stage reads does not exist.
    """
    if settings.stage != "all":
        return _perform(_named(settings.stage), PipelineFolder(settings), launch)
    for number in range(1, settings.experience.rounds + 1):
        folder = PipelineFolder(replace(settings, round=number))
        for stage in STAGES:
            if code := _perform(stage, folder, launch):
                return code
        if number < settings.experience.rounds and not _retained(folder):
            break
    return 0


def run_stage(raw: DictConfig) -> None:
    """Do the stage that the configuration names, on a rank. Collective over the world.

    Raises:
        UserError: a key is wrong, the stage's input does not exist, or the stage takes no ranks.
    """
    settings = load_experience(raw)
    names = ", ".join(stage.name for stage in STAGES if stage.needs_ranks)
    if settings.stage not in names.split(", "):
        raise UserError("stage", settings.stage, f"{names}, under torchrun or srun")
    stage, folder = _named(settings.stage), PipelineFolder(settings)
    _require_inputs(stage, folder)
    stage.run(StageContext(folder=folder))


def _named(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def _perform(stage: Stage, folder: PipelineFolder, launch: Launch) -> int:
    folder.check_unchanged()
    if is_first_node():  # on the others a file that this node has just written may be unseen
        _require_inputs(stage, folder)
    for run in _parts(stage, folder.settings):
        last = folder.files(stage.writes[-1], run)
        if all(file.is_file() for file in last) and not stage.repeats:
            logger.info("%s: finished before (%s)", stage.name, last[-1])
        elif stage.needs_ranks:
            if code := launch(_words(stage, folder.settings.round, run)):
                return _failed(run or stage.name, code)
        elif is_first_node():
            stage.run(StageContext(folder=folder))
    return 0


def _words(stage: Stage, number: int, run: str | None) -> list[str]:
    words = [f"stage={stage.name}", f"round={number}"]
    return words if run is None else [*words, f"run={run}"]


def _parts(stage: Stage, settings: Settings) -> Iterator[str | None]:
    """What a stage is launched for: None is all of it.

    A launch does all training runs, for starting ranks takes as long as ten steps of a small model.
    A server of a run's rollouts lives as long as its ranks: these runs have a launch each.
    """
    if "{run}" not in stage.writes[-1]:
        yield None
    elif settings.run is not None:
        yield settings.run
    elif settings.train.engine.get("launch"):
        yield from settings.runs
    else:
        yield None


def _require_inputs(stage: Stage, folder: PipelineFolder) -> None:
    for name in stage.reads:
        writer = next(other.name for other in STAGES if name in other.writes)
        for path in folder.files(name):
            if not path.is_file():
                raise UserError(
                    str(path),
                    ABSENT,
                    f"after stage={writer}",
                    problem="does not exist",
                    where=f"stage={stage.name}",
                )


def _failed(what: str, code: int) -> int:
    if code != EXIT_BAD_INPUT:
        logger.info("%s failed with exit code %s; the same command goes on from here", what, code)
    return code


def _retained(folder: PipelineFolder) -> bool:
    """Whether the next round may start from this round's student."""
    settings = folder.settings
    seed = settings.first_run.removeprefix("opcd-")  # whose student goes on
    base = _number(folder.of_round(1).path / SUMMARY, "rows", "base", "retention", "value")
    now = _number(folder.path / SUMMARY, "rows", "opcd", "retention_by_seed", seed)
    share = settings.experience.next_round_retention
    assert share is not None  # with several rounds
    if now >= share * base:
        return True
    logger.info(
        "stopped after round %s: retention %.2f is below experience.next_round_retention=%s "
        "of the base's %.2f",
        settings.round,
        now,
        share,
        base,
    )
    return False


def _number(file: Path, *names: str) -> float:
    """A number of a summary, below these names.

    Raises:
        UserError: the summary has no such number.
    """
    remedy = "a copy of the file as it was; or stage=evaluate, which writes it anew"
    found = read_object(file, {}, remedy)
    for name in names[:-1]:
        check_record(found, {name: dict}, file, remedy)
        found = found[name]
    check_record(found, {names[-1]: float}, file, remedy)
    return float(found[names[-1]])
