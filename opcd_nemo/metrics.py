"""Statistics that add up over micro-batches and ranks, and the JSONL record of a run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}


class Stats:
    """Named (sum, count) pairs: only sums travel, a mean exists when it is printed.

    `samples` are the few numbers of which quantiles are wanted, by name.
    """

    def __init__(
        self,
        sums: Mapping[str, tuple[float, float]] | None = None,
        samples: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Start from given sums and samples."""
        self.sums = dict(sums or {})
        self.samples = {name: list(values) for name, values in (samples or {}).items()}

    def add(self, other: Stats) -> None:
        """Add another's sums and counts to this one."""
        for name, (value, count) in other.sums.items():
            mine = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (mine[0] + value, mine[1] + count)
        for name, values in other.samples.items():
            self.samples.setdefault(name, []).extend(values)

    def mean(self, name: str) -> float:
        """The mean under `name`."""
        value, count = self.sums[name]
        return value / count if count else 0.0

    def means(self) -> dict[str, float]:
        """Every mean, by name, and the quantiles of the samples: `<name>/p90`."""
        of_samples = {
            f"{name}/{word}": value
            for name, values in self.samples.items()
            for word, value in quantiles(values).items()
        }
        return {name: self.mean(name) for name in sorted(self.sums)} | of_samples


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The smallest values that so great a share of the values does not exceed, by their words."""
    ordered = sorted(values)
    return {
        word: float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])
        for word, share in _QUANTILES.items()
        if ordered
    }


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
