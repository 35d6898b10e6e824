"""Which commands `opcd` has, and the way from its words to one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opcd_nemo.cli import composed, programs, usage
from opcd_nemo.config.spelling import unknown_name
from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.experience import STAGE_OPTION
from opcd_nemo.launch.exits import report_error
from opcd_nemo.launch.output import keep_output_open

Run = Callable[[Sequence[str]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command of `opcd`."""

    about: str
    run: Run
    """Takes the words after the command's name; returns the exit code, or ends the process."""
    config: str | None = None
    """The file of `conf/` whose groups and keys are its words."""
    usage: str = "[group=choice ...] [key=value ...]"
    options: tuple[str, ...] = ()
    examples: tuple[str, ...]


COMMANDS: dict[str, Command] = {
    "train": Command(
        about="distil a context into a model",
        run=programs.train,
        config="train",
        examples=(
            "recipe=demo_brevity parallel=tp2 optim.lr=3e-5",
            "student.path=~/models/Qwen3-1.7B task=pirate context=pirate trainer.max_steps=50",
        ),
    ),
    "experience": Command(
        about="play, write notes, select the best and train a student on them: the whole pipeline",
        run=programs.experience,
        config="experience",
        options=(STAGE_OPTION,),
        examples=("recipe=demo_games", "recipe=demo_games stage=score"),
    ),
    "report": Command(
        about="a page for a browser: of a run, of a pipeline, or of several runs beside each other",
        run=programs.report,
        usage="FOLDER [FOLDER ...] [to=FILE]",
        examples=(
            "runs/demo_brevity-dp2",
            "runs/demo_brevity-dp2 runs/demo_brevity-tp2 to=comparison.html",
        ),
    ),
    "registry": Command(
        about="list, show and compare the notes of a pipeline, or select earlier ones again",
        run=programs.registry,
        usage="list|show|diff|rollback [entry ...] registry=FOLDER",
        examples=(
            "list registry=runs/demo_games/registry",
            "diff 3f2a 91c0 registry=runs/demo_games/registry",
        ),
    ),
    "doctor": Command(
        about="check a run on its own ranks before it costs anything",
        run=programs.doctor,
        config="doctor",
        examples=("recipe=demo_brevity parallel=tp2", "doctor.environment_only=true"),
    ),
    "plan": Command(
        about="memory, time and cost of a run on an accelerator",
        run=programs.plan,
        config="plan",
        examples=(
            "recipe=demo_brevity accelerator=h100",
            "recipe=math_qwen3_8b_2n8g plan.sweep=true plan.prompt_tokens=200 "
            "plan.context_tokens=1000",
        ),
    ),
    "rehearse": Command(
        about="whole steps of a run's ranks on GPUs that do not exist: memory, deadlocks, crashes",
        run=programs.rehearse,
        config="rehearse",
        examples=(
            "recipe=math_qwen3_8b_to_4b_2n8g",
            "recipe=math_qwen3_8b_2n8g rehearse.transformer_engine=2.16.1 rehearse.layers=null",
        ),
    ),
    "export": Command(
        about="convert a model to a Hugging Face folder, a .nemo file or Megatron's shards",
        run=programs.export,
        config="export",
        usage="format=hf|nemo|mcore from=MODEL to=PATH",
        examples=(
            "format=hf from=runs/demo_brevity-dp2/checkpoints/step=30.ckpt to=exports/hf",
            "format=nemo from=exports/hf to=exports/demo.nemo",
        ),
    ),
    "chat": Command(
        about="talk to a model, with and without its context",
        run=programs.chat,
        config="chat",
        usage="from=MODEL [key=value ...]",
        examples=(
            "from=runs/demo_brevity-dp2/checkpoints/step=30.ckpt",
            'from=smollm2-135m-instruct system="Answer in one sentence." sampling.temperature=0.7',
        ),
    ),
    "launch": Command(
        about="run a training as a NeMo-Run experiment: here, in the image or on Slurm",
        run=programs.launch,
        usage="executor=local|docker|slurm [dry_run=true] [words of opcd train ...]",
        examples=(
            "executor=local recipe=demo_brevity",
            "executor=slurm script=slurm/opcd_math.sh dry_run=true",
        ),
    ),
    "maps": Command(
        about="the maps of a game, and how often a random player wins",
        run=programs.maps,
        config="train",
        examples=("task=frozen_lake", "task=sokoban task.num_test=100"),
    ),
    "config": Command(
        about="the composed configuration of a command, and the file that each value is from",
        run=programs.config,
        options=("--program",),
        usage=f"[--program {'|'.join(programs.CONFIGS)}] [the command's words ...]",
        examples=("recipe=demo_brevity", "--program experience recipe=demo_games"),
    ),
    "list": Command(
        about="the choices of a group, each in a line",
        run=programs.choices,
        usage="[group]",
        examples=("recipes", "tasks"),
    ),
}
_OPTIONS = ("--help", "-h", "--version")


def main(words: Sequence[str]) -> int:
    """Do what the words say; returns the exit code, where the command does not end the process."""
    if os.getcwd() not in sys.path:  # noqa: PTH109
        sys.path.append(os.getcwd())  # noqa: PTH109  # a task or loss of the user's own
    keep_output_open()
    try:
        code = _run(words)
    except (Exception, KeyboardInterrupt) as error:
        code = report_error(error)
    sys.stdout.flush()
    return code


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        return usage.show_commands(COMMANDS)
    name, *rest = words
    if name == "--version":
        return usage.show_version()
    if name not in COMMANDS:
        raise _unknown(name, words)
    command = COMMANDS[name]
    if {"-h", "--help"} & set(rest):
        return usage.show_command(name, command)
    if command.config is not None and "--cfg" in rest:
        return _show_config(command.config, rest)
    for word in rest:
        if word.startswith("--") and word not in command.options:
            options = ["--help", "--cfg", *command.options]
            raise unknown_name(f"opcd {name} {word}", options, name=word, what="option")
    return command.run(rest)


def _show_config(config_name: str, words: Sequence[str]) -> int:
    """Print what `--cfg job` or `--cfg all` asks for, as Hydra's programs do."""
    index = words.index("--cfg")
    kind = words[index + 1] if index + 1 < len(words) else ""
    if kind not in ("job", "all", "hydra"):
        raise UserError("--cfg", kind, "job, all, hydra")
    return composed.show_config(config_name, [*words[:index], *words[index + 2 :]], kind)


def _unknown(name: str, words: Sequence[str]) -> UserError:
    if "=" in name:
        meant = f"a command first; did you mean opcd train {' '.join(words)}?"
        return UserError(f"opcd {name}", ABSENT, meant, problem="no command is given")
    return unknown_name(f"opcd {name}", [*COMMANDS, *_OPTIONS], name=name, what="command")
