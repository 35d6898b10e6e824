"""Sums travel, means are made of them; the JSONL record."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from opcd_nemo.metrics import METRICS, Stats, Stopwatch, metric_line, quantiles, read_metrics
from opcd_nemo.storage.run_folder import RunFolder


def test_mean_does_not_depend_on_how_values_were_split() -> None:
    values = [3.0, 5.0, 1.0, 7.0]
    whole, parts = Stats({"a": (sum(values), 4.0)}), Stats()
    for value in values:
        parts.add(Stats({"a": (value, 1.0)}))
    assert parts.means() == whole.means() == {"a": 4.0}


def test_adding_leaves_the_other_alone() -> None:
    one = {"a": (1.0, 1.0)}
    stats, other = Stats(one), Stats({"a": (2.0, 1.0), "b": (4.0, 2.0)})
    stats.add(other)
    assert stats.sums == {"a": (3.0, 2.0), "b": (4.0, 2.0)}
    assert one == {"a": (1.0, 1.0)}
    assert other.sums["a"] == (2.0, 1.0)


def test_nothing_counted_is_zero() -> None:
    assert Stats({"a": (0.0, 0.0)}).mean("a") == 0.0


def test_stopwatch_adds_up_by_phase() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.phase("sleep"):
            time.sleep(0.02)
    assert 0.04 <= watch.wall_s["sleep"] < 2
    assert watch.cpu_s["sleep"] < watch.wall_s["sleep"]


def test_record_is_read_back_and_appended_to(tmp_path: Path) -> None:
    for step in range(2):
        RunFolder(tmp_path).append(METRICS, metric_line(step, {"loss/reverse_kl": 0.5 * step}))
    lines = read_metrics(tmp_path / METRICS)
    assert lines == [
        {"step": 0, "loss/reverse_kl": 0.0},
        {"step": 1, "loss/reverse_kl": 0.5},
    ]


def test_missing_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        Stats().mean("a")


def test_quantiles_are_values_that_were_there_and_add_up_over_ranks() -> None:
    whole = Stats({"a": (1.0, 1.0)}, {"length": [3.0, 9.0]})
    whole.add(Stats({}, {"length": [float(n) for n in range(10, 18)], "b": []}))
    assert whole.means() == {
        "a": 1.0,
        "length/p10": 3.0,
        "length/p50": 12.0,
        "length/p90": 16.0,
        "length/max": 17.0,
    }
    assert quantiles([4]) == dict.fromkeys(("p10", "p50", "p90", "max"), 4.0)
