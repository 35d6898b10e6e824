"""Starts a recipe as a NeMo-Run experiment, which keeps its command, code version and logs.

python recipes/launch.py executor=local recipe=demo_brevity            # recipes/train.py, here
python recipes/launch.py executor=docker image=opcd-nemo recipe=...    # in the image
python recipes/launch.py executor=slurm script=slurm/opcd_math.sh ...  # the script submits itself
python recipes/launch.py executor=... dry_run=true ...                 # shows what would run

A training is the same job everywhere, JOB below: the same command continues it, and it leaves a
`.nemo` file. With Slurm the job is the script's: NeMo-Run's own batch file has neither the health
gate nor the fence between attempts.

The image's run goes to `runs/` of this repository, with the caller as its user, who owns the files.
`models=<folder>` is there, read-only, as /models: student.path=/models/Qwen3-4B. Nothing else of
this machine is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OWN = {
    "executor": "",
    "script": "slurm/opcd_math.sh",
    "image": "opcd-nemo",
    "models": "",
    "dry_run": "false",
}
READ_BY = {"script": "slurm", "image": "docker", "models": "docker"}  # no other executor's
JOB = "exp_manager=job"  # slurm/lib.sh adds it to a training too
RUNS = "/workspace/runs"  # in the image
ALLOWED = {
    "executor": ("local", "slurm", "docker"),
    "dry_run": ("true", "false"),
    "script": tuple(f"slurm/{path.name}" for path in sorted((ROOT / "slurm").glob("opcd_*.sh"))),
}


def split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """This program's settings, and the overrides of the recipe.

    Raises:
        ValueError: a setting has another value than is allowed, or no effect.
    """
    given: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in OWN:
            given[key] = value
        else:
            overrides.append(argument)
    own = OWN | given
    for key, allowed in ALLOWED.items():
        if own[key] not in allowed:
            raise ValueError(f"{key}={own[key]}: allowed: {', '.join(allowed)}")
    for key in given.keys() & READ_BY.keys():
        if own["executor"] != READ_BY[key]:
            raise ValueError(f"{key}={own[key]}: allowed: with executor={READ_BY[key]}")
    if own["models"] and not Path(own["models"]).is_dir():
        raise ValueError(f"models={own['models']}: allowed: a folder that is there")
    return own, overrides


def command(own: dict[str, str], overrides: list[str]) -> tuple[str, list[str]]:
    """The program that reads a script, and the script with its arguments."""
    if own["executor"] == "slurm":
        return "bash", [str(ROOT / own["script"]), *overrides]
    if own["executor"] == "local":
        return sys.executable, [str(ROOT / "recipes/train.py"), JOB, *overrides]
    return "python", ["/opt/opcd/recipes/train.py", JOB, f"exp_manager.exp_dir={RUNS}", *overrides]


def build_executor(run: Any, own: dict[str, str]) -> Any:
    """NeMo-Run's executor: the image, or this machine, from which Slurm's job is submitted."""
    if own["executor"] == "docker":
        models = [f"{Path(own['models']).resolve()}:/models:ro"] if own["models"] else []
        return run.DockerExecutor(
            container_image=own["image"],
            num_gpus=-1,
            ipc_mode="host",
            volumes=[f"{ROOT / 'runs'}:{RUNS}", *models],
            # NeMo-Run's log is the caller's too; the image knows no name and no home for them
            additional_kwargs={"user": f"{os.getuid()}:{os.getgid()}"},
            env_vars={"HOME": "/tmp", "USER": "opcd"},
            packager=run.Packager(),
        )
    return run.LocalExecutor(packager=run.Packager())


def main(arguments: list[str]) -> int:
    """Run or show the experiment; returns the exit code."""
    try:
        own, overrides = split(arguments)
        if importlib.util.find_spec("nemo_run") is None:
            raise ValueError(
                "nemo_run is not installed; allowed: pip install 'opcd-nemo[launcher]'"
            )
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    import nemo_run as run

    if own["executor"] == "docker":
        (ROOT / "runs").mkdir(exist_ok=True)  # else docker makes it, for root
    entrypoint, (path, *rest) = command(own, overrides)
    script = run.Script(path=path, args=rest, entrypoint=entrypoint)
    with run.Experiment("opcd", executor=build_executor(run, own)) as experiment:
        experiment.add(script, name=own["executor"], tail_logs=True)
        if own["dry_run"] == "true":
            experiment.dryrun()
            return 0
        experiment.run(detach=False)
        (task,) = experiment.status(return_dict=True).values()
    return 0 if task["status"].name == "SUCCEEDED" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
