"""Every recipe for H100s, both layer specs, corner ranks: `python -m tests.rehearsal.matrix`.

`local` runs on the installed megatron-core, `te` on the versions of NVIDIA's image. A rank that was
played is a file in the folder and is not played again: a rehearsal that was stopped goes on.
After a change of the project remove the folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opcd_nemo.launch.recipes import CONF
from opcd_nemo.rehearsal.command import Player, tasks_of
from opcd_nemo.rehearsal.compare import mismatches
from opcd_nemo.rehearsal.planned import error_words, planned_bytes
from opcd_nemo.rehearsal.rank import Task

CORE, TE = "rehearse.megatron_core=0.18.0", "rehearse.transformer_engine=2.16.1"
SPECS = {"local": (), "te": (CORE, TE)}
# the recipe that is played in other layouts and with all layers, too
WHOLE = "math_qwen3_8b_to_4b_2n8g"
ALL_LAYERS = "rehearse.layers=null"
LAYOUTS = {
    "cp2": ("parallel=h100_2n8g_tp4_cp2",),
    "pp2": ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"),
}
SERVERS = ("engine=vllm", "engine.launch=true", "engine.colocated=true")
PHASES = ("rollout", "teacher", "student", "optimizer", "save", "resume")


@dataclass(frozen=True, slots=True)
class Row:
    """A recipe as it is played: its layer spec and what is different, and the command's words."""

    recipe: str
    played: str
    words: tuple[str, ...]


def recipes() -> list[str]:
    """Those for H100s."""
    return sorted(path.stem for path in (CONF / "recipe").glob("*n8g.yaml"))


def rows() -> Iterator[tuple[Row, bool]]:
    """What is played, what shows most first; with True the first rank alone."""
    every = [_row(recipe, spec) for spec in SPECS for recipe in recipes()]
    yield from ((row, True) for row in every)
    yield from ((_row(WHOLE, spec, "all layers", ALL_LAYERS), True) for spec in reversed(SPECS))
    yield from ((row, False) for row in every)
    yield _row(WHOLE, "local", "beside servers", *SERVERS), True
    yield Row(WHOLE, "te, installed core", (f"recipe={WHOLE}", TE)), False
    yield Row(WHOLE, "local, image's core", (f"recipe={WHOLE}", CORE)), False
    for layout, words in LAYOUTS.items():
        yield from ((_row(WHOLE, spec, layout, *words), False) for spec in SPECS)


def _row(recipe: str, spec: str, change: str = "", *more: str) -> Row:
    played = ", ".join(filter(None, (spec, change)))
    return Row(recipe, played, (f"recipe={recipe}", *SPECS[spec], *more))


@cache
def _tasks(row: Row) -> tuple[list[Task], list[str]]:
    return tasks_of(row.words)


def main() -> int:
    """Play, and print the table; 1 where a rank failed, waits for another, or the plan is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("build/rehearsal"))
    parser.add_argument("--first", action="store_true", help="only the first rank of each recipe")
    parser.add_argument("--bar", type=float, default=0.10, help="the plan's largest error")
    parser.add_argument("--recipe", action="append", default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    players = cache(Player)
    failed, results = False, dict[Row, dict[int, dict[str, Any]]]()
    for row, alone in rows():
        if options.recipe and row.recipe not in options.recipe:
            continue
        ranks = results.setdefault(row, {})
        tasks, path = _tasks(row)
        for task in tasks[: 1 if alone or options.first else None]:
            if task.rank not in ranks:
                result = _result(options.folder, row, task, players(tuple(path)))
                failed |= result is None
                if result is not None:
                    ranks[task.rank] = result
    for row, ranks in results.items():
        failed |= _show(row, list(ranks.values()), options.bar)
    return int(failed)


def _result(folder: Path, row: Row, task: Task, player: Player) -> dict[str, Any] | None:
    """What the rank did, now or before; None: it failed."""
    name = ".".join([row.recipe, *re.findall(r"[\w.]+", row.played), str(task.rank)])
    file = folder / f"{name}.json"
    if not file.exists():
        result = player.play(task)
        if result is None:
            _say(f"FAILED: {name}")
            return None
        file.write_text(json.dumps(result))
        _say(f"{name}: {result['cpu_seconds']:.0f} CPU-s, {_cells(result['peak_bytes'], {})}")
    played: dict[str, Any] = json.loads(file.read_text())
    return played


def _show(row: Row, ranks: list[dict[str, Any]], bar: float) -> bool:
    """Print a row of the table; True where ranks do not meet, or the fullest is not as planned."""
    if not ranks:
        return False
    fullest = {phase: max(rank["peak_bytes"][phase] for rank in ranks) for phase in PHASES}
    planned = planned_bytes(row.words)
    found = mismatches(ranks)
    numbers = " ".join(str(rank["rank"]) for rank in ranks)
    seconds = sum(rank["cpu_seconds"] for rank in ranks)
    cells = [row.recipe, row.played, numbers, f"{seconds:.0f}", _cells(fullest, planned)]
    _say(f"| {' | '.join(cells)} |")
    for rank in ranks:
        if len({*rank["held_bytes"].values()}) > 1:
            found.append(f"rank {rank['rank']}, before and after a resume: {rank['held_bytes']}")
    for line in found:
        _say(f"WRONG: {row.recipe}, {row.played}: {line}")
    off = {phase for phase in planned if abs(planned[phase] / fullest[phase] - 1) > bar}
    for phase in sorted(off):
        _say(f"THE PLAN IS OFF: {row.recipe}, {row.played}: {phase}")
    return bool(found or off)


def _cells(measured: dict[str, float], planned: dict[str, float]) -> str:
    """GiB by phase, and in brackets how far the plan is off."""
    return " | ".join(
        f"{measured[phase] / 2**30:.2f}"
        + (f" ({error_words(planned[phase], measured[phase])})" if phase in planned else "")
        for phase in PHASES
    )


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
