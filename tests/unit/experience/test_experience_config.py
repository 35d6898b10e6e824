"""The pipeline's own keys, and the training runs that it makes of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from opcd_nemo.config.train import load_config
from opcd_nemo.context.registry import Entry
from opcd_nemo.errors import UserError
from opcd_nemo.experience.config import Settings, load_experience
from opcd_nemo.experience.contents import check_contents, keep_contents
from opcd_nemo.experience.folder import PipelineFolder
from opcd_nemo.experience.run_configs import configs_before_start, run_config, stage_config
from opcd_nemo.formats.locate import write_json
from opcd_nemo.launch.recipes import CONF, is_for_pipeline
from tests.quick_compose import compose
from tests.tiny import write_chat_model

CONTEXT = ["context=experience"]


def raw(tmp_path: Path, *overrides: str) -> DictConfig:
    plain = [] if any(one.startswith(("recipe=", "context=")) for one in overrides) else CONTEXT
    return compose("experience", [f"exp_manager.exp_dir={tmp_path}", *plain, *overrides])


def folder_of(tmp_path: Path, *overrides: str) -> PipelineFolder:
    return PipelineFolder(load_experience(raw(tmp_path, *overrides)))


def select(pipeline: PipelineFolder, *items: str) -> Entry:
    entry = Entry(items=items, num_tokens=1, lineage={"model": "m"}, scores={})
    pipeline.registry.add(entry)
    pipeline.registry.select(entry.hash, "a test")
    pipeline.path.mkdir(parents=True, exist_ok=True)
    write_json(pipeline.path / "selected.json", {"experience": [entry.hash]})
    return entry


@pytest.mark.parametrize(
    ("override", "key", "allowed"),
    [
        ("stage=train", "stage", "all, extract, "),
        ("method=sft", "rollout.sampler", "student with the method opcd"),
        ("run=opcd-9", "run", "null, opcd-1, off_policy-1, sft-1, opcd-2"),
        ("run=opcd-1", "run", "null with stage=all"),
        ("round=2", "round", "1 to 1"),
        ("experience.rounds=0", "experience.rounds", "a whole number >= 1"),
        ("experience.rounds=2", "experience.next_round_retention", "0 .no round is the last. to 1"),
        (
            "experience.next_round_retention=0.5",
            "experience.next_round_retention",
            "null with experience.rounds=1",
        ),
        ("experience.extraction.keep=all", "experience.extraction.keep", "items, trace"),
        ("experience.extraction.prompt=x", "experience.extraction.prompt", "a text with .trace."),
        ("experience.extraction.num_chains=0", "experience.extraction.num_chains", ">= 1"),
        (
            "experience.extraction.sampling.temperature=-1",
            "experience.extraction.sampling.temperature",
            ">= 0",
        ),
        ("experience.scoring.keep=2", "experience.scoring.keep", "a number > 0 and <= 1"),
        ("experience.selection.rule=worst", "experience.selection.rule", "best, random"),
        (
            "experience.consolidation.methods=[grpo]",
            "experience.consolidation.methods",
            "a list of opcd, off_policy, sft, each",
        ),
        (
            "experience.consolidation.seeds=[1,1]",
            "experience.consolidation.seeds",
            "a list of one or more, each once",
        ),
        ("experience.controls=[random]", "experience.controls", "a list of wrong, shuffled, each"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, override: str, key: str, allowed: str) -> None:
    with pytest.raises(UserError) as refused:
        load_experience(raw(tmp_path, override))
    assert refused.value.key == key
    assert re.search(allowed, refused.value.allowed), refused.value.allowed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experience.replay=3", "experience.replay=3.*allowed: true or false"),
        ("experience.consolidation.seeds=[a]", "seeds=.*allowed: a list of whole numbers"),
        ("+experience.step=1", "experience.step=1: no such key; allowed: rounds, replay"),
    ],
)
def test_a_bad_key_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load_experience(raw(tmp_path, override))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "key", "allowed"),
    [
        (
            [
                "experience.rounds=2",
                "experience.next_round_retention=0.5",
                "experience.consolidation.methods=[sft]",
            ],
            "rounds",
            "1 without the method opcd",
        ),
        (
            [
                "experience.extraction.model=m",
                "experience.rounds=2",
                "experience.next_round_retention=0.5",
            ],
            "extraction.model",
            "null with",
        ),
        (
            ["experience.extraction.model=m", "experience.replay=true"],
            "extraction.model",
            "null with",
        ),
        (
            ["experience.selection.rule=random", "experience.extraction.num_steps=5"],
            "selection.min_steps",
            "at most experience.extraction.num_steps=5",
        ),
        (
            [
                "experience.extraction.with_previous=true",
                "experience.extraction.prompt='{trace}'",
            ],
            "extraction.with_previous",
            "false without {experience} in the prompt",
        ),
    ],
)
def test_keys_that_contradict_each_other(
    tmp_path: Path, overrides: list[str], key: str, allowed: str
) -> None:
    with pytest.raises(UserError) as refused:
        load_experience(raw(tmp_path, *overrides))
    assert refused.value.key == f"experience.{key}"
    assert allowed in refused.value.allowed


PIPELINES = [p.stem for p in sorted((CONF / "recipe").glob("*.yaml")) if is_for_pipeline(p)]


@pytest.mark.parametrize("recipe", PIPELINES)
def test_every_pipeline_of_a_recipe_composes(tmp_path: Path, recipe: str) -> None:
    settings = load_experience(raw(tmp_path, f"recipe={recipe}"))
    games = settings.train.task._target_.startswith("opcd_nemo.tasks.games.task.")
    assert ("{situation}" in settings.train.context.template) == games
    assert settings.experience.extraction.num_chains > 1


def test_the_old_name_of_a_method_is_read(tmp_path: Path) -> None:
    old = ("experience.consolidation.methods=[opcd,offpolicy]", "stage=consolidate")
    settings = load_experience(raw(tmp_path, *old, "run=offpolicy-1"))
    assert settings.experience.consolidation.methods == ["opcd", "off_policy"]
    assert settings.run == "off_policy-1"
    assert settings.run in settings.runs


def test_the_paper_s_accumulation() -> None:
    for recipe, cap in (("math_qwen3_8b_2n8g", 16384), ("sokoban_qwen3_4b_1n8g", 8192)):
        extraction = load_experience(raw(Path("runs"), f"recipe={recipe}")).experience.extraction
        assert (extraction.num_chains, extraction.num_steps, extraction.with_previous) == (
            10,
            30,
            False,
        )
        assert extraction.cap_tokens == cap


def test_a_context_without_experience_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        configs_before_start(raw(tmp_path, "context=pirate"))
    assert refused.value.key == "context._target_"
    assert str(refused.value.value).endswith("FixedContext")


def test_the_methods_differ_by_sampler_and_loss_alone(tmp_path: Path) -> None:
    pipeline = folder_of(tmp_path, "loss.temperature=0.7")
    entry = select(pipeline, "one", "two")
    runs: dict[str, Any] = {
        name: load_config(run_config(pipeline, f"{name}-2"))
        for name in ("opcd", "off_policy", "sft")
    }
    kinds = {name: run.loss.get("kind", "hard_labels") for name, run in runs.items()}
    assert kinds == {"opcd": "reverse_kl", "off_policy": "forward_kl", "sft": "hard_labels"}
    assert runs["off_policy"].loss["temperature"] == 0.7
    samplers = {name: run.rollout.sampler for name, run in runs.items()}
    assert samplers == {"opcd": "student", "off_policy": "teacher", "sft": "teacher"}
    assert runs["sft"].rollout.teacher_data == runs["off_policy"].rollout.teacher_data
    for name, run in runs.items():
        assert run.seed == run.task["seed"] == 2
        assert run.context["items"] == ["one", "two"]
        assert run.context["lineage"] == {"model": "m", "experience": entry.hash}
        assert run.name == f"demo_brevity/{name}-2"
        # the run's name is also its name in wandb
        plain = {"loss": None, "rollout": None, "exp_manager": None, "name": ""}
        assert replace(run, **plain) == replace(runs["opcd"], **plain)


def test_a_pool_is_given_by_its_entries(tmp_path: Path) -> None:
    pipeline = folder_of(tmp_path, "experience.selection.count=2")
    entries = [select(pipeline, text) for text in ("one", "two")]
    pipeline.path.mkdir(parents=True, exist_ok=True)
    write_json(pipeline.path / "selected.json", {"experience": [one.hash for one in entries]})
    config = load_config(run_config(pipeline, "opcd-1"))
    assert config.context["_target_"].endswith("ExperiencePool")
    assert [Path(path).stem for path in config.context["paths"]] == [one.hash for one in entries]


@pytest.mark.parametrize(("best", "step"), [({}, 7), ({"best_step": 4}, 4), ({"best_step": 7}, 7)])
def test_a_round_starts_from_the_student_that_was_judged_before_it(
    tmp_path: Path, best: dict[str, int], step: int
) -> None:
    first = folder_of(
        tmp_path,
        "experience.rounds=2",
        "experience.next_round_retention=0.5",
        "experience.replay=true",
    )
    folder = first.path / "opcd-1"
    folder.mkdir(parents=True)
    write_json(folder / "summary.json", {"steps": 7, **best})
    settings: Settings = replace(first.settings, round=2)
    second = PipelineFolder(settings)
    select(second, "one")
    config = load_config_without_files(run_config(second, "opcd-1"))
    assert config.student.path == str(folder / "checkpoints" / f"step={step}.ckpt")
    assert first.is_last("opcd-1") == (step == 7)
    assert config.name == "demo_brevity/round=2/opcd-1"
    assert config.task._target_.endswith("ReplayTask")
    assert config.task.path == str(second.path / "turns.jsonl")
    assert stage_config(first).student.path == "smollm2-135m-instruct"


def test_a_round_keeps_its_selection_whatever_is_selected_later(tmp_path: Path) -> None:
    first = folder_of(tmp_path, "experience.rounds=2", "experience.next_round_retention=0.5")
    second = first.of_round(2)
    (first.path / "opcd-1").mkdir(parents=True)
    write_json(first.path / "opcd-1" / "summary.json", {"steps": 7})
    with pytest.raises(ValueError, match=r"selected\.json: does not exist; allowed"):
        run_config(first, "opcd-1")
    one = select(first, "one")
    two = select(second, "two")
    assert first.registry.selected() == two
    assert run_config(first, "opcd-1").context["items"] == ["one"]
    first.registry.rollback()
    assert run_config(second, "opcd-1").context["items"] == ["two"]
    assert (first.selected(), second.selected()) == ([one], [two])


def load_config_without_files(config: DictConfig) -> DictConfig:
    load_config(config)
    return config


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path).open()
    configs_before_start(raw(tmp_path, "stage=score", "parallel=tp2"))
    with pytest.raises(ValueError, match=r"optim\.lr was 5e-05, is 1e-06; allowed: the values in"):
        configs_before_start(raw(tmp_path, "optim.lr=1e-6"))
    with pytest.raises(ValueError, match=r"experience\.extraction\.num_steps was 30, is 4"):
        configs_before_start(raw(tmp_path, "experience.extraction.num_steps=4"))


def test_a_folder_of_one_round_is_not_continued_as_one_of_several(tmp_path: Path) -> None:
    folder_of(tmp_path).open()
    with pytest.raises(
        ValueError, match=r"experience\.rounds was 1, is 2: .*; allowed: the values in"
    ):
        folder_of(tmp_path, "experience.rounds=2", "experience.next_round_retention=0.5").open()
    folder_of(tmp_path / "b", "experience.rounds=2", "experience.next_round_retention=0.5").open()
    folder_of(tmp_path / "b", "experience.rounds=3", "experience.next_round_retention=0.5").open()
    with pytest.raises(ValueError, match=r"experience\.rounds was 3, is 1"):
        folder_of(tmp_path / "b").open()


def test_the_cap_may_change_until_there_are_candidates(tmp_path: Path) -> None:
    raised = "experience.extraction.cap_tokens=4096"
    prompt = "experience.extraction.with_previous=true"
    folder_of(tmp_path / "a").open()
    folder_of(tmp_path / "b", prompt).open()
    with pytest.raises(ValueError, match="cap_tokens was 2048, is 4096"):
        folder_of(tmp_path / "b", prompt, raised).open()  # earlier prompts were cut by it
    pipeline = folder_of(tmp_path / "a", raised)
    pipeline.open()
    (pipeline.path / "candidates.json").write_text("[]")
    pipeline.open()
    with pytest.raises(ValueError, match="cap_tokens was 4096, is 2048"):
        folder_of(tmp_path / "a").open()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=math_qwen3_8b_2n8g"], "task.train: no value is given"),
        (["optim.lr=-1"], "optim.lr=-1.0; allowed"),
        (["context=pirate"], "context._target_=.*allowed: context=experience"),
        (["experience.consolidation.settings.sft.loss=null"], "loss.*allowed"),
    ],
)
def test_a_run_that_must_fail_is_refused_before_the_first_stage(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(map(load_config, configs_before_start(raw(tmp_path, "stage=extract", *overrides))))


def test_a_check_before_the_first_stage_makes_nothing_and_sees_what_was_made(
    tmp_path: Path,
) -> None:
    configs = configs_before_start(raw(tmp_path, "stage=consolidate"))
    assert len(configs) == 1 + len(load_experience(raw(tmp_path)).runs)
    for config in configs:
        load_config(config)
    configs_before_start(raw(tmp_path, "stage=extract"))
    assert list(tmp_path.iterdir()) == []
    folder_of(tmp_path).open()
    with pytest.raises(ValueError, match=r"optim\.lr.*another name"):
        configs_before_start(raw(tmp_path, "stage=extract", "optim.lr=0.5"))


def test_rounds_of_online_learning_stop_when_too_much_is_forgotten(tmp_path: Path) -> None:
    assert load_experience(raw(tmp_path)).experience.next_round_retention is None
    online = load_experience(raw(tmp_path, "experience=online")).experience
    assert online.rounds > 1
    assert online.next_round_retention == 0.5


def test_a_pipeline_with_former_names_of_methods_is_continued_in_its_folders(
    tmp_path: Path,
) -> None:
    pipeline = folder_of(tmp_path)
    pipeline.open()
    file = pipeline.root / "experience.yaml"
    stored: Any = OmegaConf.to_container(OmegaConf.load(file))
    consolidation = stored["experience"]["consolidation"]
    settings = consolidation.pop("settings")
    consolidation["methods"] = ["opcd", "offpolicy", "sft"]
    consolidation["losses"] = {
        "offpolicy": settings["off_policy"]["loss"],
        "sft": settings["sft"]["loss"],
    }
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(stored)))
    (pipeline.path / "offpolicy-1").mkdir()
    write_json(pipeline.path / "offpolicy-1/summary.json", {"steps": 7})
    write_json(pipeline.path / "controls.json", {"wrong": {}, "offpolicy_in_context": {}})

    pipeline = folder_of(tmp_path)
    pipeline.check_unchanged()
    select(pipeline, "one")
    assert pipeline.student("off_policy-1").parent == pipeline.path / "offpolicy-1/checkpoints"
    assert run_config(pipeline, "off_policy-1").name == "demo_brevity/offpolicy-1"
    assert run_config(pipeline, "off_policy-2").name == "demo_brevity/off_policy-2"
    assert list(pipeline.controls()) == ["wrong", "off_policy_in_context"]
    with pytest.raises(UserError) as refused:
        folder_of(tmp_path, "experience.consolidation.methods=[opcd,sft]").check_unchanged()
    assert "experience.consolidation.methods was" in str(refused.value.problem)


SETTINGS = "experience.consolidation.settings"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"{SETTINGS}=text", SETTINGS),
        (f"{SETTINGS}=null", SETTINGS),
        (f"~{SETTINGS}.sft", f"{SETTINGS}.sft"),
        (f"{SETTINGS}.sft=3", f"{SETTINGS}.sft"),
        (f"~{SETTINGS}.sft.rollout", f"{SETTINGS}.sft"),
        (f"+{SETTINGS}.dpo={{}}", f"{SETTINGS}.dpo"),
        (f"+{SETTINGS}.sft.optim={{lr: 1}}", f"{SETTINGS}.sft.optim"),
    ],
)
def test_a_method_has_its_settings_and_no_others(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(UserError) as refused:
        load_experience(raw(tmp_path, override))
    assert refused.value.key == key


def test_a_method_that_is_not_run_needs_no_settings(tmp_path: Path) -> None:
    load_experience(
        raw(tmp_path, f"~{SETTINGS}.sft", "experience.consolidation.methods=[opcd,off_policy]")
    )


def test_a_pipeline_goes_on_with_the_files_that_it_began_with(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "tiny")
    writer = write_chat_model(tmp_path / "writer", seed=1)
    words = [f"student.path={model}", f"experience.extraction.model={writer}"]
    folder = folder_of(tmp_path, *words)
    check_contents(folder)  # of a pipeline that has not begun
    folder.open()
    check_contents(folder)  # of one that began before files were recorded
    keep_contents(folder)
    check_contents(folder)
    for path, key in ((model, "student.path"), (writer, "experience.extraction.model")):
        weights = path / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + b"\7")
        keep_contents(folder)  # keeps what it has
        with pytest.raises(UserError) as refused:
            check_contents(folder_of(tmp_path, *words))
        assert refused.value.key == "name"
        assert str(refused.value.problem).startswith(f"{key} has another content")
        weights.write_bytes(before)
    check_contents(folder)
