"""The games' commands, with smoke settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opcd_nemo.metrics import read_metrics
from tests.recipes.conftest import Train, run_python


def test_a_game_trains_on_two_ranks(train: Train, tmp_path: Path) -> None:
    done = train(
        *("task=sokoban", "task.num_maps=40", "task.num_validation=5", "task.num_test=5"),
        *("parallel=dp2", f"exp_manager.exp_dir={tmp_path}", "name=run"),
    )
    assert done.returncode == 0, done.stderr
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["rollout/response_tokens"] > 0
    samples = (tmp_path / "run" / "samples.md").read_text()
    assert "## On the board below you are the" in samples
    assert "`test/######-" in samples


def test_the_report_of_a_setting() -> None:
    done = run_python("recipes/maps.py", "task=frozen_lake", "task.num_test=3")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["maps"] == 19
    assert (report["maps_test"], report["maps_overlap"]) == (3, 0)
    assert report["random_win_rate"] == pytest.approx(0.0160, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task=brevity"], "no game; allowed: task=frozen_lake, task=sokoban"),
        (["task=sokoban", "task.rounds=2"], "task.min_moves=3; allowed: 1 to task.rounds=2"),
        (["task=sokoban", "task.size=a"], "task.size=a; allowed: a whole number"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(settings: list[str], message: str) -> None:
    done = run_python("recipes/maps.py", *settings)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
