"""What each command does; torch and Hydra are imported by the commands that need them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from opcd_nemo.config.spelling import unknown_name

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from opcd_nemo.config.train import ParallelConfig
    from opcd_nemo.launch.ranks import Main

CONFIGS = ("train", "experience", "doctor", "plan", "rehearse", "export", "chat")


def train(words: Sequence[str]) -> int:
    """Distil a context into a model."""
    from opcd_nemo.launch.ranks import run_in_ranks

    def load() -> Main:
        from opcd_nemo.trainer.run import train

        return train

    run_in_ranks(["train", *words], load, "train")


def doctor(words: Sequence[str]) -> int:
    """Examine a run before its first step."""
    from opcd_nemo.launch.ranks import run_in_ranks

    def load() -> Main:
        from opcd_nemo.doctor.examination import examine

        return examine

    def check(raw: DictConfig) -> ParallelConfig | None:
        from opcd_nemo.doctor.examination import before_launch

        return before_launch(raw)

    run_in_ranks(["doctor", *words], load, "doctor", check)


def plan(words: Sequence[str]) -> int:
    """Say what a run takes."""
    from opcd_nemo.launch.ranks import run_alone

    def load() -> Main:
        from opcd_nemo.plan.planning import plan

        return plan

    run_alone(words, load, "plan")


def rehearse(words: Sequence[str]) -> int:
    """Play ranks of a run on GPUs that do not exist."""
    from opcd_nemo.launch.ranks import run_and_exit
    from opcd_nemo.rehearsal.command import rehearse

    run_and_exit(lambda: rehearse(words))


def export(words: Sequence[str]) -> int:
    """Convert a model."""
    from opcd_nemo.launch.compose import compose
    from opcd_nemo.launch.ranks import run_alone

    def load() -> Main:
        from opcd_nemo.export.convert import export

        def main(settings: DictConfig) -> None:
            logger.info("written: %s", export(settings, lambda: compose("train", [])))

        return main

    run_alone(words, load, "export")


def chat(words: Sequence[str]) -> int:
    """Talk to a model."""
    from opcd_nemo.launch.ranks import run_alone

    def load() -> Main:
        from opcd_nemo.cli.chat import run_chat

        def main(settings: DictConfig) -> None:
            run_chat(settings, _typed_lines())

        return main

    run_alone(words, load, "chat")


def _typed_lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def maps(words: Sequence[str]) -> int:
    """Show a game's maps and a random player's wins."""
    from opcd_nemo.launch.ranks import run_alone

    def load() -> Main:
        from omegaconf import OmegaConf

        from opcd_nemo.config.plugs import build_plug, check_plug
        from opcd_nemo.errors import UserError
        from opcd_nemo.tasks.games.task import GameTask

        def main(settings: DictConfig) -> None:
            plug: Any = OmegaConf.to_container(settings.task, resolve=True)
            check_plug("task", plug)
            task = build_plug(plug)
            if not isinstance(task, GameTask):
                games = "task=frozen_lake, task=sokoban"
                raise UserError("task._target_", plug["_target_"], games, problem="no game")
            logger.info("%s", json.dumps(task.report(), indent=1))

        return main

    run_alone(words, load, "train")


def experience(words: Sequence[str]) -> int:
    """Run the experience pipeline, or a single stage of the pipeline."""
    from opcd_nemo.experience.command import run_experience

    run_experience(words)


def report(words: Sequence[str]) -> int:
    """Write the page of a run, of a pipeline, or of several runs."""
    from opcd_nemo.launch.output import quiet_imports

    quiet_imports()
    from opcd_nemo.errors import visible
    from opcd_nemo.report.command import write_page

    sys.stdout.write(f"written: {visible(str(write_page(words)))}\n")
    return 0


def registry(words: Sequence[str]) -> int:
    """Look at a pipeline's notes, or select earlier ones again."""
    from opcd_nemo.context.registry import answer
    from opcd_nemo.errors import visible

    sys.stdout.write(f"{visible(answer(words))}\n")
    return 0


def launch(words: Sequence[str]) -> int:
    """Run a training as a NeMo-Run experiment."""
    from opcd_nemo.cli.nemo_run import run_experiment

    return run_experiment(words)


def config(words: Sequence[str]) -> int:
    """Print a composed configuration, and the file that each value is from."""
    from opcd_nemo.cli.composed import show_config

    program, rest = "train", list(words)
    if "--program" in rest:
        index = rest.index("--program")
        program = rest[index + 1] if index + 1 < len(rest) else ""
        del rest[index : index + 2]
    elif rest and rest[0] in CONFIGS:  # opcd config experience recipe=...
        program = rest.pop(0)
    if program not in CONFIGS:
        raise unknown_name("--program", CONFIGS, value=program, name=program, what="configuration")
    return show_config(program, rest)


def choices(words: Sequence[str]) -> int:
    """Print the choices of a group."""
    from opcd_nemo.cli.choices import show_choices

    return show_choices(words)
