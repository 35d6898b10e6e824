"""Kills runs at random moments and shows that the continued run is the uninterrupted one.

    python -m tests.crash [--kills 20] [--layout dp2] [--seed 0] [--one-rank]

Every run saves after each fourth step. A kill takes the launcher and all ranks at once (SIGKILL),
or one rank only, in a step, or (every second one) while a checkpoint is written; then the same
command runs again, up to its end. Weights and every metric of every step must be those of the run
that nobody killed. Exit status 1 lists what differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from opcd_nemo.metrics import read_metrics
from tests.fork_server import choose_python
from tests.recipes.conftest import SMOKE
from tests.tiny import write_chat_model
from tests.tree import PYTHONPATH, ROOT

STEPS, SAVED_EVERY, SAVE_S = 16, 4, 0.1
SETTINGS = (
    f"exp_manager=resumable "
    f"exp_manager.checkpoint_callback_params.every_n_train_steps={SAVED_EVERY} "
    f"trainer.max_steps={STEPS} optim.lr=1e-3 rollout.sampling.max_new_tokens=32 name=run"
).split()
TIMED = ("time/", "cpu/", "perf/")


class Job:
    """One folder's command."""

    def __init__(
        self, model: Path, folder: Path, layout: str, overrides: Sequence[str] = ()
    ) -> None:
        self.run = folder / "run"
        places = (f"student.path={model}", f"exp_manager.exp_dir={folder}", f"parallel={layout}")
        words = ("recipes/train.py", *SMOKE, *SETTINGS, *places, *overrides)
        self._command = [choose_python(), *words]
        folder.mkdir(exist_ok=True)
        self.log = folder / "log.txt"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command; its output goes to the folder's log."""
        with self.log.open("ab") as log:
            environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(
                self._command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def finish(self) -> None:
        """Run the command to its end."""
        if self.start().wait():
            raise RuntimeError(self.log.read_text())

    def wait_for_training(self, process: subprocess.Popen[bytes]) -> None:
        """Return when the first scores are printed, just before the first step."""
        seen = self.log.read_text().count("in-context gap") if self.log.exists() else 0
        self._wait(process, lambda: self.log.read_text().count("in-context gap") > seen)

    def wait_for_step(self, process: subprocess.Popen[bytes], step: int) -> None:
        """Return when so many steps are done."""
        self._wait(process, lambda: self._steps() >= step)

    def wait_for_save(self, process: subprocess.Popen[bytes], step: int) -> None:
        """Return when the checkpoint of this step is begun."""
        self.wait_for_step(process, step)
        partial = self.run / "checkpoints" / f".step={step}.ckpt.partial"
        whole = self.run / "checkpoints" / f"step={step}.ckpt"
        self._wait(process, lambda: partial.exists() or whole.exists())

    def _wait(self, process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
        while not condition():
            if process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            time.sleep(0.002)

    def _steps(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def moment(self) -> str:
        """What the run was doing, from what lies on the disk."""
        if any((self.run / "checkpoints").glob(".*.partial")):
            return "save"
        steps = self._steps()
        return "end" if steps == STEPS else f"step {steps}"


def outcome(run: Path) -> dict[str, Any]:
    """Every metric of a run that is not a time, by step, and the digest of its weights."""
    found: dict[str, Any] = {
        f"{name} of step {line['step']}": value
        for line in read_metrics(run / "metrics.jsonl")
        for name, value in line.items()
        if not name.startswith(TIMED)
    }
    return {**found, "weights": json.loads((run / "summary.json").read_text())["weights_sha256"]}


def kill(process: subprocess.Popen[bytes], one_rank: bool) -> float:
    """Kill everything, or the last rank alone; the seconds until nothing is left."""
    ranks = psutil.Process(process.pid).children(recursive=True)
    started = time.monotonic()
    for victim in ranks[-1:] if one_rank else [*ranks, process]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(ranks)
    return time.monotonic() - started


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--layout", default="dp2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-rank", action="store_true")
    options = parser.parse_args()
    draw, moments, faults = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_chat_model(folder / "model")
        whole = Job(model, folder / "whole", options.layout)
        whole.finish()
        lines = read_metrics(whole.run / "metrics.jsonl")
        step_s = sum(line["time/step_s"] for line in lines) / STEPS
        for number in range(options.kills):
            job = Job(model, folder / f"killed-{number}", options.layout)
            process = job.start()
            if number % 2:
                job.wait_for_save(process, draw.randrange(SAVED_EVERY, STEPS, SAVED_EVERY))
                time.sleep(draw.uniform(0, SAVE_S))
            else:
                job.wait_for_step(process, draw.randrange(STEPS))
                time.sleep(draw.uniform(0, step_s))
            took = kill(process, options.one_rank)
            moment = job.moment()
            moments[moment.split()[0]] += 1
            job.finish()
            expected, found = outcome(whole.run), outcome(job.run)
            differ = [key for key in expected if expected[key] != found.get(key)]
            faults += bool(differ) or took > 60
            sys.stdout.write(
                f"{number + 1}/{options.kills} killed in {moment}, gone after {took:.1f} s: "
                f"{differ or 'the same to the bit'}\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"{options.kills - faults}/{options.kills} continued exactly; {moments}\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
