"""Times and peak memory of providers that take turns in one process, and the table's rows."""

import csv
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One provider of one operation."""

    op: str
    provider: str
    passes: str = "forward+backward"
    dtype: str
    shape: str
    wall_s: float
    wall_min_s: float
    wall_max_s: float
    cpu_s: float
    speedup_wall: float
    """Median wall time of the naive provider of the same run, over this one's."""
    speedup_cpu: float
    """The same of CPU time, which other processes on the machine disturb less."""
    peak_extra_mib: float
    extra_in_logits: float
    """Peak extra memory in units of one logits tensor."""
    threads: int = field(default_factory=torch.get_num_threads)
    device: str = "cpu"
    hardware: str = ""
    torch: str = torch.__version__
    triton: str = triton.__version__
    commit: str = ""
    date: str = ""


class Meter:
    """Wall time, CPU time and peak extra memory of calls on one device."""

    def __init__(self, device: str) -> None:
        """For `cpu` or `cuda`."""
        self._cuda = device == "cuda"

    def run(self, call: Callable[[], object]) -> tuple[float, float, float]:
        """(wall seconds, CPU seconds, peak extra MiB) of one call; what it returns stays in it."""
        before = self._reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        if self._cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = torch.cuda.max_memory_allocated() / MIB if self._cuda else _memory_mib("VmHWM")
        del result
        return wall, cpu, peak - before

    def _reset_peak(self) -> float:
        gc.collect()
        _return_free_pages()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MIB
        Path("/proc/self/clear_refs").write_text("5")
        return _memory_mib("VmRSS")


def _return_free_pages() -> None:
    """What earlier providers freed would otherwise hide what the next one takes."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _memory_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def compare(
    op: str,
    shape: str,
    dtype: torch.dtype,
    device: str,
    logits_mib: float,
    providers: dict[str, Callable[[], Callable[[], object]]],
    repeats: int,
) -> list[Row]:
    """Rows of all providers, the first of which is the naive one.

    A provider is a function that prepares fresh inputs and returns the call to measure. Providers
    take turns, so that a slow spell of the machine hits all of them; one round is not counted.
    """
    meter = Meter(device)
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in providers}
    for turn in range(repeats + 1):
        for name, prepare in providers.items():
            sample = meter.run(prepare())
            if turn:
                samples[name].append(sample)
    naive_wall, naive_cpu = _median_times(samples[next(iter(providers))])
    rows = []
    for name, taken in samples.items():
        walls, _, peaks = zip(*taken, strict=True)
        (wall, cpu), peak = _median_times(taken), max(peaks)
        rows.append(
            Row(
                op=op,
                provider=name,
                dtype=str(dtype).removeprefix("torch."),
                shape=shape,
                wall_s=round(wall, 4),
                wall_min_s=round(min(walls), 4),
                wall_max_s=round(max(walls), 4),
                cpu_s=round(cpu, 4),
                speedup_wall=round(naive_wall / wall, 2),
                speedup_cpu=round(naive_cpu / cpu, 2),
                peak_extra_mib=round(peak, 1),
                extra_in_logits=round(peak / logits_mib, 3),
                device=device,
                hardware=torch.cuda.get_device_name() if device == "cuda" else _processor(),
                commit=_commit(),
                date=datetime.now(UTC).strftime("%Y-%m-%d"),
            )
        )
    return rows


def _median_times(samples: list[tuple[float, float, float]]) -> tuple[float, float]:
    walls, cpus, _ = zip(*samples, strict=True)
    return statistics.median(walls), statistics.median(cpus)


def _processor() -> str:
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    model = names[0].split(":")[1].strip() if names else platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def report(rows: list[Row], table: Path) -> None:
    """Prints the rows and appends them to the table."""
    names = [column.name for column in fields(Row)]
    table.parent.mkdir(exist_ok=True)
    fresh = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        if fresh:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    for row in rows:
        spread = f"{row.wall_min_s:.3f}-{row.wall_max_s:.3f}"
        ratio = f"{row.speedup_wall:6.2f}x wall {row.speedup_cpu:6.2f}x cpu"
        memory = f"+{row.peak_extra_mib:8.1f} MiB, {row.extra_in_logits:5.2f} logits"
        sys.stdout.write(
            f"{row.op:16s} {row.provider:18s} {row.dtype:8s} {row.shape:14s} "
            f"{row.wall_s:7.3f} s ({spread})  {ratio}  {memory}\n"
        )
    sys.stdout.flush()
