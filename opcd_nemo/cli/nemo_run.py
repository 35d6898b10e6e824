"""A training as a NeMo-Run experiment, which keeps its command, code version and logs.

opcd launch executor=local recipe=demo_brevity            # opcd train, here
opcd launch executor=docker image=opcd-nemo recipe=...    # in the image
opcd launch executor=slurm script=slurm/opcd_math.sh ...  # the script submits itself
opcd launch executor=... dry_run=true ...                 # shows what would run

A training is the same job everywhere, JOB below: the same command continues it, and it leaves a
`.nemo` file. With Slurm the job is the script's: NeMo-Run's own batch file has neither the health
gate nor the lock between attempts.

The image's run goes to `runs/` of this folder, with the caller as its user, who owns the files.
The image sees `models=<folder>`, read-only, as /models: student.path=/models/Qwen3-4B. It sees
nothing else of this machine.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd_nemo.errors import ABSENT, UserError

SETTINGS = {
    "executor": "",
    "script": "slurm/opcd_math.sh",
    "image": "opcd-nemo",
    "models": "",
    "dry_run": "false",
}
READ_BY = {"script": "slurm", "image": "docker", "models": "docker"}  # by no other executor
JOB = "exp_manager=job"  # slurm/lib.sh adds it to a training too
RUNS = "/workspace/runs"  # in the image
_CHOICES = {"executor": ("local", "slurm", "docker"), "dry_run": ("true", "false")}
_TRAIN = ["-m", "opcd_nemo.cli", "train", JOB]


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The settings of the launch, and the overrides of the training.

    Raises:
        UserError: a setting has another value than is allowed, or no effect.
    """
    given: dict[str, str] = {}
    overrides = []
    for word in words:
        key, _, value = word.partition("=")
        if key in SETTINGS:
            given[key] = value
        else:
            overrides.append(word)
    settings = SETTINGS | given
    for key, allowed in _CHOICES.items():
        if settings[key] not in allowed:
            raise UserError(key, settings[key], ", ".join(allowed))
    for key in given.keys() & READ_BY.keys():
        if settings["executor"] != READ_BY[key]:
            raise UserError(key, settings[key], f"with executor={READ_BY[key]}")
    if settings["executor"] == "slurm" and not Path(settings["script"]).is_file():
        scripts = ", ".join(map(str, sorted(Path("slurm").glob("opcd_*.sh"))))
        allowed_scripts = scripts or "a script of slurm/, from the folder of a clone"
        raise UserError("script", settings["script"], allowed_scripts, problem="not there")
    if settings["models"] and not Path(settings["models"]).is_dir():
        raise UserError("models", settings["models"], "a folder that exists")
    return settings, overrides


def command(settings: dict[str, str], overrides: list[str]) -> tuple[str, list[str]]:
    """The program, and its arguments."""
    if settings["executor"] == "slurm":
        return "bash", [str(Path(settings["script"]).resolve()), *overrides]
    if settings["executor"] == "local":
        return sys.executable, [*_TRAIN, *overrides]
    return "python", [*_TRAIN, f"exp_manager.exp_dir={RUNS}", *overrides]


def build_executor(run: Any, settings: dict[str, str]) -> Any:
    """NeMo-Run's executor: the image, or this machine, from which Slurm's job is submitted."""
    if settings["executor"] == "docker":
        models = [f"{Path(settings['models']).resolve()}:/models:ro"] if settings["models"] else []
        return run.DockerExecutor(
            container_image=settings["image"],
            num_gpus=-1,
            ipc_mode="host",
            volumes=[f"{Path('runs').resolve()}:{RUNS}", *models],
            # NeMo-Run's log is the caller's too; the image knows no name and no home for them
            additional_kwargs={"user": f"{os.getuid()}:{os.getgid()}"},
            env_vars={"HOME": "/tmp", "USER": "opcd"},
            packager=run.Packager(),
        )
    return run.LocalExecutor(packager=run.Packager())


def run_experiment(words: Sequence[str]) -> int:
    """Run or show the experiment; returns the exit code.

    Raises:
        UserError: a setting is wrong, or NeMo-Run is not installed.
    """
    settings, overrides = split(words)
    if importlib.util.find_spec("nemo_run") is None:
        install = "pip install 'opcd-nemo[launcher]'"
        raise UserError("nemo_run", ABSENT, install, problem="not installed")
    import nemo_run as run

    if settings["executor"] == "docker":
        Path("runs").mkdir(exist_ok=True)  # else docker makes it, for root
    entrypoint, (path, *rest) = command(settings, overrides)
    script = run.Script(path=path, args=rest, entrypoint=entrypoint)
    with run.Experiment("opcd", executor=build_executor(run, settings)) as experiment:
        experiment.add(script, name=settings["executor"], tail_logs=True)
        if settings["dry_run"] == "true":
            experiment.dryrun()
            return 0
        experiment.run(detach=False)
        (task,) = experiment.status(return_dict=True).values()
    return 0 if task["status"].name == "SUCCEEDED" else 1
