"""Validation while training, the best checkpoint, and a moving teacher, in a continued run."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opcd_nemo.metrics import read_metrics
from tests.crash import outcome
from tests.recipes.conftest import Train

MOVING = [
    *("exp_manager=resumable", "exp_manager.checkpoint_callback_params.every_n_train_steps=2"),
    *("exp_manager.checkpoint_callback_params.save_top_k=1", "optim.lr=1e-3", "name=run"),
    *("task._target_=tests.recipes.faulty_parts.PeakedTask", "parallel=dp2"),
    *("teacher=ema", "teacher.ema_decay=0.5"),
]
VALIDATED = "evaluation.every_n_steps=1"


@pytest.fixture(scope="module")
def folders(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of six steps that is never validated, and one of four that is, continued to six."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("plain", "validated")}

    def run(name: str, steps: int, *overrides: str) -> subprocess.CompletedProcess[str]:
        place = (f"exp_manager.exp_dir={made[name]}", f"trainer.max_steps={steps}")
        done = train(*MOVING, *place, *overrides)
        assert done.returncode == 0, done.stderr
        return done

    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(run, "plain", 6)
        pool.submit(run, "validated", 4, VALIDATED).result()
        first = made["validated"] / "first"
        first.mkdir()
        for name in ("summary.json", "metrics.jsonl"):
            (first / name).write_bytes((made["validated"] / "run" / name).read_bytes())
        (first / "kept").write_text(" ".join(_kept(made["validated"] / "run")))
        done = run("validated", 6, VALIDATED)
        assert "best on validation: 1.00 after 3 steps" in done.stdout
        plain.result()
    return {name: folder / "run" for name, folder in made.items()} | {"first": first}


def _kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*.ckpt"))


def test_a_step_that_is_validated_has_its_scores(folders: dict[str, Path]) -> None:
    lines = read_metrics(folders["validated"] / "metrics.jsonl")
    assert [line["validation/score"] for line in lines] == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    assert all(0 <= line["validation/retention"] <= 1 for line in lines)
    assert all(line["time/validation_s"] > 0 for line in lines)


def test_the_best_is_kept_beyond_the_last_and_after_a_resume(folders: dict[str, Path]) -> None:
    # no callback saves step 3; the best before it, steps 1 and 2, are removed
    assert (folders["first"] / "kept").read_text() == "step=3.ckpt step=4.ckpt"
    assert _kept(folders["validated"]) == ["step=3.ckpt", "step=6.ckpt"]
    for run in ("first", "validated"):
        summary = json.loads((folders[run] / "summary.json").read_text())
        assert (summary["best_step"], summary["best_validation"]) == (3, 1.0)
    assert "best_step" not in json.loads((folders["plain"] / "summary.json").read_text())


def test_validating_and_resuming_with_an_ema_teacher_change_no_bit(
    folders: dict[str, Path],
) -> None:
    found = {
        name: value
        for name, value in outcome(folders["validated"]).items()
        if not name.startswith("validation/")
    }
    assert found == outcome(folders["plain"])


def test_every_validation_is_in_the_summary(folders: dict[str, Path]) -> None:
    lines = read_metrics(folders["validated"] / "metrics.jsonl")
    summary = json.loads((folders["validated"] / "summary.json").read_text())
    assert summary["validations"] == [
        {
            "step": line["step"] + 1,
            "score": line["validation/score"],
            "retention": line["validation/retention"],
        }
        for line in lines
    ]
    assert len(lines) == 6
    assert summary["stopped_by_retention"] is None


def test_training_stops_where_retention_falls_and_stays_stopped(
    train: Train, tmp_path: Path
) -> None:
    settings = [
        *("exp_manager=resumable", "exp_manager.checkpoint_callback_params.every_n_train_steps=2"),
        *(
            "task._target_=tests.recipes.faulty_parts.PeakedTask",
            "~retention",
            "+task@retention=json",
        ),
        *("retention._target_=tests.recipes.faulty_parts.FadingTask", "evaluation.num_retention=4"),
        *(VALIDATED, "evaluation.min_retention=0.5", "parallel=single", "trainer.max_steps=6"),
        *("name=run", f"exp_manager.exp_dir={tmp_path}"),
    ]
    for _ in range(2):
        done = train(*settings)
        assert done.returncode == 0, done.stderr
        stopped = (
            "stopped by retention after step 4: 0.25 is below evaluation.min_retention=0.5 of "
            "1.00, the score before training"
        )
        assert stopped in done.stdout.splitlines()
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert (summary["steps"], summary["stopped_by_retention"]) == (4, 4)
        assert [one["retention"] for one in summary["validations"]] == [1.0, 0.75, 0.5, 0.25]
        assert summary["best_step"] == 3
        assert {"step=3.ckpt", "step=4.ckpt"} <= set(_kept(tmp_path / "run"))
    assert "continuing from" in done.stdout
