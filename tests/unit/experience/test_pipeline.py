"""The order of the stages, what is left alone, and what a stage lacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from opcd_nemo.context.items import content_hash
from opcd_nemo.context.registry import COMMANDS, answer
from opcd_nemo.errors import UserError
from opcd_nemo.experience.config import Settings, load_experience
from opcd_nemo.experience.pipeline import run_pipeline, select_experience
from opcd_nemo.experience.workplace import Workplace
from opcd_nemo.launch.compose import compose
from opcd_nemo.storage.lock import lock_folder


def settings(tmp_path: Path, *overrides: str) -> Settings:
    where = f"exp_manager.exp_dir={tmp_path}"
    raw = compose("experience", [where, "context=experience", *overrides])
    return load_experience(raw)


def ranking(*items: str) -> str:
    ranked = [
        {
            "chain": 0,
            "step": step,
            "items": [item],
            "num_tokens": 3,
            "problems": ["train/1"],
            "experience": content_hash([item]),
            "score": 1 - step / 10,
            "questions": 8,
        }
        for step, item in enumerate(items)
    ]
    return json.dumps({"without": 0.25, "num_questions": 8, "ranked": ranked})


def written(tmp_path: Path) -> Workplace:
    place = Workplace(settings(tmp_path))
    place.folder.mkdir(parents=True)
    (place.folder / "candidates.json").write_text("[]")
    (place.folder / "ranked.json").write_text(ranking("best", "worse"))
    return place


def test_stages_follow_each_other_and_a_failure_stops_them(tmp_path: Path) -> None:
    launched: list[tuple[str, ...]] = []

    def launch(extra: Sequence[str]) -> int:
        launched.append(tuple(extra))
        return 75 if "run=off_policy-1" in extra else 0

    place = written(tmp_path)
    assert run_pipeline(place.settings, launch, lambda line: None) == 75
    assert launched == [
        ("stage=consolidate", "round=1", "run=opcd-1"),
        ("stage=consolidate", "round=1", "run=off_policy-1"),
    ]


def test_a_stage_s_ranks_can_take_the_folder_and_no_second_job_can(tmp_path: Path) -> None:
    place = written(tmp_path)

    def launch(extra: Sequence[str]) -> int:
        lock_folder(place.folder).close()
        return 1

    assert run_pipeline(place.settings, launch, lambda line: None) == 1  # after the selection
    with (
        lock_folder(place.folder),
        pytest.raises(ValueError, match=r"name: .* in use by .*allowed"),
    ):
        run_pipeline(settings(tmp_path, "stage=select"), launch, lambda line: None)


def test_finished_runs_are_left_alone(tmp_path: Path) -> None:
    place = written(tmp_path)
    for run in place.settings.runs[:4]:
        (place.folder / run).mkdir()
        (place.folder / run / "summary.json").write_text("{}")
    launched: list[str] = []

    def launch(extra: Sequence[str]) -> int:
        launched.append(extra[-1])
        return 1

    assert run_pipeline(place.settings, launch, lambda line: None) == 1
    assert launched == [f"run={place.settings.runs[4]}"]


def test_the_selection_has_its_lineage(tmp_path: Path) -> None:
    place = written(tmp_path)
    select_experience(place, lambda line: None)
    entry = place.registry.selected()
    assert entry.items == ("best",)
    assert entry.scores["validation"] == 1.0
    assert entry.scores["validation_without"] == 0.25
    lineage = entry.lineage
    assert lineage["model"] == "smollm2-135m-instruct"
    assert lineage["problems"] == ["train/1"]
    assert (lineage["seed"], lineage["chain"], lineage["step"]) == (1234, 0, 0)
    assert lineage["prompt_version"] == place.settings.experience.extraction.prompt_version
    select_experience(place, lambda line: None)  # a second time changes nothing
    assert len(place.registry.history()) == 1


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("evaluate", "opcd-1, off_policy-1, .* not finished; allowed: after stage=consolidate"),
        ("select", "no .*ranked.json; allowed: after stage=score"),
    ],
)
def test_a_stage_without_its_input_is_one_line(tmp_path: Path, stage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_pipeline(settings(tmp_path, f"stage={stage}"), lambda _: 0, lambda line: None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list"], "registry=None; allowed: a registry's folder"),
        (["list", "more"], "list more; allowed: list|show"),
        (["diff", "ab"], "diff ab; allowed: list|show"),
        (["show", "zz"], "0 entries start with 'zz'; allowed"),
        (["rollback"], "1 selections; allowed: a rollback after two or more"),
    ],
)
def test_a_wrong_command_of_the_registry_is_one_line(
    tmp_path: Path, words: list[str], said: str
) -> None:
    place = written(tmp_path)
    select_experience(place, lambda line: None)
    folder = [] if said.startswith("registry") else [f"registry={place.registry.folder}"]
    with pytest.raises(UserError) as refused:
        answer([*words, *folder])
    assert said in str(refused.value)


def test_the_registry_s_commands_show_what_is_there(tmp_path: Path) -> None:
    place = written(tmp_path)
    select_experience(place, lambda line: None)
    folder = f"registry={place.registry.folder}"
    short = place.registry.selected().hash[:6]
    commands = {"list": [], "show": [short], "diff": [short, short]}
    assert set(commands) < set(COMMANDS)
    shown = [answer([command, *entries, folder]) for command, entries in commands.items()]
    assert short in shown[0]
    assert json.loads(shown[1])["items"] == ["best"]


@pytest.mark.parametrize(("kept", "rounds"), [(0.45, 2), (0.35, 1)])
def test_retention_is_judged_on_the_run_whose_student_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float, rounds: int
) -> None:
    base = {"retention": {"value": 0.8}, "retention_by_seed": {"1": 0.8, "2": 0.8}}
    opcd = {"retention": {"value": 0.4}, "retention_by_seed": {"1": kept, "2": 0.8 - kept}}
    done: list[int] = []

    def stage(place: Workplace, name: str, *_: object) -> int:
        if name == "evaluate":
            done.append(place.settings.round)
            place.folder.mkdir(parents=True)
            summary = {"rows": {"base": base, "opcd": opcd}}
            (place.folder / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr("opcd_nemo.experience.pipeline._run_stage", stage)
    plan = settings(
        tmp_path,
        "experience.rounds=2",
        "experience.next_round_retention=0.5",
        "experience.consolidation.seeds=[1,2]",
    )
    lines: list[str] = []
    assert run_pipeline(plan, lambda _: 0, lines.append) == 0
    assert done == [1, 2][:rounds]
    assert any("retention 0.35 is below" in line for line in lines) == (rounds == 1)


def test_a_wrong_first_command_leaves_no_folder_and_starts_nothing(tmp_path: Path) -> None:
    raw = compose("experience", [f"exp_manager.exp_dir={tmp_path}", "recipe=demo_brevity"])
    with pytest.raises(ValueError, match=r"context\._target_=.*allowed: context=experience"):
        run_pipeline(load_experience(raw), lambda extra: pytest.fail("started"), lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "hints"), [(2, 0), (1, 1), (75, 1)])
def test_bad_input_of_a_stage_is_not_gone_on_with(tmp_path: Path, code: int, hints: int) -> None:
    lines: list[str] = []
    assert run_pipeline(settings(tmp_path), lambda extra: code, lines.append) == code
    assert sum("the same command goes on" in line for line in lines) == hints
    assert list(tmp_path.iterdir()) == []
