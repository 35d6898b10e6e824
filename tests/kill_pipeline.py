"""Kills the experience pipeline at random moments and compares its table with an undisturbed one.

python -m tests.kill_pipeline --kills 10
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.recipes.conftest import SMOKE
from tests.recipes.test_experience import PROMPT, SETTINGS
from tests.tiny import write_chat_model
from tests.tree import PYTHONPATH, ROOT


def start(model: Path, folder: Path) -> subprocess.Popen[bytes]:
    arguments = [*SMOKE, f"student.path={model}", *SETTINGS, PROMPT]
    return subprocess.Popen(
        [sys.executable, "recipes/experience.py", *arguments, f"exp_manager.exp_dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_all(process: subprocess.Popen[bytes]) -> None:
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_chat_model(Path(scratch) / "tiny")
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        began = time.monotonic()
        assert start(model, whole).wait() == 0
        seconds = time.monotonic() - began
        kills = 0
        while True:
            process = start(model, broken)
            try:
                wait = rng.uniform(0.1, 0.6) * seconds if kills < options.kills else None
                code = process.wait(timeout=wait)
            except subprocess.TimeoutExpired:
                kill_all(process)
                kills += 1
                files = sorted(p.name for p in (broken / "lake").glob("*")) if kills else []
                sys.stdout.write(f"kill {kills} after {wait:.0f} s: {' '.join(files)}\n")
                continue
            assert code == 0, code
            break
        tables = [(folder / "lake" / "table.md").read_text() for folder in (whole, broken)]
        sys.stdout.write(
            f"{kills} kills; tables {'equal' if tables[0] == tables[1] else 'DIFFER'}\n"
        )
        sys.exit(tables[0] != tables[1])


if __name__ == "__main__":
    main()
