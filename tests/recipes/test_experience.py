"""The experience pipeline from extraction to the table, interrupted and gone on with."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from opcd_nemo.storage.lock import lock_folder
from tests.recipes.conftest import run_python

SETTINGS = (
    "task=frozen_lake context=experience_games evaluation.num_questions=4 parallel=single "
    "experience.extraction.keep=trace experience.extraction.num_chains=2 name=lake "
    "experience.extraction.num_steps=2 experience.extraction.sampling.max_new_tokens=4 "
    "experience.scoring.first_questions=2 experience.consolidation.methods=[opcd,off_policy] "
    "experience.consolidation.seeds=[1] experience.controls=[wrong]"
).split()
PROMPT = "experience.extraction.prompt='{trace} {outcome}'"
HINT = r"task.hint='a board \${x}'"  # in every trace, so in every item


def pipeline(smoke: list[str], folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    where = f"exp_manager.exp_dir={folder}"
    return run_python("recipes/experience.py", *smoke, *SETTINGS, PROMPT, HINT, where, *more)


def test_killed_anywhere_it_goes_on_to_the_same_table(smoke: list[str], tmp_path: Path) -> None:
    whole = pipeline(smoke, tmp_path)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "lake"
    table = (folder / "table.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert {"base", "in_context", "student", "internalised"} <= summary.keys()
    assert (summary["seeds"], summary["maps_overlap"]) == ([1], 0)
    students = ["opcd", "opcd_in_context", "off_policy", "off_policy_in_context"]
    assert list(summary["rows"]) == ["base", "in_context", "wrong", *students]

    # as kills leave it: in extraction, in scoring, in a run, in the evaluation
    for name in ("candidates.json", "extraction/wave=0001.jsonl", "ranked.json", "selected.json"):
        (folder / name).unlink()
    for name in ("off_policy-1/summary.json", "controls.json", "summary.json", "table.md"):
        (folder / name).unlink()
    scores = (folder / "scoring.jsonl").read_text()
    (folder / "scoring.jsonl").write_text(scores[: len(scores) // 2])
    kept = [folder / "extraction/wave=0000.jsonl", folder / "opcd-1/summary.json"]
    kept += list((folder / "teacher_data").rglob("step=00*.jsonl"))
    before = [file.stat().st_mtime_ns for file in kept]

    again = pipeline(smoke, tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"finished before ({folder / 'opcd-1/summary.json'})" in again.stdout
    assert (folder / "table.md").read_text() == table
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert len(kept) > 2

    listed = run_python("recipes/experience.py", "list", f"registry={folder / 'registry'}")
    assert f"* {summary['experience']['content_hash'][:12]}" in listed.stdout
    run = json.loads((folder / "opcd-1" / "summary.json").read_text())
    assert all("a board ${x}" in item for item in summary["experience"]["items"])
    assert run["context_lineage"]["experience"] == summary["experience"]["content_hash"]


def test_a_second_job_on_a_stage_s_folder_is_refused(smoke: list[str], tmp_path: Path) -> None:
    with lock_folder(tmp_path / "lake"):
        done = pipeline(smoke, tmp_path, "stage=extract")
    assert done.returncode == 2, done.stderr
    assert "name: " in done.stderr
    assert "in use by host" in done.stderr
    assert not (tmp_path / "lake" / "extraction").exists()


def test_a_prompt_that_cannot_fit_is_one_line(smoke: list[str], tmp_path: Path) -> None:
    done = pipeline(smoke, tmp_path, "experience.extraction.sampling.max_new_tokens=100000")
    assert done.returncode == 2, done.stderr
    assert "allowed: at most the model's" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "goes on from here" not in done.stdout
    assert not (tmp_path / "lake").exists()


def test_more_scoring_than_validation_questions_is_one_line(
    smoke: list[str], tmp_path: Path
) -> None:
    done = pipeline(smoke, tmp_path, "experience.scoring.num_questions=100000")
    assert done.returncode == 2, done.stderr
    assert "experience.scoring.num_questions=100000: validation: n=100000" in done.stderr
    assert not (tmp_path / "lake").exists()
