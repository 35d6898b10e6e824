"""Recipes run as a user runs them: a process of its own, its screen and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"}


def recipe(
    *overrides: str, timeout_s: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `recipes/train.py` and wait for its end; the whole process group ends on a time-out."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    paths = [str(ROOT), kept.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "recipes/train.py", *overrides],
        check=False,
        capture_output=True,
        cwd=ROOT,
        env={
            **kept,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            **environment,
        },
        text=True,
        timeout=timeout_s,
    )
