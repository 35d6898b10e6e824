"""Tables, samples, curves and the numbers of the summary."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from opcd_nemo import report
from opcd_nemo.evaluation import Answer, Evaluation
from opcd_nemo.metrics import MetricLogger
from opcd_nemo.model_files import write_json


def evaluation(*answers: tuple[str, float]) -> Evaluation:
    return Evaluation(
        answers=tuple(
            Answer(uid=f"test/{index}", text=text, score=score)
            for index, (text, score) in enumerate(answers)
        )
    )


def test_table_has_a_row_for_every_name() -> None:
    table = report.results_table({"base": (0.04, 0.625), "after training": (1.0, None)})
    header, base, after = table.splitlines()
    assert header.split() == ["task", "retention"]
    assert base.split() == ["base", "0.04", "0.62"]
    assert after.split() == ["after", "training", "1.00"]


def test_peak_memory_of_another_process_is_its_own_account() -> None:
    mine = report.peak_rss_kib()
    assert report.peak_rss_of(os.getpid()) == pytest.approx(mine, rel=0.05)
    assert report.gib([2**20, 2**19]) == 1.5


def test_versions_name_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_VERSIONS", ("torch", "no-such-package"))
    versions = report.versions()
    assert versions["no-such-package"] == "not installed"
    assert versions["torch"].startswith("2.")
    assert set(versions) == {"python", "torch", "no-such-package"}


def test_json_keeps_the_order(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"b": 1, "a": {"c": 2.5}})
    text = (tmp_path / "summary.json").read_text()
    assert list(json.loads(text)) == ["b", "a"]
    assert text.endswith("}\n")


def test_samples_stand_side_by_side(tmp_path: Path) -> None:
    columns = {
        "base": evaluation(("one\ntwo", 0.0), ("x", 1.0)),
        "student": evaluation(("short", 1.0), ("y", 0.0)),
    }
    report.write_samples(tmp_path / "samples.md", columns, count=1)
    assert (tmp_path / "samples.md").read_text() == (
        "# Samples\n\n## test/0\n\n- **base** (score 0)\n  > one\n  > two\n"
        "- **student** (score 1)\n  > short\n"
    )


def test_curves_are_a_picture_whatever_losses_there_are(tmp_path: Path) -> None:
    with MetricLogger(tmp_path / "metrics.jsonl") as metrics:
        names = ["loss/forward_kl", "loss/reverse_kl", "loss/captured_mass"]
        for step, loss in enumerate(names):
            metrics.log(
                step,
                {
                    loss: 0.5,
                    "rollout/response_tokens": 20.0,
                    "optim/grad_norm": 1.0,
                    "perf/tokens_per_s": 30.0,
                },
            )
    report.write_curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
