"""Runs a recipe many times in forks of one process, which pays for the imports once.

`python -m tests.recipes.forked recipes/train.py` reads a JSON list of argument lists and writes a
JSON list of [exit code, stdout, stderr].
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import opcd_nemo.engines.megatron
import opcd_nemo.launch  # noqa: F401  # what the recipe's launcher imports


def main() -> None:
    recipe = sys.argv[1]
    results = [_run(recipe, arguments) for arguments in json.load(sys.stdin)]
    json.dump(results, sys.stdout)


def _run(recipe: str, arguments: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("stdout", "stderr")]
        child = os.fork()
        if child == 0:
            for number, path in enumerate(paths, start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.argv = [recipe, *arguments]
            runpy.run_path(recipe, run_name="__main__")  # ends the process
            os._exit(99)
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status), *(path.read_text() for path in paths)


if __name__ == "__main__":
    main()
