"""The pipeline's table: what counts as a question, and that every number has its interval."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.config.plugs import build_plug
from opcd_nemo.context.registry import Entry
from opcd_nemo.errors import UserError
from opcd_nemo.evaluation.answers_file import read_answers, write_answers
from opcd_nemo.evaluation.evaluator import Answer, Evaluation
from opcd_nemo.evaluation.statistics import SHARE, estimate, mean_interval
from opcd_nemo.experience.config import load_experience
from opcd_nemo.experience.folder import PipelineFolder
from opcd_nemo.experience.table import summarise, table_text
from opcd_nemo.formats.locate import write_json
from tests.quick_compose import compose

SETTINGS = (
    "task=frozen_lake context=experience_games task.repeat_maps=true task.num_test=5 "
    "experience.consolidation.methods=[opcd,sft] experience.controls=[]"
).split()
SEEDS, PLAYS = (1, 2, 3), 23
BY_MAP = (0.0, 0.0, 1.0, 1.0, 1.0)
PARTS = ("task", "retention")


def folder_of(folder: Path, *more: str) -> PipelineFolder:
    raw = compose("experience", [f"exp_manager.exp_dir={folder}", *SETTINGS, *more])
    pipeline = PipelineFolder(load_experience(raw))
    entry = Entry(items=("one",), num_tokens=3, lineage={}, scores={"validation": 0.5})
    pipeline.registry.add(entry)
    pipeline.path.mkdir(parents=True, exist_ok=True)
    write_json(pipeline.path / "selected.json", {"experience": [entry.hash]})
    write_json(pipeline.path / "ranked.json", {"without": 0.25})
    return pipeline


def answers(pipeline: PipelineFolder, part: str, shift: float) -> list[dict[str, Any]]:
    episodes = build_plug(pipeline.plug(part)).episodes("test", 0, PLAYS if part == "task" else 4)
    return [
        asdict(
            Answer(
                uid=episode.uid,
                question="?",
                sample=sample,
                text="",
                score=BY_MAP[number % 5] if part == "task" else 1.0,
                answered=number % 2 == 0,
                num_tokens=int(number + shift),
                leaked=False,
            )
        )
        for number, episode in enumerate(episodes)
        for sample in range(2)
    ]


def write_runs(pipeline: PipelineFolder) -> None:
    for run in pipeline.settings.runs:
        folder, seed = pipeline.path / run, float(run[-1])
        folder.mkdir()
        write_json(folder / "summary.json", {"steps": 1})
        lines = [
            {"evaluation": name, "part": part, **one}
            for name in ("base", "in_context", "student")
            for part in PARTS
            for one in answers(pipeline, part, seed)
        ]
        (folder / "answers.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    row = {str(s): {part: answers(pipeline, part, s) for part in PARTS} for s in SEEDS}
    write_json(pipeline.path / "controls.json", {"opcd_in_context": row, "sft_in_context": row})


def test_plays_of_one_map_are_one_question_and_every_number_has_its_interval(
    tmp_path: Path,
) -> None:
    pipeline = folder_of(tmp_path)
    write_runs(pipeline)
    summary = summarise(pipeline)
    row = summary["rows"]["opcd"]
    assert row["score"] == asdict(estimate([BY_MAP] * 3, SHARE))
    assert 0 < row["score"]["low"] < 0.2 < 0.9 < row["score"]["high"] < 1  # five maps tell little
    assert row["pass_at_k"]["2"] == row["score"]
    assert row["format_failure_rate"]["low"] < row["format_failure_rate"]["value"]
    assert row["response_tokens"]["low"] < 11 + 2 < row["response_tokens"]["high"]
    assert (row["leakage_rate"]["value"], row["leakage_rate"]["low"]) == (0.0, 0.0)
    assert 0 < row["leakage_rate"]["high"] < 1  # five maps without a leak are no proof
    assert (row["retention"]["value"], row["retention"]["high"]) == (1.0, 1.0)
    assert 0 < row["retention"]["low"] < 1
    assert row["retention_by_seed"] == {"1": 1.0, "2": 1.0, "3": 1.0}
    text = table_text(summary)
    maps = summary["maps"]
    assert (maps["asked"], maps["plays"], maps["maps_overlap"]) == (5, 23, 0)
    assert "* 5 different maps in 23 test games, " in text
    assert f"a random player wins {maps['random_win_rate_test']:.3f} of the test" in text
    assert "| OPCD | 0.600 [" in text
    assert f"| 1.00 [{row['retention']['low']:.2f}, 1.00] |" in text


def test_of_one_map_interval_and_p_are_over_seeds(tmp_path: Path) -> None:
    pipeline = folder_of(tmp_path, "task.num_test=1")
    write_runs(pipeline)
    summary = summarise(pipeline)
    tokens = [sum(range(PLAYS)) / PLAYS + seed for seed in SEEDS]
    found = summary["rows"]["sft"]["response_tokens"]
    assert [*found.values()] == pytest.approx([*asdict(mean_interval(tokens)).values()])
    assert summary["paired"]["opcd - sft"]["p_value"] == 1.0
    assert summary["internalised"] is None
    assert "p = 1.000" in table_text(summary)


def test_answers_that_were_removed_or_edited_are_named(tmp_path: Path) -> None:
    pipeline = folder_of(tmp_path)
    write_runs(pipeline)
    file = pipeline.path / "opcd-2" / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    student = [line for line in lines if '"student"' in line and '"task"' in line]
    for kept, problem in (
        ([line for line in lines if line not in student], "0 answers of student, task, 46 with"),
        (
            [line for line in lines if line not in student[-2:]],
            "44 answers of student, task, 46 with",
        ),
        (["{}\n", *lines], "line 1: no uid"),
        ([lines[0].replace("false", '"no"'), *lines[1:]], "line 1: "),
    ):
        file.write_text("".join(kept))
        with pytest.raises(UserError) as caught:
            summarise(pipeline)
        assert str(caught.value.problem).startswith(problem)


def test_an_answer_with_any_line_end_is_one_answer(tmp_path: Path) -> None:
    told = Answer(
        uid="u",
        question="?",
        sample=0,
        text="a\u2028b\x85c",
        score=1.0,
        answered=True,
        num_tokens=1,
        leaked=False,
    )
    evaluation = Evaluation(answers=(told,))
    write_answers(tmp_path / "answers.jsonl", {"base": (evaluation, evaluation)})
    assert read_answers(tmp_path / "answers.jsonl", "a copy")["base", "task"].answers == (told,)
