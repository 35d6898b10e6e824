"""Statistics that add up over micro-batches and ranks, and the JSONL record of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class Stats:
    """Named (sum, count) pairs: only sums travel, a mean exists when it is printed."""

    def __init__(self, sums: Mapping[str, tuple[float, float]] | None = None) -> None:
        """Start from given sums."""
        self.sums = dict(sums or {})

    def add(self, other: Stats) -> None:
        """Add another's sums and counts to this one."""
        for name, (value, count) in other.sums.items():
            mine = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (mine[0] + value, mine[1] + count)

    def mean(self, name: str) -> float:
        """The mean under `name`."""
        value, count = self.sums[name]
        return value / count if count else 0.0

    def means(self) -> dict[str, float]:
        """Every mean, by name."""
        return {name: self.mean(name) for name in sorted(self.sums)}


class Stopwatch:
    """Wall and process-CPU seconds spent in named phases."""

    def __init__(self) -> None:
        """Start with no phase measured."""
        self.wall_s: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s[name] = self.wall_s.get(name, 0.0) + time.perf_counter() - wall
        self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - cpu


METRICS = "metrics.jsonl"  # in the folder of a run


def metric_line(step: int, values: Mapping[str, float | str]) -> str:
    """A line of metrics.jsonl, from which every table and curve is made."""
    return json.dumps({"step": step, **values}, sort_keys=True) + "\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Every line of a metrics file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
