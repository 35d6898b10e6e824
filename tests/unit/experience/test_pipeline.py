"""The order of the stages, what is left alone, and what a stage lacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from opcd_nemo.context.items import content_hash
from opcd_nemo.context.registry import COMMANDS, answer
from opcd_nemo.errors import UserError
from opcd_nemo.experience import config
from opcd_nemo.experience.config import Settings, load_experience
from opcd_nemo.experience.folder import PipelineFolder
from opcd_nemo.experience.pipeline import check_pipeline, run_pipeline, run_stage
from opcd_nemo.experience.stages import STAGES
from opcd_nemo.experience.stages.context import Stage, StageContext
from opcd_nemo.experience.stages.select import Select
from opcd_nemo.storage.attempt import NODE_RANK_ENV, NUM_NODES_ENV, RENDEZVOUS_ENV
from opcd_nemo.storage.lock import lock_folder
from tests.quick_compose import compose


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


def written(tmp_path: Path) -> PipelineFolder:
    folder = PipelineFolder(settings(tmp_path))
    folder.path.mkdir(parents=True)
    (folder.path / "candidates.json").write_text("[]")
    (folder.path / "ranked.json").write_text(ranking("best", "worse"))
    return folder


def select(folder: PipelineFolder) -> None:
    Select().run(StageContext(folder=folder))


def test_the_stages_are_those_of_the_key_and_each_file_has_one_writer() -> None:
    assert tuple(stage.name for stage in STAGES) == config.STAGES
    written: list[str] = []
    for stage in STAGES:
        assert {*stage.reads} <= {*written}
        written += stage.writes
    assert len(written) == len({*written})


def test_stages_follow_each_other_and_a_failure_stops_them(tmp_path: Path) -> None:
    launched: list[tuple[str, ...]] = []

    def launch(extra: Sequence[str]) -> int:
        launched.append(tuple(extra))
        return 75 if "run=off_policy-1" in extra else 0

    folder = written(tmp_path)
    own_server = PipelineFolder(settings(tmp_path, "engine=vllm", "engine.launch=true"))
    assert run_pipeline(own_server.settings, launch) == 75
    assert launched == [
        ("stage=consolidate", "round=1", "run=opcd-1"),
        ("stage=consolidate", "round=1", "run=off_policy-1"),
    ]
    assert run_pipeline(folder.settings, lambda extra: 75) == 75


def test_a_launch_does_all_training_runs(tmp_path: Path) -> None:
    folder = written(tmp_path)
    launched: list[tuple[str, ...]] = []

    def launch(extra: Sequence[str]) -> int:
        launched.append(tuple(extra))
        return 75

    assert run_pipeline(folder.settings, launch) == 75
    assert run_pipeline(settings(tmp_path, "stage=consolidate", "run=opcd-2"), launch) == 75
    assert launched == [
        ("stage=consolidate", "round=1"),
        ("stage=consolidate", "round=1", "run=opcd-2"),
    ]


def test_a_stage_s_ranks_can_take_the_folder_and_no_second_job_can(tmp_path: Path) -> None:
    folder = written(tmp_path)

    def launch(extra: Sequence[str]) -> int:
        lock_folder(folder.path).close()
        return 1

    with lock_folder(folder.path), pytest.raises(UserError) as refused:
        run_pipeline(settings(tmp_path, "stage=select"), launch)
    assert refused.value.where == "name"
    assert run_pipeline(folder.settings, launch) == 1  # after the selection
    assert (folder.path / "selected.json").is_file()


def test_a_single_rank_writes_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        folder.open()
        assert (folder.path / "experience.yaml").exists() == (rank == "0")


def test_finished_runs_are_left_alone(tmp_path: Path) -> None:
    folder = written(tmp_path)
    for run in folder.settings.runs[:4]:
        (folder.path / run).mkdir()
        (folder.path / run / "summary.json").write_text("{}")
    launched: list[str] = []

    def launch(extra: Sequence[str]) -> int:
        launched.append(extra[0])
        return 1

    assert run_pipeline(folder.settings, launch) == 1
    for run in folder.settings.runs[4:]:
        (folder.path / run).mkdir()
        (folder.path / run / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"answers\.jsonl"):  # of the next stage
        run_pipeline(folder.settings, launch)
    assert launched == ["stage=consolidate"]


def test_the_selection_has_its_lineage(tmp_path: Path) -> None:
    folder = written(tmp_path)
    select(folder)
    entry = folder.registry.selected()
    assert entry.items == ("best",)
    assert entry.scores["validation"] == 1.0
    assert entry.scores["validation_without"] == 0.25
    lineage = entry.lineage
    assert lineage["model"] == "smollm2-135m-instruct"
    assert lineage["problems"] == ["train/1"]
    assert (lineage["seed"], lineage["chain"], lineage["step"]) == (1234, 0, 0)
    assert lineage["prompt_version"] == folder.settings.experience.extraction.prompt_version
    select(folder)  # a second time changes nothing
    assert len(folder.registry.history()) == 1


@pytest.mark.parametrize(
    ("stage", "file", "after"),
    [
        ("score", "candidates.json", "extract"),
        ("select", "ranked.json", "score"),
        ("consolidate", "selected.json", "select"),
        ("evaluate", "ranked.json", "score"),
    ],
)
def test_a_stage_without_its_input_says_which_stage_writes_it(
    tmp_path: Path, stage: str, file: str, after: str
) -> None:
    of_stage = settings(tmp_path, f"stage={stage}")
    with pytest.raises(UserError) as refused:
        run_pipeline(of_stage, lambda _: pytest.fail("started"))
    assert Path(refused.value.key).name == file
    assert (refused.value.where, refused.value.allowed) == (
        f"stage={stage}",
        f"after stage={after}",
    )


def test_a_rank_takes_no_stage_without_ranks(tmp_path: Path) -> None:
    raw = compose("experience", [f"exp_manager.exp_dir={tmp_path}", "context=experience"])
    for stage in ("all", "select"):
        raw.stage = stage
        with pytest.raises(UserError) as refused:
            run_stage(raw)
        assert (refused.value.key, refused.value.value) == ("stage", stage)


def test_another_node_leaves_the_selection_to_the_first_and_starts_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path)
    monkeypatch.setenv(RENDEZVOUS_ENV, "host:1")
    monkeypatch.setenv(NUM_NODES_ENV, "2")
    monkeypatch.setenv(NODE_RANK_ENV, "1")
    launched: list[str] = []

    def launch(extra: Sequence[str]) -> int:
        launched.append(extra[0])
        return 1

    assert run_pipeline(folder.settings, launch) == 1
    assert launched == ["stage=consolidate"]
    assert not (folder.path / "selected.json").exists()


@pytest.mark.parametrize(
    ("words", "key", "problem"),
    [
        (["list", "more"], "opcd registry list", "1 entries are given"),
        (["diff", "ab"], "opcd registry diff", "1 entries are given"),
        (["show", "zz"], None, "0 entries start with 'zz'"),
        (["rollback"], None, "1 selections"),
    ],
)
def test_a_wrong_command_of_the_registry_is_named(
    tmp_path: Path, words: list[str], key: str | None, problem: str
) -> None:
    pipeline = written(tmp_path)
    select(pipeline)
    folder = pipeline.registry.folder
    with pytest.raises(UserError) as refused:
        answer([*words, f"registry={folder}"])
    assert refused.value.key == (key or str(folder))
    assert refused.value.problem == problem


def test_a_command_of_the_registry_wants_its_folder() -> None:
    with pytest.raises(UserError) as refused:
        answer(["list"])
    assert (refused.value.key, refused.value.value) == ("registry", None)


def test_the_registry_s_commands_show_what_is_there(tmp_path: Path) -> None:
    pipeline = written(tmp_path)
    select(pipeline)
    folder = f"registry={pipeline.registry.folder}"
    short = pipeline.registry.selected().hash[:6]
    commands = {"list": [], "show": [short], "diff": [short, short]}
    assert set(commands) < set(COMMANDS)
    shown = [answer([command, *entries, folder]) for command, entries in commands.items()]
    assert short in shown[0]
    assert json.loads(shown[1])["items"] == ["best"]


@pytest.mark.parametrize(("kept", "rounds"), [(0.45, 2), (0.35, 1)])
def test_retention_is_judged_on_the_run_whose_student_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kept: float,
    rounds: int,
) -> None:
    base = {"retention": {"value": 0.8}, "retention_by_seed": {"1": 0.8, "2": 0.8}}
    opcd = {"retention": {"value": 0.4}, "retention_by_seed": {"1": kept, "2": 0.8 - kept}}
    done: list[int] = []

    def perform(stage: Stage, folder: PipelineFolder, *_: object) -> int:
        if stage.name == "evaluate":
            done.append(folder.settings.round)
            folder.path.mkdir(parents=True)
            summary = {"rows": {"base": base, "opcd": opcd}}
            (folder.path / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr("opcd_nemo.experience.pipeline._perform", perform)
    plan = settings(
        tmp_path,
        "experience.rounds=2",
        "experience.next_round_retention=0.5",
        "experience.consolidation.seeds=[1,2]",
    )
    assert run_pipeline(plan, lambda _: 0) == 0
    assert done == [1, 2][:rounds]
    assert ("retention 0.35 is below" in caplog.text) == (rounds == 1)


def test_a_wrong_first_command_leaves_no_folder(tmp_path: Path) -> None:
    raw = compose("experience", [f"exp_manager.exp_dir={tmp_path}", "recipe=demo_brevity"])
    with pytest.raises(UserError) as refused:
        check_pipeline(load_experience(raw))
    assert refused.value.key == "context._target_"
    assert "context=experience" in refused.value.allowed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "hints"), [(2, 0), (1, 1), (75, 1)])
def test_bad_input_of_a_stage_is_not_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int, hints: int
) -> None:
    assert run_pipeline(settings(tmp_path), lambda extra: code) == code
    assert caplog.text.count("the same command goes on") == hints
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("ranked.json", "{", "no JSON"),
        ("ranked.json", "[]", "a list instead of a record"),
        ("ranked.json", '{"without": "x", "ranked": []}', 'without is "x"'),
        ("ranked.json", '{"without": 0, "ranked": []}', "ranks no candidate"),
        ("ranked.json", '{"without": 0, "ranked": [{}]}', "record 0: no chain"),
        ("ranked.json", ranking("best").replace('["best"]', '"best"'), "record 0: items is"),
        ("candidates.json", '{"a": 1}', "a dict, not a list"),
        ("candidates.json", "[3]", "record 0: a int instead"),
        ("selected.json", '{"experience": "abc"}', 'experience is "abc"'),
        ("selected.json", '{"experience": []}', "names no experience"),
        ("controls.json", "[]", "a list instead"),
        ("controls.json", '{"wrong": 3}', "wrong, seed : a int"),
        ("controls.json", '{"wrong": {"1": {"task": []}}}', "wrong, seed 1: no retention"),
        ("controls.json", '{"wrong": {"1": {"task": [{}], "retention": []}}}', "wrong, seed 1: no"),
    ],
)
def test_a_file_that_was_edited_is_named(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    folder = written(tmp_path)
    file = folder.path / name
    file.write_text(text)
    read = {
        "ranked.json": lambda: select(folder),
        "candidates.json": folder.candidates,
        "selected.json": folder.selected,
        "controls.json": folder.controls,
    }[name]
    with pytest.raises(UserError) as caught:
        read()
    assert caught.value.key == str(file)
    assert str(caught.value.problem).startswith(problem)
    assert "its stage is done again" in caught.value.allowed


@pytest.mark.parametrize("text", ["", "[", "a: [1, 2", "3", "experience: 3", "\x00", "a: ${b"])
def test_settings_that_were_edited_are_named(tmp_path: Path, text: str) -> None:
    folder = PipelineFolder(settings(tmp_path))
    folder.open()
    file = folder.path / "experience.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        folder.check_unchanged()
    assert caught.value.key == str(file)
    assert "is not as it was written" in str(caught.value.problem)
