"""Every recipe for H100s, both layer specs, corner ranks: `python -m tests.rehearsal.matrix`.

`local` runs on the installed megatron-core, `te` on the versions of NVIDIA's image. A rank that was
played is a file in the folder and is not played again: a rehearsal that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opcd_nemo.launch.recipes import CONF
from opcd_nemo.rehearsal.command import corners, play, tasks_of
from opcd_nemo.rehearsal.compare import mismatches
from opcd_nemo.rehearsal.planned import error_words, planned_bytes
from opcd_nemo.rehearsal.shapes import read_rehearsal

IMAGE = ("rehearse.megatron_core=0.18.0", "rehearse.transformer_engine=2.16.1")
WHOLE = "math_qwen3_8b_to_4b_2n8g"  # the recipe that is played with all layers, too
PHASES = ("rollout", "teacher", "student", "optimizer", "save", "resume")


def recipes() -> list[str]:
    """Those for H100s."""
    return sorted(path.stem for path in (CONF / "recipe").glob("*n8g.yaml"))


def cases() -> Iterator[tuple[str, str, int, list[str]]]:
    """Recipe, spec, rank, words: the first rank of everything, the other corners, extremes."""
    specs = {"te": list(IMAGE), "local": []}
    for first in (True, False):
        for spec, more in specs.items():
            for recipe in recipes():
                words = [f"recipe={recipe}", *more]
                parallel = read_rehearsal(words)[0].parallel
                for rank in corners(parallel):
                    if (rank == 0) == first:
                        yield recipe, spec, rank, words
    beside = ["engine=vllm", "engine.launch=true", "engine.colocated=true"]
    yield WHOLE, "local-vllm", 0, [f"recipe={WHOLE}", *beside]
    yield WHOLE, "te-all-layers", 0, [f"recipe={WHOLE}", *IMAGE, "rehearse.layers=null"]


def main() -> int:
    """Play, and print the table; 1 where a rank failed, waits for another, or the plan is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("build/rehearsal"))
    parser.add_argument("--first", action="store_true", help="only the first rank of each recipe")
    parser.add_argument("--bar", type=float, default=0.10, help="the plan's largest error")
    parser.add_argument("--recipe", action="append", default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    failed, results = False, {}
    for recipe, spec, rank, words in cases():
        if (options.recipe and recipe not in options.recipe) or (options.first and rank):
            continue
        file = options.folder / f"{recipe}.{spec}.{rank}.json"
        if not file.exists():
            started = time.perf_counter()
            result = _played(words, rank)
            _say(f"{file.stem}: {time.perf_counter() - started:.0f} s")
            if result is None:
                failed = True
                continue
            file.write_text(json.dumps(result))
        results.setdefault((recipe, spec), []).append(json.loads(file.read_text()))
        failed |= _show(words, recipe, spec, results[recipe, spec][-1], options.bar)
    for (recipe, spec), ranks in results.items():
        for line in mismatches(ranks):
            _say(f"{recipe} {spec}: {line}")
            failed = True
    return int(failed)


def _played(words: Sequence[str], rank: int) -> dict[str, Any] | None:
    (task, path), *_ = tasks_of([*words, f"rehearse.ranks=[{rank}]"])
    return play(task, path)


def _show(words: Sequence[str], recipe: str, spec: str, result: dict[str, Any], bar: float) -> bool:
    """Print a row; True where the plan is wrong by more than the bar."""
    planned = planned_bytes(words)
    measured = result["peak_bytes"]
    errors = {phase: planned[phase] / measured[phase] - 1 for phase in planned}
    cells = "  ".join(
        f"{phase} {measured[phase] / 2**30:.2f}"
        + (f" {error_words(planned[phase], measured[phase])}" if phase in planned else "")
        for phase in PHASES
    )
    _say(f"{recipe:32} {spec:13} {result['rank']:3} {result['cpu_seconds']:5.0f} s  {cells}")
    return any(abs(error) > bar for error in errors.values())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
